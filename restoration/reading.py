"""Pictures for training and scoring at their own bit depth, kept in memory where they fit."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from restoration.config import Cache
from restoration.picture_reader import any_size, read_picture
from vision_ssm.data.images import ImageHeader, read_header
from vision_ssm.errors import UserError

_SHARE_OF_MEMORY = 0.5
"""Of what is free, that `auto` takes for pictures."""
_WHITE = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}


def read_levels(path: str | Path) -> np.ndarray:
    """Decode a picture to RGB at its own depth, upright; transparency is dropped, grey becomes three equal channels.

    Returns:
        (H, W, 3) uint8 or uint16 as stored, or float32 with 1.0 for white.

    Raises:
        UserError: Names the file; as `read_picture`.
    """
    try:
        pixels = read_picture(Path(path)).pixels
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return pixels if pixels.shape[2] == 3 else pixels.repeat(3, axis=2)


def header_of(path: Path) -> ImageHeader:
    """Size and mode of a picture; kinds of file that only `read_levels` knows are decoded for it.

    Raises:
        UserError: As `read_levels`.
    """
    try:
        with any_size():
            return read_header(path)
    except (UserError, MemoryError):  # MemoryError: a header that asks for more than any machine has
        height, width = read_levels(path).shape[:2]
        return ImageHeader(width, height, "RGB", 1)


def with_name(path: Path, error: UserError) -> str:
    """The text of an error about a picture, with its name in front if it is not there yet."""
    return str(error) if str(error).startswith(f"{path}: ") else f"{path}: {error}"


def to_tensor(pixels: np.ndarray) -> Tensor:
    """(H, W, C) of any depth -> (C, H, W) float32 with 1.0 for white."""
    floats = np.ascontiguousarray(pixels.transpose(2, 0, 1)).astype(np.float32)
    white = _WHITE.get(pixels.dtype, 1)
    return torch.from_numpy(floats if white == 1 else floats / white)


Reader = Callable[[Path], np.ndarray]
"""Gives the pixels of a picture, as `read_levels` does."""


class PictureStore:
    """Pictures by path, decoded once and kept, or read anew each time.

    Args:
        headers: of all pictures.
        cache: ram keeps all, none keeps none, auto keeps them if they take at most half of the free memory. Worker
            processes share the memory where they are forked (Linux).

    Raises:
        UserError: Names every picture that cannot be decoded (with a cache), or says how much memory is missing.
    """

    def __init__(self, headers: dict[Path, ImageHeader], cache: Cache) -> None:
        self.bytes = sum(3 * h.width * h.height * (2 if h.mode.startswith("I;16") else 1) for h in headers.values())
        """Of all pictures, decoded."""
        free = psutil.virtual_memory().available
        if cache == "ram" and self.bytes > 0.9 * free:
            raise UserError(
                f"{len(headers)} pictures take {self.bytes / 1e9:.1f} GB in memory and {free / 1e9:.1f} GB are free; "
                "use --data.cache none"
            )
        keep = cache == "ram" or (cache == "auto" and self.bytes <= _SHARE_OF_MEMORY * free)
        self._kept = _read_all(list(headers)) if keep else {}
        if keep:
            self.bytes = sum(pixels.nbytes for pixels in self._kept.values())

    def __str__(self) -> str:
        where = "kept in memory" if self._kept else "read from disk each time"
        return f"{self.bytes / 1e6:.1f} MB of pixels, {where}"

    def read(self, path: Path) -> np.ndarray:
        """As `read_levels`; not to be changed."""
        kept = self._kept.get(path)
        return read_levels(path) if kept is None else kept


def refuse_bad(problems: Sequence[str], most: int = 10) -> None:
    """Do nothing where there are no problems with pictures.

    Raises:
        UserError: Lists the problems, up to ``most``.
    """
    if problems:
        more = [f"and {len(problems) - most} more"] if len(problems) > most else []
        raise UserError("\n  ".join([f"{len(problems)} bad pictures:", *problems[:most], *more]))


def _read_all(paths: Sequence[Path]) -> dict[Path, np.ndarray]:
    with ThreadPoolExecutor() as pool:
        read = list(pool.map(_pixels_or_problem, paths))
    refuse_bad([problem for problem in read if isinstance(problem, str)])
    return {path: pixels for path, pixels in zip(paths, read, strict=True) if isinstance(pixels, np.ndarray)}


def _pixels_or_problem(path: Path) -> np.ndarray | str:
    try:
        return read_levels(path)
    except UserError as error:
        return str(error)
