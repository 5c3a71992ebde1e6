"""Small restorers with random weights that change their input, in memory and on disk."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from restoration.card import WeightsCard
from restoration.model import Serpent
from restoration.pretrained import save_weights


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """The same model in eval mode, every weight but the scans' constants drawn so that signals keep their size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".scan." in name:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.1 * noise)
    return model.eval()


def tiny_serpent(**changes: Any) -> Serpent:
    """A Serpent of two levels and 8 channels."""
    model = Serpent(**{"variant": "small", "width": 8, "depths": (1, 1)} | changes)
    shaken(model)
    with torch.no_grad():
        model.get_parameter("head.out.weight").mul_(0.1)
    return model


def save_tiny(folder: Path, task: str = "denoise", *, scale: int = 1, **changes: Any) -> Path:
    """A checkpoint folder of `tiny_serpent`."""
    model = tiny_serpent(**changes)
    save_weights(folder, model, WeightsCard(model={"name": "serpent", **model.config}, task=task, scale=scale))
    return folder
