"""From a degraded image to a restored one through a network: what has to happen around it."""

import torch
from torch import Tensor

from restoration.degrade import enlarge
from restoration.networks import Restorer


def network_input(images: Tensor, scale: int, network_scale: int = 1) -> Tensor:
    """What a network reads: images at the size of its own grid.

    Args:
        images: (B, C, h, w) degraded images.
        scale: the task's: results are so many times larger.
        network_scale: how many times the network enlarges by itself.

    Returns:
        (B, C, h * scale / network_scale, w * scale / network_scale).
    """
    return enlarge(images, scale // network_scale)


def restore(model: Restorer, images: Tensor, scale: int = 1) -> Tensor:
    """Restore a batch.

    Args:
        model: on the device of the images, in eval mode; enlarges by itself, or reads images at the target size.
        images: (B, C, h, w) degraded, 1.0 for white; C 4 where the last channel tells the known pixels (1.0).
        scale: results are so many times larger.

    Returns:
        (B, 3, h * scale, w * scale); not clipped. Known pixels of inpainting are those given.
    """
    with torch.no_grad():
        restored = model(network_input(images, scale, model.scale)).to(images.dtype)
    return keep_known(images, restored)


def keep_known(images: Tensor, restored: Tensor) -> Tensor:
    """With a mask in the last of 4 channels: the known pixels of the input, the others of the result."""
    if images.shape[1] != 4:
        return restored
    known = images[:, 3:]
    return images[:, :3] * known + restored * (1 - known)
