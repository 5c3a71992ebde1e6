"""The building blocks of Mamba-YOLO, in the order in which the paper draws them.

Source: "Mamba YOLO: SSMs-Based YOLO For Object Detection" (arXiv 2406.05835v1) and the behaviour of the released code
where the two differ. All maps are (B, C, H, W); they run fastest in channels-last memory, which the model sets once.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from vision_ssm.mixer_config import NO_OPTIONS, MixerName, ScanOptions
from vision_ssm.mixers2d import build_mixer2d
from vision_ssm.scan_parameters import Init

MLP_RATIO = 4
BatchNorm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.03)


class ConvNormAct(Conv2dNormActivation):
    """Convolution, batch norm (eps 1e-3, momentum 0.03), activation; the padding keeps the size at stride 1."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        *,
        stride: int = 1,
        bias: bool = False,
        padding: int | None = None,
        activation: Callable[..., nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            norm_layer=BatchNorm,
            activation_layer=activation,
            inplace=None,
            bias=bias,
        )


class SimpleStem(nn.Sequential):
    """Two strided convolutions, (B, 3, H, W) -> (B, C, H/4, W/4). The first activation is GELU, the second SiLU."""

    def __init__(self, in_channels: int, channels: int) -> None:
        half = channels // 2
        super().__init__(
            ConvNormAct(in_channels, half, 3, stride=2, activation=nn.GELU),
            ConvNormAct(half, channels, 3, stride=2),
        )


class VisionClueMerge(ConvNormAct):
    """Downsample by gathering each 2x2 square into channels and projecting it (paper: Vision Clue Merge).

    Gathering and a 1x1 convolution are together one 2x2 convolution of stride 2, which is how it is written here.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 2, stride=2, padding=0, bias=True)


class LSBlock(nn.Module):
    """Local spatial block: x + fc2(GELU(fc1(BN(depthwise3x3(x))))). Shape kept."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = BatchNorm(channels)
        self.fc1 = nn.Conv2d(channels, channels, 1)
        self.fc2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return x + self.fc2(F.gelu(self.fc1(self.norm(self.conv(x)))))


class RGBlock(nn.Module):
    """Residual gated block, the feed-forward part: fc(GELU(depthwise3x3(a) + a) * v) with a, v = gate(x), value(x).

    The released code computes a and v by one convolution; two give the same values and spare a copy. The hidden
    width is int(2/3 * 4C), the usual cut for a gated feed-forward layer. Shape kept.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = int(2 * (MLP_RATIO * channels) / 3)
        self.gate = nn.Conv2d(channels, hidden, 1)
        self.value = nn.Conv2d(channels, hidden, 1)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        gate = self.gate(x)
        return self.fc(F.gelu(self.conv(gate) + gate) * self.value(x))


class ODSSBlock(nn.Module):
    """Object-detection state-space block: projection, local block, scan and gated feed-forward.

    The residual of the scan branch starts before the local block. Two kinds exist in the released code: a backbone
    block always projects, by a convolution with bias; a neck block projects without bias and only where the width
    changes, and may chain several scans inside one residual. The drop-path rate of every published configuration is
    0, so there is none.

    Shape: (B, C_in, H, W) -> (B, C, H, W)

    Args:
        in_channels: C_in.
        channels: C.
        neck: Build the neck kind.
        scans: Chained SS2D modules, or mixers in their place (and under their name, which the weights have).
        lsblock: Keep the local block (the second version of the paper removed it).
        init: Rule for the scan's constants, see ``vision_ssm.scan_parameters``.
        mixer: See ``vision_ssm.mixers2d``.
        options: Of scans.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        neck: bool = False,
        scans: int = 1,
        lsblock: bool = True,
        init: Init = "official",
        mixer: MixerName = "s6",
        options: ScanOptions = NO_OPTIONS,
    ) -> None:
        super().__init__()
        identity = neck and in_channels == channels
        self.proj = nn.Identity() if identity else ConvNormAct(in_channels, channels, bias=not neck)
        self.local = LSBlock(channels) if lsblock else nn.Identity()
        self.norm1 = LayerNorm2d(channels, eps=1e-6)
        self.ss2d = nn.Sequential(
            *(build_mixer2d(mixer, channels, init=init, act="gelu", options=options) for _ in range(scans))
        )
        self.norm2 = LayerNorm2d(channels, eps=1e-6)
        self.mlp = RGBlock(channels)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.proj(x)
        pixels = self.norm1(self.local(x)).permute(0, 2, 3, 1)
        x = x + self.ss2d(pixels).permute(0, 3, 1, 2)
        return x + self.mlp(self.norm2(x))


class SPPF(nn.Module):
    """Fast spatial pyramid pooling: three chained 5x5 max-pools, all stages concatenated. Shape kept."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = ConvNormAct(channels, channels // 2)
        self.pool = nn.MaxPool2d(5, stride=1, padding=2)
        self.expand = ConvNormAct(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        maps = [self.reduce(x)]
        for _ in range(3):
            maps.append(self.pool(maps[-1]))
        return self.expand(torch.cat(maps, dim=1))
