"""Pictures from disk as RGB arrays: one reader for every bit depth, colour mode and orientation."""

from __future__ import annotations

import glob
import io
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vision_ssm.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".gif", ".avif")

_GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N", "F")
_ORIENTATION_TAG = 0x0112
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_GLOB_CHARACTERS = frozenset("*?[")


@dataclass(frozen=True)
class ImageHeader:
    """What the first bytes of a picture say, without decoding it.

    Attributes:
        width: Columns as stored, before any EXIF rotation.
        height: Rows as stored.
        mode: Pillow's colour mode, for example "RGB", "L", "I;16".
        orientation: EXIF orientation, 1 (upright) where the file has none.
    """

    width: int
    height: int
    mode: str
    orientation: int

    @property
    def shown_size(self) -> tuple[int, int]:
        """(width, height) after the EXIF rotation: the shape `read_image` returns."""
        return (self.height, self.width) if self.orientation in _TURNED else (self.width, self.height)

    @property
    def is_grey(self) -> bool:
        """True for a picture stored with one channel."""
        return self.mode in _GREY_MODES


def read_header(path: str | Path) -> ImageHeader:
    """Size, colour mode and orientation of a picture, without decoding its pixels.

    Raises:
        UserError: The file is missing or is no picture.
    """
    try:
        with Image.open(path) as image:
            orientation = image.getexif().get(_ORIENTATION_TAG, 1)
            return ImageHeader(image.width, image.height, image.mode, int(orientation or 1))
    except (UnidentifiedImageError, Image.DecompressionBombError):
        # 16-bit RGB TIFF and a few others are known to OpenCV alone.
        height, width = read_image(path).shape[:2]
        return ImageHeader(width, height, "RGB", 1)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UserError(f"cannot read the picture {path}: {getattr(error, 'strerror', None) or error}") from error


def read_image(path: str | Path, *, apply_exif: bool = True) -> np.ndarray:
    """Decode a picture to RGB.

    Grey becomes three equal channels, 16 bits become 8 (divided by 256, so that the same light gives the same value
    in every picture), transparency is dropped, palettes are looked up, the EXIF rotation is applied.

    Args:
        path: The file.
        apply_exif: False gives the pixels in the order in which they are stored.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        UserError: The file is missing, is no picture, or is cut off.
    """
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UserError(f"cannot read the picture {path}: {getattr(error, 'strerror', None) or error}") from error
    return decode_image(data, str(path), apply_exif=apply_exif)


def decode_image(data: bytes, name: str, *, apply_exif: bool = True) -> np.ndarray:
    """As `read_image`, from the bytes of a file; `name` is used in messages."""
    if not data:
        raise UserError(f"cannot read the picture {name}: the file is empty")
    if _is_cut_off(data):
        raise UserError(f"cannot read the picture {name}: the file is cut off; copy or download it again")
    flags = cv2.IMREAD_COLOR if apply_exif else cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        image = None
    if image is not None and image.dtype == np.uint8:
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    return _decode_with_pillow(data, name, apply_exif)


def list_images(source: str | Path) -> list[Path]:
    """Pictures named by a file, a folder (searched to any depth) or a glob pattern, sorted by path.

    Raises:
        UserError: Nothing is there, or nothing of it is a picture.
    """
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.is_file()]
    elif _GLOB_CHARACTERS & set(str(source)):
        found = [Path(name) for name in glob.glob(str(source), recursive=True) if Path(name).is_file()]
    else:
        raise UserError(f"{source} does not exist; give a picture, a folder or a pattern such as 'photos/*.jpg'")
    images = sorted(file for file in found if file.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise UserError(f"no pictures in {source}; known endings: {' '.join(IMAGE_SUFFIXES)}")
    return images


def _is_cut_off(data: bytes) -> bool:
    """True for a JPEG or PNG whose end is missing: decoders fill the rest with grey and do not complain."""
    if data.startswith(b"\xff\xd8"):
        # Searched from the first scan on: a preview inside the header has an end mark of its own, and so may
        # anything that a camera appends (a film, a depth map).
        return data.find(b"\xff\xd9", _first_scan(data)) < 0
    return data.startswith(b"\x89PNG") and b"IEND" not in data


def _first_scan(data: bytes) -> int:
    """Where the coded pixels of a JPEG begin; its length when the header never ends."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xDA:
            return at
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return min(at, len(data))


def _decode_with_pillow(data: bytes, name: str, apply_exif: bool) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data)) as opened:
            image = ImageOps.exif_transpose(opened) if apply_exif else opened
            if image.mode.startswith("I"):
                grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
                return np.repeat(grey[:, :, None], 3, axis=2)
            return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError as error:
        raise UserError(f"cannot read the picture {name}: no known picture format, or damaged at its start") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the picture {name}: damaged ({error})") from error
