"""The three stages of a distillation, each a run of the shared loop; what comes out is a checkpoint of a classifier.

1. Matrices: every mixer is to have the matrix of the teacher's attention on the teacher's tokens.
2. Hidden states: every mixer is to give what that attention gives. Everything else is the teacher's and stays so.
3. End to end: the whole student is to give the teacher's probabilities.

In the first two every layer learns by itself, all in one step; no stage reads a label.
"""

import copy
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vision_ssm.checkpoint import load_checkpoint, load_matching
from vision_ssm.classify.config import ClassifyConfig, NetworkConfig
from vision_ssm.classify.model import normalized
from vision_ssm.classify.train import ClassifyTask
from vision_ssm.config import from_dict, to_dict
from vision_ssm.data.labelled import find_labelled
from vision_ssm.device import choose_device
from vision_ssm.distill.config import DistillConfig, StudentConfig
from vision_ssm.distill.student import STUDENT, MatrixMixer, replace_attention
from vision_ssm.distill.teacher import Teacher, attention_matrix, load_teacher, tapped
from vision_ssm.errors import UserError
from vision_ssm.files import write_text
from vision_ssm.training import RunInfo, read_run_config, train
from vision_ssm.training.runs import new_run_dir

FOLDERS = {1: "1-matrices", 2: "2-hidden", 3: "3-end-to-end"}
_SETTINGS, _REPORT = "distill.json", "report.json"
_MEASURED = 256
"""Most pictures on which distances are measured."""


class StageTask(ClassifyTask):
    """One stage; its checkpoints are those of a classifier."""

    def __init__(self, config: DistillConfig, stage: int, teacher: Teacher, start: Path | None) -> None:
        self.distillation, self.stage, self.teacher, self.start = config, stage, teacher, start
        self.primary = {1: "matrix", 2: "hidden", 3: "accuracy"}[stage]
        self.higher_is_better = stage == 3
        network = student_network(teacher, config.student)
        super().__init__(ClassifyConfig(network=network, data=config.data, train=config.train))

    def config(self) -> dict[str, Any]:
        """As a classifier's, with what it learned from."""
        settings = {**to_dict(self.distillation), "stage": self.stage}
        settings.pop("train")
        return {**super().config(), "settings": settings}

    def build(self) -> nn.Module:
        """The teacher with mixers in place of attention, and what the stage before made of it."""
        student = new_student(self.teacher, self.distillation.student)
        if self.start is not None:
            load_matching(student, load_checkpoint(self.start)[0]).require_complete(self.start)
        student.requires_grad_(self.stage == 3)
        for block in student.blocks if self.stage < 3 else ():
            mixer = cast(MatrixMixer, block.attn)
            for parameter in mixer.matrix_parameters() if self.stage == 1 else mixer.parameters():
                parameter.requires_grad_(True)
        return student

    def loss(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """The distance of the stage; of the end, the cross entropy to the teacher's probabilities."""
        images = normalized(batch[0], self.settings.data.statistics)
        with torch.no_grad():
            shown = tapped(self.teacher.network.to(images.device), images)
        if self.stage == 3:
            return {"loss": F.cross_entropy(model(images), shown.logits.softmax(dim=1))}
        layers = []
        for old, new, x, y in zip(_mixers(self.teacher.network), _mixers(model), *shown[1:], strict=True):
            if self.stage == 1:
                with torch.no_grad():
                    wanted = attention_matrix(cast(Attention, old), x)
                layers.append(torch.linalg.matrix_norm(cast(MatrixMixer, new).matrix(x) - wanted).mean())
            else:
                layers.append(torch.linalg.vector_norm(new(x) - y, dim=-1).mean())
        return {"loss": torch.stack(layers).mean()}

    def evaluate(self, model: nn.Module, run: RunInfo) -> dict[str, float]:
        """A classifier's scores, and the distances from the teacher."""
        return {**super().evaluate(model, run), **self.distances(model, run.device)}

    @torch.no_grad()
    def distances(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """How far the mixers are from the teacher's attention on held-out pictures, as shares of what that gives.

        Returns:
            matrix and hidden, the means over the layers, and of each layer matrix/0, hidden/0 and so on.
        """
        spread = self.val_squares[:: max(1, len(self.val_squares) // _MEASURED)][:_MEASURED]  # of all classes
        squares = torch.from_numpy(np.ascontiguousarray(spread)).permute(0, 3, 1, 2)
        sums: dict[str, list[Tensor]] = {}
        for images in squares.split(32):
            shown = tapped(
                self.teacher.network.to(device), normalized(images.to(device), self.settings.data.statistics)
            )
            for i, (old, new, x, y) in enumerate(
                zip(_mixers(self.teacher.network), _mixers(model), *shown[1:], strict=True)
            ):
                wanted = attention_matrix(cast(Attention, old), x)
                far = torch.linalg.matrix_norm(cast(MatrixMixer, new).matrix(x) - wanted)
                sums.setdefault(f"matrix/{i}", []).append((far / torch.linalg.matrix_norm(wanted)).flatten(1).mean(1))
                far = torch.linalg.vector_norm(new(x) - y, dim=-1).mean(1)
                sums.setdefault(f"hidden/{i}", []).append(far / torch.linalg.vector_norm(y, dim=-1).mean(1))
        found = {name: torch.cat(values).mean().item() for name, values in sums.items()}
        layers = len(found) // 2
        means = {kind: sum(found[f"{kind}/{i}"] for i in range(layers)) / layers for kind in ("matrix", "hidden")}
        return means | found


def student_network(teacher: Teacher, student: StudentConfig) -> NetworkConfig:
    """How timm builds the student."""
    return NetworkConfig(STUDENT, {"base": teacher.built.name, **to_dict(student), **teacher.built.options})


def new_student(teacher: Teacher, student: StudentConfig) -> VisionTransformer:
    """A copy of the teacher with mixers in place of attention, all else the teacher's."""
    network = copy.deepcopy(teacher.network)
    replace_attention(network, student.mixer, student.state_size)
    return network


def run_distill(config: DistillConfig, *, resume: Path | None = None) -> Path:
    """Distil as the configuration says, or go on with the distillation in the folder `resume`.

    Returns:
        The checkpoint folder of the student.

    Raises:
        UserError: bad data, teacher or settings, or nothing to resume.
        SystemExit: stopped by Ctrl-C (130) or SIGTERM (143); the state is saved.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a distillation runs in one process, without torchrun")
    if resume is not None:
        config = _saved_settings(resume)
    if not config.data.train:
        raise UserError("no pictures: give their folder as --data.train (a folder per class, or idx files)")
    classes = find_labelled(config.data.train, "train").classes
    teacher = load_teacher(config.teacher, classes, config.data)
    if resume is None:
        folder = new_run_dir(config.train.run_dir)
        write_text(folder / _SETTINGS, json.dumps(to_dict(config), indent=2) + "\n")
    else:
        folder = resume
    start, rows = None, {}
    for stage in FOLDERS:
        if not config.steps(stage):
            continue
        task = StageTask(config, stage, teacher, start)
        if not rows:
            rows["start"] = _measured(task, task.build())
        start = _run_stage(task, folder / FOLDERS[stage])
        rows[FOLDERS[stage]] = _measured(task, task.build(), start)
    if start is None:
        raise UserError(f"train.steps {config.train.steps} are too few: no stage gets one")
    write_text(folder / _REPORT, json.dumps(rows, indent=2) + "\n")
    print(f"distances from the teacher, as shares of its own; {folder / _REPORT}\n{table(rows)}")
    print(f"the student is in {start}")
    return start


def _run_stage(task: StageTask, folder: Path) -> Path:
    """Run a stage, go on with it, or leave it where it is finished; its last checkpoint."""
    config, stage = task.distillation, task.stage
    optim = replace(config.train.optim, lr=config.train.optim.lr * config.rates[stage - 1])
    settings = replace(config.train, run_dir=str(folder), steps=config.steps(stage), optim=optim)
    begun = (folder / "last").is_dir()
    if begun:
        done = read_run_config(folder)["trained"]
        if done["step"] >= done["steps"]:
            return folder / "last"
    elif folder.exists():
        shutil.rmtree(folder)  # it stopped before its first checkpoint
    return train(task, settings, resume=folder if begun else None).last


def _measured(task: StageTask, student: nn.Module, weights: Path | None = None) -> dict[str, float]:
    if weights is not None:
        load_matching(student, load_checkpoint(weights)[0]).require_complete(weights)
    device = choose_device(task.distillation.train.device)
    return task.evaluate(student.eval().to(device), RunInfo(Path(), device, 0, 0, 0))


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Distances by layer and accuracy after each stage, as text."""
    names = [name for name in next(iter(rows.values())) if name.startswith(("matrix", "hidden"))]
    columns = ["accuracy", *names]
    lines = [f"{'':<14}" + "".join(f"{name:>11}" for name in columns)]
    lines += [f"{stage:<14}" + "".join(f"{row[name]:>11.3f}" for name in columns) for stage, row in rows.items()]
    return "\n".join(lines)


def _mixers(network: nn.Module) -> list[nn.Module]:
    return [block.attn for block in cast(Any, network).blocks]


def _saved_settings(folder: Path) -> DistillConfig:
    file = folder / _SETTINGS
    if not file.is_file():
        raise UserError(f"nothing to resume: {folder} has no {_SETTINGS}; give the folder of a distillation")
    return from_dict(DistillConfig, json.loads(file.read_text(encoding="utf-8")), str(file))
