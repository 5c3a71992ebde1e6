"""SS2D: a selective scan over a feature map in four directions (VMamba, section 4.2)."""

import math
from typing import Literal

from torch import Tensor, nn

from kernels import selective_scan_2d
from kernels.selective_scan.op import Backend
from vision_ssm.mixing import MixingMatrix
from vision_ssm.scan_parameters import Init, ScanParameters

# Shapes: B batch, H/W height and width, C model width, D = expand * C inner channels,
# K = 4 directions, N state size, R rank of the step size.

DIRECTIONS = ("rows", "columns", "rows_reversed", "columns_reversed")


class SS2D(MixingMatrix, nn.Module):
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
        act: Literal["gelu", "silu"] = "gelu",
        gate: bool = True,
        conv_bias: bool = True,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        inner = int(expand * dim)
        rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        scans = len(DIRECTIONS)
        self.split = (rank, state_size, state_size)
        self.backend: Backend = backend
        self.in_proj = nn.Conv2d(dim, inner, 1, bias=False)
        self.gated = gate
        if gate:
            self.gate_proj = nn.Conv2d(dim, inner, 1, bias=False)
        self.conv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=conv_bias)
        self.act = nn.GELU() if act == "gelu" else nn.SiLU()
        self.x_proj = nn.Conv2d(inner, scans * sum(self.split), 1, bias=False)
        self.scan = ScanParameters(scans, inner, state_size=state_size, rank=rank, init=init)
        self.norm = nn.LayerNorm(inner, eps=norm_eps)
        self.out_proj = nn.Conv2d(inner, dim, 1, bias=False)

    def core(self, x: Tensor) -> Tensor:
        """Scan a map in four directions, sum and normalise: (B, H, W, D) -> (B, H, W, D)."""
        projected = _pixels(self.x_proj(_maps(x))).unflatten(-1, (len(DIRECTIONS), sum(self.split)))
        delta, B, C = projected.split(self.split, dim=-1)  # (B, H, W, K, R | N | N)
        A, D, bias = self.scan.exact(x)
        y = selective_scan_2d(
            x,
            delta,
            A,
            B,
            C,
            D,
            directions=DIRECTIONS,
            delta_weight=self.scan.dt_weight,
            delta_bias=bias,
            softplus=True,
            backend=self.backend,
        )
        return self.norm(y).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        maps = _maps(x)
        y = self.core(_pixels(self.act(self.conv(self.in_proj(maps)))))
        if self.gated:
            y = y * _pixels(self.act(self.gate_proj(maps)))
        return _pixels(self.out_proj(_maps(y)))


def _maps(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, C, H, W), a view in channels-last memory."""
    return x.permute(0, 3, 1, 2)


def _pixels(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W, C), contiguous: a view if the convolution kept channels-last memory, as most do."""
    return x.permute(0, 2, 3, 1).contiguous()
