"""Training a restorer: what restoration adds to the shared loop."""

from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from restoration.blocks import checkpoint_blocks
from restoration.card import WeightsCard
from restoration.config import RestoreConfig, RestoreDataConfig
from restoration.data import CropDataset, as_float, as_picture, collate, load_sets, save_batch_picture
from restoration.degrade import degradation_for
from restoration.folders import Example, ExampleSet, check_pictures
from restoration.forward import network_input
from restoration.loss import RestorationLoss
from restoration.metrics import Measure
from restoration.model import Serpent
from restoration.networks import model_config
from restoration.pretrained import resolve_weights
from restoration.reading import PictureStore
from restoration.scoring import GIVEN, Case, Score, by_network, cases_of, score, untouched
from restoration.tasks import find_task
from vision_ssm.checkpoint import load_checkpoint, load_matching
from vision_ssm.config import from_dict, to_dict
from vision_ssm.errors import UserError
from vision_ssm.training import RunInfo, Task, last_run_dir, read_run_config, train
from vision_ssm.training.environment import is_main_process
from vision_ssm.training.plan import Plan
from vision_ssm.viz import grid, save_picture, titled

SAMPLES = 4
"""Pictures of the validation set that are shown at every epoch."""
_SAMPLE_SIDE = 256


class RestorationTask(Task):
    """Serpent on one task; the best checkpoint is the one of highest mean PSNR on the validation pictures."""

    primary = "psnr"

    def __init__(self, config: RestoreConfig, *, resumed: bool = False) -> None:
        data = config.data
        self.settings = config
        self.start = resolve_weights(config.weights) if config.weights is not None and not resumed else None
        self.task = find_task(config.task)
        self.degradation = degradation_for(config.task, config.degradation)
        self.train_sets = load_sets(data.train, split="train", scale=self.task.scale)
        self.val_sets = load_sets(data.val, split="val", scale=self.task.scale)
        self._refuse_overlap()
        headers = check_pictures([*self.train_sets, *self.val_sets], scale=self.task.scale)
        self.val_examples = _evenly([e for found in self.val_sets for e in found.examples], data.val_pictures)
        self.store = PictureStore({file: headers[file] for file in sorted(_files(self.train_sets))}, data.cache)
        self.val_store = PictureStore({file: headers[file] for e in self.val_examples for file in e.files}, "auto")
        self.criterion = RestorationLoss(config.loss)
        self.measure = Measure("y", self.task.scale) if self.task.scale > 1 else Measure()
        if is_main_process():
            for found in self.train_sets:
                print(f"train: {found}")
            print(f"train: {self.store}\n" + "\n".join(f"val: {found}" for found in self.val_sets), flush=True)

    def config(self) -> dict[str, Any]:
        """The card of the weights, and the run's settings."""
        settings = to_dict(self.settings)
        settings.pop("train")  # the loop adds it
        trained_on = self.settings.data.about or ", ".join(found.root.name for found in self.train_sets)
        before = f"; started from {self.settings.weights}" if self.settings.weights is not None else ""
        card = WeightsCard(
            model=self._model_config(),
            task=self.task.name,
            degradation={} if self.train_sets[0].paired else self.degradation.parameters(),
            scale=self.task.scale,
            trained_on=trained_on + before,
            licence=self.settings.data.licence,
            steps=self._plan().steps,
            seed=self.settings.train.seed,
        )
        return card.to_dict() | {"settings": settings}

    def build(self) -> nn.Module:
        """The network, with the weights it starts from (a resumed run has its own)."""
        model = self._network()
        checkpoint_blocks(model, self.settings.model.recompute)
        if self.start is not None:
            report = load_matching(model, load_checkpoint(self.start)[0])
            if is_main_process():
                print(f"starting from {self.settings.weights}\n{report}")
        return model.to(memory_format=torch.channels_last)

    def train_data(self) -> Dataset:
        """Degraded random crops."""
        return CropDataset(
            self._train_examples(),
            self.store.read,
            degradation=self.degradation,
            scale=self.task.scale,
            config=self.settings.data,
            epochs=self._plan().epochs,
        )

    def collate(self, samples: list[Any]) -> dict[str, Tensor]:
        """Batch as `restoration.data.collate` gives it."""
        return collate(samples)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Distance of the restored crops from the clean ones."""
        restored = model(network_input(batch["input"], self.task.scale))
        return self.criterion(restored, as_float(batch["target"]))

    def evaluate(self, model: nn.Module, run: RunInfo) -> dict[str, float]:
        """Mean PSNR and SSIM on the validation pictures at each level, and over all; saves sample pictures."""
        method = by_network(model, run.device)  # type: ignore[arg-type]
        levels = list(self.degradation.levels())
        middle = levels[len(levels) // 2]
        scores: list[Score] = []
        shown: list[tuple[Case, Tensor]] = []
        for example in self.val_examples:
            for case in cases_of(example, self.val_store.read, self.degradation, side=self.settings.data.val_side):
                one, restored = score(case, "network", method, self.measure)
                scores.append(one)
                if len(shown) < SAMPLES and case.level in (GIVEN, middle):
                    shown.append((case, restored))
        self._save_samples(shown, run)
        levels = list(dict.fromkeys(one.level for one in scores))  # of pairs another than the operator's
        metrics = {"psnr": fmean(one.psnr for one in scores)}
        similar = [one.ssim for one in scores if one.ssim is not None]  # none where pictures are tiny
        if similar:
            metrics["ssim"] = fmean(similar)
        if len(levels) > 1:
            metrics |= {f"psnr {level}": fmean(s.psnr for s in scores if s.level == level) for level in levels}
        return metrics

    def first_batch(self, batch: dict[str, Tensor], run_dir: Path) -> None:
        """Save the first batch, inputs above targets."""
        save_batch_picture(batch, run_dir / "first_batch.png")

    def _network(self) -> Serpent:
        model = self.settings.model
        return Serpent(
            model.variant,
            in_channels=self.task.in_channels,
            width=model.width,
            depths=model.depths,
            detail=model.detail,
            mixer=model.mixer,
            mixer_pattern=model.mixer_pattern,
            polar=model.polar,
            smr=model.smr,
        )

    def _model_config(self) -> dict[str, Any]:
        with torch.device("meta"):  # asked for at every checkpoint
            return model_config(self._network())

    def _train_examples(self) -> list[Example]:
        return [example for found in self.train_sets for example in found.examples]

    def _plan(self) -> Plan:
        samples = max(self.settings.data.epoch_samples, len(self._train_examples()))
        return Plan.of(self.settings.train, samples)

    def _refuse_overlap(self) -> None:
        both = _files(self.train_sets) & _files(self.val_sets)
        if both:
            raise UserError(
                f"{len(both)} pictures are for training and for scoring, for example {min(both)}: give other folders, "
                "or one that is split in folders called train and val"
            )

    def _save_samples(self, shown: list[tuple[Case, Tensor]], run: RunInfo) -> None:
        """Rows of input, output and target in samples/ and in TensorBoard."""
        from torch.utils.tensorboard import SummaryWriter

        tiles = []
        for case, restored in shown:
            for title, image in (("input", untouched(case)), ("output", restored), ("target", case.clean)):
                psnr = "" if title == "target" else f" {self.measure(image, case.clean)['psnr']:.2f} dB"
                tiles.append(titled(_middle_part(as_picture(image)), f"{title}{psnr}"))
        if tiles:
            picture = grid(tiles, columns=3)
            save_picture(run.run_dir / "samples" / f"step_{run.step:06d}.jpg", picture)
            with SummaryWriter(str(run.run_dir / "tensorboard"), filename_suffix=".samples") as board:
                board.add_image("input | output | target", picture, run.step, dataformats="HWC")


def _middle_part(picture: Any) -> Any:
    top, left = (max(0, (length - _SAMPLE_SIDE) // 2) for length in picture.shape[:2])
    return picture[top : top + _SAMPLE_SIDE, left : left + _SAMPLE_SIDE]


def _files(sets: list[ExampleSet]) -> set[Path]:
    return {file for found in sets for e in found.examples for file in e.files}


def _evenly(examples: list[Example], most: int | None) -> list[Example]:
    if most is None or len(examples) <= most:
        return examples
    return [examples[i * len(examples) // most] for i in range(most)]


def run_train(config: RestoreConfig, *, resume: Path | None = None) -> int:
    """Train as the configuration says, or go on with the run in the folder `resume`.

    Raises:
        UserError: bad data, weights or settings, or nothing to resume.
        SystemExit: stopped by Ctrl-C (130) or SIGTERM (143); the state is saved.
    """
    if resume is not None:
        config, resume = resumed_config(resume, data=config.data)
    result = train(RestorationTask(config, resumed=resume is not None), config.train, resume=resume)
    if is_main_process():
        best = f"; best: PSNR {result.metrics['psnr']:.2f} dB in {result.best}" if result.best else ""
        print(f"{result.run_dir} is done{best}")
    return 0


def resumed_config(run: Path, *, data: RestoreDataConfig | None = None) -> tuple[RestoreConfig, Path]:
    """Settings of a run that is to go on, and its folder: `run` itself, or the newest of run, run2, ...

    Args:
        run: folder of the run.
        data: its folders, where given, replace those of the run: the pictures may have moved.

    Raises:
        UserError: nothing to resume there.
    """
    folder = last_run_dir(run)
    saved = read_run_config(folder)
    if not isinstance(saved.get("settings"), dict) or "train" not in saved:
        raise UserError(f"{folder} is no run of `vssm restore train`: so says its last/config.json")
    config = from_dict(RestoreConfig, {**saved["settings"], "train": saved["train"]}, str(folder / "last"))
    if data is not None:
        moved = replace(config.data, train=data.train or config.data.train, val=data.val or config.data.val)
        config = replace(config, data=moved)
    return config, folder
