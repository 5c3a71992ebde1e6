"""What timm wants of every network that we register."""

from abc import ABC, abstractmethod
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead
from timm.models._features import feature_take_indices
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
    feature_info: list[dict[str, Any]]

    @abstractmethod
    def maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """One map for each of ``feature_info``."""

    def last(self, maps: tuple[Tensor, ...]) -> Tensor:
        """What the head reads."""
        return maps[-1]

    def forward_features(self, images: Tensor) -> Tensor:
        """What the head reads, (B, C, H / 32, W / 32)."""
        return self.last(self.maps(images))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps of chosen stages, as timm's feature extractor asks for them.

        Args:
            x: (B, in_chans, H, W) images.
            indices: Places in ``feature_info``; a number is that many of the last, None all.
            norm, stop_early: Without effect: maps come without a last norm, and the whole network is run.
            output_fmt: NCHW, no other.
            intermediates_only: Leave out the final features.

        Returns:
            The maps, before them the final features as of ``forward_features``.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be NCHW, got {output_fmt!r}")
        take, _ = feature_take_indices(len(self.feature_info), indices)
        maps = self.maps(x)
        chosen = [maps[i] for i in take]
        return chosen if intermediates_only else (self.last(maps), chosen)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the classifier; returns the places of the chosen maps."""
        if prune_head:
            self.reset_classifier(0, "")
        return feature_take_indices(len(self.feature_info), indices)[0]

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
