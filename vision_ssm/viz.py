"""Pictures for people: boxes with captions, grids of pictures, saving."""

import colorsys
import functools
import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vision_ssm.errors import UserError
from vision_ssm.files import write_bytes

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
"""Endings that `save_picture` can write."""

_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
_CROWD = 30


def class_color(label: int) -> tuple[int, int, int]:
    """RGB colour of a class; neighbouring labels get far apart hues, the same label always the same colour."""
    lightness, saturation = ((0.55, 0.95), (0.42, 0.85), (0.68, 0.9))[label // 7 % 3]
    red, green, blue = colorsys.hls_to_rgb((0.02 + label * _GOLDEN_RATIO) % 1, lightness, saturation)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_boxes(
    image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, captions: Sequence[str] | None = None
) -> np.ndarray:
    """Draw boxes in the colours of their classes, on a copy.

    Line width and letters grow with the picture. Captions of earlier boxes win: one that would cover another caption
    is left out, so give the best boxes first. In a crowd (over 30 boxes) lines are thin, letters small, and a caption
    is left out that is more than twice as wide as its box, so that the objects can still be seen.

    Args:
        image: (H, W, 3) uint8 RGB.
        boxes: (n, 4) xyxy pixels.
        labels: (n,) classes.
        captions: one text for each box, in any script that DejaVu Sans has; none to draw boxes alone.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    canvas = np.ascontiguousarray(image).copy()
    longest = max(canvas.shape[:2])
    crowded = len(boxes) > _CROWD
    width = max(1, round(longest / (640 if crowded else 320)))
    colors = [class_color(int(label)) for label in labels]
    corners = [tuple(int(v) for v in np.floor(np.clip(box, -longest, 2 * longest))) for box in boxes]
    for (x1, y1, x2, y2), color in reversed(list(zip(corners, colors, strict=True))):
        cv2.rectangle(canvas, (x1, y1), (x2, y2), color, width)
    if not captions:
        return canvas
    size = min(max(round(longest / (96 if crowded else 48)), 11), 40)
    return _draw_captions(canvas, corners, colors, captions, size, most=2.0 if crowded else math.inf)


def _draw_captions(
    canvas: np.ndarray,
    corners: list[tuple[int, ...]],
    colors: list[tuple[int, int, int]],
    captions: Sequence[str],
    size: int,
    most: float,
) -> np.ndarray:
    """Write captions; `most` is the largest width of a caption in widths of its box."""
    height, width = canvas.shape[:2]
    picture = Image.fromarray(canvas)
    draw, font = ImageDraw.Draw(picture), _font(size)
    ascent, descent = font.getmetrics()
    taken: list[tuple[int, int, int, int]] = []
    for (x1, y1, x2, _), color, caption in zip(corners, colors, captions, strict=True):
        wide, high = math.ceil(font.getlength(caption)) + 4, ascent + descent
        if wide > most * max(x2 - x1, 1):
            continue
        left = min(max(x1, 0), max(width - wide, 0))
        top = y1 - high if y1 >= high else min(max(y1, 0), max(height - high, 0))
        place = (left, top, left + wide, top + high)
        if any(_overlap(place, other) for other in taken):
            continue
        taken.append(place)
        draw.rectangle(place, fill=color)
        draw.text((left + 2, top), caption, fill=_ink(color), font=font)
    return np.array(picture)


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _ink(color: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever is read better on a colour."""
    red, green, blue = color
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    # matplotlib brings a font with Latin, Greek and Cyrillic letters; OpenCV's own has ASCII alone.
    from matplotlib import get_data_path

    return ImageFont.truetype(str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def grid(
    images: Sequence[np.ndarray], *, columns: int | None = None, cell: tuple[int, int] | None = None, gap: int = 4
) -> np.ndarray:
    """Pictures side by side, each shrunk or enlarged to fit its cell, centred, on white.

    Args:
        images: (H, W, 3) uint8 RGB each, of any sizes.
        columns: pictures in a row; by default about as many as rows.
        cell: (height, width) of a cell; by default the largest height and width.
        gap: white pixels between cells.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        ValueError: no pictures.
    """
    if not images:
        raise ValueError("a grid needs at least one picture")
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    rows = math.ceil(len(images) / columns)
    high, wide = cell or (max(i.shape[0] for i in images), max(i.shape[1] for i in images))
    canvas = np.full((rows * (high + gap) - gap, columns * (wide + gap) - gap, 3), 255, dtype=np.uint8)
    for k, image in enumerate(images):
        fitted = fit(image, high, wide)
        top = k // columns * (high + gap) + (high - fitted.shape[0]) // 2
        left = k % columns * (wide + gap) + (wide - fitted.shape[1]) // 2
        canvas[top : top + fitted.shape[0], left : left + fitted.shape[1]] = fitted
    return canvas


def fit(image: np.ndarray, high: int, wide: int) -> np.ndarray:
    """The picture at the largest size that fits into (`high`, `wide`), proportions kept."""
    height, width = image.shape[:2]
    scale = min(high / height, wide / width)
    size = (min(max(round(width * scale), 1), wide), min(max(round(height * scale), 1), high))
    if size == (width, height):
        return image
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)


def titled(image: np.ndarray, title: str) -> np.ndarray:
    """A picture with one line of text on white above it.

    Args:
        image: (H, W, 3) uint8 RGB.
        title: the line; what does not fit is cut.
    """
    size = min(max(round(image.shape[1] / 32), 11), 28)
    font = _font(size)
    strip = Image.new("RGB", (image.shape[1], size + size // 2), "white")
    ImageDraw.Draw(strip).text((2, size // 8), title, fill="black", font=font)
    return np.concatenate((np.asarray(strip), image))


def save_picture(path: str | Path, image: np.ndarray) -> None:
    """Write a picture in the format of its ending; the file appears complete or not at all.

    Args:
        path: file; folders are made as needed.
        image: (H, W, 3) uint8 RGB.

    Raises:
        UserError: the ending is not a picture's, or the file cannot be written.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in PICTURE_SUFFIXES:
        raise UserError(f"cannot save a picture as {path}: the ending must be one of {' '.join(PICTURE_SUFFIXES)}")
    quality = [cv2.IMWRITE_JPEG_QUALITY, 92] if suffix in (".jpg", ".jpeg") else []
    ok, data = cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), quality)
    if not ok:
        raise UserError(f"cannot save a picture as {path}: OpenCV could not encode {image.shape[1]}x{image.shape[0]}")
    write_bytes(path, data.tobytes())
