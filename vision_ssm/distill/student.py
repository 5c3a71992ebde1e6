"""The student: a vision transformer of timm whose attention is a state-space mixer with as many heads.

Its mixing matrix can be written down, so that it can be compared with attention's. Per head (Bick et al., 2024, the
"discrete Mamba-2"): y_i = sum_j M_ij v_j + D v_i with M_ij = <C_i, B_j> times a decay, no step size beside the decay,
no activation, and gate and convolution that begin as the identity.
"""

from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from kernels import selective_scan, ssd, ssd_bidirectional, ssd_noncausal
from kernels.mixing import noncausal_matrix, s6_matrix
from kernels.observe import watched
from vision_ssm.distill.config import StudentName
from vision_ssm.errors import UserError
from vision_ssm.scan_parameters import exact, spare_from_decay

# Shapes: B batch, L tokens, C width, E heads, P = C / E channels per head, N state size.

TAPS = 3
"""Of the convolution over values, B and C; its middle tap begins as one, the others as zero."""
SHORT = 64
"""Up to this many tokens the matrix itself is the cheapest way to mix (s6 apart, whose matrix is a sum over states);
beyond it the scans are, which are linear."""
STUDENT = "vit_ssm"
"""What timm calls the student."""


class MatrixMixer(nn.Module):
    """A mixer in place of timm's attention: value and output projection as attention's, the mixing a state space's.

    Kinds, with a_j > 0 what a token says of its decay (per head, and per direction where there are two):

    - nc_ssd: M_ij = <C_i, B_j> a_j (VSSD)
    - ssd_causal: M_ij = <C_i, B_j> exp(-(a_{j+1} + ... + a_i)) for j <= i
    - ssd: that for j <= i, and the same read from the end for j > i
    - s6: as ssd, but every state n has a decay rate A_n of its own, and a_j is a step size: B_j is multiplied by it

    Shape: (B, L, C) -> (B, L, C)

    Args:
        dim: C.
        heads: E.
        state_size: N.
        kind: see above.
        value_bias: whether the values have a bias.
        proj_bias: whether the output projection has one.
    """

    def __init__(
        self, dim: int, heads: int, state_size: int, kind: StudentName, *, value_bias: bool, proj_bias: bool
    ) -> None:
        super().__init__()
        self.kind: StudentName = kind
        self.heads = heads
        self.directions = 2 if kind in ("ssd", "s6") else 1
        self.split = (dim, heads * state_size, heads * state_size)
        self.value = nn.Linear(dim, dim, bias=value_bias)
        self.in_proj = nn.Linear(dim, 2 * heads * state_size + self.directions * heads)  # B, C, decay
        self.conv = nn.Conv1d(sum(self.split), sum(self.split), TAPS, padding=TAPS // 2, groups=sum(self.split))
        self.D = nn.Parameter(torch.zeros(heads))
        self.gate = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        rates = torch.arange(1, state_size + 1).float().log().expand(2, heads, -1).clone()
        self.A_log = nn.Parameter(rates) if kind == "s6" else None
        spare_from_decay(self.D, *(() if self.A_log is None else (self.A_log,)))
        nn.init.dirac_(self.conv.weight, groups=sum(self.split))
        nn.init.zeros_(cast(Tensor, self.conv.bias))
        nn.init.zeros_(self.gate.weight)
        nn.init.ones_(self.gate.bias)

    def copy_projections(self, attention: Attention) -> None:
        """Take values and output projection from attention, so that equal matrices give equal outputs."""
        with torch.no_grad():
            rows = slice(2 * self.value.out_features, None)
            self.value.weight.copy_(attention.qkv.weight[rows])
            if attention.qkv.bias is not None:
                self.value.bias.copy_(attention.qkv.bias[rows])
        self.proj.load_state_dict(attention.proj.state_dict())

    def matrix_parameters(self) -> list[nn.Parameter]:
        """What the mixing matrix depends on."""
        rates = [] if self.A_log is None else [self.A_log]
        return [*self.in_proj.parameters(), *self.conv.parameters(), self.D, *rates]

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """See the class; the mask must be absent, timm passes it to what it takes for attention."""
        if attn_mask is not None or is_causal:
            raise UserError("a state-space student takes no attention mask")
        read = self._read(x)
        by_matrix = x.shape[1] <= SHORT and self.kind != "s6" and not watched()
        y = self._mixed_by_matrix(*read) if by_matrix else self._mixed_by_scan(*read)
        return self.proj(y.flatten(2) * self.gate(x))

    def matrix(self, x: Tensor) -> Tensor:
        """The mixing matrices (B, E, L, L) of tokens (B, L, C), which multiply the values."""
        return self._matrix(*self._read(x))

    def _mixed_by_matrix(self, v: Tensor, B: Tensor, C: Tensor, a: Tensor) -> Tensor:
        return (self._matrix(v, B, C, a).to(v.dtype) @ v.transpose(1, 2)).transpose(1, 2)

    def _mixed_by_scan(self, v: Tensor, B: Tensor, C: Tensor, a: Tensor) -> Tensor:
        D = exact(self.D, v)
        if self.kind == "s6":
            return self._scan(v, B, C, a) + D[:, None] * v
        if self.kind == "nc_ssd":
            return ssd_noncausal(v, a[:, :, 0], -torch.ones_like(D), B, C, D)
        # the operators multiply B by their step size, which is the decay here
        rate = -torch.ones(self.directions, self.heads, dtype=D.dtype, device=D.device)
        B = B.unsqueeze(2) / a.unsqueeze(-1)
        if self.directions == 1:
            return cast(Tensor, ssd(v, a[:, :, 0], rate[0], B[:, :, 0], C, D))
        return ssd_bidirectional(v, a, rate, B, C.unsqueeze(2).expand_as(B), D)

    def _matrix(self, v: Tensor, B: Tensor, C: Tensor, a: Tensor) -> Tensor:
        if self.kind == "nc_ssd":
            return noncausal_matrix(a[:, :, 0], -torch.ones_like(self.D), B, C, self.D)
        if self.A_log is not None:
            rates, backwards = -self.A_log.exp(), torch.arange(v.shape[1] - 1, -1, -1, device=v.device)
            M = s6_matrix(a[:, :, 0], rates[0], B, C, self.D)
            M = M + s6_matrix(a[:, :, 1], rates[1], B, C, rank=backwards)
            return M - torch.diag_embed(self._own(B, C, a).transpose(1, 2))
        # both directions share their products and no step multiplies B: half the time of two calls of ssd_matrix
        reached = [_between(one, backwards=k == 1) for k, one in enumerate(a.permute(2, 0, 3, 1))]
        decays = [between.exp() * seen for between, seen in reached]
        D = torch.diag_embed(self.D[:, None].expand(-1, v.shape[1]))
        return C.transpose(1, 2) @ B.transpose(1, 2).mT * sum(decays[1:], decays[0]) + D

    def _read(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Values (B, L, E, P), B and C (B, L, E, N), and decays (B, L, directions, E)."""
        BC, a = self.in_proj(x).split((sum(self.split[1:]), self.directions * self.heads), dim=-1)
        vBC = self.conv(torch.cat([self.value(x), BC], dim=-1).mT).mT.contiguous()
        v, B, C = (t.unflatten(-1, (self.heads, -1)) for t in vBC.split(self.split, dim=-1))
        # far above zero, since SSD's operator divides by it
        return v, B, C, F.softplus(a).unflatten(-1, (self.directions, -1)) + 1e-4

    def _scan(self, v: Tensor, B: Tensor, C: Tensor, a: Tensor) -> Tensor:
        """Both directions of s6 over (B, L, E, P); a token's own input counts in the first alone."""
        per_channel = v.shape[-1]
        rates = -exact(cast(Tensor, self.A_log), v).exp().repeat_interleave(per_channel, dim=1)  # (2, C, N)
        steps = a.repeat_interleave(per_channel, dim=-1)  # (B, L, 2, C)
        u = v.flatten(2).contiguous()
        both = [
            cast(Tensor, selective_scan(u, steps[:, :, k].contiguous(), rates[k], B, C, reverse=k == 1)) for k in (0, 1)
        ]
        return (both[0] + both[1]).unflatten(-1, v.shape[2:]) - self._own(B, C, a).unsqueeze(-1) * v

    def _own(self, B: Tensor, C: Tensor, a: Tensor) -> Tensor:
        """(B, L, E): what the second direction of s6 gives of a token's own input."""
        return (B * C).sum(-1) * a[:, :, 1]


def _between(a: Tensor, *, backwards: bool) -> tuple[Tensor, Tensor]:
    """Log of the decay from j to i, (B, E, L) -> (B, E, L, L), zero where i does not see j; and where it does, (L, L).

    Forwards i sees j <= i; backwards j > i, its own place left out.
    """
    total = a.cumsum(-1)
    seen = torch.ones(a.shape[-1], a.shape[-1], dtype=torch.bool, device=a.device)
    if backwards:  # a_i + ... + a_{j-1}
        before, seen = total - a, seen.triu(1)
        between = before.unsqueeze(-1) - before.unsqueeze(-2)
    else:  # a_{j+1} + ... + a_i
        between, seen = total.unsqueeze(-2) - total.unsqueeze(-1), seen.tril()
    return between.masked_fill(~seen, 0.0), seen


def replace_attention(network: VisionTransformer, mixer: StudentName, state_size: int) -> None:
    """Put mixers in the place of a network's attention, with attention's values and output projections.

    Raises:
        UserError: attention of a kind whose matrix alone does not say what it gives.
    """
    check_attention(network)
    for block in network.blocks:
        attention = cast(Attention, block.attn)
        mixing = MatrixMixer(
            attention.attn_dim, attention.num_heads, state_size, mixer, value_bias=attention.qkv.bias is not None,
            proj_bias=attention.proj.bias is not None,
        )  # fmt: skip
        mixing.copy_projections(attention)
        block.attn = mixing


def check_attention(network: nn.Module) -> None:
    """Refuse a network whose attention a mixing matrix does not describe.

    Raises:
        UserError: no VisionTransformer of timm, or one with gated, normalised or rectangular attention.
    """
    if not isinstance(network, VisionTransformer):
        raise UserError(f"distillation takes timm's VisionTransformer (vit_*, deit_*); got a {type(network).__name__}")
    for block in network.blocks:
        one = cast(Any, block).attn
        plain = isinstance(one, Attention) and one.gate is None and isinstance(one.norm, nn.Identity)
        if not plain or one.attn_dim != one.qkv.in_features or one.attn_dim != one.proj.out_features:
            raise UserError(
                "distillation takes plain attention: heads that fill the width, without a gate and without a norm "
                "after it"
            )


@register_model
def vit_ssm(
    pretrained: bool = False,
    *,
    base: str = "vit_tiny_patch16_224",
    mixer: StudentName = "nc_ssd",
    state_size: int = 16,
    **options: Any,
) -> VisionTransformer:
    """timm's entry for a student: `timm.create_model("vit_ssm", base=..., mixer=..., num_classes=...)`.

    Args:
        pretrained: there are no weights to download: it must be false.
        base: timm's name of the vision transformer that the student is like.
        mixer: see `MatrixMixer`.
        state_size: of each head.
        options: arguments of timm.create_model for the base.

    Raises:
        UserError: pretrained weights are asked for, or the base is no vision transformer.
    """
    if pretrained:
        raise UserError("students have no pretrained weights: distil one with `vssm distill train`")
    for unused in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):  # timm hands them to every entry
        options.pop(unused, None)
    network = timm.create_model(base, pretrained=False, **options)
    replace_attention(cast(VisionTransformer, network), mixer, state_size)
    return cast(VisionTransformer, network)
