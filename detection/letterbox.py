"""Fitting a picture into the shape the network sees, and the way back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np

PAD_VALUE = 114
STRIDE = 32


def resize_long_side(image: np.ndarray, size: int) -> tuple[np.ndarray, float]:
    """Resize (bilinear) so that the longer side has `size` pixels.

    Returns:
        ((h, w, 3) picture, ratio new / old).
    """
    height, width = image.shape[:2]
    ratio = size / max(height, width)
    if ratio == 1:
        return image, 1.0
    shape = (max(round(width * ratio), 1), max(round(height * ratio), 1))
    return cv2.resize(image, shape, interpolation=cv2.INTER_LINEAR), ratio


def pad_to(image: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, int, int]:
    """Centre a picture on a grey canvas of `shape` (height, width), which must hold it.

    Returns:
        (canvas, columns added on the left, rows added on top).
    """
    height, width = image.shape[:2]
    top, left = (shape[0] - height) // 2, (shape[1] - width) // 2
    canvas = np.full((*shape, 3), PAD_VALUE, np.uint8)
    canvas[top : top + height, left : left + width] = image
    return canvas, left, top


def letterbox(
    image: np.ndarray, size: int, shape: tuple[int, int] | None = None
) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Resize to long side `size` and pad.

    Args:
        image: (H, W, 3) uint8.
        size: Length of the longer side after resizing.
        shape: (height, width) to pad to; by default the next multiples of 32.

    Returns:
        (picture, (ratio, left, top)); a point of the result is at ((x - left) / ratio, (y - top) / ratio) in `image`.
    """
    resized, ratio = resize_long_side(image, size)
    if shape is None:
        shape = tuple(math.ceil(side / STRIDE) * STRIDE for side in resized.shape[:2])  # type: ignore[assignment]
    assert shape is not None
    padded, left, top = pad_to(resized, shape)
    return padded, (ratio, float(left), float(top))


def rectangular_batches(
    sizes: Sequence[tuple[int, int]], batch_size: int, image_size: int
) -> list[tuple[list[int], tuple[int, int]]]:
    """Deal pictures out into batches of similar aspect, each with the smallest shape that serves all of it.

    The shape is ceil(side * image_size / 32 + 0.5) * 32, with side 1 for the longer axis: half a stride is added, so
    that objects at the border keep some surroundings (640 becomes 672).

    Args:
        sizes: (width, height) of each picture.
        batch_size: Pictures in a batch.
        image_size: Long side of the pictures.

    Returns:
        For each batch the positions of its pictures and its (height, width).
    """
    aspect = np.array([height / width for width, height in sizes])
    order = np.argsort(aspect, kind="stable")
    batches = []
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        low, high = aspect[members[0]], aspect[members[-1]]
        sides = (min(high, 1.0), min(1 / low, 1.0))
        height, width = (math.ceil(side * image_size / STRIDE + 0.5) * STRIDE for side in sides)
        batches.append((members.tolist(), (height, width)))
    return batches
