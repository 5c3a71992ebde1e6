"""Mamba-YOLO: a YOLO detector whose backbone and neck blocks scan the feature map (arXiv 2406.05835).

Top to bottom: stem, four stages of ODSS blocks joined by vision-clue merges, spatial pyramid pooling, a
path-aggregation neck, a decoupled head. The default is exactly the released code: with the local block (LSBlock) and
stage repeats 3, 3, 9, 3; the paper's later version has no local block and repeats 3, 6, 6, 3.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models import checkpoint_seq
from torch import Tensor, nn

from detection.blocks import SPPF, ConvNormAct, ODSSBlock, SimpleStem, VisionClueMerge
from detection.config import check_width
from detection.head import STRIDES, DetectionHead
from detection.timm_backbone import TimmBackbone
from vision_ssm.errors import UserError
from vision_ssm.mixer_config import MapPattern, MixerName, MixerStack, ScanOptions
from vision_ssm.scan_parameters import Init

SizeName = Literal["t", "b", "l"]


@dataclass(frozen=True)
class Scale:
    """Scaling of one model size: depth and width multipliers and the cap on channels before scaling."""

    depth: float
    width: float
    max_channels: int

    def channels(self, base: int) -> int:
        """Scaled width, a multiple of 8."""
        return math.ceil(min(base, self.max_channels) * self.width / 8) * 8

    def repeats(self, base: int) -> int:
        """Scaled number of blocks, at least one."""
        return max(round(base * self.depth), 1)


SCALES: dict[str, Scale] = {"t": Scale(0.33, 0.25, 1024), "b": Scale(0.33, 0.50, 1024), "l": Scale(0.67, 0.75, 768)}
STAGE_CHANNELS = (128, 256, 512, 1024)
STAGE_REPEATS = (3, 3, 9, 3)
NECK_SCANS = 3


class Backbone(nn.Module):
    """(B, in_channels, H, W) -> maps at strides 8, 16, 32."""

    def __init__(
        self,
        widths: Sequence[int],
        repeats: Sequence[int],
        *,
        lsblock: bool,
        init: Init,
        stack: MixerStack,
        in_channels: int = 3,
    ) -> None:
        super().__init__()

        def stage(width: int, repeat: int) -> nn.Sequential:
            layers = stack.layers(repeat, coarse=width in widths[-2:])
            return nn.Sequential(
                *(ODSSBlock(width, width, lsblock=lsblock, init=init, mixer=m, options=o) for m, o in layers)
            )

        self.stem = SimpleStem(in_channels, widths[0])
        self.stages = nn.ModuleList(stage(width, repeat) for width, repeat in zip(widths, repeats, strict=True))
        self.merges = nn.ModuleList(VisionClueMerge(a, b) for a, b in pairwise(widths))
        self.sppf = SPPF(widths[-1])
        self.grad_checkpointing = False

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See the class."""
        _, c3, c4, c5 = self.maps(images)
        return c3, c4, c5

    def maps(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Also the map at stride 4."""
        c2 = self._stage(0, self.stem(images))
        c3 = self._stage(1, self.merges[0](c2))
        c4 = self._stage(2, self.merges[1](c3))
        c5 = self._stage(3, self.merges[2](c4))
        return c2, c3, c4, self.sppf(c5)

    def _stage(self, i: int, x: Tensor) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint_seq(self.stages[i], x)
        return self.stages[i](x)


class Neck(nn.Module):
    """Path aggregation: top-down, then bottom-up. Widths are kept. Mixers are of one kind, patterns are for stages."""

    def __init__(self, widths: Sequence[int], scans: int, *, lsblock: bool, init: Init, stack: MixerStack) -> None:
        super().__init__()

        def block(in_channels: int, channels: int) -> ODSSBlock:
            return ODSSBlock(
                in_channels, channels, neck=True, scans=scans, lsblock=lsblock, init=init,
                mixer=stack.mixer, options=stack.options,
            )  # fmt: skip

        w3, w4, w5 = widths
        self.top_down4 = block(w5 + w4, w4)
        self.top_down3 = block(w4 + w3, w3)
        self.down3 = ConvNormAct(w3, w3, 3, stride=2)
        self.bottom_up4 = block(w3 + w4, w4)
        self.down4 = ConvNormAct(w4, w4, 3, stride=2)
        self.bottom_up5 = block(w4 + w5, w5)

    def forward(self, c3: Tensor, c4: Tensor, c5: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See the class."""
        t4 = self.top_down4(torch.cat((_upsample(c5), c4), dim=1))
        p3 = self.top_down3(torch.cat((_upsample(t4), c3), dim=1))
        p4 = self.bottom_up4(torch.cat((self.down3(p3), t4), dim=1))
        p5 = self.bottom_up5(torch.cat((self.down4(p4), c5), dim=1))
        return p3, p4, p5


class MambaYOLO(nn.Module):
    """Mamba-YOLO T, B or L.

    Parameters at 80 classes with the 16 fixed bin values: 6,131,704 / 21,828,000 / 57,631,024.

    Args:
        size: ``t``, ``b`` or ``l``.
        num_classes: Number of classes, labels 0 .. num_classes - 1.
        lsblock: Keep the local block before every scan.
        stage_repeats: Blocks per backbone stage before the size's depth multiplier.
        width: Multiplier of all widths instead of the size's (0.25, 0.5, 0.75); channels are rounded up to eights.
        init: Initial scan constants: ``official`` as the released code, ``vmamba`` as Mamba and VMamba.
        mixer: What mixes the pixels, see ``vision_ssm.mixers2d``.
        mixer_pattern: Where attention stands among the blocks of a backbone stage, see ``vision_ssm.mixer_config``;
            last_half_attention changes the last two stages alone (MambaVision).
        polar: Option of scans, see ``vision_ssm.mixer_config``.
        smr: Option of scans, see there.
        backbone: Name, options and statistics of a network of timm in place of the own backbone, as those of
            ``detection.timm_backbone.TimmBackbone``; what is said of stages above then goes for the neck alone.

    Raises:
        UserError: Unknown size or mixer, fewer than one class, not four positive repeats, a width out of range, or
            options that do not fit.
    """

    def __init__(
        self,
        size: SizeName = "t",
        num_classes: int = 80,
        *,
        lsblock: bool = True,
        stage_repeats: Sequence[int] = STAGE_REPEATS,
        width: float | None = None,
        init: Init = "official",
        mixer: MixerName = "s6",
        mixer_pattern: MapPattern = "same",
        polar: Sequence[int] = (0, 0),
        smr: int = 0,
        backbone: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if size not in SCALES:
            raise UserError(f"Mamba-YOLO has the sizes {', '.join(SCALES)}; got {size!r}")
        if num_classes < 1:
            raise UserError(f"num_classes must be at least 1, got {num_classes}")
        if len(stage_repeats) != len(STAGE_CHANNELS) or min(stage_repeats) < 1:
            raise UserError(f"stage_repeats must be four positive numbers such as 3,3,9,3; got {tuple(stage_repeats)}")
        check_width(width)
        self.num_classes = num_classes
        self.config: dict[str, Any] = {
            "size": size,
            "num_classes": num_classes,
            "lsblock": lsblock,
            "stage_repeats": tuple(stage_repeats),
            "width": width,
            "init": init,
            "mixer": mixer,
            "mixer_pattern": mixer_pattern,
            "polar": tuple(polar),
            "smr": smr,
            "backbone": dict(backbone or {}),
        }
        """Arguments that build this model again: ``MambaYOLO(**model.config)``."""
        stack = MixerStack(mixer, mixer_pattern, ScanOptions(polar, smr), maps=True)
        scale = SCALES[size] if width is None else replace(SCALES[size], width=width)
        widths = [scale.channels(c) for c in STAGE_CHANNELS]
        repeats = [scale.repeats(n) for n in stage_repeats]
        if backbone:
            self.backbone = TimmBackbone(**backbone, widths=widths[1:])
        else:
            self.backbone = Backbone(widths, repeats, lsblock=lsblock, init=init, stack=stack)
        self.neck = Neck(widths[1:], scale.repeats(NECK_SCANS), lsblock=lsblock, init=init, stack=stack)
        self.head = DetectionHead(widths[1:], num_classes)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Detect objects, in training and in evaluation alike.

        Args:
            images: (B, 3, H, W) in [0, 1], RGB; H and W multiples of 32.

        Returns:
            Raw maps P3, P4, P5: (B, 64 + num_classes, H / stride, W / stride) at strides 8, 16, 32. ``decode`` turns
            them into boxes and scores, ``DetectionLoss`` into a loss.

        Raises:
            UserError: The images have another shape.
        """
        _check_images(images)
        images = images.contiguous(memory_format=torch.channels_last)
        return self.head(self.neck(*self.backbone(images)))


def _check_images(images: Tensor) -> None:
    shape = tuple(images.shape)
    if images.ndim != 4 or shape[1] != 3:
        raise UserError(f"images must be (batch, 3, height, width), got {shape}")
    if shape[2] % STRIDES[-1] or shape[3] % STRIDES[-1]:
        raise UserError(
            f"image height and width must be multiples of {STRIDES[-1]}, got {shape[2]}x{shape[3]}; "
            "pad or letterbox the images first"
        )


def _upsample(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
