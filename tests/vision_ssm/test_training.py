"""The training loop as a whole: against a plain loop, killed and resumed, on two processes, and when things fail."""

import csv
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.vision_ssm.training_runs import Pictures, TinyTask, tiny_config
from vision_ssm.checkpoint import load_checkpoint
from vision_ssm.errors import UserError
from vision_ssm.training import OptimConfig, RunInfo, ScheduleConfig, TrainResult, last_run_dir, read_run_config, train
from vision_ssm.training.batches import SampleKey, seed_everything
from vision_ssm.training.compiled import compile_network
from vision_ssm.training.environment import make_accelerator, out_of_memory_message

ROOT = Path(__file__).parents[2]
TWO_PROCESSES = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
VARYING = ("seconds", "images_per_s", "data_wait")  # wall time


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def script(launcher: list[str], *options: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Train once by tests/vision_ssm/training_runs.py in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, "-m", "tests.vision_ssm.training_runs", json.dumps(options)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def without_times(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name not in VARYING} for row in history]


def assert_same_run(got: TrainResult, want: TrainResult) -> None:
    """Every loss, metric and weight is equal to the last bit."""
    assert without_times(got.history) == without_times(want.history)
    for folder in ("last", "best"):
        weights, wanted = load_checkpoint(got.run_dir / folder)[0], load_checkpoint(want.run_dir / folder)[0]
        assert wanted.keys() == weights.keys()
        for name, value in wanted.items():
            assert torch.equal(weights[name], value), f"{folder}: {name}"
    states = [torch.load(r.last / "training" / "state.pt", weights_only=True) for r in (got, want)]
    torch.testing.assert_close(states[0]["model"], states[1]["model"], rtol=0, atol=0)
    torch.testing.assert_close(states[0]["optimizer"]["state"], states[1]["optimizer"]["state"], rtol=0, atol=0)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> tuple[TrainResult, TinyTask]:
    """A run that nothing disturbs."""
    torch.set_num_threads(1)
    task = TinyTask()
    return train(task, tiny_config(tmp_path_factory.mktemp("whole") / "run", workers=1)), task


def reference_run(task: TinyTask) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The run of ``tiny_config`` written out: weights and averaged weights of TinyTask(plain=True) in the end."""
    seed_everything(0)
    model = task.build()
    biases = [p for name, p in model.named_parameters() if "bias" in name]
    weights = [model[0].weight, model[6].weight]
    groups = [{"params": weights, "weight_decay": 0.01}, {"params": [model[1].weight]}, {"params": biases}]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    data = Pictures(22)
    for step in range(9):
        epoch, group = divmod(step, 3)
        order = np.random.default_rng((0, epoch)).permutation(22)
        order = np.concatenate([order, order[:2]])
        for indices in order[8 * group : 8 * group + 8].reshape(2, 4):
            samples = []
            for index in indices:
                seed_everything(0, epoch, int(index))
                samples.append(data[SampleKey(0, epoch, int(index))])
            images, labels = torch.stack([s[0] for s in samples]), torch.stack([s[1] for s in samples])
            (nn.functional.cross_entropy(model(images), labels) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        warm, peak = min(1.0, (step + 1) / 3), 0.05 * (1 - 0.99 * step / 9)
        for number, settings in enumerate(optimizer.param_groups):
            start = 0.1 if number == 2 else 0.0
            settings["lr"], settings["momentum"] = start + (peak - start) * warm, 0.8 + 0.1 * warm
        optimizer.step()
        optimizer.zero_grad()
        decay = 0.9 * (1 - np.exp(-(step + 1) / 3))
        average = {name: decay * average[name] + (1 - decay) * v for name, v in model.state_dict().items()}
    return model.state_dict(), average


def test_the_loop_is_the_recipe_written_out(tmp_path):
    task = TinyTask(plain=True)
    result = train(task, tiny_config(tmp_path / "run", clip=0.5))
    weights, average = reference_run(TinyTask(plain=True))
    state = torch.load(result.last / "training" / "state.pt", weights_only=True)
    torch.testing.assert_close(state["model"], weights, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(load_checkpoint(result.last)[0], average, rtol=1e-5, atol=1e-6)
    assert [row["train/loss"] for row in result.history] == pytest.approx(
        np.reshape(task.losses, (3, 6)).mean(axis=1).tolist()
    )


def test_a_killed_and_resumed_run_is_the_same_run(tmp_path, whole_run):
    # killed in the 11th batch: the 6th step, in the second epoch, two steps after a save within it
    killed = script([], {"run_dir": str(tmp_path / "run"), "kill_at": 10, "config": {"save_every": 4, "workers": 1}})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run_dir = last_run_dir(tmp_path / "run")
    assert read_run_config(run_dir)["trained"]["step"] == 4
    task = TinyTask()
    result = train(task, tiny_config(run_dir, save_every=4), resume=run_dir)
    assert_same_run(result, whole_run[0])
    assert task.losses == whole_run[1].losses[8:]
    assert task.seen_first == 0


@pytest.mark.parametrize(("fails_at", "saved"), [(8, None), (14, 6)])
def test_epochs_between_two_checkpoints(tmp_path, fails_at, saved):
    def fail(images: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    task = TinyTask()
    task.actions[fails_at] = fail  # a batch of the second or of the third epoch, of 6 batches in 3 steps each
    with pytest.raises(ZeroDivisionError):
        train(task, tiny_config(tmp_path / "run", save_epochs=2, val_every=3))
    last = tmp_path / "run" / "last"
    assert (read_run_config(tmp_path / "run")["trained"]["step"] if last.exists() else None) == saved


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_told_to_stop_saves_and_goes_on_later(tmp_path, whole_run, number, code):
    task, before = TinyTask(), signal.getsignal(signal.SIGINT)  # ignored where a shell started the tests with "&"

    def interrupt(images: torch.Tensor) -> torch.Tensor:
        for process in [*multiprocessing.active_children(), multiprocessing.current_process()]:  # as a terminal does
            os.kill(process.pid or 0, number)
        return images

    task.actions[8] = interrupt  # the first batch of the fifth step
    with pytest.raises(SystemExit) as stopped:
        train(task, tiny_config(tmp_path / "run", workers=1))
    assert stopped.value.code == code
    assert not multiprocessing.active_children()
    assert signal.getsignal(signal.SIGINT) is before
    assert read_run_config(tmp_path / "run")["trained"]["step"] == 5  # the step in which it came is finished
    assert_same_run(train(TinyTask(), tiny_config(tmp_path / "run"), resume=tmp_path / "run"), whole_run[0])


def test_a_stop_during_evaluation_is_heeded_after_it(tmp_path):
    task = TinyTask()
    real = task.evaluate

    def interrupted(model: nn.Module, run: RunInfo) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGINT)
        return real(model, run)

    task.evaluate = interrupted  # type: ignore[method-assign]
    with pytest.raises(SystemExit):
        train(task, tiny_config(tmp_path / "run"))
    assert read_run_config(tmp_path / "run")["trained"]["step"] == 3
    assert len(task.losses) == 6


@pytest.mark.parametrize("broken", [1, 3])
def test_an_evaluation_that_fails_costs_no_training(tmp_path, whole_run, broken):
    """In the first and in the last epoch: what was learned is saved, and the resumed run evaluates it."""
    task = TinyTask()
    real = task.evaluate

    def fail(model: nn.Module, run: RunInfo) -> dict[str, float]:
        if run.epoch == broken:
            raise UserError("picture 7 is corrupt")
        return real(model, run)

    task.evaluate = fail  # type: ignore[method-assign]
    with pytest.raises(UserError, match=rf"picture 7 is corrupt\. Epoch {broken} is saved in .*last"):
        train(task, tiny_config(tmp_path / "run"))
    again = TinyTask()
    assert_same_run(train(again, tiny_config(tmp_path / "run"), resume=tmp_path / "run"), whole_run[0])
    assert len(again.losses) == 6 * (3 - broken)


@pytest.mark.parametrize("reduction", ["mean", "sum"])  # each in processes of its own: groups are joined once
def test_two_processes_train_as_one(tmp_path, reduction):
    task = {"plain": True, "reduction": reduction}
    done = script(TWO_PROCESSES, {"run_dir": str(tmp_path / "two"), "task": task})
    assert done.returncode == 0, done.stderr
    assert_one_run_of_two(tmp_path / "two", train(TinyTask(**task), tiny_config(tmp_path / "alone")))


def assert_one_run_of_two(folder: Path, alone: TrainResult) -> None:
    """Two processes shared the batches, had equal histories, wrote one set of files, and learned what one learns."""
    results = [json.loads((folder / f"result{rank}.json").read_text()) for rank in (0, 1)]
    assert without_times(results[0]["history"]) == without_times(results[1]["history"])
    assert [result["seen_first"] for result in results] == [1, 0]
    assert not folder.with_name(f"{folder.name}2").exists()
    assert len(list((folder / "tensorboard").iterdir())) == 1
    for got, want in zip(results[0]["history"], alone.history, strict=True):
        for name in ("epoch", "step", "lr", "train/loss", "val/accuracy"):
            assert got[name] == pytest.approx(want[name], rel=1e-5), name
    averages = [load_checkpoint(path)[0] for path in (folder / "last", alone.last)]
    torch.testing.assert_close(averages[0], averages[1], rtol=1e-5, atol=1e-6)


def test_what_a_run_leaves_behind(tmp_path, capfd):
    task = TinyTask()
    task.scores = [0.5, 0.7, 0.6]
    result = train(task, tiny_config(tmp_path / "run"))
    assert task.seen_first == 1
    assert (result.metrics["epoch"], result.metrics["accuracy"]) == (2, 0.7)
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["epoch"], row["step"], row["val/accuracy"]) for row in rows] == [
        ("1", "3", "0.5"),
        ("2", "6", "0.7"),
        ("3", "9", "0.6"),
    ]
    assert all(float(row["images_per_s"]) > 0 and 0 <= float(row["data_wait"]) <= 1 for row in rows)
    best = load_checkpoint(tmp_path / "run" / "best")[1]
    assert (best["task"], best["train"]["batch_size"], best["trained"]["step"]) == ("tiny", 4, 6)
    assert not (tmp_path / "run" / "best" / "training").exists()
    lines = capfd.readouterr().err.strip().splitlines()  # not a terminal: a greeting and a line per epoch
    assert len(lines) == 4
    assert lines[2].startswith("epoch 2/3  loss ")
    again = train(task, tiny_config(tmp_path / "run", steps=1, epochs=None))
    assert again.run_dir == tmp_path / "run2"


def test_early_stop_waits_patiently(tmp_path):
    task = TinyTask()
    task.scores = [0.1, 0.3, 0.3, 0.2, 0.9]
    result = train(task, tiny_config(tmp_path / "run", epochs=5, patience=2))
    assert [row["epoch"] for row in result.history] == [1, 2, 3, 4]
    assert result.metrics["epoch"] == 2


def test_validation_may_be_rare_and_the_last_epoch_has_one(tmp_path):
    result = train(TinyTask(), tiny_config(tmp_path / "run", val_every=2))
    assert ["val/accuracy" in row for row in result.history] == [False, True, True]


@pytest.mark.parametrize("where", ["layer", "passing"])
def test_nan_stops_the_run_and_names_the_layer(tmp_path, where):
    task = TinyTask(plain=True)
    built = task.build()
    task.build = lambda: built  # type: ignore[method-assign]

    def poison(images: torch.Tensor) -> torch.Tensor:
        if where == "passing":
            return images * float("nan")
        built[4].register_forward_hook(lambda module, args, out: out / 0)
        return images

    task.actions[9] = poison  # the second batch of the fifth step, one after the last checkpoint
    named = 'layer "4" (AdaptiveAvgPool2d)' if where == "layer" else "repeating the step gave finite values"
    with pytest.raises(UserError) as caught:
        train(task, tiny_config(tmp_path / "run", save_every=4))
    message = str(caught.value)
    assert "at step 5, epoch 2" in message
    assert named in message
    assert str(tmp_path / "run" / "last") in message
    assert read_run_config(tmp_path / "run")["trained"]["step"] == 4
    assert all(torch.isfinite(value).all() for value in load_checkpoint(tmp_path / "run" / "last")[0].values())


def test_out_of_memory_says_what_to_lower(tmp_path):
    task = TinyTask()

    def exhaust(images: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    task.actions[7] = exhaust
    with pytest.raises(UserError, match=r"out of GPU memory with batch_size 4 .* lower batch_size"):
        train(task, tiny_config(tmp_path / "run"))
    assert read_run_config(tmp_path / "run")["trained"]["step"] == 3


def test_resume_refuses_another_run(tmp_path):
    train(TinyTask(), tiny_config(tmp_path / "run", steps=4, epochs=None))
    with pytest.raises(UserError, match=r"is finished \(4 of 4 steps\)"):
        train(TinyTask(), tiny_config(tmp_path, steps=4, epochs=None), resume=tmp_path / "run")
    with pytest.raises(UserError, match="batch_size was 4 and is 8 now, batches per step was 2 and is 1 now"):
        train(TinyTask(), tiny_config(tmp_path, batch_size=8), resume=tmp_path / "run")
    with pytest.raises(UserError, match="holds another model"):
        train(TinyTask(plain=True), tiny_config(tmp_path), resume=tmp_path / "run")
    with pytest.raises(UserError, match="nothing to resume"):
        train(TinyTask(), tiny_config(tmp_path), resume=tmp_path / "elsewhere")


@pytest.mark.parametrize("change", [{"step": None}, {"history": None, "same": None}, {"optimizer": {}}])
def test_resume_refuses_a_state_of_something_else(tmp_path, change):
    train(TinyTask(), tiny_config(tmp_path / "run", epochs=1))
    file = tmp_path / "run" / "last" / "training" / "state.pt"
    state = torch.load(file, weights_only=True)
    for name, value in change.items():
        if value is None:
            del state[name]
        else:
            state[name] = value
    torch.save(state, file)
    expected = "holds another model or optimiser" if "optimizer" in change else f"lacks {', '.join(sorted(change))}"
    with pytest.raises(UserError, match=expected):
        train(TinyTask(), tiny_config(tmp_path / "run"), resume=tmp_path / "run")


def test_a_longer_run_goes_on_from_a_finished_one(tmp_path):
    train(TinyTask(), tiny_config(tmp_path / "run", epochs=1))
    result = train(TinyTask(), tiny_config(tmp_path / "run", epochs=2), resume=tmp_path / "run")
    assert [row["step"] for row in result.history] == [3, 6]


def test_adamw_in_bf16_learns(tmp_path):
    task = TinyTask(samples=64)
    kinds: set[torch.dtype] = set()
    built = task.build()
    built[0].register_forward_hook(lambda module, args, out: kinds.add(out.dtype))
    task.build = lambda: built  # type: ignore[method-assign]
    optim, schedule = OptimConfig(name="adamw", lr=0.02), ScheduleConfig(kind="cosine", warmup_epochs=0.5)
    result = train(task, tiny_config(tmp_path / "run", epochs=20, precision="bf16", optim=optim, schedule=schedule))
    assert kinds == {torch.bfloat16}
    assert result.history[-1]["train/loss"] < 0.8 * result.history[0]["train/loss"]
    assert result.metrics["accuracy"] >= 0.75
    assert all(value.dtype != torch.bfloat16 for value in load_checkpoint(result.last)[0].values())


def test_frozen_layers_keep_weights_and_statistics(tmp_path):
    task = TinyTask()
    built = task.build()
    built[:2].requires_grad_(False)
    before = {name: value.clone() for name, value in built[:2].state_dict().items()}
    last_layer = built[6].weight.detach().clone()
    task.build = lambda: built  # type: ignore[method-assign]
    train(task, tiny_config(tmp_path / "run", epochs=1))
    torch.testing.assert_close(dict(built[:2].state_dict()), before, rtol=0, atol=0)
    assert not torch.equal(built[6].weight, last_layer)


def test_out_of_memory_of_a_cpu_run_asks_no_gpu(tmp_path, monkeypatch):
    config = tiny_config(tmp_path)
    accelerator = make_accelerator(config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "lower batch_size" in out_of_memory_message(config, accelerator)


def test_device_cuda_without_a_gpu_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device is cuda, but torch sees no GPU"):
        train(TinyTask(), tiny_config(tmp_path, device="cuda"))


@pytest.fixture
def deterministic_gpu():
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = False
    torch.cuda.set_sync_debug_mode("default")


class GpuTask(TinyTask):
    """Never waits for the device itself, lets nobody wait between two of its batches, and stops a run in another."""

    no_waiting: tuple[int, int] = (0, 0)
    stop_at: int | None = None

    def loss(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        self.losses.append(0.0)
        if len(self.losses) in self.no_waiting:
            torch.cuda.set_sync_debug_mode("error" if len(self.losses) == self.no_waiting[0] else "default")
        if len(self.losses) == self.stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        images, labels = batch
        assert images.is_cuda
        return {"loss": nn.functional.cross_entropy(model(images), labels)}

    def evaluate(self, model: nn.Module, run: RunInfo) -> dict[str, float]:
        found = model(self.data.pictures.to(run.device)).argmax(1).cpu()
        return {"accuracy": (found == self.data.labels).float().mean().item()}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_on_a_gpu_no_step_waits_and_a_resumed_run_is_the_same(tmp_path, deterministic_gpu, name):
    changes = {"device": "cuda", "precision": "bf16", "workers": 2, "nominal_batch": 4}
    changes["optim"] = OptimConfig(name=name, lr=0.01)
    undisturbed = GpuTask(samples=96)
    undisturbed.no_waiting = (3, 18)  # the loop looks at the device after step 20
    whole = train(undisturbed, tiny_config(tmp_path / "whole", **changes))
    stopped = GpuTask(samples=96)
    stopped.stop_at = 30
    with pytest.raises(SystemExit):
        train(stopped, tiny_config(tmp_path / "parts", **changes))
    resumed = train(GpuTask(samples=96), tiny_config(tmp_path, **changes), resume=tmp_path / "parts")
    assert [row["train/loss"] for row in resumed.history] == [row["train/loss"] for row in whole.history]
    assert resumed.history[-1]["gpu_memory_gb"] > 0
    weights, wanted = load_checkpoint(resumed.last)[0], load_checkpoint(whole.last)[0]
    torch.testing.assert_close(weights, wanted, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_graphs_train_as_python_does(tmp_path, deterministic_gpu, precision):
    """With two batches a step, whose gradients are gathered."""
    changes = {"device": "cuda", "precision": precision, "nominal_batch": 8, "epochs": 2}
    runs = [
        train(GpuTask(samples=96), tiny_config(tmp_path / str(graph), graph=graph, **changes))
        for graph in (False, True)
    ]
    losses = [[row["train/loss"] for row in run.history] for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    weights, wanted = (load_checkpoint(run.last)[0] for run in reversed(runs))
    torch.testing.assert_close(weights, wanted, rtol=1e-4, atol=1e-6)


def test_without_a_gpu_graphs_change_nothing_and_that_is_said(tmp_path, capsys):
    result = train(TinyTask(), tiny_config(tmp_path / "run", device="cpu", graph=True))
    assert result.history
    assert "no graphs: there is no GPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_out_of_memory_on_a_gpu(tmp_path):
    task = GpuTask()
    task.loss = lambda model, batch: {"loss": torch.empty(2**44, device="cuda").sum()}  # type: ignore[method-assign]
    with pytest.raises(UserError, match="out of GPU memory with batch_size 4"):
        train(task, tiny_config(tmp_path / "run", device="cuda"))


class Deep(TinyTask):
    """TinyTask's pictures, and a network that repeats a block."""

    def build(self) -> nn.Module:
        blocks = [nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.SiLU()) for _ in range(3)]
        return nn.Sequential(nn.Sequential(*blocks), super().build())


def compile_by(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture and split as torch.compile does, but without a compiler for the code, which this machine may lack."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    torch.compiler.reset()


def test_compiled_blocks_train_as_others_do(tmp_path, monkeypatch):
    compile_by("aot_eager", monkeypatch)
    network = Deep().build()
    assert compile_network(network) == 3
    assert [module for module in network.modules() if module._compiled_call_impl] == list(network[0])
    assert compile_network(nn.Linear(1, 1)) == 1  # nothing repeats: all of it
    want, got = (
        train(Deep(), tiny_config(tmp_path / str(compiled), device="cpu", compile=compiled))
        for compiled in (False, True)
    )
    for folder in ("last", "best"):
        weights, wanted = load_checkpoint(got.run_dir / folder)[0], load_checkpoint(want.run_dir / folder)[0]
        torch.testing.assert_close(weights, wanted, rtol=1e-4, atol=1e-6)


def test_a_network_that_does_not_compile_is_one_message(tmp_path, monkeypatch):
    def broken(*_: Any) -> None:
        raise ValueError("no such compiler")

    compile_by(broken, monkeypatch)
    with pytest.raises(UserError, match=r"cannot be compiled \(no such compiler\); train without --train.compile"):
        train(Deep(), tiny_config(tmp_path / "run", device="cpu", compile=True))
