"""What timm wants of every network that we register."""

from abc import ABC, abstractmethod
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead
from torch import Tensor, nn


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


class MapClassifier(nn.Module, ABC):
    """A network whose last map is pooled for a linear layer: what timm's users call, but for the network itself."""

    head: ClassifierHead
    num_classes: int

    @abstractmethod
    def forward_features(self, images: Tensor) -> Tensor:
        """The last map."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify what ``forward_features`` gave, or only pool it."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(images))

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put an untrained classifier, or none (0), in place of the present one."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay must not touch."""
        return scan_constants(self)
