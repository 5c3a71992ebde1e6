"""Masks of missing pixels for inpainting: a box, single pixels, or brush strokes."""

from typing import Literal

import cv2
import numpy as np

MaskName = Literal["box", "random", "free-form", "mixed"]

_STROKES = (1, 6)
_CORNERS = (4, 12)


def draw_mask(
    name: MaskName, shape: tuple[int, int], *, size: int, drop: float, rng: np.random.Generator
) -> np.ndarray:
    """Draw which pixels are known.

    Args:
        name: box (one square), random (each pixel for itself), free-form (strokes of a brush, after "Free-form image
            inpainting with gated convolution", arXiv 1806.03589, algorithm 1), mixed (one of these, drawn).
        shape: (H, W).
        size: side of the box in pixels, of which at most half of the shorter side is taken.
        drop: share of the pixels that are missing in a random mask.
        rng: what is drawn comes from here.

    Returns:
        (H, W) float32, 1.0 for known and 0.0 for missing.
    """
    if name == "mixed":
        name = ("box", "random", "free-form")[rng.integers(3)]
    if name == "box":
        return _box(shape, size, rng)
    if name == "random":
        return (rng.random(shape) >= drop).astype(np.float32)
    return _strokes(shape, rng)


def _box(shape: tuple[int, int], size: int, rng: np.random.Generator) -> np.ndarray:
    side = max(1, min(size, min(shape) // 2))
    top, left = (int(rng.integers(length - side + 1)) for length in shape)
    known = np.ones(shape, np.float32)
    known[top : top + side, left : left + side] = 0
    return known


def _strokes(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Polylines whose segments turn by about 144 degrees, back and forth, with round corners."""
    height, width = shape
    shorter = min(shape)
    missing = np.zeros(shape, np.uint8)
    for _ in range(int(rng.integers(*_STROKES))):
        x, y = float(rng.uniform(0, width)), float(rng.uniform(0, height))
        thickness = max(1, round(float(rng.uniform(0.03, 0.1)) * shorter))
        for corner in range(int(rng.integers(*_CORNERS))):
            angle = rng.normal(2 * np.pi / 5, 2 * np.pi / 15) + (np.pi if corner % 2 else 0)
            length = rng.uniform(0.05, 0.25) * shorter
            end_x = float(np.clip(x + length * np.cos(angle), 0, width - 1))
            end_y = float(np.clip(y + length * np.sin(angle), 0, height - 1))
            cv2.line(missing, (round(x), round(y)), (round(end_x), round(end_y)), 1, thickness)
            cv2.circle(missing, (round(end_x), round(end_y)), thickness // 2, 1, cv2.FILLED)
            x, y = end_x, end_y
    return 1 - missing.astype(np.float32)
