"""Training: the loss falls, a run goes on exactly as if it had not stopped, recipes can be read."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from restoration.config import LossConfig, RestoreConfig
from restoration.degrade import degradation_for
from restoration.loss import RestorationLoss
from restoration.pairs import run_degrade
from restoration.pretrained import load_model
from restoration.train import RestorationTask, resumed_config, run_train
from tests.restoration.photographs import write_set
from vision_ssm.checkpoint import load_checkpoint
from vision_ssm.config import from_dict, load_config, shipped_configs
from vision_ssm.errors import UserError
from vision_ssm.training import train

RECIPES = {name: path for name, path in shipped_configs().items() if name.startswith("restoration/")}


@pytest.fixture
def folders(tmp_path):
    train_names, val_names = ("astronaut", "coffee", "rocket"), ("chelsea",)
    return write_set(tmp_path / "data" / "train", 64, train_names), write_set(tmp_path / "data" / "val", 40, val_names)


def settings(folders, run_dir: Path, **changes) -> RestoreConfig:
    values = {
        "task": "denoise",
        "degradation": {"sigma": 50},
        "model": {"variant": "small", "width": 8, "depths": [1, 1]},
        "data": {
            "train": str(folders[0]), "val": str(folders[1]), "crops": [[16, 0.5], [24, 0.5]], "epoch_samples": 20,
        },
        "train": {
            "run_dir": str(run_dir), "steps": 12, "batch_size": 4, "workers": 0, "precision": "fp32", "device": "cpu",
            "optim": {"lr": 5e-3}, "schedule": {"warmup_min_batches": 2}, "ema": {"decay": 0.5, "warmup_steps": 1},
        },
    }  # fmt: skip
    for group, items in changes.items():
        values[group] = items if not isinstance(items, dict) else {**values.get(group, {}), **items}
    return from_dict(RestoreConfig, values)


def test_training_lowers_the_loss(folders, tmp_path, capsys):
    config = settings(folders, tmp_path / "run", model={"width": 16}, train={"steps": 60})
    result = train(RestorationTask(config), config.train)
    losses = [row["train/loss"] for row in result.history]
    assert losses[-1] < 0.7 * losses[0]
    assert result.metrics["psnr"] > 18, "the noisy pictures have 15 dB"
    assert 0 < result.metrics["ssim"] < 1
    assert "3 clean pictures" in capsys.readouterr().out


def test_a_run_leaves_samples_and_weights_that_can_be_used(folders, tmp_path):
    config = settings(folders, tmp_path / "run", data={"about": "photographs", "licence": "free"})
    assert run_train(config) == 0
    assert (tmp_path / "run" / "first_batch.png").is_file()
    assert [path.name for path in sorted((tmp_path / "run" / "samples").iterdir())] == [
        "step_000005.jpg", "step_000010.jpg", "step_000012.jpg",
    ]  # fmt: skip
    model, card = load_model(tmp_path / "run" / "best")
    assert (card.task, card.trained_on, card.licence, card.steps) == ("denoise", "photographs", "free", 12)
    assert degradation_for(card.task, card.degradation) == degradation_for("denoise", {"sigma": 50})
    image = torch.rand(1, 3, 20, 20)
    assert not torch.equal(model(image), image)


def test_pictures_too_small_for_ssim_are_scored_without_it(folders, tmp_path):
    config = settings(folders, tmp_path / "run", data={"val_side": 8, "epoch_samples": 4}, train={"steps": 1})
    metrics = train(RestorationTask(config), config.train).metrics
    assert metrics["psnr"] > 0
    assert "ssim" not in metrics


class Stopping(RestorationTask):
    """Asks the run to stop at a batch."""

    stop_at = 0
    seen = 0

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.seen += 1
        if self.seen == self.stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return super().loss(model, batch)


@pytest.mark.skipif(os.name == "nt", reason="os.kill cannot send SIGINT on Windows")
def test_a_stopped_run_goes_on_exactly(folders, tmp_path):
    whole = settings(folders, tmp_path / "whole")
    train(RestorationTask(whole), whole.train)
    cut = settings(folders, tmp_path / "cut")
    task = Stopping(cut)
    task.stop_at = 7
    with pytest.raises(SystemExit):
        train(task, cut.train)
    assert run_train(RestoreConfig(), resume=tmp_path / "cut") == 0
    for part in ("last", "best"):
        want, got = (load_checkpoint(tmp_path / name / part)[0] for name in ("whole", "cut"))
        assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
    lines = [(tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("whole", "cut")]
    head = lines[0][0].split(",")
    for want, got in zip(*lines, strict=True):
        pairs = zip(head, want.split(","), got.split(","), strict=True)
        assert all(a == b for name, a, b in pairs if name.startswith(("train/", "val/", "step")))


def test_settings_of_a_run_are_read_back_and_the_pictures_may_have_moved(folders, tmp_path):
    config = settings(folders, tmp_path / "run", train={"steps": 2}, weights=None)
    run_train(config)
    again, folder = resumed_config(tmp_path / "run")
    assert folder == tmp_path / "run"
    assert again == config
    moved, _ = resumed_config(tmp_path / "run", data=replace(config.data, train="elsewhere", val=""))
    assert (moved.data.train, moved.data.val) == ("elsewhere", config.data.val)
    with pytest.raises(UserError, match="nothing to resume"):
        resumed_config(tmp_path / "no")


@pytest.mark.parametrize("task", ["sr2", "inpaint"])
def test_other_tasks_and_pairs(folders, tmp_path, task):
    for kind, folder in zip(("train", "val"), folders, strict=True):
        run_degrade(folder, tmp_path / "pairs" / kind, task=task)
    for data in (folders, (tmp_path / "pairs" / "train", tmp_path / "pairs" / "val")):
        config = replace(settings(data, tmp_path / "run", train={"steps": 2}), task=task, degradation={})
        result = train(RestorationTask(config), config.train)
        assert 5 < result.metrics["psnr"] < 50
        _, card = load_model(result.last)
        assert bool(card.degradation) == (data is folders)


def test_starting_from_weights(folders, tmp_path, capsys):
    config = settings(folders, tmp_path / "run", train={"steps": 2})
    first = train(RestorationTask(config), config.train)
    config = replace(config, weights=first.last)
    model = RestorationTask(config).build()
    want, _ = load_checkpoint(first.last)
    assert all(torch.equal(tensor, want[name]) for name, tensor in model.state_dict().items())
    assert "starting from" in capsys.readouterr().out


def test_starting_from_shipped_weights(folders, tmp_path, capsys):
    config = settings(folders, tmp_path / "run", model={"variant": "base", "width": 40, "depths": None, "detail": 8})
    task = RestorationTask(replace(config, weights=Path("serpent_denoise")))
    task.build()
    assert task.config()["trained_on"] == "train; started from serpent_denoise"
    assert "starting from serpent_denoise\n290 of 290" in capsys.readouterr().out
    with pytest.raises(UserError, match="did you mean 'serpent_denoise'"):
        RestorationTask(replace(config, weights=Path("serpent_denois")))
    RestorationTask(replace(config, weights=Path("serpent_denois")), resumed=True)  # which may be gone by then


def test_pictures_of_both_sides_are_refused(folders, tmp_path):
    with pytest.raises(UserError, match="3 pictures are for training and for scoring"):
        RestorationTask(settings((folders[0], folders[0]), tmp_path / "run"))
    root = folders[0].parent
    task = RestorationTask(settings((root, root), tmp_path / "run"))
    assert [len(found.examples) for found in (*task.train_sets, *task.val_sets)] == [3, 1]


def test_losses():
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(2, 3, 8, 8, generator=generator)
    restored = target + 0.1 * torch.randn(2, 3, 8, 8, generator=generator)
    error = restored - target
    l1 = RestorationLoss(LossConfig())(restored, target)
    assert l1["loss"].item() == pytest.approx(error.abs().mean().item())
    want = (-10 * error.square().mean((1, 2, 3)).log10()).mean().item()
    assert l1["psnr"].item() == pytest.approx(want, abs=1e-4)
    smooth = RestorationLoss(LossConfig("charbonnier"))(restored, target)
    assert smooth["loss"].item() == pytest.approx((error**2 + 1e-6).sqrt().mean().item())
    both = RestorationLoss(LossConfig(frequency=0.5))(restored, target)
    spectrum = torch.fft.fft2(error, norm="ortho")[..., :5]
    frequency = 0.5 * (spectrum.real.abs().mean() + spectrum.imag.abs().mean())
    assert both["frequency"].item() == pytest.approx(frequency.item(), rel=1e-5)
    assert both["loss"].item() == pytest.approx((l1["loss"] + 0.5 * frequency).item(), rel=1e-5)
    with pytest.raises(UserError, match="frequency"):
        LossConfig(frequency=-1)


@pytest.mark.parametrize("detail", [-1, 65])
def test_detail_is_checked_before_pictures_are_read(detail):
    with pytest.raises(UserError, match=f"model: detail must be 0 to 64 blocks, got {detail}"):
        from_dict(RestoreConfig, {"model": {"detail": detail}})


def test_every_task_has_a_recipe():
    from restoration.tasks import TASKS

    assert {f"restoration/{task}" for task in TASKS} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name):
    config = load_config(RestoreConfig, name)
    operator = degradation_for(config.task, config.degradation)
    assert operator.levels()
    assert config.train.steps
    assert config.train.run_dir.startswith("runs/")
    assert config.data.train
    assert config.data.val
