"""Blur kernels and filtering with them."""

import cv2
import numpy as np
import torch

_STEPS = 64
"""Points of a camera's path."""


def gaussian_blur(image: np.ndarray, side: int, sigma: float) -> np.ndarray:
    """(H, W, C) float32 blurred by a side x side Gaussian; borders are reflected, the edge pixel not repeated."""
    blurred = cv2.GaussianBlur(image, (side, side), sigma, borderType=cv2.BORDER_REFLECT_101)
    return blurred.reshape(image.shape)  # OpenCV drops the axis of a single channel


def correlate(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """(H, W, C) float32 correlated with an odd square kernel; borders are reflected, the edge pixel not repeated."""
    kernel = np.ascontiguousarray(kernel, np.float32)
    return cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REFLECT_101).reshape(image.shape)


def gaussian_kernel(side: int, sigma: float) -> np.ndarray:
    """(side, side) float32 Gaussian with sum 1, that of `gaussian_blur`."""
    line = cv2.getGaussianKernel(side, sigma, cv2.CV_64F)
    return (line @ line.T).astype(np.float32)


def motion_kernel(side: int, intensity: float, rng: np.random.Generator) -> np.ndarray:
    """Blur of a camera that moves while the shutter is open: the trace of a random path.

    Our own generator. The camera goes on with steady speed while its direction drifts by a random walk; ``intensity``
    scales the drift and the chance of a sudden turn, as a hand that shakes. The path is as long as the kernel's side
    at intensity 0 and curls up with it. It is centred on its centre of gravity and drawn with bilinear weights.

    Args:
        side: of the kernel in pixels, odd.
        intensity: 0 for a straight line to 1 for a path that turns all the time.
        rng: what is drawn comes from here.

    Returns:
        (side, side) float32 with sum 1.
    """
    drift = rng.normal(0, 0.6 * intensity, _STEPS)
    jerks = (rng.random(_STEPS) < 0.08 * intensity) * rng.uniform(-np.pi, np.pi, _STEPS)
    angle = rng.uniform(0, 2 * np.pi) + np.cumsum(drift + jerks)
    length = rng.uniform(0.3, 0.9) * (side - 1)
    path = np.cumsum(np.stack((np.sin(angle), np.cos(angle)), axis=1), axis=0) * (length / _STEPS)
    path -= path.mean(axis=0)
    half = (side - 1) / 2
    reach = np.abs(path).max()
    if reach > half:
        path *= half / reach
    kernel = _trace(path + half, side)
    return (kernel / kernel.sum()).astype(np.float32)


def _trace(points: np.ndarray, side: int) -> np.ndarray:
    """Each (row, column) point shared out among the four pixels around it."""
    kernel = np.zeros((side + 1, side + 1))
    low = np.clip(np.floor(points), 0, side - 1).astype(int)
    part = points - low
    for row in (0, 1):
        for column in (0, 1):
            weight = np.abs(1 - row - part[:, 0]) * np.abs(1 - column - part[:, 1])
            np.add.at(kernel, (low[:, 0] + row, low[:, 1] + column), weight)
    return kernel[:side, :side]


def oriented_kernel(
    side: int, sigmas: tuple[float, float], angle: float, *, beta: float = 1.0, plateau: bool = False
) -> np.ndarray:
    """Gaussian-like kernel with two widths along turned axes (Real-ESRGAN, arXiv 2107.10833, section 3.1).

    With d the squared distance in units of the widths, it is exp(-d^beta / 2), or 1 / (1 + d^beta) for a plateau.

    Args:
        side: of the kernel in pixels, odd.
        sigmas: widths along both axes, in pixels.
        angle: of the first axis, in radians.
        beta: 1 for a Gaussian, larger for a flatter top.
        plateau: the second form.

    Returns:
        (side, side) float32 with sum 1.
    """
    line = np.arange(side) - (side - 1) / 2
    y, x = np.meshgrid(line, line, indexing="ij")
    along, across = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    distance = ((along / sigmas[0]) ** 2 + (across / sigmas[1]) ** 2) ** beta
    kernel = 1 / (1 + distance) if plateau else np.exp(-distance / 2)
    return (kernel / kernel.sum()).astype(np.float32)


def sinc_kernel(side: int, cutoff: float) -> np.ndarray:
    """Ideal circular low-pass filter, which rings (Real-ESRGAN, arXiv 2107.10833, equation 5).

    Args:
        side: of the kernel in pixels, odd.
        cutoff: frequency in radians per pixel, up to pi.

    Returns:
        (side, side) float32 with sum 1.
    """
    line = np.arange(side) - (side - 1) / 2
    radius = np.hypot(line[:, None], line[None])
    centre = side // 2
    radius[centre, centre] = 1.0
    kernel = cutoff * torch.special.bessel_j1(torch.from_numpy(cutoff * radius)).numpy() / (2 * np.pi * radius)
    kernel[centre, centre] = cutoff**2 / (4 * np.pi)
    return (kernel / kernel.sum()).astype(np.float32)
