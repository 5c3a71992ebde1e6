"""Mixers of feature maps by name: the restorer's and the detector's blocks take any of them in place of SS2D.

All but attention share SS2D's frame (`vision_ssm.ss2d.GatedMap`): projections, a 3x3 depthwise convolution and a gate,
so that what differs is the mixing alone.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import ssd_2d, ssd_noncausal
from vision_ssm.directions import HEAD_WIDTH, first_steps, learned_heads, present_heads
from vision_ssm.mixer_config import NO_OPTIONS, MixerName, ScanOptions, check_mixer
from vision_ssm.mixers import AttentionMixer
from vision_ssm.mixing import MixingMatrix
from vision_ssm.s4d import S4D
from vision_ssm.scan_parameters import Init, exact, spare_from_decay
from vision_ssm.ss2d import DIRECTIONS, SS2D, Act, GatedMap, build_replays, replayed, sum_of, to_maps, to_pixels

# Shapes: B batch, H/W height and width, C model width, D = 2 C inner channels, K = 4 directions, E heads,
# P = D / E channels per head, N state size.

EXPAND, NORM_EPS = 2.0, 1e-5
SSD_STATES, NC_STATES, S4D_STATES = 16, 64, 16
"""N. Four directions have B and C of their own: with 16 states, as SS2D, ssd has about its number of weights."""


class SSD2D(MixingMatrix, GatedMap):
    """SS2D with Mamba-2's scan: one decay per head and direction instead of one per channel and state.

    Of the heads, the first ``polar[0]`` have decay 1, the last ``polar[1]`` decay 0. Heads have 64 channels, or the
    largest common divisor of D and 64.

    Shape: (B, H, W, C) -> (B, H, W, C)

    Args:
        dim: C.
        state_size: N.
        act: Activation of the convolution and of the gate.
        options: Of the scans.
    """

    def __init__(
        self, dim: int, *, state_size: int = SSD_STATES, act: Act = "gelu", options: ScanOptions = NO_OPTIONS
    ) -> None:
        super().__init__(dim, expand=EXPAND, act=act)
        scans, self.heads = len(DIRECTIONS), heads_of(self.inner)
        self.split = (self.heads, state_size, state_size)
        self.options = options
        self.x_proj = nn.Conv2d(self.inner, scans * sum(self.split), 1, bias=False)
        self.A_log = nn.Parameter(torch.empty(scans, learned_heads(self.heads, options)).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(scans, self.heads))
        self.dt_bias = nn.Parameter(first_steps(scans * self.heads).view(scans, -1))
        self.replays = build_replays(self.inner, options)
        self.add_output(NORM_EPS)
        spare_from_decay(self.A_log, self.D)

    def core(self, x: Tensor) -> Tensor:
        """Scan a map in four directions, sum and normalise: (B, H, W, D) -> (B, H, W, D)."""
        projected = to_pixels(self.x_proj(to_maps(x))).unflatten(-1, (len(DIRECTIONS), sum(self.split)))
        if self.replays is None:
            y = self._scan(x, projected, slice(0, len(DIRECTIONS)))
        else:
            inputs = replayed(self.replays, x)
            y = sum_of(self._scan(u, projected[:, :, :, k : k + 1], slice(k, k + 1)) for k, u in enumerate(inputs))
        return self.norm(y).to(x.dtype)

    def _scan(self, x: Tensor, projected: Tensor, own: slice) -> Tensor:
        """The sum of the scans of some directions over (B, H, W, D)."""
        dt, B, C = projected.split(self.split, dim=-1)  # (B, H, W, K, E | N | N)
        ones, zeros = self.options.polar
        kept = self.heads - zeros
        x, B, C = x.unflatten(-1, (self.heads, -1)), B.unsqueeze(-2), C.unsqueeze(-2)
        D, dt_bias = exact(self.D[own], x), exact(self.dt_bias[own], x)
        y: Tensor = ssd_2d(  # pyright: ignore[reportAssignmentType]
            x[..., :kept, :],
            dt[..., :kept],
            F.pad(-exact(self.A_log[own], x).exp(), (ones, 0)),
            B,
            C,
            D[:, :kept],
            directions=DIRECTIONS[own],
            dt_bias=dt_bias[:, :kept],
            softplus=True,
        )
        if zeros:
            held = x[..., None, kept:, :]
            now = present_heads(held, dt[..., kept:], B, C, D[:, kept:], dt_bias[:, kept:]).sum(3)
            y = torch.cat([y, now.to(y.dtype)], dim=-2)
        return y.flatten(-2)


class NonCausalSSD2D(MixingMatrix, GatedMap):
    """SSD without an order over all pixels (VSSD, 2024): every pixel reads one sum; the convolution knows the places.

    Shape: (B, H, W, C) -> (B, H, W, C)

    Args:
        dim: C.
        state_size: N.
        act: Activation of the convolution and of the gate.
    """

    def __init__(self, dim: int, *, state_size: int = NC_STATES, act: Act = "gelu") -> None:
        super().__init__(dim, expand=EXPAND, act=act)
        self.heads = heads_of(self.inner)
        self.split = (self.heads, state_size, state_size)
        self.x_proj = nn.Conv2d(self.inner, sum(self.split), 1, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.heads))
        self.dt_bias = nn.Parameter(first_steps(self.heads))
        self.add_output(NORM_EPS)
        spare_from_decay(self.A_log, self.D)

    def core(self, x: Tensor) -> Tensor:
        """Let every pixel read the sum over all, and normalise: (B, H, W, D) -> (B, H, W, D)."""
        dt, B, C = to_pixels(self.x_proj(to_maps(x))).split(self.split, dim=-1)
        y = ssd_noncausal(
            x.unflatten(-1, (self.heads, -1)),
            dt,
            -exact(self.A_log, x).exp(),
            B.unsqueeze(-2),
            C.unsqueeze(-2),
            exact(self.D, x),
            dt_bias=exact(self.dt_bias, x),
            softplus=True,
        )
        return self.norm(y.flatten(-2)).to(x.dtype)


class S4D2D(GatedMap):
    """S4D along every row and every column, both ways: a pixel sees its own row and column.

    Shape: (B, H, W, C) -> (B, H, W, C)

    Args:
        dim: C.
        state_size: N, an even number of real states.
        act: Activation of the convolution and of the gate.
        options: Of the scans.
    """

    def __init__(
        self, dim: int, *, state_size: int = S4D_STATES, act: Act = "gelu", options: ScanOptions = NO_OPTIONS
    ) -> None:
        super().__init__(dim, expand=EXPAND, act=act)
        self.scans = nn.ModuleList(
            S4D(self.inner, state_size=state_size, reverse=d.endswith("reversed"), total=options.polar[0] > 0)
            for d in DIRECTIONS
        )
        self.replays = build_replays(self.inner, options)
        self.add_output(NORM_EPS)

    def core(self, x: Tensor) -> Tensor:
        """Scan rows and columns, sum and normalise: (B, H, W, D) -> (B, H, W, D)."""
        axes = [1 if d.startswith("columns") else 2 for d in DIRECTIONS]
        inputs = [x] * len(axes)
        if self.replays is not None:
            inputs = [replay(x, axis)[0] for replay, axis in zip(self.replays, axes, strict=True)]
        y = sum_of(scan(u, axis) for scan, u, axis in zip(self.scans, inputs, axes, strict=True))
        return self.norm(y).to(x.dtype)


class GatedConv2D(GatedMap):
    """The control: SS2D without its scan, a gated CNN block (after MambaOut, 2024).

    Shape: (B, H, W, C) -> (B, H, W, C)

    Args:
        dim: C.
        act: Activation of the convolution and of the gate.
    """

    def __init__(self, dim: int, *, act: Act = "gelu") -> None:
        super().__init__(dim, expand=EXPAND, act=act)
        self.add_output(NORM_EPS)

    def core(self, x: Tensor) -> Tensor:
        """Normalise: the 3x3 convolution before it is all that mixes."""
        return self.norm(x).to(x.dtype)


class Attention2D(nn.Module):
    """Attention over all pixels of a map: its cost grows with the square of their number.

    Shape: (B, H, W, C) -> (B, H, W, C)

    Args:
        dim: C.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attention = AttentionMixer(dim)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.attention(x.flatten(1, 2), 1).unflatten(1, x.shape[1:3])


def build_mixer2d(
    name: MixerName, dim: int, *, init: Init, act: Act, options: ScanOptions = NO_OPTIONS
) -> GatedMap | Attention2D:
    """The mixer of maps of that name.

    Args:
        name: s6 (SS2D), ssd, nc_ssd, s4d, attention or gated_conv.
        dim: C.
        init: Rule for the constants of s6.
        act: Activation of the convolution and of the gate.
        options: Of scans.

    Raises:
        UserError: Another name, or options that the mixer cannot have.
    """
    check_mixer(name)
    options.check(name)
    if name == "s6":
        return SS2D(dim, init=init, act=act, options=options)
    if name == "attention":
        return Attention2D(dim)
    if name in ("ssd", "s4d"):
        return (SSD2D if name == "ssd" else S4D2D)(dim, act=act, options=options)
    return (NonCausalSSD2D if name == "nc_ssd" else GatedConv2D)(dim, act=act)


def heads_of(inner: int) -> int:
    """Number of heads of D channels."""
    return inner // math.gcd(inner, HEAD_WIDTH)
