"""Options of data loading and augmentation. No heavy imports: `vssm detect train --help` reads this file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vision_ssm.errors import UserError


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes of training pictures; the defaults are Mamba-YOLO's.

    Attributes:
        mosaic: Probability of joining four pictures into one.
        close_mosaic: The last epochs, trained without mosaic and mixup.
        mixup: Probability of blending with a second (mosaic) picture.
        translate: Shift, at most this share of the picture's side.
        scale: Size change by a factor in 1 - scale .. 1 + scale.
        degrees: Rotation, at most this angle either way.
        shear: Shear angle in degrees, at most this either way.
        hsv_h: Hue change, at most this share of the colour circle.
        hsv_s: Saturation change by a factor in 1 - hsv_s .. 1 + hsv_s.
        hsv_v: Brightness change by a factor in 1 - hsv_v .. 1 + hsv_v.
        flip_lr: Probability of swapping left and right.
        flip_ud: Probability of swapping up and down: for pictures without an upright (aerial, microscope).
    """

    mosaic: float = 1.0
    close_mosaic: int = 10
    mixup: float = 0.0
    translate: float = 0.1
    scale: float = 0.5
    degrees: float = 0.0
    shear: float = 0.0
    hsv_h: float = 0.015
    hsv_s: float = 0.7
    hsv_v: float = 0.4
    flip_lr: float = 0.5
    flip_ud: float = 0.0

    def __post_init__(self) -> None:
        for name in ("mosaic", "mixup", "flip_lr", "flip_ud"):
            _between(name, getattr(self, name), 0, 1)
        for name in ("translate", "scale", "hsv_h", "hsv_s", "hsv_v"):
            _between(name, getattr(self, name), 0, 0.999)
        _between("degrees", self.degrees, 0, 180)
        _between("shear", self.shear, 0, 45)
        if self.close_mosaic < 0:
            raise UserError(f"close_mosaic counts epochs and cannot be negative: {self.close_mosaic}")


@dataclass(frozen=True)
class DataConfig:
    """Which pictures, how large, and how they are loaded.

    Attributes:
        path: Folder of the data set (or the yaml of a YOLO set).
        train: Split to train on.
        val: Split to validate on.
        image_size: Long side in pixels, a multiple of 32.
        cache: "ram" keeps the decoded and resized pictures in memory.
        augment: Random changes of training pictures.
    """

    path: str = ""
    train: str = "train"
    val: str = "val"
    image_size: int = 640
    cache: Literal["none", "ram"] = "none"
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        if self.image_size < 32 or self.image_size % 32:
            raise UserError(f"image_size must be a multiple of 32, from 32 up: {self.image_size}")


def _between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UserError(f"{name} must lie in {low} to {high}: {value}")
