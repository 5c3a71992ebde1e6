"""The mixers that probes measure, by name: the one place where a probe learns how a mixer is built.

A mixer is a module (B, L, C) -> (B, L, C). One that forgets by decays also answers ``log_decays``.
"""

import math
from collections.abc import Iterable
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import causal_conv1d, s4d, ssd, ssd_bidirectional
from vision_ssm.errors import UserError
from vision_ssm.mamba import DirectionalScan
from vision_ssm.scan_parameters import DT_MAX, DT_MIN

# Shapes: B batch, L tokens, C model width, D = 2 C inner channels, E heads, N state size.

MixerName = Literal["s6", "ssd", "s4d", "attention", "gated_conv"]
NAMES: tuple[MixerName, ...] = ("s6", "ssd", "s4d", "attention", "gated_conv")
EXPAND, TAPS, HEADS = 2, 4, 4
STATES = {"s6": 16, "ssd": 64, "s4d": 64}


def build(name: str, dim: int, *, state_size: int | None = None, causal: bool) -> nn.Module:
    """The mixer of that name.

    Args:
        name: One of ``NAMES``; ``gated_conv`` is the control without a scan.
        dim: C, a multiple of 4.
        state_size: N of a scan; 16 for s6, 64 for ssd and s4d if not given.
        causal: A token sees those before it only.

    Raises:
        UserError: An unknown name, or sizes that cannot be.
    """
    if name not in NAMES:
        raise UserError(f"{name!r} is no mixer; there are {', '.join(NAMES)}")
    if dim < HEADS or dim % HEADS:
        raise UserError(f"dim must be a multiple of {HEADS}, so that heads fill it, got {dim}")
    if state_size is not None and not 1 <= state_size <= 256:
        raise UserError(f"state_size must be 1 to 256, got {state_size}")
    if name == "s4d" and (state_size or 0) % 2:
        raise UserError(f"state_size must be even for s4d (two states to a complex mode), got {state_size}")
    states = state_size or STATES.get(name, 0)
    if name == "s6":
        return S6(dim, states, causal)
    if name == "ssd":
        return SSD(dim, states, causal)
    if name == "s4d":
        return S4D(dim, states, causal)
    return Attention(dim, causal) if name == "attention" else GatedConv(dim, causal)


def steps_bias(channels: int) -> nn.Parameter:
    """Bias whose softplus is log-uniform between Mamba's initial step sizes."""
    steps = torch.empty(channels).uniform_(math.log(DT_MIN), math.log(DT_MAX)).exp()
    return nn.Parameter(steps + torch.log(-torch.expm1(-steps)))


class S6(nn.Module):
    """Mamba's block, or Vision Mamba's with both directions, averaged."""

    def __init__(self, dim: int, state_size: int, causal: bool) -> None:
        super().__init__()
        inner, rank = EXPAND * dim, math.ceil(dim / 16)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.scans = nn.ModuleList(
            DirectionalScan(inner, state_size=state_size, rank=rank, conv_size=TAPS, reverse=reverse, backend="auto")
            for reverse in _directions(causal)
        )
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        value, gate = self.in_proj(x).chunk(2, dim=-1)
        return self.out_proj(sum(scan(value, gate) for scan in self.scans) / len(self.scans))

    def log_decays(self, x: Tensor) -> Tensor:
        """(B, L, D N): what every step of the forward scan multiplies each state by, as a logarithm."""
        scan = cast(DirectionalScan, self.scans[0])
        value = self.in_proj(x).chunk(2, dim=-1)[0]
        u = causal_conv1d(value, scan.conv.weight.squeeze(1), scan.conv.bias, activation="silu")
        delta = scan.x_proj(u)[..., : scan.split[0]] @ scan.scan.dt_weight[0].T + scan.scan.dt_bias[0]
        return (F.softplus(delta)[..., None] * scan.scan.A[0]).flatten(-2)


class SSD(nn.Module):
    """Mamba-2's block, four heads; both directions share their parameters."""

    def __init__(self, dim: int, state_size: int, causal: bool) -> None:
        super().__init__()
        inner = EXPAND * dim
        self.causal, self.inner = causal, inner
        self.split = (inner, state_size, state_size)
        self.in_proj = nn.Linear(dim, inner + sum(self.split) + HEADS, bias=False)
        self.conv = nn.Conv1d(sum(self.split), sum(self.split), TAPS, groups=sum(self.split))
        self.A_log = nn.Parameter(torch.empty(HEADS).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(HEADS))
        self.dt_bias = steps_bias(HEADS)
        self.norm = nn.RMSNorm(inner, eps=1e-5)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        z, xBC, dt = self.in_proj(x).split((self.inner, sum(self.split), HEADS), dim=-1)
        xBC = causal_conv1d(xBC, self.conv.weight.squeeze(1), self.conv.bias, activation="silu")
        value, B, C = cast(Tensor, xBC).split(self.split, dim=-1)
        value, B, C, A = value.unflatten(-1, (HEADS, -1)), B.unsqueeze(-2), C.unsqueeze(-2), -self.A_log.exp()
        if self.causal:
            y = cast(Tensor, ssd(value, dt, A, B, C, self.D, dt_bias=self.dt_bias, softplus=True))
        else:
            dt, B, C = (t.unsqueeze(2).expand(-1, -1, 2, *t.shape[2:]) for t in (dt, B, C))
            A, bias = A.expand(2, -1), self.dt_bias.expand(2, -1)
            y = ssd_bidirectional(value, dt, A, B, C, self.D, dt_bias=bias, softplus=True)
        return self.out_proj(self.norm(y.flatten(-2) * F.silu(z)))

    def log_decays(self, x: Tensor) -> Tensor:
        """(B, L, E): one a head."""
        return F.softplus(self.in_proj(x)[..., -HEADS:] + self.dt_bias) * -self.A_log.exp()


class S4D(nn.Module):
    """Diagonal S4 with constant coefficients, GELU, gated linear unit; the directions' scans are averaged."""

    def __init__(self, dim: int, state_size: int, causal: bool) -> None:
        super().__init__()
        self.reverse = _directions(causal)
        scans, modes = len(self.reverse), state_size // 2
        low, high = math.log(DT_MIN), math.log(DT_MAX)
        self.log_dt = nn.Parameter(torch.empty(scans, dim).uniform_(low, high))
        self.log_A_real = nn.Parameter(torch.full((scans, dim, modes), math.log(0.5)))
        self.A_imag = nn.Parameter(math.pi * torch.arange(modes).float().repeat(scans, dim, 1))
        self.C = nn.Parameter(torch.randn(scans, dim, modes, 2) * 0.5**0.5)
        self.D = nn.Parameter(torch.randn(scans, dim))
        self.out_proj = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        constants = (self.log_dt, self.log_A_real, self.A_imag, self.C, self.D)
        ways = [cast(Tensor, s4d(x, *(c[i] for c in constants), reverse=r)) for i, r in enumerate(self.reverse)]
        return F.glu(self.out_proj(F.gelu(torch.stack(ways).mean(0))), dim=-1)

    def log_decays(self, x: Tensor) -> Tensor:
        """(B, L, C N / 2): constant, the real parts of the modes."""
        decays = -self.log_dt[0].exp()[:, None] * self.log_A_real[0].exp()
        return decays.flatten().expand(*x.shape[:2], -1)


class Attention(nn.Module):
    """Softmax attention of four heads, without positions of its own."""

    def __init__(self, dim: int, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.in_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        q, k, v = self.in_proj(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(y.transpose(1, 2).flatten(-2))


class GatedConv(nn.Module):
    """Mamba's block without its scan: short depthwise convolution (both ways if not causal) and gate."""

    def __init__(self, dim: int, causal: bool) -> None:
        super().__init__()
        inner = EXPAND * dim
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.convs = nn.ModuleList(nn.Conv1d(inner, inner, TAPS, groups=inner) for _ in _directions(causal))
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        value, gate = self.in_proj(x).chunk(2, dim=-1)
        convs = cast(Iterable[nn.Conv1d], self.convs)
        ways = [
            cast(Tensor, causal_conv1d(value, c.weight.squeeze(1), c.bias, reverse=i > 0)) for i, c in enumerate(convs)
        ]
        return self.out_proj(F.silu(torch.stack(ways).sum(0)) * F.silu(gate))


def _directions(causal: bool) -> tuple[bool, ...]:
    return (False,) if causal else (False, True)
