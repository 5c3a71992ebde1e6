"""The two-stage chain of Real-ESRGAN (arXiv 2107.10833, section 3): blur, resize, noise and JPEG, twice, then ringing.

Written from the paper; the probabilities and ranges are those that its authors publish for their x4 network.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from restoration.jpeg import through_jpeg, to_uint8
from restoration.kernels2d import correlate, oriented_kernel, sinc_kernel

_SIDES = range(7, 22, 2)
_SHAPES = ("round", "oriented", "round general", "oriented general", "round plateau", "oriented plateau")
_SHAPE_CHANCES = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
_SINC_CHANCE = 0.1
_BETA_GENERAL, _BETA_PLATEAU = (0.5, 4.0), (1.0, 2.0)
_FINAL_SINC_CHANCE = 0.8
_RESIZERS = (cv2.INTER_AREA, cv2.INTER_LINEAR, cv2.INTER_CUBIC)
_GAUSSIAN_CHANCE = 0.5  # of noise, the other kind is Poisson's
_GREY_CHANCE = 0.4
_JPEG_QUALITY = (30, 95)


@dataclass(frozen=True)
class _Stage:
    """Ranges of one pass of the chain."""

    blur_chance: float
    blur_sigma: tuple[float, float]
    resize_chances: tuple[float, float, float]
    """Up, down, keep."""
    resize_range: tuple[float, float]
    noise_sigma: tuple[float, float]
    """In 255ths."""
    poisson_scale: tuple[float, float]


_FIRST = _Stage(1.0, (0.2, 3.0), (0.2, 0.7, 0.1), (0.15, 1.5), (1.0, 30.0), (0.05, 3.0))
_SECOND = _Stage(0.8, (0.2, 1.5), (0.3, 0.4, 0.3), (0.3, 1.2), (1.0, 25.0), (0.05, 2.5))


def degrade_like_a_camera(image: np.ndarray, scale: int, rng: np.random.Generator) -> np.ndarray:
    """Run a clean image through the chain.

    Args:
        image: (H, W, C) float32 in [0, 1], C 1 or 3.
        scale: the result is so many times smaller.
        rng: what is drawn comes from here.

    Returns:
        (H / scale, W / scale, C) float32 in [0, 1], of 8 bits.
    """
    height, width = image.shape[:2]
    final = (height // scale, width // scale)
    x = _blur(image, _FIRST, rng)
    x = _resize(x, _drawn_size((height, width), _FIRST, rng), rng)
    x = _jpeg(_noise(x, _FIRST, rng), rng)
    if rng.random() < _SECOND.blur_chance:
        x = _blur(x, _SECOND, rng)
    x = _resize(x, _drawn_size(final, _SECOND, rng), rng)
    x = _noise(x, _SECOND, rng)
    sinc = _sinc(rng) if rng.random() < _FINAL_SINC_CHANCE else None
    if rng.random() < 0.5:  # ringing may come before the last compression or after it
        x = _jpeg(_filtered(_resize(x, final, rng), sinc), rng)
    else:
        x = _filtered(_resize(_jpeg(x, rng), final, rng), sinc)
    return to_uint8(x).astype(np.float32) / 255


def _blur(x: np.ndarray, stage: _Stage, rng: np.random.Generator) -> np.ndarray:
    if rng.random() < _SINC_CHANCE:
        return correlate(x, _sinc(rng))
    side = int(rng.choice(_SIDES))
    shape = _SHAPES[rng.choice(len(_SHAPES), p=_SHAPE_CHANCES)]
    first, second = rng.uniform(*stage.blur_sigma, 2)
    sigmas = (first, first if shape.startswith("round") else second)
    beta = 1.0
    if not shape.endswith(("round", "oriented")):
        low, high = _BETA_PLATEAU if shape.endswith("plateau") else _BETA_GENERAL
        # half of them flatter than a Gaussian, half of them more peaked
        beta = rng.uniform(low, 1.0) if rng.random() < 0.5 else rng.uniform(1.0, high)
    kernel = oriented_kernel(
        side, sigmas, rng.uniform(-np.pi, np.pi), beta=float(beta), plateau=shape.endswith("plateau")
    )
    return correlate(x, kernel)


def _sinc(rng: np.random.Generator) -> np.ndarray:
    side = int(rng.choice(_SIDES))
    return sinc_kernel(side, float(rng.uniform(np.pi / 3 if side < 13 else np.pi / 5, np.pi)))


def _filtered(x: np.ndarray, kernel: np.ndarray | None) -> np.ndarray:
    return x if kernel is None else correlate(x, kernel)


def _drawn_size(size: tuple[int, int], stage: _Stage, rng: np.random.Generator) -> tuple[int, int]:
    way = rng.choice(3, p=stage.resize_chances)
    low, high = stage.resize_range
    factor = (rng.uniform(1, high), rng.uniform(low, 1), 1.0)[way]
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _resize(x: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    method = _RESIZERS[rng.integers(len(_RESIZERS))]
    return cv2.resize(x, size[::-1], interpolation=method).reshape(*size, x.shape[2])


def _noise(x: np.ndarray, stage: _Stage, rng: np.random.Generator) -> np.ndarray:
    """Gaussian or Poisson noise, in colour or the same in all channels."""
    grey = rng.random() < _GREY_CHANCE
    if rng.random() < _GAUSSIAN_CHANCE:
        shape = (*x.shape[:2], 1) if grey else x.shape
        sigma = np.float32(rng.uniform(*stage.noise_sigma) / 255)
        noise = sigma * rng.standard_normal(shape, dtype=np.float32)
    else:
        light = np.rint(x.clip(0, 1) * 255) / 255
        light = light.mean(axis=2, keepdims=True) if grey else light
        photons = 2 ** np.ceil(np.log2(max(2, len(np.unique(light)))))
        noise = rng.uniform(*stage.poisson_scale) * (rng.poisson(light * photons) / photons - light)
    return (x + noise).clip(0, 1).astype(np.float32)


def _jpeg(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return through_jpeg(x, int(rng.integers(_JPEG_QUALITY[0], _JPEG_QUALITY[1] + 1)))
