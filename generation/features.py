"""Networks whose features samples are compared in: our classifier, or a TorchScript file such as FID's or FVD's."""

import hashlib
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from generation.generator import weights_hash
from vision_ssm.classify.model import Classifier, find_weights
from vision_ssm.device import choose_device
from vision_ssm.errors import UserError


class Features(Protocol):
    """A feature network."""

    def __call__(self, samples: Tensor) -> tuple[Tensor, Tensor | None]:
        """(n, C, H, W) or (n, F, C, H, W) uint8 -> features (n, D), and class probabilities where it has classes."""
        ...

    def facts(self) -> dict[str, Any]:
        """What a report says of it."""
        ...


class ClassifierFeatures:
    """The layer before the last of a classifier of `vssm classify train`."""

    def __init__(self, weights: Path, device: str = "auto") -> None:
        self.weights = find_weights(weights)
        self.classifier = Classifier.load(self.weights, device=device)

    def __call__(self, samples: Tensor) -> tuple[Tensor, Tensor | None]:
        """(n, C, H, W) uint8 -> features and probabilities.

        Raises:
            UserError: clips are given.
        """
        if samples.ndim != 4:
            raise UserError("a classifier sees pictures; score clips by their attributes or by --network")
        return self.classifier(samples if samples.shape[1] == 3 else samples.expand(-1, 3, -1, -1))

    def facts(self) -> dict[str, Any]:
        """Name, accuracy, hash and preprocessing."""
        return {
            "network": "classifier",
            "weights": self.weights.name,
            "sha256": weights_hash(self.weights),
            "accuracy_on_real_val": self.classifier.accuracy,
            "side": self.classifier.side,
            "classes": list(self.classifier.classes),
        }


class ScriptFeatures:
    """Any TorchScript module from uint8 samples to features.

    It is called with (n, 3, H, W) uint8, or (n, 3, F, H, W) floats from 0 to 255, and with `return_features`, `rescale`
    and `resize` set where its forward has arguments of these names, as the usual files of Inception-v3 and I3D have.

    Args:
        file: of `torch.jit.save`. TorchScript can only compute, but take files from where you trust.
        device: auto, cpu or cuda.

    Raises:
        UserError: no TorchScript file.
    """

    def __init__(self, file: Path, device: str = "auto") -> None:
        if not file.is_file():
            raise UserError(f"no network at {file}; give a TorchScript file, nothing is downloaded")
        self.file, self.device = file, choose_device(device)
        try:
            self.module = torch.jit.load(str(file), map_location=self.device).eval()
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{file} is no TorchScript file: {str(error).splitlines()[0]}") from None
        arguments = {argument.name for argument in self.module.forward.schema.arguments}
        self.options = {name: True for name in ("return_features", "rescale", "resize") if name in arguments}

    @torch.no_grad()
    def __call__(self, samples: Tensor, *, batch_size: int = 32) -> tuple[Tensor, Tensor | None]:
        """(n, C, H, W) or (n, F, C, H, W) uint8 -> features.

        Raises:
            UserError: the network does not take them.
        """
        if samples.shape[-3] == 1:
            samples = samples.expand(*samples.shape[:-3], 3, *samples.shape[-2:])
        parts = []
        for part in samples.split(batch_size):
            given = part.to(self.device) if part.ndim == 4 else part.to(self.device).transpose(1, 2).float()
            try:
                parts.append(self.module(given, **self.options).flatten(1).float().cpu())
            except RuntimeError as error:
                message = str(error).strip().splitlines()[-1]
                raise UserError(f"{self.file} does not take {tuple(given.shape)} {given.dtype}: {message}") from None
        return torch.cat(parts), None

    def facts(self) -> dict[str, Any]:
        """Name, hash and how it is called."""
        digest = hashlib.sha256(self.file.read_bytes()).hexdigest()
        return {"network": "TorchScript", "weights": self.file.name, "sha256": digest, "options": list(self.options)}
