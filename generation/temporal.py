"""Layers that mix the frames of a video, place by place (Oshima et al., "SSM Meets Video Diffusion Models", 2024).

All of them take (B, F, ..., C), frames on axis 1 and channels last, and return the same shape; nothing is transposed
for the scans. Scans need no positions, the order is in the recurrence.

Shapes: B batch, F frames, C channels, N state size.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generation.frame_attention import TemporalAttention, TemporalLinearAttention
from kernels import causal_conv1d, selective_scan, ssd
from vision_ssm.directions import HEAD_WIDTH, SSD_STATES, first_steps
from vision_ssm.errors import UserError
from vision_ssm.mixing import MixingMatrix
from vision_ssm.s4d import S4D
from vision_ssm.scan_parameters import ScanParameters, exact, spare_from_decay

Scan = Literal["s4d", "s6", "ssd"]
Kind = Literal["s4d", "s6", "ssd", "attention", "linear_attention"]
Variant = Literal["glu", "mlp", "gated", "mamba"]
CONV_SIZE = 4
"""Taps of the depthwise convolutions of `MambaLayer`."""


class S6(MixingMatrix, nn.Module):
    """Selective scan with its projections but no convolution and no gate (Gu and Dao, 2023).

    Shape: (B, F, ..., C) -> (B, F, ..., C)

    Args:
        channels: C.
        state_size: N.
        reverse: Read from the last frame.
    """

    def __init__(self, channels: int, *, state_size: int = 16, reverse: bool = False) -> None:
        super().__init__()
        self.reverse = reverse
        self.split = (math.ceil(channels / 16), state_size, state_size)
        self.x_proj = nn.Linear(channels, sum(self.split), bias=False)
        self.scan = ScanParameters(1, channels, state_size=state_size, rank=self.split[0])
        spare_from_decay(self.scan.A_log, self.scan.D)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        delta, B, C = self.x_proj(x).split(self.split, dim=-1)
        y = selective_scan(
            x,
            delta,
            exact(self.scan.A[0], x),
            B,
            C,
            exact(self.scan.D[0], x),
            delta_weight=self.scan.dt_weight[0],
            delta_bias=exact(self.scan.dt_bias[0], x),
            softplus=True,
            reverse=self.reverse,
        )
        return cast(Tensor, y)


class SSD(MixingMatrix, nn.Module):
    """SSD in the place of `S6`: one decay per head, products of matrices in place of the scan (Mamba-2, 2024). Ours.

    Shape: (B, F, ..., C) -> (B, F, ..., C)

    Args:
        channels: C; heads are 64 wide, or as wide as the largest divisor that C and 64 have in common.
        state_size: N.
        reverse: Read from the last frame.
    """

    def __init__(self, channels: int, *, state_size: int = SSD_STATES, reverse: bool = False) -> None:
        super().__init__()
        self.reverse = reverse
        self.heads = channels // math.gcd(channels, HEAD_WIDTH)
        self.split = (self.heads, state_size, state_size)
        self.x_proj = nn.Linear(channels, sum(self.split), bias=False)
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.heads))
        self.dt_bias = nn.Parameter(first_steps(self.heads))
        spare_from_decay(self.A_log, self.D)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        dt, B, C = self.x_proj(x).split(self.split, dim=-1)
        y = ssd(
            x.unflatten(-1, (self.heads, -1)),
            dt,
            -exact(self.A_log, x).exp(),
            B.unsqueeze(-2),
            C.unsqueeze(-2),
            exact(self.D, x),
            dt_bias=exact(self.dt_bias, x),
            softplus=True,
            reverse=self.reverse,
            dim=1,
        )
        return cast(Tensor, y).flatten(-2)


SCANS: dict[str, type[S4D] | type[S6] | type[SSD]] = {"s4d": S4D, "s6": S6, "ssd": SSD}


class GLULayer(MixingMatrix, nn.Module):
    """Each direction is a scan, an activation and a gated linear unit; their sum may pass an MLP.

    Version 1 of the paper with an MLP ("bi-s4d", the figure in its repository), version 2 of its successor without.
    The activation before the GLU is GELU after S4D and SiLU after S6, as published, and after SSD.

    Shape: (B, F, ..., C) -> (B, F, ..., C)

    Args:
        dim: C.
        ssm: Which scan.
        state_size: N.
        bidirectional: Also read from the last frame, with weights of its own.
        hidden: Width of the MLP, None for no MLP.
    """

    def __init__(
        self,
        dim: int,
        *,
        ssm: Scan = "s4d",
        state_size: int = 512,
        bidirectional: bool = True,
        hidden: int | None = 512,
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(
                SCANS[ssm](dim, state_size=state_size, reverse=reverse),
                nn.GELU() if ssm == "s4d" else nn.SiLU(),
                nn.Linear(dim, 2 * dim),
                nn.GLU(),
            )
            for reverse in _directions(bidirectional)
        )
        self.mlp = nn.Identity() if hidden is None else _mlp(dim, hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.mlp(_sum(branch(x) for branch in self.branches))


class MLPLayer(MixingMatrix, nn.Module):
    """The scans of both directions side by side, then an MLP ("mixing MLP", version 1 of the successor's layers).

    Shape: (B, F, ..., C) -> (B, F, ..., C)

    Args:
        dim: C.
        ssm: Which scan.
        state_size: N.
        bidirectional: Also read from the last frame, with weights of its own.
        hidden: Width of the MLP; 2 C if not given.
    """

    def __init__(
        self,
        dim: int,
        *,
        ssm: Scan = "s4d",
        state_size: int = 16,
        bidirectional: bool = True,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        self.scans = nn.ModuleList(
            SCANS[ssm](dim, state_size=state_size, reverse=reverse) for reverse in _directions(bidirectional)
        )
        self.mlp = _mlp(dim * len(self.scans), 2 * dim if hidden is None else hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.mlp(F.gelu(torch.cat([scan(x) for scan in self.scans], dim=-1)))


class GatedLayer(MixingMatrix, nn.Module):
    """Product of three gates: a shortcut and the scans of both directions (GSS, BiGS; version 10).

    Shape: (B, F, ..., C) -> (B, F, ..., C)

    Args:
        dim: C.
        ssm: Which scan.
        state_size: N.
        bidirectional: Also read from the last frame, with weights of its own.
        hidden: Width of the gates; 3 C if not given.
    """

    def __init__(
        self,
        dim: int,
        *,
        ssm: Scan = "s4d",
        state_size: int = 16,
        bidirectional: bool = True,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        hidden = 3 * dim if hidden is None else hidden
        self.shortcut = nn.Linear(dim, hidden)
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Linear(dim, dim),
                nn.GELU(),
                SCANS[ssm](dim, state_size=state_size, reverse=reverse),
                nn.Linear(dim, dim),
            )
            for reverse in _directions(bidirectional)
        )
        self.widen = nn.Linear(dim, hidden)
        self.out = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        mixed = self.branches[0](x)
        for branch in self.branches[1:]:
            mixed = mixed * branch(x)
        return self.out(F.gelu(self.shortcut(x)) * F.gelu(self.widen(mixed)))


class ConvolvedScan(nn.Module):
    """One direction of `MambaLayer`: causal depthwise convolution, SiLU, scan.

    Shape: (B, F, ..., D) -> (B, F, ..., D)

    Args:
        channels: D.
        ssm: Which scan.
        state_size: N.
        reverse: Read from the last frame.
    """

    def __init__(self, channels: int, *, ssm: Scan, state_size: int, reverse: bool) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, CONV_SIZE, groups=channels)
        self.scan = SCANS[ssm](channels, state_size=state_size, reverse=reverse)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        u = causal_conv1d(
            x, self.conv.weight.squeeze(1), self.conv.bias, activation="silu", reverse=self.scan.reverse
        )  # fmt: skip
        return self.scan(cast(Tensor, u))


class MambaLayer(MixingMatrix, nn.Module):
    """Gated scan with short convolutions, as in Mamba and Vision Mamba (version 20); the directions are summed.

    Shape: (B, F, ..., C) -> (B, F, ..., C)

    Args:
        dim: C; the scans run on 2 C channels.
        ssm: Which scan.
        state_size: N.
        bidirectional: Also read from the last frame, with a convolution and a scan of its own.
    """

    def __init__(self, dim: int, *, ssm: Scan = "s6", state_size: int = 16, bidirectional: bool = True) -> None:
        super().__init__()
        self.in_proj = nn.Linear(dim, 4 * dim)
        self.branches = nn.ModuleList(
            ConvolvedScan(2 * dim, ssm=ssm, state_size=state_size, reverse=reverse)
            for reverse in _directions(bidirectional)
        )
        self.out_proj = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        value, gate = self.in_proj(x).chunk(2, dim=-1)
        return self.out_proj(_sum(branch(value) for branch in self.branches) * F.silu(gate))


@dataclass(frozen=True, kw_only=True)
class TemporalConfig:
    """Which temporal layer a network has; the default is the one of the paper."""

    kind: Kind = "s4d"
    variant: Variant = "glu"
    """How a scan is wrapped: `GLULayer`, `MLPLayer`, `GatedLayer`, `MambaLayer`. Attention has one form."""
    bidirectional: bool = True
    state_size: int = 512
    hidden: int | None = 512
    """Width of the layer's MLP or gates, see the layers; `mamba` has none."""
    heads: int = 8
    """Of attention."""
    head_width: int = 64
    """Of attention."""

    def __post_init__(self) -> None:
        for name, kinds in (("kind", Kind), ("variant", Variant)):
            if getattr(self, name) not in kinds.__args__:
                raise UserError(f"temporal {name}: got {getattr(self, name)!r}, expected {', '.join(kinds.__args__)}")

    @property
    def takes_bias(self) -> bool:
        """Whether the layer reads a table of relative frame positions."""
        return self.kind == "attention"


def temporal_layer(config: TemporalConfig, dim: int) -> nn.Module:
    """The layer that `config` names, over `dim` channels."""
    if config.kind == "attention":
        return TemporalAttention(dim, heads=config.heads, head_width=config.head_width)
    if config.kind == "linear_attention":
        return TemporalLinearAttention(dim, heads=config.heads, head_width=config.head_width)
    ssm, size, both = config.kind, config.state_size, config.bidirectional
    if config.variant == "mamba":
        return MambaLayer(dim, ssm=ssm, state_size=size, bidirectional=both)
    layer = {"glu": GLULayer, "mlp": MLPLayer, "gated": GatedLayer}[config.variant]
    return layer(dim, ssm=ssm, state_size=size, bidirectional=both, hidden=config.hidden)


def _directions(bidirectional: bool) -> tuple[bool, ...]:
    """`reverse` of each branch."""
    return (False, True) if bidirectional else (False,)


def _mlp(dim: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, out))


def _sum(parts: Iterable[Tensor]) -> Tensor:
    first, *others = parts
    for other in others:
        first = first + other
    return first
