"""Training a detector: what detection adds to the shared loop."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from detection.check import unreadable_pictures
from detection.config import BackboneConfig, DetectConfig
from detection.data import TrainDataset, collate, save_batch_picture, val_loader
from detection.evaluate import evaluate
from detection.formats import DetectionSet, load_detection_set
from detection.loss import DetectionLoss
from detection.model import MambaYOLO
from detection.pretrained import starting_weights
from vision_ssm.checkpoint import load_checkpoint, load_matching
from vision_ssm.classify.model import find_weights
from vision_ssm.config import from_dict, to_dict
from vision_ssm.errors import UserError
from vision_ssm.training import RunInfo, Task, TrainResult, last_run_dir, read_run_config, train
from vision_ssm.training.environment import is_main_process

FROZEN = {"none": (), "backbone": ("backbone",), "all_but_head": ("backbone", "neck")}
"""Parts of the network that `freeze` keeps as they are."""
LOGGED = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")
"""Numbers of `Metrics.scalars` that are logged at every epoch."""


class DetectionTask(Task):
    """Mamba-YOLO on one data set; the best checkpoint is the one of highest fitness, 0.1 AP50 + 0.9 AP on `val`."""

    primary = "fitness"
    loss_reduction = "sum"

    def __init__(self, config: DetectConfig, *, resumed: bool = False) -> None:
        if not config.data.path:
            raise UserError("no data set: give its folder as --data.path (COCO, Pascal VOC or YOLO form)")
        self.settings, self.resumed = config, resumed
        self.train_set = load_detection_set(config.data.path, config.data.train)
        self.val_set = load_detection_set(config.data.path, config.data.val, names=self.train_set.names)
        if not self.train_set.names:
            raise UserError(f"{config.data.path} has no classes: no box is drawn in it yet")
        for dataset in (self.train_set, self.val_set):
            dataset.refuse_errors()
            if is_main_process():
                report_findings(dataset)
                refuse_unreadable(dataset)
        self.criterion = DetectionLoss(len(self.train_set.names))
        self.backbone, self.backbone_weights = backbone_of(config.model.backbone)

    def config(self) -> dict[str, Any]:
        """The run's settings, and what a detector needs to know to predict."""
        settings = to_dict(self.settings)
        settings.pop("train")  # the loop adds it
        settings["model"] |= {"num_classes": len(self.train_set.names), "backbone": self.backbone}
        return settings | {
            "task": "detect",
            "names": list(self.train_set.names),
            "category_ids": list(self.train_set.category_ids),
            "image_size": self.settings.data.image_size,
        }

    def build(self) -> nn.Module:
        """The network, with the weights it starts from (a resumed run has its own) and its frozen part."""
        model = MambaYOLO(**self.config()["model"])
        if self.backbone_weights and not self.resumed:
            report = load_matching(model.get_submodule("backbone.network"), self.backbone_weights)
            if is_main_process():
                print(f"backbone from {self.settings.model.backbone.weights}\n{report}")
        if self.settings.weights is not None and not self.resumed:
            report = load_matching(model, starting_weights(self.settings.weights))
            if is_main_process():
                print(f"starting from {self.settings.weights}\n{report}")
        for part in FROZEN[self.settings.freeze]:
            model.get_submodule(part).requires_grad_(False)
        return model.to(memory_format=torch.channels_last)

    def train_data(self) -> Dataset:
        """Augmented training samples."""
        data = self.settings.data
        return TrainDataset(
            self.train_set,
            image_size=data.image_size,
            config=data.augment,
            epochs=self.settings.train.epochs or 1_000_000_000,
            cache=data.cache,
        )

    def collate(self, samples: list[Any]) -> dict[str, Tensor]:
        """Batch as `detection.data.collate` gives it."""
        return collate(samples)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Box, class and distribution losses of one batch."""
        return self.criterion(model(batch["images"].float() / 255), batch)

    def evaluate(self, model: nn.Module, run: RunInfo) -> dict[str, float]:
        """COCO and VOC numbers on the validation split."""
        train = self.settings.train
        loader = val_loader(
            self.val_set,
            image_size=self.settings.data.image_size,
            batch_size=train.batch_size,
            workers=train.workers,
        )
        metrics = evaluate(model, loader, self.val_set, device=run.device, amp=train.precision == "bf16")
        scores = metrics.scalars()
        return {"fitness": metrics.fitness} | {name: scores[name] for name in LOGGED}

    def first_batch(self, batch: dict[str, Tensor], run_dir: Path) -> None:
        """Save the first batch with its boxes."""
        save_batch_picture(batch, run_dir / "first_batch.jpg", self.train_set.names)


def backbone_of(config: BackboneConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a model is told of a backbone of timm, and the weights that it starts with; both empty without one."""
    if not config.weights:
        return {k: v for k, v in to_dict(config).items() if k != "weights"} if config.name else {}, {}
    folder = find_weights(config.weights)
    weights, saved = load_checkpoint(folder)
    if saved.get("task") != "classify":
        raise UserError(f"{folder} is no classifier; train one with `vssm classify train` or `vssm distill train`")
    return {**saved["network"], "statistics": saved.get("statistics", "plain")}, weights


def report_findings(dataset: DetectionSet, most: int = 5) -> None:
    """Print the warnings met while reading a data set, the first few in full."""
    warnings = [f for f in dataset.findings if f.severity == "warning"]
    for finding in warnings[:most]:
        print(f"{dataset.split}: {finding.file} {finding.where}: {finding.rule}")
    if len(warnings) > most:
        print(f"{dataset.split}: {len(warnings) - most} more warnings; `vssm detect check {dataset.root}` lists them")


def refuse_unreadable(dataset: DetectionSet) -> None:
    """Decode every picture once, which takes less than the loading of one epoch: now, not hours into the run.

    Raises:
        UserError: some cannot be used; the message names the first.
    """
    replace(dataset, findings=tuple(unreadable_pictures(dataset, progress=True))).refuse_errors()


def train_detector(config: DetectConfig, *, resume: Path | None = None) -> TrainResult:
    """Train as the configuration says; `resume` is the folder of a run to go on with.

    Raises:
        UserError: bad data, weights or settings; a run that was trained on other classes.
    """
    task = DetectionTask(config, resumed=resume is not None)
    if resume is not None:
        _check_classes(resume, task.train_set)
    return train(task, config.train, resume=resume)


def _check_classes(run: Path, dataset: DetectionSet) -> None:
    """Refuse to go on with a run on data whose labels mean other things."""
    before, now = read_run_config(run).get("names"), list(dataset.names)
    if not isinstance(before, list):
        raise UserError(f"cannot resume {run}: last/config.json is damaged, it does not name the classes (`names`)")
    if before != now:
        raise UserError(
            f"cannot resume {run}: it was trained on the classes {', '.join(map(str, before))}; {dataset.root} has "
            f"{', '.join(now)}. Give it data with the same classes in the same order (--data.path), or begin a new run "
            f"from what it has learned: --weights {run / 'last'}"
        )


def resumed_config(run: Path, *, data_path: str = "") -> tuple[DetectConfig, Path]:
    """Settings of a run that is to go on, and its folder: `run` itself, or the newest of run, run2, ...

    Raises:
        UserError: nothing to resume there.
    """
    folder = last_run_dir(run)
    saved = read_run_config(folder)
    if saved.get("task") != "detect" or not isinstance(saved.get("model"), dict):
        raise UserError(f"{folder} is no run of `vssm detect train`: so says its last/config.json")
    saved["model"].pop("num_classes", None)  # follows from the data
    known = {f.name for f in fields(DetectConfig)}
    config = from_dict(DetectConfig, {k: v for k, v in saved.items() if k in known}, str(folder / "last"))
    return (replace(config, data=replace(config.data, path=data_path)) if data_path else config), folder
