"""SS2D: a selective scan over a feature map in four directions (VMamba, section 4.2)."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn

from kernels import selective_scan_2d
from kernels.selective_scan.op import Backend
from vision_ssm.memory_replay import MemoryReplay
from vision_ssm.mixer_config import NO_OPTIONS, ScanOptions
from vision_ssm.mixing import MixingMatrix
from vision_ssm.scan_parameters import Init, ScanParameters, present_only

# Shapes: B batch, H/W height and width, C model width, D = expand * C inner channels,
# K = 4 directions, N state size, R rank of the step size.

DIRECTIONS = ("rows", "columns", "rows_reversed", "columns_reversed")
Act = Literal["gelu", "silu"]


class GatedMap(nn.Module, ABC):
    """The frame of SS2D around any mixing of pixels: project, depthwise convolution, ``core``, gate, project back.

    Shape: (B, H, W, C) -> (B, H, W, C)

    Args:
        dim: C.
        expand: D / C.
        act: Activation of the convolution and of the gate.
        gate: Multiply by a gate.
        conv_bias: Give the depthwise convolution a bias.
    """

    norm: nn.LayerNorm
    out_proj: nn.Conv2d

    def __init__(self, dim: int, *, expand: float, act: Act, gate: bool = True, conv_bias: bool = True) -> None:
        super().__init__()
        self.dim, self.inner = dim, int(expand * dim)
        self.in_proj = nn.Conv2d(dim, self.inner, 1, bias=False)
        self.gated = gate
        if gate:
            self.gate_proj = nn.Conv2d(dim, self.inner, 1, bias=False)
        self.conv = nn.Conv2d(self.inner, self.inner, 3, padding=1, groups=self.inner, bias=conv_bias)
        self.act = nn.GELU() if act == "gelu" else nn.SiLU()

    def add_output(self, norm_eps: float) -> None:
        """Make what follows the core; the last act of a constructor, so that random weights keep their order."""
        self.norm = nn.LayerNorm(self.inner, eps=norm_eps)
        self.out_proj = nn.Conv2d(self.inner, self.dim, 1, bias=False)

    @abstractmethod
    def core(self, x: Tensor) -> Tensor:
        """Mix the pixels of a map and normalise: (B, H, W, D) -> (B, H, W, D)."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        maps = to_maps(x)
        y = self.core(to_pixels(self.act(self.conv(self.in_proj(maps)))))
        if self.gated:
            y = y * to_pixels(self.act(self.gate_proj(maps)))
        return to_pixels(self.out_proj(to_maps(y)))


class SS2D(MixingMatrix, GatedMap):
    """Four-direction scan: project, depthwise convolution, scan, norm, gate, project back.

    Deviations from the released modules, none of which changes a value: the input projection is kept as its two halves
    (so that no half has to be copied out of the other), and one projection gives step size, B and C of all directions.

    Shape: (B, H, W, C) -> (B, H, W, C)

    Args:
        dim: C.
        state_size: N, states per channel.
        expand: D / C.
        dt_rank: R; ceil(C / 16) if not given.
        init: Rule for the scan's constants, see ``ScanParameters``.
        norm_eps: Epsilon of the layer norm after the scan.
        act: Activation of the convolution and of the gate. Mamba-YOLO's released code uses GELU (its figures show
            SiLU), VMamba and MambaIR use SiLU.
        gate: Multiply by a gate; VMamba's second version has none.
        conv_bias: Give the depthwise convolution a bias; VMamba's second version has none.
        backend: Back end of the scan, see ``kernels.selective_scan_2d``.
        options: Of the scans.
    """

    def __init__(
        self,
        dim: int,
        *,
        state_size: int = 16,
        expand: float = 2.0,
        dt_rank: int | None = None,
        init: Init = "official",
        norm_eps: float = 1e-5,
        act: Act = "gelu",
        gate: bool = True,
        conv_bias: bool = True,
        backend: Backend = "auto",
        options: ScanOptions = NO_OPTIONS,
    ) -> None:
        super().__init__(dim, expand=expand, act=act, gate=gate, conv_bias=conv_bias)
        rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        scans, states = len(DIRECTIONS), state_size + sum(options.polar)
        self.split = (rank, states, states)
        self.backend: Backend = backend
        self.options = options
        self.x_proj = nn.Conv2d(self.inner, scans * sum(self.split), 1, bias=False)
        self.scan = ScanParameters(
            scans, self.inner, state_size=state_size, rank=rank, init=init, ones=options.polar[0]
        )  # fmt: skip
        self.replays = build_replays(self.inner, options)
        self.add_output(norm_eps)

    def core(self, x: Tensor) -> Tensor:
        """Scan a map in four directions, sum and normalise: (B, H, W, D) -> (B, H, W, D)."""
        if self.replays is None:
            y = self._scan(x, self.x_proj(to_maps(x)), slice(0, len(DIRECTIONS)))
        else:
            weights = self.x_proj.weight.chunk(len(DIRECTIONS))
            inputs = replayed(self.replays, x)
            y = sum_of(
                self._scan(u, F.conv2d(to_maps(u), weight), slice(k, k + 1))
                for k, (u, weight) in enumerate(zip(inputs, weights, strict=True))
            )
        return self.norm(y).to(x.dtype)

    def _scan(self, x: Tensor, projected: Tensor, own: slice) -> Tensor:
        """The sum of the scans of some directions, which read (B, H, W, D) by what was projected from it."""
        directions, zeros = DIRECTIONS[own], self.options.polar[1]
        projected = to_pixels(projected).unflatten(-1, (len(directions), sum(self.split)))
        delta, B, C = projected.split(self.split, dim=-1)  # (B, H, W, K, R | N | N)
        kept = B.shape[-1] - zeros
        A, D, bias = (constant[own] for constant in self.scan.exact(x))
        weight = self.scan.dt_weight[own]
        y: Tensor = selective_scan_2d(  # pyright: ignore[reportAssignmentType]
            x,
            delta,
            A,
            B[..., :kept],
            C[..., :kept],
            D,
            directions=directions,
            delta_weight=weight,
            delta_bias=bias,
            softplus=True,
            backend=self.backend,
        )
        if zeros:
            parts = zip(delta.unbind(3), weight, bias, B[..., kept:].unbind(3), C[..., kept:].unbind(3), strict=True)
            y = y + sum_of(present_only(x, *part) for part in parts)
        return y


def build_replays(channels: int, options: ScanOptions) -> nn.ModuleList | None:
    """A memory replay for each direction, None without the option."""
    if not options.smr:
        return None
    return nn.ModuleList(MemoryReplay(channels, options.smr, reverse=d.endswith("reversed")) for d in DIRECTIONS)


def replayed(replays: nn.ModuleList, x: Tensor) -> list[Tensor]:
    """A map (B, H, W, D) as each direction's memory weights it, in that direction's own order."""
    results = []
    for replay, direction in zip(replays, DIRECTIONS, strict=True):
        turned = x.transpose(1, 2) if direction.startswith("columns") else x
        tokens = cast(Tensor, replay(turned.flatten(1, 2))[0]).unflatten(1, turned.shape[1:3])
        results.append((tokens.transpose(1, 2) if direction.startswith("columns") else tokens).contiguous())
    return results


def sum_of(parts: Iterable[Tensor]) -> Tensor:
    """The sum of at least one tensor."""
    first, *others = parts
    for other in others:
        first = first + other
    return first


def to_maps(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, C, H, W), a view in channels-last memory."""
    return x.permute(0, 3, 1, 2)


def to_pixels(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W, C), contiguous: a view if the convolution kept channels-last memory, as most do."""
    return x.permute(0, 2, 3, 1).contiguous()
