"""MambaIR (arXiv 2402.15648): residual groups of state-space blocks at one resolution, and its U-Net.

Here so that its published weights run on any machine: same values as the released code, checked by recorded ones. The
U-Net is the one for real noise; its dual-pixel option raises an error in the released code and is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from timm.layers import LayerNorm2d, LayerScale2d, SqueezeExcite
from torch import Tensor, nn

from restoration.blocks import NORM_EPS, Blocks, init_projections, scan_maps
from restoration.unet import DecoderLevel, EncoderLevel, RestorationUNet, check_image
from vision_ssm.errors import UserError
from vision_ssm.ss2d import SS2D

Kind = Literal["light", "classic", "denoise"]
MEAN = (0.4488, 0.4371, 0.4040)  # of the training pictures (DIV2K), RGB
TAIL_WIDTH = 64


class ChannelAttentionBlock(nn.Sequential):
    """Convolutions with a bottleneck, then every channel scaled by a function of all channels' means. Shape kept.

    Args:
        channels: C.
        light: Split both convolutions into pointwise and depthwise ones, the second dilated, at half the width.
    """

    def __init__(self, channels: int, *, light: bool = False) -> None:
        attention = SqueezeExcite(channels, rd_channels=channels // 30)
        if not light:
            inner = channels // 3
            super().__init__(
                nn.Conv2d(channels, inner, 3, padding=1),
                nn.GELU(),
                nn.Conv2d(inner, channels, 3, padding=1),
                attention,
            )
            return
        inner = channels // 2
        super().__init__(
            nn.Conv2d(channels, inner, 1),
            nn.Conv2d(inner, inner, 3, padding=1, groups=inner),
            nn.GELU(),
            nn.Conv2d(inner, channels, 1),
            nn.Conv2d(channels, channels, 3, padding=2, dilation=2, groups=channels),
            attention,
        )


class MambaIRBlock(nn.Module):
    """x <- scale1 x + SS2D(LN(x)); x <- scale2 x + CAB(LN(x)), both scales one number per channel. Shape kept.

    Args:
        channels: C.
        state_size: States per channel of the scan.
        expand: Width of the scan over C.
        light: The light kind of channel-attention block.
    """

    def __init__(self, channels: int, *, state_size: int = 16, expand: float = 2.0, light: bool = False) -> None:
        super().__init__()
        self.norm1 = LayerNorm2d(channels, eps=NORM_EPS)
        self.ss2d = SS2D(channels, state_size=state_size, expand=expand, init="vmamba", act="silu")
        self.scale1 = LayerScale2d(channels, init_values=1.0)
        self.norm2 = LayerNorm2d(channels, eps=NORM_EPS)
        self.conv = ChannelAttentionBlock(channels, light=light)
        self.scale2 = LayerScale2d(channels, init_values=1.0)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.scale1(x) + scan_maps(self.ss2d, self.norm1(x))
        return self.scale2(x) + self.conv(self.norm2(x))


class ResidualGroup(nn.Module):
    """x + conv3x3(blocks(x)). Shape kept."""

    def __init__(self, channels: int, blocks: Blocks) -> None:
        super().__init__()
        self.blocks = blocks
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return x + self.conv(self.blocks(x))


@dataclass(frozen=True)
class Layout:
    """Size of one MambaIR: width, blocks per group, states, width of the scans over it, kind of block, scales."""

    width: int
    depths: tuple[int, ...]
    state_size: int
    expand: float
    light: bool
    scales: tuple[int, ...]


LAYOUTS: dict[Kind, Layout] = {
    "light": Layout(60, (6,) * 4, state_size=10, expand=1.2, light=True, scales=(2, 3, 4)),
    "classic": Layout(180, (6,) * 6, state_size=16, expand=2.0, light=False, scales=(2, 3, 4)),
    "denoise": Layout(180, (6,) * 6, state_size=16, expand=1.2, light=False, scales=(1,)),
}


class MambaIR(nn.Module):
    """MambaIR for super-resolution (light, classic) or colour denoising, at any size.

    Shape: (B, 3, H, W) -> (B, 3, scale * H, scale * W), floats with 1.0 for white.

    Parameters: light x2, x3, x4 905,016 / 913,131 / 924,492; classic x2 20.422 M; denoise 15.778 M.

    Args:
        kind: See ``LAYOUTS``.
        scale: 2, 3 or 4 for the first two kinds (2 if not given); denoising keeps the size.

    Raises:
        UserError: Unknown kind or scale.
    """

    mean: Tensor

    def __init__(self, kind: Kind = "light", *, scale: int | None = None) -> None:
        super().__init__()
        if kind not in LAYOUTS:
            raise UserError(f"MambaIR has the kinds {', '.join(LAYOUTS)}; got {kind!r}")
        layout = LAYOUTS[kind]
        scale = layout.scales[0] if scale is None else scale
        if scale not in layout.scales:
            raise UserError(f"MambaIR {kind} has the scales {', '.join(map(str, layout.scales))}; got {scale}")
        self.in_channels = 3
        self.scale = scale
        self.config: dict[str, Any] = {"kind": kind, "scale": scale}
        """Arguments that build this model again: ``MambaIR(**model.config)``."""
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.stem = _conv(3, layout.width)
        self.stem_norm = LayerNorm2d(layout.width, eps=NORM_EPS)
        self.groups = nn.ModuleList(_group(layout, depth) for depth in layout.depths)
        self.norm = LayerNorm2d(layout.width, eps=NORM_EPS)
        self.body = _conv(layout.width, layout.width)
        self.tail = _tail(kind, layout.width, scale)
        init_projections(self)

    def forward(self, image: Tensor) -> Tensor:
        """Restore images; see the class.

        Raises:
            UserError: The image has another number of axes or channels, or no pixels.
        """
        check_image(image, self.in_channels)
        centred = (image - self.mean).contiguous(memory_format=torch.channels_last)
        shallow = self.stem(centred)
        x = self.stem_norm(shallow)
        for group in self.groups:
            x = group(x)
        x = self.tail(self.body(self.norm(x)) + shallow)
        return (centred + x if self.scale == 1 else x) + self.mean


class MambaIRUNet(RestorationUNet):
    """MambaIR's U-Net for real noise: 48 channels, 4, 6, 6 and 8 blocks, 4 of refinement, 30.750 M parameters.

    The finest level of the decoder and the refinement work on up-sampled maps and skip together, so at 96 channels.
    Outside the blocks no convolution has a bias.

    Shape: (B, 3, H, W) -> (B, 3, H, W), any H, W >= 1, floats with 1.0 for white; sides that are no multiples of 8
    are padded.
    """

    def __init__(self) -> None:
        width, depths, refinement = 48, (4, 6, 6, 8), 4
        widths = [width * 2**i for i in range(len(depths))]
        levels = list(zip(pairwise(widths), depths, strict=False))
        super().__init__(
            stem=_conv(3, width, bias=False),
            encoder=[EncoderLevel(_unet_blocks(a, n), _down(a)) for (a, _), n in levels],
            middle=_unet_blocks(widths[-1], depths[-1]),
            decoder=[
                DecoderLevel(_up(b), nn.Conv2d(b, a, 1, bias=False), _unet_blocks(a, n))
                for (a, b), n in reversed(levels[1:])
            ]
            + [DecoderLevel(_up(widths[1]), nn.Identity(), _unet_blocks(widths[1], depths[0]))],
            head=nn.Sequential(_unet_blocks(widths[1], refinement), _conv(widths[1], 3, bias=False)),
            in_channels=3,
            out_channels=3,
            multiple=2 ** len(levels),
        )
        self.config: dict[str, Any] = {}
        """Arguments that build this model again: none."""
        init_projections(self)


def _conv(in_channels: int, out_channels: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)


def _group(layout: Layout, depth: int) -> ResidualGroup:
    blocks = (
        MambaIRBlock(layout.width, state_size=layout.state_size, expand=layout.expand, light=layout.light)
        for _ in range(depth)
    )
    return ResidualGroup(layout.width, Blocks(*blocks))


def _tail(kind: Kind, width: int, scale: int) -> nn.Sequential:
    """From the last maps to an image: one convolution, one shuffle (light), or shuffles by 2 or 3 at 64 channels."""
    if kind == "denoise":
        return nn.Sequential(_conv(width, 3))
    if kind == "light":
        return nn.Sequential(_conv(width, 3 * scale**2), nn.PixelShuffle(scale))
    steps: Sequence[int] = {2: (2,), 3: (3,), 4: (2, 2)}[scale]
    shuffles = [layer for s in steps for layer in (_conv(TAIL_WIDTH, TAIL_WIDTH * s**2), nn.PixelShuffle(s))]
    return nn.Sequential(_conv(width, TAIL_WIDTH), nn.LeakyReLU(), *shuffles, _conv(TAIL_WIDTH, 3))


def _unet_blocks(channels: int, count: int) -> Blocks:
    return Blocks(*(MambaIRBlock(channels) for _ in range(count)))


def _down(channels: int) -> nn.Sequential:
    return nn.Sequential(_conv(channels, channels // 2, bias=False), nn.PixelUnshuffle(2))


def _up(channels: int) -> nn.Sequential:
    return nn.Sequential(_conv(channels, 2 * channels, bias=False), nn.PixelShuffle(2))
