"""The parts of the training loop: configs, groups, schedule, average, plan, batches, guard, run folders."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.vision_ssm.training_runs import Pictures
from vision_ssm.config import from_dict, to_dict
from vision_ssm.errors import UserError
from vision_ssm.training import (
    EmaConfig,
    OptimConfig,
    SampleKey,
    ScheduleConfig,
    TrainConfig,
    last_run_dir,
    new_run_dir,
)
from vision_ssm.training import runs as run_folders
from vision_ssm.training.batches import BatchStream, iterate_batches, load_batch
from vision_ssm.training.ema import Ema
from vision_ssm.training.guard import NonFiniteGuard, name_non_finite
from vision_ssm.training.optim import build_optimizer, parameter_groups, set_rates
from vision_ssm.training.plan import Plan


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "epochs or in steps, got neither"),
        ({"epochs": 1, "steps": 1}, "epochs=1 and steps=1: set one to null"),
        ({"epochs": 0}, "epochs must be 1 or more, got 0"),
        ({"epochs": 1, "precision": "fp16"}, "precision must be fp32 or bf16, got 'fp16'"),
        ({"epochs": 1, "clip": -1.0}, "clip must be a positive number or null, got -1.0"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**fields)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimConfig(betas=(0.9, 1.5)), r"betas must be two numbers from 0 to below 1, got \(0.9, 1.5\)"),
        (lambda: ScheduleConfig(warmup_bias_lr=-0.1), "warmup_bias_lr must be 0 or more, got -0.1"),
        (lambda: ScheduleConfig(warmup_momentum=1.0), "warmup_momentum must be a number from 0 to below 1, got 1.0"),
    ],
)
def test_rates_that_no_optimiser_takes_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_config_goes_through_a_checkpoint():
    config = TrainConfig(steps=5, clip=None, optim=OptimConfig(name="adamw", betas=(0.9, 0.95)))
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_config_does_not_import_torch():
    code = "import sys, vision_ssm.training.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_decay_and_accumulation_follow_the_nominal_batch():
    small = TrainConfig(epochs=1, batch_size=24, nominal_batch=64)
    large = TrainConfig(epochs=1, batch_size=512, nominal_batch=64)
    assert (small.accumulate, large.accumulate) == (3, 1)
    assert small.scaled_weight_decay == pytest.approx(5e-4 * 72 / 64)
    assert large.scaled_weight_decay == pytest.approx(4e-3)


class Mixed(nn.Module):
    """One parameter of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1)
        self.batch_norm = nn.BatchNorm2d(2)
        self.layer_norm = nn.LayerNorm(2)
        self.A_logs = nn.Parameter(torch.zeros(2, 2))
        self.dt_projs_bias = nn.Parameter(torch.zeros(2))
        self.D = nn.Parameter(torch.ones(2))
        self.D._no_weight_decay = True  # type: ignore[attr-defined]
        self.tied = self.conv
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def test_parameter_groups():
    model = Mixed()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, 0.1)
    members = {g["name"]: {names[id(p)] for p in g["params"]} for g in groups}
    assert members == {
        "decay": {"conv.weight", "A_logs"},
        "no_decay": {"batch_norm.weight", "layer_norm.weight", "D"},
        "bias": {"conv.bias", "batch_norm.bias", "layer_norm.bias", "dt_projs_bias"},
    }
    assert {g["name"]: g["weight_decay"] for g in groups} == {"decay": 0.1, "no_decay": 0.0, "bias": 0.0}


def test_rates_warm_up_and_fall():
    optim, schedule = OptimConfig(lr=0.01, momentum=0.9), ScheduleConfig(warmup_bias_lr=0.1)
    optimizer = build_optimizer(Mixed(), optim, 0.0)

    def rates(done: float, warm: float) -> dict[str, tuple[float, float]]:
        set_rates(optimizer, optim, schedule, done=done, warm=warm)
        return {g["name"]: (g["lr"], g["momentum"]) for g in optimizer.param_groups}

    half_warm, peak, end = rates(0.0, 0.5), rates(0.0, 1.0), rates(1.0, 1.0)
    assert half_warm["decay"] == pytest.approx((0.005, 0.85))
    assert half_warm["bias"] == pytest.approx((0.055, 0.85))
    assert peak["decay"] == pytest.approx((0.01, 0.9))
    assert peak["bias"] == pytest.approx((0.01, 0.9))
    assert end["decay"] == pytest.approx((0.0001, 0.9))


@pytest.mark.parametrize(("kind", "middle"), [("linear", 0.6), ("cosine", 0.6), ("constant", 1.0)])
def test_schedule_kinds(kind, middle):
    optim, schedule = OptimConfig(name="adamw", lr=1.0), ScheduleConfig(kind=kind, final_ratio=0.2)
    optimizer = build_optimizer(Mixed(), optim, 0.0)
    assert set_rates(optimizer, optim, schedule, done=0.5, warm=1.0) == pytest.approx(middle)


def test_average_has_the_decay_of_the_recipe():
    model = nn.BatchNorm1d(2)
    ema = Ema(model, EmaConfig(decay=0.99, warmup_steps=5))
    want_weight, want_mean = torch.ones(2), torch.zeros(2)
    for t in (1, 2, 3):
        with torch.no_grad():
            model.weight += t
            model.running_mean += 2 * t  # type: ignore[operator]
        ema.update(model, t)
        decay = 0.99 * (1 - math.exp(-t / 5))
        want_weight = decay * want_weight + (1 - decay) * model.weight
        want_mean = decay * want_mean + (1 - decay) * model.running_mean
    torch.testing.assert_close(ema.module.weight, want_weight)
    torch.testing.assert_close(ema.module.running_mean, want_mean)


def test_plan_counts_batches_steps_and_epochs():
    plan = Plan.of(TrainConfig(epochs=2, batch_size=4, nominal_batch=12), samples=25)  # 7 batches in groups of 3
    assert (plan.batches_per_epoch, plan.steps_per_epoch, plan.steps, plan.epochs) == (7, 3, 6, 2)
    assert [plan.batch_at(step) for step in range(7)] == [0, 3, 6, 7, 10, 13, 14]
    short = Plan.of(TrainConfig(steps=4, batch_size=4, nominal_batch=12), samples=25)
    assert (short.epochs, [short.ends_epoch(s) for s in (1, 2, 3, 4)]) == (2, [False, False, True, True])
    schedule = ScheduleConfig(warmup_epochs=1, warmup_min_batches=10)
    assert [plan.warm(step, schedule) for step in range(5)] == [0.3, 0.6, 0.7, 1.0, 1.0]


def stream(*, length: int = 10, rank: int = 0, processes: int = 1) -> BatchStream:
    return BatchStream(length, batch_size=4, seed=3, stop=6, rank=rank, processes=processes)


def test_every_epoch_has_every_sample_in_another_order():
    batches = list(stream())
    assert [len(batch) for batch in batches] == [4] * 6
    epochs = [[key for batch in batches[:3] for key in batch], [key for batch in batches[3:] for key in batch]]
    for number, keys in enumerate(epochs):
        assert {key.epoch for key in keys} == {number}
        assert {key.index for key in keys} == set(range(10))
    assert [k.index for k in epochs[0]] != [k.index for k in epochs[1]]


def test_processes_share_each_batch():
    whole, halves = list(stream()), [list(stream(rank=rank, processes=2)) for rank in (0, 1)]
    for batch, first, second in zip(whole, *halves, strict=True):
        assert sorted(first + second) == sorted(batch)


def test_a_batch_larger_than_the_set_repeats_samples():
    indices = [key.index for key in stream(length=3).keys(0)]
    assert len(indices) == 4
    assert set(indices) == {0, 1, 2}


def test_streams_refuse_what_cannot_be_shared():
    with pytest.raises(UserError, match="got 4 for 3 processes"):
        stream(processes=3)
    with pytest.raises(UserError, match="training set is empty"):
        stream(length=0)


def test_augmentation_does_not_depend_on_workers_or_on_where_a_run_begins():
    def load(workers: int, start: int) -> list[torch.Tensor]:
        order = stream(length=12)
        order.start = start
        batches = iterate_batches(
            Pictures(12), order, torch.utils.data.default_collate, workers=workers, pin_memory=False
        )
        return [images for images, _ in batches]

    plain = load(0, 0)
    torch.testing.assert_close(load(2, 0), plain, rtol=0, atol=0)
    torch.testing.assert_close(load(1, 4), plain[4:], rtol=0, atol=0)
    again = load_batch(Pictures(12), stream(length=12), torch.utils.data.default_collate, 4)[0]
    torch.testing.assert_close(again, plain[4], rtol=0, atol=0)


def test_sample_keys_draw_by_seed_epoch_and_index():
    draws = {
        key: key.rng().random()
        for key in (SampleKey(0, 0, 0), SampleKey(1, 0, 0), SampleKey(0, 1, 0), SampleKey(0, 0, 1))
    }
    assert len(set(draws.values())) == 4
    assert all(key.rng().random() == draw for key, draw in draws.items())


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_sample_is_told_without_a_traceback(workers):
    batches = iterate_batches(
        Pictures(12, broken=7), stream(length=12), torch.utils.data.default_collate, workers=workers, pin_memory=False
    )
    with pytest.raises(UserError) as caught:
        list(batches)
    assert str(caught.value) == "picture 7 is corrupt"


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_guard_freezes_the_weights_from_the_first_bad_step(name):
    model = nn.Linear(2, 1)
    optimizer = build_optimizer(model, OptimConfig(name=name, lr=0.1), 0.0)
    guard = NonFiniteGuard(torch.device("cpu"))
    weights = []
    for inputs in (torch.ones(1, 2), torch.full((1, 2), math.nan), torch.ones(1, 2)):
        loss = model(inputs).sum()
        loss.backward()
        optimizer.found_inf = guard.observe(torch.isfinite(loss.detach()))  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad()
        weights.append(model.weight.detach().clone())
    assert guard.steps_before_first_bad() == 1
    assert torch.isfinite(weights[0]).all()
    torch.testing.assert_close(weights[1:], [weights[0]] * 2, rtol=0, atol=0)


class Root(nn.Module):
    """A square root: at zero its value is finite and its gradient is not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sqrt()


@pytest.mark.parametrize(
    ("inputs", "found"),
    [
        (torch.ones(1, 2), None),
        (torch.full((1, 2), -1.0), 'the output of layer "1.0" (Root)'),
        (torch.zeros(1, 2), 'the gradient of parameter "0.weight"'),
        (torch.tensor([[1.0, math.inf]]), "the input batch itself"),
    ],
)
def test_the_first_layer_that_is_not_finite_is_named(inputs, found):
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Sequential(Root()), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
    assert name_non_finite(model, lambda m: {"loss": m(inputs).sum()}, inputs) == found
    assert not any(module._forward_hooks for module in model.modules())


def test_run_folders_count_up(tmp_path):
    base = tmp_path / "runs" / "train"
    made = []
    for _ in range(3):
        made.append(new_run_dir(base))
        (made[-1] / "metrics.csv").touch()
    assert [path.name for path in made] == ["train", "train2", "train3"]
    with pytest.raises(UserError, match="has saved a checkpoint"):
        last_run_dir(base)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match="cannot create the run folder"):
        new_run_dir(file / "train")


def save_numbered(folder: Path, number: int) -> None:
    run_folders.save(folder, {"w": torch.tensor([float(number)])}, {"number": number}, {"step": number})


def test_a_failed_save_keeps_the_checkpoint_before_it(tmp_path, monkeypatch):
    save_numbered(tmp_path / "last", 1)

    def full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match="No space left on device; the one before it is kept"):
        save_numbered(tmp_path / "last", 2)
    weights, state = run_folders.load(tmp_path / "last")
    assert (weights["w"].item(), state["step"]) == (1.0, 1)


def test_a_checkpoint_survives_a_kill_at_any_point_of_saving(tmp_path, monkeypatch):
    save_numbered(tmp_path / "last", 1)
    real, calls = Path.rename, []

    def killed_at_second(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", killed_at_second)
    with pytest.raises(KeyboardInterrupt):
        save_numbered(tmp_path / "last", 2)
    monkeypatch.undo()
    assert not (tmp_path / "last").exists()
    assert last_run_dir(tmp_path) == tmp_path
    assert run_folders.load(tmp_path / "last")[1]["step"] == 1


def test_a_checkpoint_is_on_the_disk_before_the_old_one_goes(tmp_path, monkeypatch):
    save_numbered(tmp_path / "last", 1)
    events: list[str] = []
    write, rename, remove = run_folders.to_disk, Path.rename, shutil.rmtree
    monkeypatch.setattr(run_folders, "to_disk", lambda path: (events.append(path.name), write(path)))
    monkeypatch.setattr(Path, "rename", lambda self, to: (events.append(f"rename {self.name}"), rename(self, to))[1])
    monkeypatch.setattr(shutil, "rmtree", lambda path, **how: (events.append(f"rm {path.name}"), remove(path, **how)))
    save_numbered(tmp_path / "last", 2)
    assert events == [
        "rm last.new", "state.pt", "rm last.old", "rename last", "rename last.new", tmp_path.name, "rm last.old",
    ]  # fmt: skip


def test_a_run_is_found_in_a_folder_with_brackets(tmp_path):
    save_numbered(tmp_path / "run[1]" / "last", 1)
    assert last_run_dir(tmp_path / "run[1]") == tmp_path / "run[1]"


def test_a_damaged_config_is_told(tmp_path):
    save_numbered(tmp_path / "last", 1)
    assert run_folders.read_run_config(tmp_path) == {"number": 1}
    (tmp_path / "last" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is damaged"):
        run_folders.read_run_config(tmp_path)


def test_a_damaged_state_is_told(tmp_path):
    save_numbered(tmp_path / "last", 1)
    (tmp_path / "last" / "training" / "state.pt").write_bytes(b"half")
    with pytest.raises(UserError, match="is damaged"):
        run_folders.load(tmp_path / "last")
