"""Serpent: a U-Net of four-direction selective scans for image restoration, after arXiv 2403.17902.

After, not of: neither the paper's tables nor its code could be had, so the shape below (hierarchical, patch-based, a
selective scan of the image unrolled in four directions as the only mixing of pixels) follows its description, and
widths, depths and names are ours. No figure of the paper is claimed for it and its weights do not load here.

Top to bottom: a stem that makes cells of p x p pixels; levels of blocks at C, 2C, 4C joined by strided convolutions;
blocks at 8C; the same levels upwards, each joined with its skip; a head that turns cells into pixels again. The head's
last convolution starts at zero and the image is added to its result, so an untrained net returns its input exactly.

With ``detail``, one more level stands around these: convolutions at the image's own resolution, which see what the
patches of the stem would mix up; the scans stay where they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from restoration.blocks import NORM_EPS, Blocks, ConvBlock, SerpentBlock, init_projections
from restoration.unet import DecoderLevel, EncoderLevel, RestorationUNet
from vision_ssm.errors import UserError
from vision_ssm.mixer_config import MapPattern, MixerName, MixerStack, ScanOptions

VariantName = Literal["fast", "small", "base", "base-p4", "large", "full-res"]


@dataclass(frozen=True)
class Variant:
    """Size of one Serpent: p, C and the number of blocks per level, the finest first, the middle last."""

    patch: int
    width: int
    depths: tuple[int, ...]


VARIANTS: dict[VariantName, Variant] = {
    "fast": Variant(patch=4, width=48, depths=(2, 2, 2, 2)),
    "small": Variant(patch=2, width=32, depths=(2, 2, 2, 2)),
    "base": Variant(patch=2, width=48, depths=(2, 2, 2, 2)),
    "base-p4": Variant(patch=4, width=96, depths=(2, 2, 2, 2)),
    "large": Variant(patch=2, width=64, depths=(2, 2, 4, 4)),
    "full-res": Variant(patch=1, width=32, depths=(2, 2, 2, 2)),
}


class Head(nn.Module):
    """Norm, cells to pixels, a last convolution that starts at zero: (B, C, H/p, W/p) -> (B, C_out, H, W)."""

    def __init__(self, width: int, out_channels: int, patch: int) -> None:
        super().__init__()
        self.norm = LayerNorm2d(width, eps=NORM_EPS)
        self.up = up(width, width, patch) if patch > 1 else nn.Identity()
        self.out = nn.Conv2d(width, out_channels, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.up(self.norm(x)).contiguous(memory_format=torch.channels_last)
        return self.out(x)


class Serpent(RestorationUNet):
    """Serpent for any task whose output has the size of its input.

    Shape: (B, in_channels, H, W) -> (B, out_channels, H, W), any H, W >= 1, floats with 1.0 for white.

    Parameters in millions: fast 5.23, small 2.51, base 5.20, base-p4 19.12, large 15.23, full-res 2.51.

    Args:
        variant: Size, see ``VARIANTS``.
        in_channels: 3 for RGB; 4 where a mask follows it (inpainting).
        out_channels: The first of them that are restored.
        patch: p instead of the variant's.
        width: C instead of the variant's.
        depths: Blocks per level instead of the variant's; their number is the number of levels.
        detail: Blocks of convolutions at full resolution, before the patches are made and after; 0 for no such level.
        mixer: What mixes the pixels, see `vision_ssm.mixers2d`.
        mixer_pattern: Where attention stands among the blocks of a level, see `vision_ssm.mixer_config`;
            last_half_attention changes the two coarsest sizes alone (MambaVision).
        polar: Option of scans, see `vision_ssm.mixer_config`.
        smr: Option of scans, see there.

    Raises:
        UserError: Unknown variant or mixer, or a number that is not allowed.
    """

    def __init__(
        self,
        variant: VariantName = "base",
        *,
        in_channels: int = 3,
        out_channels: int = 3,
        patch: int | None = None,
        width: int | None = None,
        depths: Sequence[int] | None = None,
        detail: int = 0,
        mixer: MixerName = "s6",
        mixer_pattern: MapPattern = "same",
        polar: Sequence[int] = (0, 0),
        smr: int = 0,
    ) -> None:
        size = _resolve(variant, patch, width, depths)
        if detail < 0:
            raise UserError(f"detail of Serpent must be a number of blocks or 0, got {detail}")
        stack = MixerStack(mixer, mixer_pattern, ScanOptions(polar, smr), maps=True)

        def blocks(channels: int, count: int) -> Blocks:
            layers = stack.layers(count, coarse=channels in widths[-2:])
            return Blocks(*(SerpentBlock(channels, mixer=name, options=options) for name, options in layers))

        widths = [size.width * 2**i for i in range(len(size.depths))]
        levels = list(zip(pairwise(widths), size.depths, strict=False))
        encoder = [EncoderLevel(blocks(a, n), nn.Conv2d(a, b, 2, stride=2)) for (a, b), n in levels]
        decoder = [DecoderLevel(up(b, a, 2), nn.Conv2d(2 * a, a, 1), blocks(a, n)) for (a, b), n in reversed(levels)]
        patch, fine = size.patch, size.width
        if detail:  # this level makes the patches
            encoder.insert(0, EncoderLevel(_convs(fine, detail), nn.Conv2d(fine, fine, patch, stride=patch)))
            decoder.append(DecoderLevel(up(fine, fine, patch), nn.Conv2d(2 * fine, fine, 1), _convs(fine, detail)))
            patch = 1
        super().__init__(
            stem=_stem(in_channels, fine, patch),
            encoder=encoder,
            middle=blocks(widths[-1], size.depths[-1]),
            decoder=decoder,
            head=Head(fine, out_channels, patch),
            in_channels=in_channels,
            out_channels=out_channels,
            multiple=size.patch * 2 ** len(levels),
        )
        init_projections(self)
        self.config: dict[str, Any] = {
            "variant": variant,
            "in_channels": in_channels,
            "out_channels": out_channels,
            "patch": size.patch,
            "width": size.width,
            "depths": size.depths,
            "detail": detail,
            "mixer": mixer,
            "mixer_pattern": mixer_pattern,
            "polar": stack.options.polar,
            "smr": smr,
        }
        """Arguments that build this model again: ``Serpent(**model.config)``."""


def up(in_channels: int, channels: int, factor: int) -> nn.Sequential:
    """(B, in_channels, h, w) -> (B, channels, factor * h, factor * w): each cell gives its square of finer ones."""
    return nn.Sequential(nn.Conv2d(in_channels, channels * factor**2, 1), nn.PixelShuffle(factor))


def _convs(channels: int, count: int) -> Blocks:
    return Blocks(*(ConvBlock(channels) for _ in range(count)))


def _stem(in_channels: int, width: int, patch: int) -> nn.Conv2d:
    """Without a norm: restoration needs the absolute level."""
    if patch == 1:
        return nn.Conv2d(in_channels, width, 3, padding=1)
    return nn.Conv2d(in_channels, width, patch, stride=patch)


def _resolve(variant: str, patch: int | None, width: int | None, depths: Sequence[int] | None) -> Variant:
    if variant not in VARIANTS:
        raise UserError(f"Serpent has the variants {', '.join(VARIANTS)}; got {variant!r}")
    given = VARIANTS[variant]
    size = Variant(
        patch=given.patch if patch is None else patch,
        width=given.width if width is None else width,
        depths=given.depths if depths is None else tuple(depths),
    )
    if min(size.patch, size.width, *size.depths, len(size.depths)) < 1:
        raise UserError(f"patch, width and depths of Serpent must be positive numbers, got {size}")
    return size
