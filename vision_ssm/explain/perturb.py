"""The perturbation test: does a heat map name the parts of a picture that a classifier needs?"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

FRACTIONS = tuple(i / 10 for i in range(1, 10))
"""Shares of the cells that are blanked (Ali et al., 2024, section 5.2)."""
RANDOM_ORDERS = 4


@dataclass(frozen=True)
class Perturbation:
    """Top-1 accuracy in per cent by share of cells blanked, and its mean over the shares (area under the curve).

    Attributes:
        fractions: shares of the cells.
        positive: accuracies with the most relevant cells blanked first; low is good.
        random: with cells in random order, mean over 4 orders.
        negative: with the least relevant first; high is good.
    """

    fractions: tuple[float, ...]
    positive: tuple[float, ...]
    random: tuple[float, ...]
    negative: tuple[float, ...]

    def auc(self) -> dict[str, float]:
        """Mean accuracy of every order."""
        return {name: sum(getattr(self, name)) / len(self.fractions) for name in ("positive", "random", "negative")}


@torch.no_grad()
def perturbation_test(
    predict: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    heat: Tensor,
    *,
    blank: float | Tensor = 0.0,
    fractions: tuple[float, ...] = FRACTIONS,
    seed: int = 0,
) -> Perturbation:
    """Blank cells of pictures by relevance and see how a classifier's accuracy falls.

    The cells are those of the heat map, and the random orders are of the same cells: scattered pixels would hide less
    of a picture than whole cells do.

    Args:
        predict: (n, C, H, W) -> (n, classes).
        images: (n, C, H, W) as `predict` takes them.
        labels: (n,) true classes.
        heat: (n, h, w) relevance of cells, on a grid of pixels or a coarser one.
        blank: what a cell is filled with; broadcastable to the images.
        fractions: shares of the cells that are blanked.
        seed: of the random orders.

    Raises:
        ValueError: the shapes do not fit one another.
    """
    count, size = len(images), images.shape[-2:]
    if heat.ndim != 3 or len(heat) != count or labels.shape != (count,):
        raise ValueError(
            f"images {tuple(images.shape)} want a heat ({count}, h, w) and labels ({count},); "
            f"got {tuple(heat.shape)} and {tuple(labels.shape)}"
        )
    generator = torch.Generator().manual_seed(seed)

    def curve(relevance: Tensor) -> list[float]:
        ranks = relevance.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        accuracies = []
        for fraction in fractions:
            cells = (ranks < round(fraction * ranks.shape[1])).view(count, 1, *heat.shape[1:])
            gone = F.interpolate(cells.float(), size, mode="nearest").bool().to(images.device)
            right = predict(torch.where(gone, blank, images)).argmax(1).cpu() == labels.cpu()
            accuracies.append(100 * right.double().mean().item())
        return accuracies

    noise = [curve(torch.rand(heat.shape, generator=generator)) for _ in range(RANDOM_ORDERS)]
    random = tuple(sum(values) / RANDOM_ORDERS for values in zip(*noise, strict=True))
    return Perturbation(tuple(fractions), tuple(curve(heat)), random, tuple(curve(-heat)))
