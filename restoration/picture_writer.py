"""Writing one picture with its profile, EXIF data and resolution: whole or not at all."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin

from restoration.picture import Picture
from vision_ssm.errors import UserError
from vision_ssm.files import write_bytes

_FORMATS = {
    ".png": "PNG", ".tif": "TIFF", ".tiff": "TIFF", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".avif": "AVIF",
    ".bmp": "BMP",
}  # fmt: skip
SUFFIXES = tuple(_FORMATS)
"""Endings of the pictures that can be written."""
_ANY_DEPTH, _WITH_ALPHA = ("PNG", "TIFF"), ("PNG", "TIFF", "WEBP", "AVIF")
_QUALITY = 95
_INCH = 0.0254
_OWN_TAGS = (34665, 34853)  # EXIF and GPS directories of their own


def why_not(suffix: str, picture: Picture) -> str | None:
    """Why files with an ending cannot hold a picture, or None where they can."""
    kind = _FORMATS.get(suffix.lower())
    if kind is None:
        return f"{suffix or 'no ending'} is not a format that can be written; take one of {' '.join(SUFFIXES)}"
    if picture.bits == 32 and kind != "TIFF":
        return f"{kind} holds no float pixels; take .tif"
    if picture.bits == 16 and kind not in _ANY_DEPTH:
        return f"{kind} holds no 16 bits; take .png or .tif"
    if picture.alpha is not None and kind not in _WITH_ALPHA:
        return f"{kind} holds no transparency; take .png, .tif or .webp"
    return None


def write_picture(path: Path, picture: Picture) -> None:
    """Write a picture in the format of the ending; JPEG, WebP and AVIF with quality 95, the others without loss.

    Raises:
        UserError: the format cannot hold the picture, or the file cannot be written.
    """
    reason = why_not(path.suffix, picture)
    if reason is not None:
        raise UserError(f"cannot write {path}: {reason}")
    kind = _FORMATS[path.suffix.lower()]
    if kind == "TIFF":
        data = _tiff(picture)
    elif picture.bits == 16:
        data = _deep_png(picture)
    else:
        data = _by_pillow(picture, kind)
    write_bytes(path, data)


def _joined(picture: Picture) -> np.ndarray:
    """(H, W, 1 to 4) pixels with their alpha."""
    if picture.alpha is None:
        return picture.pixels
    return np.concatenate((picture.pixels, picture.alpha[:, :, None]), axis=2)


def _by_pillow(picture: Picture, kind: str) -> bytes:
    values = _joined(picture)
    options: dict[str, Any] = {}
    if kind in ("JPEG", "WEBP", "AVIF"):
        options["quality"] = _QUALITY
    if kind == "JPEG":
        options["subsampling"] = 0  # full colour resolution: restored edges would lose theirs
    if picture.icc:
        options["icc_profile"] = picture.icc
    if picture.exif:
        options["exif"] = b"Exif\0\0" + picture.exif
    if picture.dpi and kind in ("PNG", "JPEG", "BMP"):
        options["dpi"] = picture.dpi
    buffer = io.BytesIO()
    try:
        Image.fromarray(values[:, :, 0] if values.shape[2] == 1 else values).save(buffer, kind, **options)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot write as {kind}: {error}; take --format png") from error
    return buffer.getvalue()


def _deep_png(picture: Picture) -> bytes:
    """16-bit PNG, which Pillow writes for plain grey only and OpenCV without profile and EXIF data."""
    values = _joined(picture)
    height, width, channels = values.shape
    kind = (0, 4, 2, 6)[channels - 1]  # grey, grey and alpha, RGB, RGB and alpha
    data = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    if picture.icc:
        data += _chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(picture.icc))
    if picture.dpi:
        data += _chunk(b"pHYs", struct.pack(">IIB", *(round(value / _INCH) for value in picture.dpi), 1))
    if picture.exif:
        data += _chunk(b"eXIf", picture.exif)
    rows = np.ascontiguousarray(values.astype(">u2")).view(np.uint8).reshape(height, -1)
    filtered = np.empty((height, rows.shape[1] + 1), np.uint8)
    filtered[:, 0] = 2  # "up": each row is stored as its difference to the one above, which compresses better
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    return data + _chunk(b"IDAT", zlib.compress(filtered.tobytes())) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _tiff(picture: Picture) -> bytes:
    """TIFF of any depth, deflated: Pillow writes no 16-bit colour, OpenCV neither profile nor EXIF data."""
    values = _joined(picture)
    if values.shape[2] == 2 and picture.bits > 8:
        values = values[:, :, [0, 0, 0, 1]]  # common readers know no grey with alpha of this depth
    height, width, channels = values.shape
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    if picture.exif:
        exif = Image.Exif()
        exif.load(picture.exif)
        for tag, value in exif.items():
            tags[tag] = dict(exif.get_ifd(tag)) if tag in _OWN_TAGS else value
    pixels = zlib.compress(np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<")).tobytes())
    tags[256], tags[257] = width, height
    tags[258] = (picture.bits,) * channels
    tags[259] = 8  # Adobe deflate
    tags[262] = 1 if channels < 3 else 2  # black is zero, or RGB
    tags[273], tags[279] = 0, len(pixels)  # Pillow adds where the directory ends
    tags[274] = 1
    tags[277], tags[278] = channels, height
    tags[284] = 1  # pixel by pixel
    if picture.alpha is not None:
        tags[338] = 2  # straight alpha
    if picture.bits == 32:
        tags[339] = (3,) * channels  # float
    if picture.dpi:
        tags[282], tags[283] = (TiffImagePlugin.IFDRational(value) for value in picture.dpi)
        tags[296] = 2  # inches
    if picture.icc:
        tags[34675] = picture.icc
    buffer = io.BytesIO()
    tags.save(buffer)
    return buffer.getvalue() + pixels
