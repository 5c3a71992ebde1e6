"""Reading one picture of any bit depth with its profile, EXIF data and resolution."""

import io
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import psutil
from cv2.utils import logging as _opencv
from PIL import Image, ImageCms, TiffImagePlugin, UnidentifiedImageError

from restoration.picture import Picture, check_floats
from vision_ssm.errors import UserError

_BITS, _ORIENTATION, _SAMPLES, _RESOLUTION, _UNIT, _ICC = 258, 274, 277, (282, 283), 296, 34675  # TIFF tags
_OWN_DIRECTORY = (34665, 34853)  # EXIF, GPS
_ABOUT = (270, 271, 272, 305, 306, 315, 33432, *_OWN_DIRECTORY)
"""Tags about the picture, not its layout: description, camera, software, date, artist, copyright, EXIF, GPS."""
_PNG_BITS_AT, _PNG_COLOUR_AT = 24, 25
_GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N", "F")
_EXIF_MARK = b"Exif\0\0"
_LIMIT_OF_PILLOW = threading.Lock()


def read_picture(path: Path) -> Picture:
    """Decode a picture and turn it upright.

    Raises:
        UserError: missing, empty, damaged, cut off, not a picture, of an unusual kind, too large for this memory, or
            with floats that are not finite or on another scale.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read: {error.strerror or error}") from error
    if not data:
        raise UserError("cannot read: the file is empty")
    with _quiet():
        picture = _decoded(data)
    check_floats(picture.pixels)
    return picture


def _decoded(data: bytes) -> Picture:
    try:
        with any_size():
            image = Image.open(io.BytesIO(data))
        with image:
            _check_memory(image)
            return _picture(image, data)
    except UserError:
        raise
    except UnidentifiedImageError as error:
        if data[:2] not in (b"II", b"MM"):
            raise UserError("cannot read: no known picture format, or damaged at its start") from error
        return _unusual_tiff(data)
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, cv2.error, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read: damaged or cut off ({error})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what Pillow and OpenCV say of odd files: either they can be read, or the error tells why not."""
    if threading.current_thread() is not threading.main_thread():
        yield  # both settings are of the process: threads that end in another order would leave them changed
        return
    level = _opencv.setLogLevel(_opencv.LOG_LEVEL_SILENT)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        _opencv.setLogLevel(level)


@contextmanager
def any_size() -> Iterator[None]:
    """Open files without Pillow's limit, which guards servers against strangers' files; memory is checked instead."""
    with _LIMIT_OF_PILLOW, _quiet():  # the limit is one for all threads
        limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _check_memory(image: Image.Image) -> None:
    """Pixels as read and as float32, both in memory."""
    needed = image.width * image.height * 4 * (2 + 4)
    free = psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"too large: {image.width}x{image.height} pixels need {needed / 2**30:.1f} GiB to decode, "
            f"{free / 2**30:.1f} GiB are free"
        )


def _picture(image: Image.Image, data: bytes) -> Picture:
    notes = []
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        notes.append(f"has {frames} pages or frames; only the first is restored")
    orientation = image.getexif().get(_ORIENTATION, 1)
    exif, deep = _exif(image), _is_deep(image, data)
    image.load()  # finds what is cut off, also where OpenCV decodes
    if deep:
        grey = data[_PNG_COLOUR_AT] in (0, 4) if image.format == "PNG" else image.mode in _GREY
        values = _decode_deep(data, grey=grey)
    else:
        orientation = image.getexif().get(_ORIENTATION, 1)  # Pillow turns TIFF files itself and then drops the tag
        values = _decode(image)
    icc = image.info.get("icc_profile") or None
    if image.mode in ("CMYK", "LAB"):
        notes.append(f"is {image.mode}; restored and written as RGB{', without its colour profile' if icc else ''}")
        icc = None
    pixels, alpha = _split(_upright(values, int(orientation)))
    return Picture(pixels, alpha, icc, exif, _dpi(image), (*notes, *_profile_notes(icc)))


def _unusual_tiff(data: bytes) -> Picture:
    """A TIFF file of a kind that Pillow does not know, such as float colour: its tags by hand."""
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(data[:8])
        file = io.BytesIO(data)
        file.seek(tags.next)
        tags.load(file)
        exif = Image.Exif()
        exif.load(data)
    except (SyntaxError, OSError, ValueError, struct.error) as error:
        raise UserError("cannot read: damaged at its start") from error
    values = _decode_deep(data, grey=tags.get(_SAMPLES, 1) < 3)
    pixels, alpha = _split(_upright(values, int(tags.get(_ORIENTATION, 1))))
    dpi = tuple(float(tags[tag]) for tag in _RESOLUTION if tag in tags)
    known = len(dpi) == 2 and min(dpi) > 1 and tags.get(_UNIT, 2) == 2
    icc = tags.get(_ICC)
    return Picture(pixels, alpha, icc, _about(exif), (dpi[0], dpi[1]) if known else None, tuple(_profile_notes(icc)))


def _is_deep(image: Image.Image, data: bytes) -> bool:
    """Whether Pillow would reduce 16 bits to 8, as it does for everything but plain grey."""
    if image.format == "PNG":
        return data[_PNG_BITS_AT] == 16
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return max(image.tag_v2.get(_BITS, (1,))) > 8 and image.mode != "F"
    return False


def _decode(image: Image.Image) -> np.ndarray:
    """(H, W, 1 to 4) uint8, uint16 or float32 in the order of the file."""
    mode, transparent = image.mode, "transparency" in image.info or image.mode[-1:] in "Aa"
    if mode == "F":
        values = np.asarray(image)
    elif mode.startswith("I"):
        values = np.asarray(image)
        if values.max(initial=0) > 65535 or values.min(initial=0) < 0:
            raise UserError("32-bit whole numbers cannot be restored; save it with 8 or 16 bits, or as float in [0, 1]")
        values = values.astype(np.uint16)
    elif mode in _GREY:
        values = np.asarray(image.convert("LA" if transparent else "L"))
    else:
        values = np.asarray(image.convert("RGBA" if transparent else "RGB"))
    return values if values.ndim == 3 else values[:, :, None]


def _decode_deep(data: bytes, *, grey: bool) -> np.ndarray:
    """(H, W, 1 to 4) uint16 or float32 in the order of the file."""
    # OpenCV turns TIFF files by their tag, some versions with an error, so it gets to see an upright one.
    values = cv2.imdecode(np.frombuffer(_marked_upright(data), np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None:
        raise UserError("cannot read: damaged, or a kind of 16-bit file that OpenCV does not know")
    if values.dtype not in (np.uint16, np.float32):
        raise UserError(f"pixels of type {values.dtype} cannot be restored; save it with 8 or 16 bits, or as float32")
    if values.ndim == 2:
        return values[:, :, None]
    values = cv2.cvtColor(values, cv2.COLOR_BGRA2RGBA if values.shape[2] == 4 else cv2.COLOR_BGR2RGB)
    return values[:, :, [0, *range(3, values.shape[2])]] if grey else values


def _split(values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Pixels and alpha of (H, W, 1 to 4)."""
    return (values[..., :-1], values[..., -1]) if values.shape[2] in (2, 4) else (values, None)


def _upright(values: np.ndarray, orientation: int) -> np.ndarray:
    """Apply an EXIF orientation: 1 as it is, 3 half a turn, 6 and 8 quarter turns, the others mirrored."""
    if orientation in (5, 6, 7, 8):
        values = values.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    return np.ascontiguousarray(values)


def _exif(image: Image.Image) -> bytes | None:
    """EXIF data byte for byte but for the orientation; of a TIFF file, its tags about the picture."""
    if image.format == "TIFF":
        return _about(image.getexif())
    data = image.info.get("exif")
    return _marked_upright(data.removeprefix(_EXIF_MARK)) if data else None


def _about(found: Image.Exif) -> bytes | None:
    kept = Image.Exif()
    for tag in _ABOUT:
        if tag in found:
            kept[tag] = found.get_ifd(tag) if tag in _OWN_DIRECTORY else found[tag]
    return kept.tobytes().removeprefix(_EXIF_MARK) if len(kept) else None


def _marked_upright(data: bytes) -> bytes:
    """TIFF or EXIF data whose orientation tag, if there is one, says 1; other data as it is."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None or len(data) < 8:
        return data
    (first,) = struct.unpack_from(order + "I", data, 4)
    if first + 2 > len(data):
        return data
    (entries,) = struct.unpack_from(order + "H", data, first)
    for at in range(first + 2, min(first + 2 + 12 * entries, len(data) - 11), 12):
        if struct.unpack_from(order + "H", data, at)[0] == _ORIENTATION:
            return data[: at + 8] + struct.pack(order + "H", 1) + data[at + 10 :]
    return data


def _dpi(image: Image.Image) -> tuple[float, float] | None:
    dpi = image.info.get("dpi")
    if not dpi or min(dpi) <= 1:  # 1 is what writers put where they do not know
        return None
    return float(dpi[0]), float(dpi[1])


def _profile_notes(icc: bytes | None) -> list[str]:
    if not icc:
        return []
    try:
        name = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(icc))).strip()
    except (ImageCms.PyCMSError, OSError):
        return ["has a colour profile that cannot be read; it is kept as it is"]
    if any(word in name.lower() for word in ("srgb", "gray", "grey")):
        return []
    return [f"has the colour profile {name!r}, which is kept; the networks were trained on sRGB"]
