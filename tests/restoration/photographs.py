"""Real photographs of scikit-image's wheel, for the tests of restoration."""

from pathlib import Path

import cv2
import numpy as np
import torch
from skimage import data
from torch import Tensor

NAMES = ("astronaut", "chelsea", "coffee", "rocket")


def photograph(name: str = "astronaut", side: int = 256) -> np.ndarray:
    """(side, side, 3) uint8, the middle of a photograph."""
    pixels = getattr(data, name)()
    top, left = ((length - side) // 2 for length in pixels.shape[:2])
    return np.ascontiguousarray(pixels[top : top + side, left : left + side])


def as_image(pixels: np.ndarray) -> Tensor:
    """(3, H, W) float32 in [0, 1] of (H, W, 3) uint8."""
    return torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32) / 255)


def write(path: Path, pixels: np.ndarray) -> Path:
    """Write RGB pixels of 8 or 16 bits; makes folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _, data = cv2.imencode(path.suffix, np.ascontiguousarray(pixels[..., ::-1]))
    path.write_bytes(data.tobytes())
    return path


def write_set(folder: Path, side: int = 48, names: tuple[str, ...] = NAMES) -> Path:
    """A folder with the middles of photographs as PNG files."""
    for name in names:
        write(folder / f"{name}.png", photograph(name, side))
    return folder
