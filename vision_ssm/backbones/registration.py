"""What timm wants to know about every network that we register."""

from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn


def untrained(first_conv: str, classifier: str, *, grid: tuple[int, int] = (7, 7)) -> dict[str, Any]:
    """timm's description of a network without weights of its own, seen at 224 pixels as the published ones are.

    Args:
        first_conv: Name of the convolution that reads the image.
        classifier: Name of the last linear layer.
        grid: Height and width of the last map.
    """
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": grid,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": classifier,
    }


def scan_constants(model: nn.Module) -> set[str]:
    """Names of the decay rates and skips of all scans of a network, which weight decay must not touch."""
    return {name for name, _ in model.named_parameters() if name.endswith((".scan.A_log", ".scan.D"))}
