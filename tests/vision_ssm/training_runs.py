"""A task small enough to train in a second, for the tests of the training loop; as a script it trains once."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from vision_ssm.errors import UserError
from vision_ssm.training import EmaConfig, OptimConfig, RunInfo, SampleKey, ScheduleConfig, Task, TrainConfig, train


class Pictures(Dataset):
    """Noise pictures (3, 6, 6), their class is the brightest channel; "augmented" from both kinds of generator."""

    def __init__(self, samples: int, broken: int | None = None) -> None:
        self.pictures = torch.randn(samples, 3, 6, 6, generator=torch.Generator().manual_seed(5))
        self.labels = self.pictures.mean(dim=(2, 3)).argmax(dim=1)
        self.broken = broken

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, Tensor]:
        if key.index == self.broken:
            raise UserError(f"picture {key.index} is corrupt")
        noise = torch.randn(3, 6, 6) + float(key.rng().normal())
        return self.pictures[key.index] + 0.1 * noise, self.labels[key.index]


class TinyTask(Task):
    """Classification of ``Pictures``.

    Args:
        plain: Without batch statistics and dropout, so that the result does not depend on how batches are split.
        reduction: Of the loss, also over batches and processes.
        broken: A sample that cannot be read.

    Attributes:
        actions: Functions of the images, by the number of the batch (of this object, from 0) that calls them.
        scores: What ``evaluate`` gives for each epoch instead of the real accuracy, if not empty.
        losses: Of every batch so far.
    """

    primary = "accuracy"

    def __init__(
        self, *, samples: int = 22, plain: bool = False, reduction: str = "mean", broken: int | None = None
    ) -> None:
        self.data = Pictures(samples, broken)
        self.plain = plain
        self.loss_reduction = reduction  # type: ignore[assignment]
        self.losses: list[float] = []
        self.actions: dict[int, Any] = {}
        self.scores: list[float] = []
        self.seen_first = 0

    def config(self) -> dict[str, Any]:
        return {"task": "tiny", "plain": self.plain}

    def build(self) -> nn.Module:
        norm = nn.GroupNorm(2, 8) if self.plain else nn.BatchNorm2d(8)
        drop = nn.Identity() if self.plain else nn.Dropout(0.2)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), norm, nn.ReLU(), drop, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
        )

    def train_data(self) -> Dataset:
        return self.data

    def loss(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        action = self.actions.get(len(self.losses))
        images, labels = batch
        if action is not None:
            images = action(images)
        scores = model(images)
        entropy = nn.functional.cross_entropy(scores, labels, reduction=self.loss_reduction)
        self.losses.append(entropy.item())
        return {"loss": entropy, "norm": scores.norm()}

    def evaluate(self, model: nn.Module, run: RunInfo) -> dict[str, float]:
        assert not model.training
        score = (model(self.data.pictures).argmax(1) == self.data.labels).float().mean().item()
        return {"accuracy": self.scores[run.epoch - 1] if self.scores else score, "drawn": torch.rand(()).item()}

    def first_batch(self, batch: Any, run_dir: Path) -> None:
        self.seen_first += 1


def tiny_config(run_dir: Path, **changes: Any) -> TrainConfig:
    """Three epochs of 6 batches of 4, in 3 steps each."""
    defaults: dict[str, Any] = {
        "epochs": 3,
        "batch_size": 4,
        "nominal_batch": 8,
        "workers": 0,
        "device": "cpu",
        "optim": OptimConfig(lr=0.05, momentum=0.9, weight_decay=0.01),
        "schedule": ScheduleConfig(warmup_epochs=1, warmup_min_batches=0, warmup_bias_lr=0.1),
        "ema": EmaConfig(decay=0.9, warmup_steps=3),
    }
    return TrainConfig(run_dir=str(run_dir), **{**defaults, **changes})


def kill(images: Tensor) -> Tensor:
    """End the process as the kernel does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)
    return images


def main() -> None:
    """Train by the JSON on the command line: a list of {"run_dir", "kill_at", "task": {...}, "config": {...}}."""
    torch.set_num_threads(1)
    for options in json.loads(sys.argv[1]):
        task = TinyTask(**options.get("task", {}))
        if "kill_at" in options:
            task.actions[options["kill_at"]] = kill
        result = train(task, tiny_config(Path(options["run_dir"]), **options.get("config", {})))
        told = {"metrics": result.metrics, "history": result.history, "seen_first": task.seen_first}
        (result.run_dir / f"result{os.environ.get('RANK', '0')}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
