"""Samples as files: mp4, gif, png grid, npz; and beside them what it takes to make them again."""

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import vision_ssm
from vision_ssm.data.video import video_writer
from vision_ssm.errors import UserError
from vision_ssm.files import replacing, write_text
from vision_ssm.viz import PICTURE_SUFFIXES, grid, save_picture

FORMATS = (".png", ".jpg", ".webp", ".mp4", ".avi", ".gif", ".npz")
"""Endings that `save_samples` writes."""
_SHOWN_FRAMES = 8
_LEAST_SIDE = 64
_PACKAGES = ("torch", "diffusers", "timm", "numpy", "triton")


def check_format(path: Path, *, video: bool) -> None:
    """Refuse a name whose ending does not fit the samples, before they are drawn.

    Raises:
        UserError: not one of `FORMATS`, a folder, or a film of pictures.
    """
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise UserError(f"cannot save samples as {path}: the ending must be one of {' '.join(FORMATS)}")
    if path.is_dir():
        raise UserError(f"output is the folder {path}; give a file such as {path / f'samples{suffix}'}")
    if not video and suffix in (".mp4", ".avi", ".gif"):
        raise UserError(f"{path} is a video, this model makes pictures: take .png (a grid) or .npz")


def save_samples(path: Path, samples: Tensor, labels: Sequence[int] | None = None, *, fps: float = 8.0) -> None:
    """Write samples in the format of the ending; all of them into one file.

    Args:
        path: a picture or film shows them side by side, an .npz holds `images` (n, H, W, C) or `videos`
            (n, F, H, W, C) uint8, and `labels`.
        samples: (n, C, H, W) or (n, F, C, H, W) uint8.
        labels: class of each.
        fps: frames per second of films.

    Raises:
        UserError: another ending, or the file cannot be written.
    """
    video = samples.ndim == 5
    check_format(path, video=video)
    suffix = path.suffix.lower()
    if suffix == ".npz":
        arrays = {"videos" if video else "images": samples.movedim(-3, -1).numpy()}
        if labels is not None:
            arrays["labels"] = np.asarray(labels, dtype=np.int64)
        with replacing(path) as temporary:
            np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]
    elif suffix in PICTURE_SUFFIXES:
        save_picture(path, picture_grid(samples))
    elif suffix == ".gif":
        first, *others = [Image.fromarray(frame) for frame in film(samples)]
        with replacing(path) as temporary:
            first.save(temporary, save_all=True, append_images=others, duration=round(1000 / fps), loop=0)
    else:
        with video_writer(path, fps) as append:
            for frame in film(samples):
                append(frame)


def picture_grid(samples: Tensor) -> np.ndarray:
    """Pictures side by side, or a row of up to 8 frames for each clip, (H, W, 3) uint8.

    Args:
        samples: (n, C, H, W) or (n, F, C, H, W) uint8.
    """
    if samples.ndim == 4:
        return grid(_enlarged(samples))
    frames = samples.shape[1]
    shown = np.linspace(0, frames - 1, min(frames, _SHOWN_FRAMES)).round().astype(int)
    return grid(_enlarged(samples[:, shown].flatten(0, 1)), columns=len(shown))


def film(samples: Tensor) -> list[np.ndarray]:
    """Frames (H, W, 3) uint8 with all clips (n, F, C, H, W) uint8 side by side, of even height and width."""
    frames = [grid(_enlarged(samples[:, index])) for index in range(samples.shape[1])]
    return [np.pad(f, ((0, f.shape[0] % 2), (0, f.shape[1] % 2), (0, 0))) for f in frames]  # as codecs ask


def write_facts(path: Path, facts: Mapping[str, Any]) -> Path:
    """Write what it takes to make an output again beside it, as NAME.json: `facts`, and the versions in use."""
    versions: dict[str, str] = {"vision-ssm": vision_ssm.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    target = path.with_name(f"{path.name}.json")
    write_text(target, json.dumps({**facts, "versions": versions, "machine": device}, indent=2) + "\n")
    return target


def _enlarged(pictures: Tensor) -> list[np.ndarray]:
    """(n, C, H, W) as RGB arrays, small ones with every pixel repeated, so that they can be seen."""
    times = max(1, -(-_LEAST_SIDE // min(pictures.shape[-2:])))
    large = pictures.repeat_interleave(times, -1).repeat_interleave(times, -2)
    if large.shape[1] == 1:
        large = large.expand(-1, 3, -1, -1)
    return [picture.permute(1, 2, 0).cpu().contiguous().numpy() for picture in large]
