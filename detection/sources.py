"""What a detector can look at: files, folders, patterns, videos, arrays, Pillow pictures, tensors, lists of these."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from vision_ssm.data.images import read_image
from vision_ssm.data.media import is_video, media_files
from vision_ssm.data.video import read_frames
from vision_ssm.errors import UserError

Source = str | Path | np.ndarray | Image.Image | torch.Tensor | Iterable[Any]
"""A file, folder or pattern; (H, W, 3) uint8 RGB; a Pillow picture; a (3, H, W) or (B, 3, H, W) tensor; several."""

OnError = Callable[[UserError], None]


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture to look at.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        path: the file it comes from; None for pictures from memory.
        index: position in a video, from 0; None for a single picture.
    """

    image: np.ndarray
    path: Path | None = None
    index: int | None = None


def read_source(source: Source, on_error: OnError | None = None) -> Iterator[Frame]:
    """Every picture of a source in order, decoded when it is asked for.

    Args:
        source: see `Source`.
        on_error: called for each file that cannot be read, which is then left out; without it the error is raised.

    Raises:
        UserError: something else than a source, or (without `on_error`) a file that cannot be read.
    """
    if isinstance(source, str | Path):
        for path in media_files(source):
            yield from _read_file(path, on_error)
    elif isinstance(source, np.ndarray):
        yield Frame(_from_array(source))
    elif isinstance(source, Image.Image):
        yield Frame(np.asarray(ImageOps.exif_transpose(source).convert("RGB")))
    elif isinstance(source, torch.Tensor):
        for image in source[None] if source.ndim == 3 else source:
            yield Frame(_from_tensor(image, tuple(source.shape)))
    elif isinstance(source, Iterable):
        for part in source:
            yield from read_source(part, on_error)
    else:
        raise UserError(
            f"cannot look at a {type(source).__name__}; give a file, a folder, a pattern such as 'photos/*.jpg', an "
            "(H, W, 3) uint8 RGB array, a Pillow picture, a (3, H, W) tensor, or a list of these"
        )


def _read_file(path: Path, on_error: OnError | None) -> Iterator[Frame]:
    try:
        if is_video(path):
            for index, image in enumerate(read_frames(path)):
                yield Frame(image, path, index)
        else:
            yield Frame(read_image(path), path)
    except UserError as error:
        if on_error is None:
            raise
        on_error(error)


def _from_array(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3 and array.size:
        return array
    if array.dtype == np.uint8 and array.ndim == 2 and array.size:
        return np.repeat(array[:, :, None], 3, axis=2)
    raise UserError(
        f"an array must be (H, W, 3) uint8 RGB, or (H, W) uint8 grey; got {array.shape} {array.dtype}. "
        "OpenCV's BGR becomes RGB by image[:, :, ::-1], several pictures are given as a list"
    )


def _from_tensor(image: torch.Tensor, given: tuple[int, ...]) -> np.ndarray:
    if image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
        raise UserError(f"a tensor must be (3, H, W) or (B, 3, H, W), RGB; got {given}")
    if image.is_floating_point():
        low, high = float(image.min()), float(image.max())
        if not (low >= 0 and high <= 1):
            raise UserError(f"a float tensor must lie in [0, 1], got {low:.4g} to {high:.4g}; divide by 255?")
        image = (image.float() * 255).round().to(torch.uint8)
    elif image.dtype != torch.uint8:
        raise UserError(f"a tensor must be uint8, or float in [0, 1]; got {image.dtype}")
    return image.permute(1, 2, 0).contiguous().cpu().numpy()
