"""Digit scenes: handwritten digits of scikit-learn's wheel on photographs of scikit-image's wheel.

A quick set for a first training: no download, large objects, few classes; yet real strokes, real backgrounds, and
train and val share neither digits nor photographs.
"""

from __future__ import annotations

import colorsys
import importlib.util
from pathlib import Path

import cv2
import numpy as np

from detection.samples.voc_folder import VocFolder, build_folder
from vision_ssm.data.images import read_image
from vision_ssm.errors import UserError

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_PHOTOGRAPHS = {
    "train": (
        "astronaut.png",
        "brick.png",
        "camera.png",
        "coffee.png",
        "grass.png",
        "hubble_deep_field.jpg",
        "moon.png",
    ),
    "val": ("chelsea.png", "gravel.png", "rocket.jpg"),
}
_TRAIN_SHARE = 0.8
_SIZES = (32, 64)  # pixels of a digit's 8x8 field
_MOST_DIGITS = 5
_TURN = 15.0  # degrees either way
_INK = 0.3  # what counts as stroke for the box
_NEEDED = "the scenes need scikit-learn and scikit-image: pip install scikit-learn scikit-image"
_CREDIT = """Digit scenes with Pascal VOC boxes, made with seed {seed}.
Digits: "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, UCI Machine Learning Repository 1998,
CC BY 4.0, as shipped in scikit-learn. Photographs: {photographs}, as shipped in scikit-image
(skimage/data; each in the public domain or CC0, see the docstrings of skimage.data).
Changes: digits enlarged, turned and coloured; photographs cropped, resized and mirrored.
"""


def make_scenes(
    folder: str | Path,
    *,
    train: int = 600,
    val: int = 120,
    size: int = 160,
    seed: int = 0,
) -> bool:
    """Make the digit scenes as Pascal VOC.

    Args:
        folder: Where; a folder made before with the same numbers is left as it is.
        train: Pictures to train on.
        val: Pictures to validate on, from other digits and other photographs.
        size: Side of the pictures in pixels, 96 at least.
        seed: The same seed gives the same pictures.

    Returns:
        False when the folder was there already.

    Raises:
        UserError: scikit-learn or scikit-image is missing, a number is out of range, or the folder holds other files.
    """
    if train < 1 or val < 1 or size < 96:
        raise UserError(f"scenes: train and val at least 1, size at least 96; got {train}, {val}, {size}")
    recipe = {"set": "scenes", "version": 2, "train": train, "val": val, "size": size, "seed": seed}

    def fill(made: Path) -> None:
        voc = VocFolder(made)
        strokes = _strokes()
        for number, (split, count) in enumerate((("train", train), ("val", val))):
            photographs = _photographs(split)
            for index in range(count):
                rng = np.random.default_rng((seed, number, index))
                image, boxes, labels = _scene(photographs, strokes[split], size, rng)
                voc.add(split, f"{split}_{index:05d}.jpg", image, boxes, [NAMES[label] for label in labels])
        names = ", ".join(name for split in _PHOTOGRAPHS.values() for name in split)
        (made / "CREDIT.txt").write_text(_CREDIT.format(seed=seed, photographs=names), encoding="utf-8")
        voc.finish()

    return build_folder(Path(folder), recipe, fill)


def _strokes() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each split the (n, 8, 8) strokes in 0..1 and their (n,) labels; the wheel is ordered by writers."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(_NEEDED) from error
    strokes, labels = load_digits(return_X_y=True)
    end = round(_TRAIN_SHARE * len(labels))
    split = {}
    for name, part in (("train", slice(0, end)), ("val", slice(end, None))):
        split[name] = (strokes[part].reshape(-1, 8, 8).astype(np.float32) / 16, labels[part])
    return split


def _photographs(split: str) -> list[np.ndarray]:
    found = importlib.util.find_spec("skimage")
    if found is None or found.origin is None:
        raise UserError(_NEEDED)
    return [read_image(Path(found.origin).parent / "data" / name) for name in _PHOTOGRAPHS[split]]


def _scene(
    photographs: list[np.ndarray], digits: tuple[np.ndarray, np.ndarray], size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """(picture, (n, 4) boxes, labels): up to five digits that do not overlap, on a piece of a photograph."""
    image = _background(photographs[rng.integers(len(photographs))], size, rng)
    boxes: list[tuple[int, int, int, int]] = []
    labels: list[int] = []
    for _ in range(rng.integers(1, _MOST_DIGITS + 1)):
        choice = rng.integers(len(digits[1]))
        stroke = _turned(digits[0][choice], rng)
        height, width = stroke.shape
        x, y = int(rng.integers(size - width + 1)), int(rng.integers(size - height + 1))
        box = (x, y, x + width, y + height)
        if any(_touch(box, other) for other in boxes):
            continue
        _paint(image[y : y + height, x : x + width], stroke, rng)
        boxes.append(box)
        labels.append(int(digits[1][choice]))
    return image, np.array(boxes), labels


def _background(photograph: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A square piece, at least half the shorter side, resized and perhaps mirrored."""
    height, width = photograph.shape[:2]
    side = int(rng.uniform(0.5, 1) * min(height, width))
    x, y = rng.integers(width - side + 1), rng.integers(height - side + 1)
    piece = cv2.resize(photograph[y : y + side, x : x + side], (size, size), interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(piece[:, ::-1]) if rng.random() < 0.5 else piece


def _turned(stroke: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An 8x8 digit enlarged and turned, cut to its strokes; values 0..1."""
    side = int(rng.integers(_SIZES[0], _SIZES[1] + 1))
    turn = cv2.getRotationMatrix2D((3.5, 3.5), rng.uniform(-_TURN, _TURN), side / 8)
    turn[:, 2] += side / 2 - 4
    large = cv2.warpAffine(stroke, turn, (side, side), flags=cv2.INTER_CUBIC).clip(0, 1)
    rows, columns = (np.flatnonzero((large > _INK).any(axis)) for axis in (1, 0))
    return large[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _touch(first: tuple[int, int, int, int], second: tuple[int, int, int, int]) -> bool:
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]


def _paint(patch: np.ndarray, stroke: np.ndarray, rng: np.random.Generator) -> None:
    """Bright ink with a dark rim, so that a digit can be seen on any background."""
    color = np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.3, 1), rng.uniform(0.8, 1))) * 255
    rim = cv2.dilate(stroke, np.ones((3, 3), np.uint8))[..., None]
    ink = np.clip(1.7 * (stroke - 0.25), 0, 1)[..., None]
    patch[:] = (patch * (1 - 0.7 * rim) * (1 - ink) + color * ink).round().astype(np.uint8)
