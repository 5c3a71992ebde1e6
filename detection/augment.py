"""Mosaic, affine, colour, flips and mixup of training pictures (Mamba-YOLO's recipe, which is YOLOv8's).

A sample is an (H, W, 3) uint8 RGB picture with (n, 4) float32 xyxy boxes in its pixels (continuous edges) and (n,)
labels. Every function draws from the generator it is given, so that one seed makes one picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from detection.data_config import AugmentConfig
from detection.letterbox import PAD_VALUE

_SMALLEST_SIDE = 2.0  # pixels
_SMALLEST_VISIBLE = 0.1  # of a box's area
_LARGEST_ASPECT = 100.0
_MIXUP_BETA = 32.0


@dataclass(frozen=True, eq=False)
class Sample:
    """A picture with its boxes: image (H, W, 3) uint8 RGB, boxes (n, 4) float32 xyxy pixels, labels (n,) int64."""

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, eq=False)
class _Tile:
    """A sample with the place of its corner (x, y) on the canvas."""

    sample: Sample
    x: int
    y: int


def mosaic(samples: Sequence[Sample], size: int, config: AugmentConfig, rng: np.random.Generator) -> Sample:
    """Four samples around a random centre of a canvas of twice the size, then `random_affine` of it.

    Each pixel is interpolated once: the tiles are warped straight onto the result, the canvas is never made.

    Args:
        samples: Four samples whose longer side is `size`.
        size: Side of the result.
        config: Ranges of the affine part.
        rng: Source of the draws.

    Returns:
        A (size, size) sample.
    """
    x, y = (int(v) for v in rng.uniform(0.5 * size, 1.5 * size, 2))
    tiles = []
    for corner, sample in enumerate(samples):
        height, width = sample.image.shape[:2]
        left = x if corner in (1, 3) else x - width
        top = y if corner in (2, 3) else y - height
        tiles.append(_cut(_Tile(sample, left, top), 2 * size))
    return _compose([tile for tile in tiles if tile is not None], 2 * size, size, config, rng)


def random_affine(sample: Sample, size: int, config: AugmentConfig, rng: np.random.Generator) -> Sample:
    """Centre a sample on a grey (size, size) canvas, then scale, rotate, shear and shift it.

    Args:
        sample: Longer side at most `size`.
        size: Side of the result.
        config: Ranges.
        rng: Source of the draws.
    """
    height, width = sample.image.shape[:2]
    tile = _Tile(sample, (size - width) // 2, (size - height) // 2)
    return _compose([tile], size, size, config, rng)


def mixup(first: Sample, second: Sample, rng: np.random.Generator) -> Sample:
    """Blend two samples of one size and keep the boxes of both (Zhang et al. 2018; weight from Beta(32, 32))."""
    weight = rng.beta(_MIXUP_BETA, _MIXUP_BETA)
    image = cv2.addWeighted(first.image, weight, second.image, 1 - weight, 0)
    boxes = np.concatenate((first.boxes, second.boxes))
    return Sample(image, boxes, np.concatenate((first.labels, second.labels)))


def change_colors(image: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """Random factors on hue, saturation and brightness, by look-up tables."""
    gains = 1 + rng.uniform(-1, 1, 3) * (config.hsv_h, config.hsv_s, config.hsv_v)
    if not (config.hsv_h or config.hsv_s or config.hsv_v):
        return image
    levels = np.arange(256, dtype=np.float64)
    hue = (levels * gains[0]) % 180
    tables = np.stack((hue, *(np.clip(levels * gain, 0, 255) for gain in gains[1:])), axis=-1).astype(np.uint8)
    return cv2.cvtColor(cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), tables[None]), cv2.COLOR_HSV2RGB)


def random_flips(sample: Sample, config: AugmentConfig, rng: np.random.Generator) -> Sample:
    """Mirror left-right and up-down with the given probabilities."""
    left_right, up_down = rng.random(2) < (config.flip_lr, config.flip_ud)
    image, boxes = sample.image, sample.boxes
    height, width = image.shape[:2]
    if left_right:
        image = cv2.flip(image, 1)
        boxes = np.stack((width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]), axis=1)
    if up_down:
        image = cv2.flip(image, 0)
        boxes = np.stack((boxes[:, 0], height - boxes[:, 3], boxes[:, 2], height - boxes[:, 1]), axis=1)
    return Sample(image, boxes, sample.labels)


def _cut(tile: _Tile, side: int) -> _Tile | None:
    """The part of a tile that lies on a (side, side) canvas; boxes are cut too, those outside are dropped."""
    height, width = tile.sample.image.shape[:2]
    x1, y1 = max(tile.x, 0), max(tile.y, 0)
    x2, y2 = min(tile.x + width, side), min(tile.y + height, side)
    if x2 <= x1 or y2 <= y1:
        return None
    image = tile.sample.image[y1 - tile.y : y2 - tile.y, x1 - tile.x : x2 - tile.x]
    boxes = tile.sample.boxes - np.array((x1 - tile.x, y1 - tile.y) * 2, np.float32)
    boxes = np.clip(boxes, 0, np.array((x2 - x1, y2 - y1) * 2, np.float32))
    keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return _Tile(Sample(image, boxes[keep], tile.sample.labels[keep]), x1, y1)


def _draw_matrix(side: int, size: int, config: AugmentConfig, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """((2, 3) matrix from canvas to result, in continuous coordinates; scale factor)."""
    angle = math.radians(rng.uniform(-config.degrees, config.degrees))
    scale = rng.uniform(1 - config.scale, 1 + config.scale)
    shear = np.tan(np.radians(rng.uniform(-config.shear, config.shear, 2)))
    shift = rng.uniform(0.5 - config.translate, 0.5 + config.translate, 2) * size
    turn = scale * np.array(((math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))))
    linear = np.array(((1, shear[0]), (shear[1], 1))) @ turn
    offset = shift - linear @ (side / 2, side / 2)
    return np.column_stack((linear, offset)), scale


def _compose(tiles: Sequence[_Tile], side: int, size: int, config: AugmentConfig, rng: np.random.Generator) -> Sample:
    """Warp tiles on a canvas of `side` to a (size, size) sample with one random affine map."""
    matrix, scale = _draw_matrix(side, size, config, rng)
    result = np.full((size, size, 3), PAD_VALUE, np.uint8)
    boxes, labels = [np.zeros((0, 4), np.float32)], [np.zeros(0, np.int64)]
    for tile in tiles:
        moved = matrix.copy()
        moved[:, 2] += matrix[:, :2] @ (tile.x, tile.y)
        _warp(tile.sample.image, moved, result)
        new = np.clip(_move_boxes(tile.sample.boxes, moved), 0, size)
        keep = _worth_keeping(tile.sample.boxes, new, scale)
        boxes.append(new[keep])
        labels.append(tile.sample.labels[keep])
    return Sample(result, np.concatenate(boxes), np.concatenate(labels))


def _warp(image: np.ndarray, matrix: np.ndarray, result: np.ndarray) -> None:
    """Draw `image` onto `result`; only the part of the result that it covers is touched."""
    height, width = image.shape[:2]
    corners = matrix[:, :2] @ np.array(((0, width, 0, width), (0, 0, height, height))) + matrix[:, 2:]
    low, high = corners.min(1), corners.max(1)
    # A pixel is drawn when its centre is covered, so neighbouring tiles neither overlap nor leave a gap.
    x1, y1 = (max(math.ceil(v - 0.5), 0) for v in low)
    x2, y2 = (min(math.ceil(v - 0.5), s) for v, s in zip(high, (result.shape[1], result.shape[0]), strict=True))
    if x2 <= x1 or y2 <= y1:
        return
    # OpenCV maps pixel numbers, which are centres minus one half.
    offset = matrix[:, :2] @ (0.5, 0.5) + matrix[:, 2] - 0.5 - (x1, y1)
    upright = matrix[0, 1] == 0 and matrix[1, 0] == 0
    cv2.warpAffine(
        image,
        np.column_stack((matrix[:, :2], offset)),
        (x2 - x1, y2 - y1),
        dst=result[y1:y2, x1:x2],
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE if upright else cv2.BORDER_TRANSPARENT,
    )


def _move_boxes(boxes: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Upright boxes around the moved corners, (n, 4) float32."""
    corners = boxes[:, (0, 1, 2, 1, 2, 3, 0, 3)].reshape(-1, 4, 2) @ matrix[:, :2].T + matrix[:, 2]
    return np.concatenate((corners.min(1), corners.max(1)), axis=1).astype(np.float32)


def _worth_keeping(old: np.ndarray, new: np.ndarray, scale: float) -> np.ndarray:
    """Boxes that are still large enough, mostly visible and no slivers."""
    width, height = (new[:, 2:] - new[:, :2]).T
    area = (old[:, 2:] - old[:, :2]).prod(1) * scale**2
    aspect = np.maximum(width / (height + 1e-9), height / (width + 1e-9))
    large = (width > _SMALLEST_SIDE) & (height > _SMALLEST_SIDE)
    return large & (width * height > _SMALLEST_VISIBLE * area) & (aspect < _LARGEST_ASPECT)
