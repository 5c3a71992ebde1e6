"""Handwritten digits (8 x 8, from scikit-learn's wheel) as sequences of 64 pixel tokens, and a classifier of them."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_ssm.probe.options import Pool
from vision_ssm.probe.stack import Stack, StackConfig, fit

# Shapes: B pictures, L = 64 pixels row by row.

LENGTH, CLASSES, TEST, BATCH = 64, 10, 500, 64


def load() -> tuple[Tensor, Tensor]:
    """(1797, 64, 1) pixels of zero mean and unit variance, (1797,) digits, in a random order that never changes."""
    from sklearn.datasets import load_digits

    pictures, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pixels = pictures.float()[order, :, None]
    return (pixels - pixels.mean()) / pixels.std(), labels[order]


def classifier(config: StackConfig) -> Stack:
    """Untrained: pixels and positions in, ten scores at every token out."""
    return Stack(config, nn.Linear(1, config.dim), CLASSES, length=LENGTH)


def scores(model: Stack, pixels: Tensor, pool: Pool) -> Tensor:
    """(B, 10)."""
    found = model(pixels)
    return found[:, -1] if pool == "last" else found.mean(1)


def train(model: Stack, pixels: Tensor, labels: Tensor, *, pool: Pool, steps: int, seed: int) -> float:
    """Fit all but the last ``TEST`` pictures; seconds."""
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            chosen = torch.randint(len(labels) - TEST, (BATCH,), generator=generator)
            yield pixels[chosen], labels[chosen]

    return fit(model, batches(), lambda x, y: F.cross_entropy(scores(model, x, pool), y), steps=steps, lr=4e-3)
