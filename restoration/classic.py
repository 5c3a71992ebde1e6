"""Restoring without learning: the methods of scikit-image, OpenCV and Pillow, as something to compare with.

Where a method needs to know how strong the noise is, or the blur, it is told the truth; of pairs the noise is
estimated. Their own settings follow the noise as tuned by hand on four photographs.
"""

import importlib
from collections.abc import Callable
from typing import Any, Literal, cast

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from restoration.degrade import Degradation, GaussianBlur, MotionBlur, Noise, enlarge
from restoration.jpeg import to_uint8
from restoration.kernels2d import gaussian_kernel
from restoration.tasks import TASKS
from vision_ssm.errors import UserError

MethodName = Literal["bicubic", "lanczos", "nlm", "tv", "wiener", "richardson-lucy", "bm3d", "telea"]

_DENOISE = ("denoise",)
_BLUR = ("deblur", "motion")
_LARGER = ("sr2", "sr4", "sr8")
METHODS: dict[MethodName, tuple[str, ...]] = {
    "bicubic": _LARGER,
    "lanczos": _LARGER,
    "nlm": _DENOISE,
    "tv": _DENOISE,
    "wiener": _BLUR,
    "richardson-lucy": _BLUR,
    "bm3d": _DENOISE,
    "telea": ("inpaint",),
}
"""Each method and its tasks."""

_TV_WEIGHT = ((0.0, 15.0, 25.0, 50.0), (0.0, 0.045, 0.085, 0.19))
"""Strengths of noise in 255ths, and weights for them."""
_WIENER_BALANCE = ((0.0, 0.01, 0.05), (1e-3, 2e-2, 0.3))
_RICHARDSON_LUCY_ROUNDS = ((0.0, 0.01, 0.05), (60.0, 20.0, 6.0))
_TELEA_RADIUS = 5.0


def check_method(method: str, task: str) -> None:
    """Refuse a method that is not for this task, or whose package is missing.

    Raises:
        UserError: Says which methods the task has, or what to install.
    """
    fitting = [name for name, tasks in METHODS.items() if task in tasks]
    if method not in METHODS:
        raise UserError(f"no method {method!r}; for the task {task} there are {', '.join(fitting) or 'none'}")
    if method not in fitting:
        names = ", ".join(TASKS[name].name for name in METHODS[cast(MethodName, method)])
        raise UserError(f"the method {method} is for {names}; for {task} there are {', '.join(fitting) or 'none'}")
    if method == "bm3d":
        _bm3d()
    elif method not in ("bicubic", "lanczos", "telea"):
        _skimage()


def restore_classic(
    degraded: Tensor, method: MethodName, degradation: Degradation | None = None, *, scale: int = 1, seed: int = 0
) -> Tensor:
    """Restore one image.

    Args:
        degraded: (C, h, w) floats with 1.0 for white, on the CPU.
        method: one of `METHODS` that fits.
        degradation: what made it, with a single value for the strength of noise or blur; None if not known.
        scale: the result is so many times larger; for bicubic and lanczos.
        seed: with which it was made: a motion kernel follows from it.

    Returns:
        (3, H, W), not clipped.

    Raises:
        UserError: The method needs to know the kernel of a blur, or its package is missing.
    """
    if method == "bicubic":
        return enlarge(degraded[None], scale)[0]
    pixels = np.ascontiguousarray(degraded.permute(1, 2, 0).numpy())
    if method == "lanczos":
        result = _lanczos(pixels, scale)
    elif method == "telea":
        missing = (pixels[..., 3] < 0.5).astype(np.uint8)
        filled = cv2.inpaint(to_uint8(pixels[..., :3]), missing, _TELEA_RADIUS, cv2.INPAINT_TELEA)
        result = np.where(missing[..., None] > 0, filled / np.float32(255), pixels[..., :3])
    elif method in ("wiener", "richardson-lucy"):
        result = _deconvolved(pixels, method, degradation, seed)
    else:
        result = _denoised(pixels, method, degradation)
    return torch.from_numpy(np.ascontiguousarray(result.transpose(2, 0, 1), np.float32))


def _lanczos(pixels: np.ndarray, scale: int) -> np.ndarray:
    size = (pixels.shape[1] * scale, pixels.shape[0] * scale)
    planes = [Image.fromarray(pixels[..., i]).resize(size, Image.Resampling.LANCZOS) for i in range(pixels.shape[2])]
    return np.stack([np.asarray(plane) for plane in planes], axis=2)


def _denoised(pixels: np.ndarray, method: MethodName, degradation: Degradation | None) -> np.ndarray:
    known = isinstance(degradation, Noise) and isinstance(degradation.sigma, float | int)
    sigma = cast(float, degradation.sigma) / 255 if known else estimate_sigma(pixels)  # type: ignore[union-attr]
    if sigma == 0:
        return pixels
    if method == "bm3d":
        return _bm3d()(pixels, sigma)
    if method == "tv":
        weight = float(np.interp(sigma * 255, *_TV_WEIGHT))
        return _skimage().denoise_tv_chambolle(pixels, weight=weight, eps=1e-5, channel_axis=2)
    return _skimage().denoise_nl_means(
        pixels, h=0.8 * sigma, sigma=sigma, patch_size=5, patch_distance=6, fast_mode=True, channel_axis=2
    )


def estimate_sigma(pixels: np.ndarray) -> float:
    """Standard deviation of the noise in (H, W, C) pixels, from the median of the finest diagonal Haar wavelets.

    D. L. Donoho, I. M. Johnstone, "Ideal spatial adaptation by wavelet shrinkage", Biometrika 1994.
    """
    height, width = (side - side % 2 for side in pixels.shape[:2])
    even = pixels[:height, :width]
    detail = even[::2, ::2] - even[1::2, ::2] - even[::2, 1::2] + even[1::2, 1::2]
    return float(np.median(np.abs(detail / 2)) / 0.6745) if detail.size else 0.0


def _deconvolved(pixels: np.ndarray, method: MethodName, degradation: Degradation | None, seed: int) -> np.ndarray:
    """Each channel by itself, the border reflected so that the ends of the picture do not meet."""
    restoration = _skimage()
    if isinstance(degradation, GaussianBlur):
        kernel = gaussian_kernel(degradation.kernel, float(cast(float, degradation.sigma)))
    elif isinstance(degradation, MotionBlur):
        kernel = degradation.drawn_kernel(seed)
    else:
        raise UserError(f"{method} needs to know the kernel of the blur, which nobody knows of given pairs")
    edge = kernel.shape[0]
    padded = cv2.copyMakeBorder(pixels, edge, edge, edge, edge, cv2.BORDER_REFLECT_101)
    if method == "wiener":
        balance = float(np.interp(degradation.noise, *_WIENER_BALANCE))
        planes = [restoration.wiener(plane, kernel, balance, clip=False) for plane in np.moveaxis(padded, 2, 0)]
    else:
        rounds = round(float(np.interp(degradation.noise, *_RICHARDSON_LUCY_ROUNDS)))
        light = np.moveaxis(padded.clip(0, 1), 2, 0)
        # without the bound, ratios in black areas explode
        planes = [restoration.richardson_lucy(p, kernel, num_iter=rounds, filter_epsilon=1e-3) for p in light]
    return np.stack(planes, axis=2)[edge:-edge, edge:-edge]


def _skimage() -> Any:
    try:
        return importlib.import_module("skimage.restoration")
    except ImportError:
        raise UserError("this method needs scikit-image: pip install scikit-image") from None


def _bm3d() -> Callable[[np.ndarray, float], np.ndarray]:
    try:
        return importlib.import_module("bm3d").bm3d_rgb
    except ImportError:
        raise UserError(
            "bm3d is not installed; its licence allows no commercial use, so it does not come with this package: "
            "pip install bm3d"
        ) from None
