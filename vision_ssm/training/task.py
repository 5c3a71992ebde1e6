"""What a task gives to the training loop: a model, data, a loss, an evaluation."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate


@dataclass(frozen=True)
class RunInfo:
    """Where a run stands when it is evaluated."""

    run_dir: Path
    device: torch.device
    epoch: int
    """Finished epochs."""
    epochs: int
    step: int
    """Finished optimiser steps."""


class Task(ABC):
    """Detection, restoration, diffusion or classification, as the loop sees it.

    Random numbers: inside ``train_data()[key]`` the global generators of random, numpy and torch are seeded from
    (seed, epoch, index), inside ``loss`` from (seed, batch, process), inside ``evaluate`` from (seed, step). So drawing
    from them is reproducible for any number of workers and after a resume.
    """

    primary: str
    """Name of the metric of ``evaluate`` by which the best checkpoint is chosen."""
    higher_is_better: bool = True
    loss_reduction: Literal["mean", "sum"] = "mean"
    """Whether the losses of the batches of one step, and of several processes, are averaged or added."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """What rebuilds model and task; plain values, written to ``config.json``."""

    @abstractmethod
    def build(self) -> nn.Module:
        """The model to train, on the CPU. Parameters with ``requires_grad=False`` stay as they are."""

    @abstractmethod
    def train_data(self) -> Dataset:
        """The training set: ``len()`` and ``[key]`` with a ``SampleKey`` (``index``, ``epoch``, ``rng()``)."""

    def collate(self, samples: list[Any]) -> Any:
        """Make a batch of a list of samples."""
        return default_collate(samples)

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """Scalar losses of a batch on the device: ``loss`` is minimised, the others are logged.

        ``model(...)`` runs under autocast if asked for and returns float32. With several processes every trainable
        parameter must take part in the loss of every batch.
        """

    @abstractmethod
    def evaluate(self, model: nn.Module, run: RunInfo) -> dict[str, float]:
        """Metrics of the averaged weights. Called in the main process only, in eval mode, without gradients."""

    def first_batch(self, batch: Any, run_dir: Path) -> None:
        """Look at the first batch of a new run (on the CPU), e.g. save it as a picture. Main process only."""
        return
