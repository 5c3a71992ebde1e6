"""What makes a clean image bad: seeded operators, the same for training, for test pairs and for scoring.

Every operator is a frozen dataclass of its parameters with ``apply(image, seed=...)``: (C, H, W) floats with 1.0 for
white in, floats out, which are never clipped where noise is added. The seed comes from the image's name
(``seed_of``), not from its place in a batch, so that any two methods see the same pixels. The work is done on the
CPU, so that they are also the same on every device.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import PurePath
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from restoration.jpeg import through_jpeg, to_uint8
from restoration.kernels2d import correlate, gaussian_blur, motion_kernel
from restoration.masks import MaskName, draw_mask
from restoration.real_chain import degrade_like_a_camera
from restoration.tasks import find_task
from vision_ssm.config import from_dict, near_match, to_dict
from vision_ssm.errors import UserError

Range = float | tuple[float, float]
"""One value for all images, or the bounds between which one is drawn for every image."""

# Shapes: C channels, H/W height and width in pixels, s the scale.


def seed_of(name: str | PurePath, seed: int = 0) -> int:
    """The seed of an image: follows from the file's name without folder and ending, and from ``seed`` of the run."""
    digest = hashlib.sha256(f"{seed}/{PurePath(name).stem}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


class Degradation(ABC):
    """An operator with its parameters."""

    kind: ClassVar[str]
    scale: int = 1
    """The clean image is so many times larger than the result."""

    def apply(self, image: Tensor, *, seed: int) -> Tensor:
        """The degraded image.

        Args:
            image: (C, H, W) floats in [0, 1], on any device; H and W multiples of ``scale``.
            seed: of everything that is drawn; the same seed gives the same result.

        Returns:
            (C, H / scale, W / scale) in the image's type and on its device, outside of [0, 1] where noise leads there;
            `Mask` adds a channel.

        Raises:
            UserError: The sides of the image are no multiples of ``scale``.
        """
        if image.ndim != 3 or not image.is_floating_point():
            raise UserError(
                f"a degradation takes one (C, H, W) image of floats, got {tuple(image.shape)} {image.dtype}"
            )
        height, width = image.shape[1:]
        if height % self.scale or width % self.scale or not height * width:
            raise UserError(
                f"the sides of an image to be shrunk {self.scale} times must be multiples of {self.scale}, "
                f"got {height}x{width}; crop it with `crop_to_multiple`"
            )
        pixels = np.ascontiguousarray(image.detach().cpu().float().permute(1, 2, 0).numpy())
        result = self._degrade(pixels, np.random.default_rng(seed))
        return torch.from_numpy(np.ascontiguousarray(result.transpose(2, 0, 1))).to(image)

    @abstractmethod
    def _degrade(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(H, W, C) float32 in and out."""

    def levels(self) -> "dict[str, Degradation]":
        """Points at which it is scored: where a parameter is a range, some of its values; else itself."""
        return {self.kind: self}

    def parameters(self) -> dict[str, Any]:
        """JSON values that `degradation_for` takes."""
        return {"kind": self.kind, **to_dict(self)}


@dataclass(frozen=True)
class Noise(Degradation):
    """Gaussian noise, not clipped."""

    sigma: Range = (0.0, 50.0)
    """Standard deviation, in 255ths."""

    kind: ClassVar[str] = "noise"

    def __post_init__(self) -> None:
        _check_range("sigma", self.sigma, 0, 255)

    def _degrade(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return _add_noise(image, _draw(self.sigma, rng) / 255, rng)

    def levels(self) -> dict[str, Degradation]:
        """At 15, 25 and 50, as the field does."""
        return {f"sigma {value:g}": Noise(value) for value in _points(self.sigma, (15.0, 25.0, 50.0))}


@dataclass(frozen=True)
class GaussianBlur(Degradation):
    """Blur by a Gaussian, borders reflected, then Gaussian noise, not clipped."""

    sigma: Range = 3.0
    """Of the blur, in pixels."""
    kernel: int = 61
    """Side of the kernel in pixels, odd."""
    noise: float = 0.05
    """Standard deviation of the noise, 1.0 for white."""

    kind: ClassVar[str] = "gaussian-blur"

    def __post_init__(self) -> None:
        _check_range("sigma", self.sigma, 1e-3, 100)
        _check_kernel(self.kernel)
        _check_range("noise", self.noise, 0, 1)

    def _degrade(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        blurred = gaussian_blur(image, self.kernel, _draw(self.sigma, rng))
        return _add_noise(blurred, self.noise, rng)


@dataclass(frozen=True)
class MotionBlur(Degradation):
    """Blur along the path of a moving camera, drawn anew for every image, then Gaussian noise, not clipped."""

    intensity: float = 0.5
    """0 for a straight line, 1 for a path that turns all the time."""
    kernel: int = 61
    """Side of the kernel in pixels, odd."""
    noise: float = 0.05
    """Standard deviation of the noise, 1.0 for white."""

    kind: ClassVar[str] = "motion-blur"

    def __post_init__(self) -> None:
        _check_range("intensity", self.intensity, 0, 1)
        _check_kernel(self.kernel)
        _check_range("noise", self.noise, 0, 1)

    def drawn_kernel(self, seed: int) -> np.ndarray:
        """The (kernel, kernel) float32 kernel that `apply` with this seed convolves with; its sum is 1."""
        return motion_kernel(self.kernel, self.intensity, np.random.default_rng(seed))

    def _degrade(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        kernel = motion_kernel(self.kernel, self.intensity, rng)
        return _add_noise(correlate(image, kernel[::-1, ::-1]), self.noise, rng)


@dataclass(frozen=True)
class Downscale(Degradation):
    """Antialiased bicubic reduction (a = -0.5, as Pillow and MATLAB), rounded to 8 bits."""

    scale: int = 4

    kind: ClassVar[str] = "downscale"

    def __post_init__(self) -> None:
        _check_scale(self.scale)

    def _degrade(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return to_uint8(_bicubic(image, 1 / self.scale)).astype(np.float32) / 255


@dataclass(frozen=True)
class Jpeg(Degradation):
    """JPEG as libjpeg writes it, colours at half resolution (4:2:0)."""

    quality: Range = (10.0, 40.0)

    kind: ClassVar[str] = "jpeg"

    def __post_init__(self) -> None:
        _check_range("quality", self.quality, 1, 100)

    def _degrade(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        quality = round(_draw(self.quality, rng))
        return through_jpeg(image, quality)

    def levels(self) -> dict[str, Degradation]:
        """At 10, 20, 30 and 40, as the field does."""
        return {f"quality {value:g}": Jpeg(value) for value in _points(self.quality, (10.0, 20.0, 30.0, 40.0))}


@dataclass(frozen=True)
class Mask(Degradation):
    """Missing pixels: they become 0, and a channel with 1.0 for each known pixel is added at the end."""

    mask: MaskName = "box"
    size: int = 128
    """Side of the box in pixels; at most half of the image's shorter side is taken."""
    drop: float = 0.92
    """Share of the pixels that a random mask drops."""

    kind: ClassVar[str] = "mask"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"size must be 1 or more, got {self.size}")
        _check_range("drop", self.drop, 0, 1)

    def _degrade(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        known = draw_mask(self.mask, image.shape[:2], size=self.size, drop=self.drop, rng=rng)[..., None]
        return np.concatenate((image * known, known), axis=2)


@dataclass(frozen=True)
class Real(Degradation):
    """What happens to a picture on its way to the web: see `restoration.real_chain`."""

    scale: int = 4

    kind: ClassVar[str] = "real"

    def __post_init__(self) -> None:
        _check_scale(self.scale)

    def _degrade(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return degrade_like_a_camera(image, self.scale, rng)


KINDS: dict[str, type[Degradation]] = {
    operator.kind: operator for operator in (Noise, GaussianBlur, MotionBlur, Downscale, Jpeg, Mask, Real)
}
_OF_TASK = {
    "denoise": "noise", "deblur": "gaussian-blur", "motion": "motion-blur", "sr2": "downscale", "sr4": "downscale",
    "sr8": "downscale", "jpeg": "jpeg", "inpaint": "mask",
}  # fmt: skip


def degradation_for(task: str, parameters: Mapping[str, Any] | None = None) -> Degradation:
    """The operator that makes a task's inputs.

    Args:
        task: a name of `restoration.tasks`.
        parameters: replace those of the task; ``kind`` takes another operator (one of `KINDS`) than the task's.

    Raises:
        UserError: Unknown task, operator or parameter, or a result of another size or kind than the task has.
    """
    its_task, given = find_task(task), dict(parameters or {})
    kind = given.pop("kind", _OF_TASK[task])
    if kind not in KINDS:
        raise UserError(f"no degradation {kind!r}; there are {', '.join(KINDS)}{near_match(str(kind), KINDS)}")
    if kind == _OF_TASK[task]:
        given = {**its_task.degradation, **given}
    elif "scale" in {f.name for f in fields(KINDS[kind])}:  # type: ignore[arg-type]
        given = {"scale": its_task.scale, **given}
    operator = from_dict(KINDS[kind], given, f"degradation {kind}")
    if operator.scale != its_task.scale or (its_task.in_channels == 4) != isinstance(operator, Mask):
        raise UserError(
            f"the task {task!r} enlarges {its_task.scale} times and reads {its_task.in_channels} channels; "
            f"degradation {kind!r} with {given or 'its defaults'} does not give such an input"
        )
    return operator


def crop_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """(..., H, W) without the last rows and columns, so that both sides are multiples.

    Raises:
        UserError: The image is smaller than ``multiple``.
    """
    height, width = (side - side % multiple for side in image.shape[-2:])
    if not height * width:
        raise UserError(f"an image of {image.shape[-2]}x{image.shape[-1]} cannot be shrunk {multiple} times")
    return image[..., :height, :width]


def enlarge(images: Tensor, scale: int) -> Tensor:
    """Bicubic enlargement (a = -0.5) of (B, C, h, w) to (B, C, h * s, w * s): what a network for enlarging reads."""
    if scale == 1:
        return images
    return F.interpolate(images, scale_factor=scale, mode="bicubic", antialias=True)


def _bicubic(image: np.ndarray, factor: float) -> np.ndarray:
    """(H, W, C) resized by torch, whose antialiased bicubic has Pillow's a = -0.5."""
    size = [round(side * factor) for side in image.shape[:2]]
    planes = torch.from_numpy(image.transpose(2, 0, 1))[None]
    return F.interpolate(planes, size=size, mode="bicubic", antialias=True)[0].numpy().transpose(1, 2, 0)


def _add_noise(image: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    return image + np.float32(sigma) * rng.standard_normal(image.shape, dtype=np.float32)


def _draw(value: Range, rng: np.random.Generator) -> float:
    return float(rng.uniform(*value)) if isinstance(value, tuple) else value


def _points(value: Range, points: tuple[float, ...]) -> tuple[float, ...]:
    """Those of the field's test points that lie in a range, else its middle; a single value is itself."""
    if not isinstance(value, tuple):
        return (value,)
    return tuple(p for p in points if value[0] <= p <= value[1]) or (sum(value) / 2,)


def _check_range(name: str, value: Range, least: float, most: float) -> None:
    low, high = value if isinstance(value, tuple) else (value, value)
    if not least <= low <= high <= most:
        raise UserError(f"{name} must lie between {least:g} and {most:g}, smaller bound first, got {value}")


def _check_kernel(side: int) -> None:
    if side < 1 or side % 2 == 0:
        raise UserError(f"kernel must be a positive odd number of pixels, got {side}")


def _check_scale(scale: int) -> None:
    if scale < 1:
        raise UserError(f"scale must be 1 or more, got {scale}")
