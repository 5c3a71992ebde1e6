"""One picture with everything that its file carries: depth, grey or colour, transparency, profile, EXIF, resolution."""

from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from torch import Tensor

from vision_ssm.errors import UserError

# Shapes: H/W height and width, C 1 (grey) or 3 (RGB).

_WHITE = {"uint8": 255, "uint16": 65535, "float32": 1}
_LOW, _HIGH = -8.0, 9.0  # the strongest noise that `degrade` makes stays inside, other scales do not


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded picture, upright.

    Attributes:
        pixels: (H, W, C) uint8, uint16, or float32 with 1.0 for white.
        alpha: (H, W) of the same type, straight (not multiplied into the pixels), or None.
        icc: colour profile as in the file, or None.
        exif: EXIF data without the leading "Exif" mark, its orientation 1, or None.
        dpi: horizontal and vertical resolution in dots per inch, or None.
        notes: what a person should know about how the file was read.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    icc: bytes | None = None
    exif: bytes | None = None
    dpi: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.pixels.shape[0], self.pixels.shape[1]

    @property
    def is_grey(self) -> bool:
        """Whether it has one channel."""
        return self.pixels.shape[2] == 1

    @property
    def bits(self) -> int:
        """Bits per value: 8, 16, or 32 for floats."""
        return self.pixels.dtype.itemsize * 8

    def to_tensor(self) -> Tensor:
        """(3, H, W) float32 with 1.0 for white; what is fully transparent gets the colour of its nearest neighbour."""
        pixels = self.pixels
        if self.alpha is not None:
            pixels = _without_hidden_colour(pixels, self.alpha)
        scaled = pixels.astype(np.float32) / _WHITE[pixels.dtype.name]
        return torch.from_numpy(np.ascontiguousarray(scaled.transpose(2, 0, 1))).expand(3, -1, -1)

    def with_result(self, result: Tensor) -> "Picture":
        """The same picture with restored pixels, which may be larger.

        Args:
            result: (3, H', W') float; 8 and 16 bits are limited to their range, floats are not.
        """
        if self.is_grey:
            result = result.mean(0, keepdim=True)
        pixels = _as_type(result.permute(1, 2, 0).float(), self.pixels.dtype)
        alpha = self.alpha
        if alpha is not None and pixels.shape[:2] != alpha.shape:
            height, width = pixels.shape[:2]
            # Linear, because sharper filters make halos at the edges of cut-out objects.
            alpha = cv2.resize(alpha, (width, height), interpolation=cv2.INTER_LINEAR)
        return replace(self, pixels=pixels, alpha=alpha)


def check_floats(pixels: np.ndarray) -> None:
    """Refuse (H, W, C) floats that are no picture; whole numbers always are one.

    Raises:
        UserError: values that are not finite, or on another scale.
    """
    if pixels.dtype != np.float32:
        return
    finite = np.isfinite(pixels)
    if not finite.all():
        row, column = np.argwhere(~finite)[0][:2]
        raise UserError(
            f"{int((~finite).sum())} values are not finite (NaN or infinite), the first in row {row}, column "
            f"{column}; replace them first"
        )
    low, high = float(pixels.min()), float(pixels.max())
    if low < _LOW or high > _HIGH:
        raise UserError(
            f"float pixels must have 0 for black and 1 for white, got {low:.4g} to {high:.4g}; rescale them"
        )


def _without_hidden_colour(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Pixels whose colour nobody sees take that of the nearest one that is seen, so that none leaks over an edge."""
    hidden = alpha == 0
    if not hidden.any() or hidden.all():
        return pixels
    _, labels = cv2.distanceTransformWithLabels(
        hidden.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    nearest = np.empty(labels.max() + 1, np.int64)
    nearest[labels[~hidden]] = np.flatnonzero(~hidden)
    return pixels.reshape(-1, pixels.shape[2])[nearest[labels]]


def _as_type(values: Tensor, dtype: np.dtype) -> np.ndarray:
    if dtype == np.float32:
        return values.numpy()
    return np.rint(values.clamp(0, 1).numpy() * _WHITE[dtype.name]).astype(dtype)
