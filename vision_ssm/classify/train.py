"""Training a classifier: what classification adds to the shared loop."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from vision_ssm.checkpoint import load_checkpoint, load_matching
from vision_ssm.classify.config import ClassifyConfig, ClassifyDataConfig
from vision_ssm.classify.model import Classifier, build_network, check_side, normalized
from vision_ssm.config import from_dict, to_dict
from vision_ssm.data.labelled import LabelledPictures, find_labelled, to_square
from vision_ssm.errors import UserError
from vision_ssm.training import RunInfo, SampleKey, Task, last_run_dir, read_run_config, train
from vision_ssm.training.environment import is_main_process
from vision_ssm.viz import grid, save_picture


class Squares(Dataset):
    """Pictures as augmented squares (3, S, S) uint8 with their labels; a key always gives the same one.

    Decoded squares are kept: a training set of a classifier for small pictures fits into memory.
    """

    def __init__(self, pictures: LabelledPictures, config: ClassifyDataConfig) -> None:
        self.config, self.labels = config, pictures.labels
        self.squares = read_squares(pictures, config.side)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, int]:
        picture = augmented(self.squares[key.index], self.config, key.rng())
        return torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1))), int(self.labels[key.index])


def read_squares(pictures: LabelledPictures, side: int) -> np.ndarray:
    """All pictures as squares, (n, side, side, 3) uint8."""
    squares = np.empty((len(pictures), side, side, 3), np.uint8)
    for index in range(len(pictures)):
        squares[index] = to_square(pictures.read(index), side)
    return squares


def augmented(picture: np.ndarray, config: ClassifyDataConfig, rng: np.random.Generator) -> np.ndarray:
    """A picture (S, S, 3) shifted, turned or mirrored, and with other brightness and contrast."""
    most = int(config.shift * config.side)
    if most:
        padded = cv2.copyMakeBorder(picture, most, most, most, most, cv2.BORDER_REFLECT_101)
        top, left = rng.integers(2 * most + 1, size=2)
        picture = padded[top : top + config.side, left : left + config.side]
    if config.augment == "turns":
        picture = np.rot90(picture, int(rng.integers(4)))
    if config.augment != "none" and rng.integers(2):
        picture = picture[:, ::-1]
    if config.color:
        gain, offset = rng.uniform(1 - config.color, 1 + config.color), 128 * rng.uniform(-config.color, config.color)
        picture = np.clip((picture - 128.0) * gain + 128 + offset, 0, 255).astype(np.uint8)
    return picture


class ClassifyTask(Task):
    """A classifier; the best checkpoint is the one that gets most of the validation pictures right."""

    primary = "accuracy"

    def __init__(self, config: ClassifyConfig, *, resumed: bool = False) -> None:
        data = config.data
        if not data.train:
            raise UserError("no pictures: give their folder as --data.train (a folder per class, or idx files)")
        self.settings, self.resumed = config, resumed
        self.pictures = find_labelled(data.train, "train")
        self.classes: list[str] = list(self.pictures.classes)
        if len(self.classes) < 2:
            raise UserError(f"{data.train} has one class only, {self.classes[0]!r}: nothing to tell apart")
        held_out = find_labelled(data.val or data.train, "val", self.classes)
        self._refuse_overlap(held_out)
        self.val_squares, self.val_labels = read_squares(held_out, data.side), held_out.labels
        if is_main_process():
            print(
                f"{len(self.pictures)} pictures to train on, {len(held_out)} to score, {len(self.classes)} classes",
                flush=True,
            )

    def config(self) -> dict[str, Any]:
        """Network, classes, preprocessing, and the run's settings."""
        settings = to_dict(self.settings)
        settings.pop("train")  # the loop adds it
        return {
            "task": "classify",
            "network": settings["network"],
            "classes": self.classes,
            "side": self.settings.data.side,
            "statistics": self.settings.data.statistics,
            "settings": settings,
        }

    def build(self) -> nn.Module:
        """The network, with the weights it starts from (a resumed run has its own)."""
        network = build_network(self.settings.network, len(self.classes))
        check_side(network, self.settings.network.name, self.settings.data.side)
        if self.settings.weights is not None and not self.resumed:
            weights, config = load_checkpoint(self.settings.weights)
            report = load_matching(network, weights)
            if is_main_process():
                print(f"starting from {self.settings.weights}\n{report}")
                if (statistics := config.get("statistics", "plain")) != self.settings.data.statistics:
                    print(f"note: these weights expect pixels normalised otherwise: --data.statistics {statistics}")
        return network

    def train_data(self) -> Dataset:
        """Augmented squares."""
        return Squares(self.pictures, self.settings.data)

    def loss(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """Cross entropy, and the share of pictures that are right."""
        images, labels = batch
        scores = model(normalized(images, self.settings.data.statistics))
        smoothing = self.settings.label_smoothing
        entropy = nn.functional.cross_entropy(scores, labels, label_smoothing=smoothing)
        return {"loss": entropy, "accuracy": (scores.detach().argmax(1) == labels).float().mean()}

    def evaluate(self, model: nn.Module, run: RunInfo) -> dict[str, float]:
        """Accuracy and negative log-likelihood on the validation pictures."""
        data = self.settings.data
        classifier = Classifier(model, self.classes, data.side, statistics=data.statistics)
        return scores_of(classifier, self.val_squares, self.val_labels)

    def first_batch(self, batch: Any, run_dir: Path) -> None:
        """Save the first batch as a picture."""
        save_picture(run_dir / "first_batch.png", grid([i.permute(1, 2, 0).numpy() for i in batch[0][:64]]))

    def _refuse_overlap(self, held_out: LabelledPictures) -> None:
        both = {self.pictures.name(i) for i in range(len(self.pictures))} & {
            held_out.name(i) for i in range(len(held_out)) if isinstance(held_out.pictures[i], Path)
        }
        if both:
            raise UserError(
                f"{len(both)} pictures are for training and for scoring, for example {min(both)}: give --data.val, or "
                "a folder with the splits train and val"
            )


def scores_of(classifier: Classifier, squares: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, negative log-likelihood in nats, and mean accuracy over classes."""
    _, probabilities = classifier(torch.from_numpy(squares).permute(0, 3, 1, 2))
    truth = torch.from_numpy(labels)
    right = (probabilities.argmax(1) == truth).double()
    per_class = [right[truth == label].mean().item() for label in truth.unique()]
    chosen = probabilities.gather(1, truth[:, None]).clamp_min(1e-12)
    return {
        "accuracy": right.mean().item(),
        "mean_class_accuracy": float(np.mean(per_class)),
        "nll": -chosen.log().mean().item(),
    }


def run_train(config: ClassifyConfig, *, resume: Path | None = None) -> int:
    """Train as the configuration says, or go on with the run in the folder `resume`.

    Raises:
        UserError: bad data, weights or settings, or nothing to resume.
        SystemExit: stopped by Ctrl-C (130) or SIGTERM (143); the state is saved.
    """
    if resume is not None:
        resume = last_run_dir(resume)
        saved = read_run_config(resume)
        if saved.get("task") != "classify" or "settings" not in saved:
            raise UserError(f"{resume} is no run of `vssm classify train`: so says its last/config.json")
        data = config.data
        config = from_dict(ClassifyConfig, {**saved["settings"], "train": saved["train"]}, str(resume / "last"))
        moved = replace(config.data, train=data.train or config.data.train, val=data.val or config.data.val)
        config = replace(config, data=moved)
    result = train(ClassifyTask(config, resumed=resume is not None), config.train, resume=resume)
    if is_main_process():
        best = f"; best: {result.metrics['accuracy']:.2%} right in {result.best}" if result.best else ""
        print(f"{result.run_dir} is done{best}")
    return 0
