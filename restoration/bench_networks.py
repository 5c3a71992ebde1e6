"""What Serpent is compared with for cost: its own U-Net with attention or convolution blocks, at equal parameters.

Untrained: this compares time and memory, not accuracy.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from restoration.blocks import Blocks
from restoration.model import VARIANTS, Head, Serpent, VariantName, up
from restoration.unet import DecoderLevel, EncoderLevel, RestorationUNet

# Shapes: B batch, C channels, h/w height and width of a map, n heads.

_GDFN_EXPANSION = 2.66
_HEAD_WIDTH = 48
"""Restormer has 1, 2, 4 and 8 heads for 48, 96, 192 and 384 channels."""


class ChannelAttention(nn.Module):
    """Multi-Dconv head transposed attention (Restormer, arXiv 2111.09881, section 3.1): channels attend to channels.

    Shape: (B, C, h, w) -> (B, C, h, w).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = max(head for head in range(1, max(1, channels // _HEAD_WIDTH) + 1) if channels % head == 0)
        self.temperature = nn.Parameter(torch.ones(self.heads, 1, 1))
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.local = nn.Conv2d(3 * channels, 3 * channels, 3, padding=1, groups=3 * channels, bias=False)
        self.out = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        b, c, h, w = x.shape
        q, k, v = self.local(self.qkv(x)).reshape(b, 3, self.heads, c // self.heads, h * w).unbind(1)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        return self.out((scores.softmax(dim=-1) @ v).reshape(b, c, h, w))


class GatedFeedForward(nn.Module):
    """Gated-Dconv feed-forward network (Restormer, section 3.2). Shape: (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = int(channels * _GDFN_EXPANSION)
        self.into = nn.Conv2d(channels, 2 * hidden, 1, bias=False)
        self.local = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, bias=False)
        self.out = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        gate, value = self.local(self.into(x)).chunk(2, dim=1)
        return self.out(F.gelu(gate) * value)


class AttentionBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)). Shape: (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.attention = LayerNorm2d(channels), ChannelAttention(channels)
        self.norm2, self.feed_forward = LayerNorm2d(channels), GatedFeedForward(channels)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class ConvolutionBlock(nn.Module):
    """Two 3x3 convolutions with a ReLU after each (U-Net, arXiv 1505.04597). Shape: (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.layers(x)


def plain_unet(width: int, depths: tuple[int, ...], patch: int, block: Callable[[int], nn.Module]) -> RestorationUNet:
    """Serpent's U-Net with other blocks: (B, 3, H, W) -> (B, 3, H, W)."""
    widths = [width * 2**i for i in range(len(depths))]
    levels = list(zip(pairwise(widths), depths, strict=False))

    def blocks(channels: int, count: int) -> Blocks:
        return Blocks(*(block(channels) for _ in range(count)))

    stem = nn.Conv2d(3, width, patch, stride=patch) if patch > 1 else nn.Conv2d(3, width, 3, padding=1)
    return RestorationUNet(
        stem=stem,
        encoder=[EncoderLevel(blocks(a, n), nn.Conv2d(a, b, 2, stride=2)) for (a, b), n in levels],
        middle=blocks(widths[-1], depths[-1]),
        decoder=[DecoderLevel(up(b, a, 2), nn.Conv2d(2 * a, a, 1), blocks(a, n)) for (a, b), n in reversed(levels)],
        head=Head(width, 3, patch),
        in_channels=3,
        out_channels=3,
        multiple=patch * 2 ** len(levels),
    )


def matched(variant: VariantName, block: Callable[[int], nn.Module]) -> RestorationUNet:
    """That U-Net with the width, an even number, whose parameters come closest to a Serpent variant's."""
    size = VARIANTS[variant]
    with torch.device("meta"):
        wanted = parameters(Serpent(variant))

        def distance(width: int) -> int:
            return abs(parameters(plain_unet(width, size.depths, size.patch, block)) - wanted)

        # parameters grow nearly with the square of the width
        first = parameters(plain_unet(size.width, size.depths, size.patch, block))
        guess = 2 * round(size.width * (wanted / first) ** 0.5 / 2)
        width = min(range(max(2, guess - 4), guess + 5, 2), key=distance)
    return plain_unet(width, size.depths, size.patch, block)


def parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
