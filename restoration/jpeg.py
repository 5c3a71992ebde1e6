"""Pixels of 8 bits, and what JPEG makes of them."""

import cv2
import numpy as np


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Floats with 1.0 for white, clipped and rounded to 8 bits."""
    return np.rint(image.clip(0, 1) * 255).astype(np.uint8)


def through_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """Compress and decode an image by libjpeg, with colours at half resolution (4:2:0).

    Args:
        image: (H, W, 3) RGB or (H, W, 1), float32 with 1.0 for white.
        quality: 1 to 100.

    Returns:
        The same shape, float32.
    """
    pixels = np.ascontiguousarray(to_uint8(image)[..., ::-1])  # OpenCV's order is BGR
    _, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = np.asarray(cv2.imdecode(data, cv2.IMREAD_UNCHANGED)).reshape(image.shape)
    return decoded[..., ::-1].astype(np.float32) / 255
