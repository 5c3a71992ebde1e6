"""A trained classifier: network, classes and preprocessing, loaded from one folder."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from vision_ssm.checkpoint import load_checkpoint, load_matching
from vision_ssm.classify.config import NetworkConfig, Statistics
from vision_ssm.config import near_match
from vision_ssm.device import choose_device
from vision_ssm.errors import UserError
from vision_ssm.files import shipped_or_path

STATISTICS: dict[Statistics, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "plain": ((0.5,), (0.25,)),
    "imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
}
"""Mean and deviation of pixel values from 0 to 1, for all channels or each."""
OURS = ("vision_ssm.backbones", "vision_ssm.distill.student", "detection.backbone")
"""Modules that register our networks in timm; imported when a name is not known without them."""

_SHIPPED = Path(__file__).parent / "weights"


def find_weights(place: str | Path) -> Path:
    """A file or folder that exists, or the folder of shipped weights of that name; else the path as it is."""
    return shipped_or_path(place, _SHIPPED)


def build_network(config: NetworkConfig, classes: int) -> nn.Module:
    """One of timm's networks with an untrained head.

    Raises:
        UserError: no such network, or it does not take the options.
    """
    for module in OURS:
        if not timm.is_model(config.name):
            importlib.import_module(module)
    if not timm.is_model(config.name):
        raise UserError(f"timm has no network {config.name!r}{near_match(config.name, timm.list_models())}")
    try:
        return timm.create_model(config.name, pretrained=False, num_classes=classes, **config.options)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:  # timm asserts some of its arguments
        raise UserError(f"timm cannot build {config.name} with {config.options}: {error}") from None


@torch.no_grad()
def check_side(network: nn.Module, name: str, side: int) -> None:
    """Refuse a network that does not take pictures of that size, before it is trained.

    Raises:
        UserError: it says so at one picture of zeros.
    """
    training = network.training
    try:
        network.eval()(torch.zeros(1, 3, side, side))
        network.train(training)
    except (RuntimeError, AssertionError) as error:  # timm asserts the size of its vision transformers
        raise UserError(f"{name} does not take pictures of {side}x{side} pixels (data.side): {error}") from None


def normalized(images: Tensor, statistics: Statistics = "plain") -> Tensor:
    """(B, 3, H, W) uint8, or floats from 0 to 1, as networks see them."""
    floats = images.float() / 255 if images.dtype == torch.uint8 else images
    mean, std = (floats.new_tensor(values)[:, None, None] for values in STATISTICS[statistics])
    return (floats - mean) / std


class Classifier:
    """A network with its classes; `save` of a run's loop wrote it.

    Args:
        network: of timm.
        classes: their names.
        side: of the squares it was trained on, in pixels.
        accuracy: share of the validation pictures it gets right, for reports; None if unknown.
        statistics: what its pixels are normalised by.
    """

    def __init__(
        self,
        network: nn.Module,
        classes: Sequence[str],
        side: int,
        accuracy: float | None = None,
        statistics: Statistics = "plain",
    ) -> None:
        self.network, self.classes, self.side, self.accuracy = network.eval(), tuple(classes), side, accuracy
        self.statistics: Statistics = statistics

    @classmethod
    def load(cls, path: str | Path, *, device: str | torch.device = "auto") -> "Classifier":
        """Read a checkpoint folder or `.safetensors` file of `vssm classify train`, or shipped weights by name.

        Raises:
            UserError: missing, damaged, or weights of something else.
        """
        path = find_weights(path)
        weights, config = load_checkpoint(path)
        network = classifier_from(weights, config, path)
        scores = config.get("trained", {}).get("best", {})
        statistics = config.get("statistics", "plain")
        if statistics not in STATISTICS:
            allowed = " or ".join(STATISTICS)
            raise UserError(f"{path}: config.json is damaged: statistics is {statistics!r}, allowed is {allowed}")
        return cls(
            network.to(choose_device(device)), config["classes"], config["side"], scores.get("accuracy"), statistics
        )

    @torch.no_grad()
    def __call__(self, images: Tensor, *, batch_size: int = 256) -> tuple[Tensor, Tensor]:
        """Features before the last layer, and probabilities.

        Args:
            images: (n, 3, H, W) uint8, or floats from 0 to 1; other sizes than `side` are resized.
            batch_size: pictures that go through the network together.

        Returns:
            (n, D) features and (n, classes) probabilities, float32 on the CPU.
        """
        device = next(self.network.parameters()).device
        features, probabilities = [], []
        for part in images.split(batch_size):
            batch = normalized(part.to(device), self.statistics)
            if batch.shape[-2:] != (self.side, self.side):
                batch = nn.functional.interpolate(batch, (self.side, self.side), mode="bilinear", antialias=True)
            pooled = self.network.forward_head(self.network.forward_features(batch), pre_logits=True)  # type: ignore[operator]
            logits = self.network.get_classifier()(pooled)  # type: ignore[operator]
            features.append(pooled.float().cpu())
            probabilities.append(logits.float().softmax(dim=1).cpu())
        return torch.cat(features), torch.cat(probabilities)


def classifier_from(weights: Mapping[str, Tensor], config: Mapping[str, Any], source: str | Path) -> nn.Module:
    """The network of a checkpoint, on the CPU.

    Raises:
        UserError: the checkpoint is no classifier's.
    """
    if config.get("task") != "classify":
        raise UserError(f"{source} is no classifier; train one with `vssm classify train`")
    network = build_network(NetworkConfig(**config["network"]), len(config["classes"]))
    load_matching(network, weights).require_complete(source)
    return network
