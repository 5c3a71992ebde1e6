"""Training a generator: the loss falls, held-out bins are paired, a run resumes exactly, its weights give pipelines."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from generation.config import GenerateConfig
from generation.data import to_unit
from generation.dim import DiM
from generation.generator import draw, load_generator
from generation.objectives import Objective
from generation.pipelines import DiMPipeline, VideoDiMPipeline
from generation.train import GenerateTask, held_out_losses, resumed_config, run_train
from vision_ssm.checkpoint import load_checkpoint
from vision_ssm.config import from_dict, load_config, shipped_configs
from vision_ssm.errors import UserError
from vision_ssm.training import SampleKey, train
from vision_ssm.viz import save_picture

RECIPES = [name for name in shipped_configs() if name.startswith("generation/")]
TINY = {"width": 32, "depth": 2, "patch": 4, "mixer": "s6", "conditioning": "adaln_single", "state_size": 4}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for split, count in (("train", 4), ("val", 2)):
        for name, color in (("blue", (20, 30, 220)), ("red", (220, 30, 20))):
            for number in range(count):
                save_picture(root / split / name / f"{number}.png", np.full((8, 8, 3), color, np.uint8))
    return root


def settings(pictures: Path, run_dir: Path, **changes) -> GenerateConfig:
    values = {
        "model": TINY,
        "data": {"train": str(pictures), "side": 8},
        "watch": {"samples": 2, "steps": 2, "bins": 2},
        "train": {
            "run_dir": str(run_dir), "steps": 6, "batch_size": 4, "workers": 0, "precision": "fp32", "device": "cpu",
            "val_every": 1, "optim": {"lr": 5e-3}, "schedule": {"warmup_min_batches": 2},
            "ema": {"decay": 0.8, "warmup_steps": 1, "power_widths": [0.1]},
        },
    }  # fmt: skip
    for group, items in changes.items():
        values[group] = {**values.get(group, {}), **items} if isinstance(items, dict) else items
    return from_dict(GenerateConfig, values)


def test_training_lowers_the_loss_and_leaves_pipelines(pictures, tmp_path, capsys):
    config = settings(pictures, tmp_path / "run", train={"steps": 60, "val_every": 10})
    assert run_train(config) == 0
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("train/loss")
    losses = [float(row.split(",")[column]) for row in rows[1:]]
    assert losses[-1] < 0.65 * losses[0]
    assert {"val/loss t 0-500", "val/loss t 500-1000"} <= set(rows[0].split(","))
    assert "8 pictures to train on, 4 held out" in capsys.readouterr().out
    assert (tmp_path / "run" / "samples" / "step_000060.png").is_file()
    assert (tmp_path / "run" / "first_batch.png").is_file()
    run, saved = load_generator(tmp_path / "run" / "best"), load_generator(tmp_path / "run" / "pipeline")
    assert isinstance(saved, DiMPipeline)
    assert saved.labels == {"blue": 0, "red": 1}
    images = [draw(pipeline, [0, 1], [5, 6], steps=4) for pipeline in (run, saved)]
    assert torch.equal(*images)
    assert images[0].shape == (2, 3, 8, 8)
    average = load_generator(tmp_path / "run" / "averages" / "0.1", scheduler="heun")
    assert type(average.scheduler).__name__ == "FlowMatchHeunDiscreteScheduler"


def test_a_sample_depends_on_its_seed_alone(pictures, tmp_path):
    config = settings(pictures, tmp_path / "run")
    result = train(GenerateTask(config), config.train)
    pipeline = load_generator(result.last)
    together = draw(pipeline, [0, 1, 0], [3, 4, 5], steps=3, guidance=2.0)
    alone = draw(pipeline, [1], [4], steps=3, guidance=2.0)
    assert (together[1].int() - alone[0].int()).abs().max() <= 1


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(pictures, tmp_path, monkeypatch):
    whole_config = settings(pictures, tmp_path / "whole")
    whole = train(GenerateTask(whole_config), whole_config.train)
    config = settings(pictures, tmp_path / "stopped")
    task, original, calls = GenerateTask(config), GenerateTask.loss, []

    def loss(self, model, batch):
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, model, batch)

    monkeypatch.setattr(GenerateTask, "loss", loss)
    with pytest.raises(SystemExit):
        train(task, config.train)
    monkeypatch.undo()
    again, folder = resumed_config(tmp_path / "stopped", data=GenerateConfig().data)
    assert again == config
    resumed = train(GenerateTask(again, resumed=True), again.train, resume=folder)
    want, got = load_checkpoint(whole.last)[0], load_checkpoint(resumed.last)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_every_objective_trains(pictures, tmp_path, kind):
    config = settings(pictures, tmp_path / "run", objective={"kind": kind}, train={"steps": 2})
    result = train(GenerateTask(config), config.train)
    assert 0 < result.metrics["loss"] < 50
    assert load_generator(result.last).transformer.config.objective == kind


def video_settings(run_dir: Path, **changes) -> GenerateConfig:
    return settings(
        Path("unused"),
        run_dir,
        data={"train": "synthetic", "side": 16, "frames": 4, "clips": 8, "augment": "none", **changes.pop("data", {})},
        watch={"held_out": 4},
        **changes,
    )


def test_a_causal_model_needs_a_level_per_frame(tmp_path):
    with pytest.raises(UserError, match="objective.per_frame true only"):
        video_settings(tmp_path / "run", model={"layout": "st", "causal": True})


def test_a_causal_video_model_trains_with_a_level_per_frame(tmp_path):
    config = video_settings(
        tmp_path / "run", model={"layout": "st", "causal": True}, objective={"per_frame": True}, train={"steps": 3}
    )
    task = GenerateTask(config)
    result = train(task, config.train)
    pipeline = load_generator(result.last)
    assert isinstance(pipeline, VideoDiMPipeline)
    assert draw(pipeline, [0], [1], steps=2, frames=3).shape == (1, 3, 3, 16, 16)


def test_a_model_that_will_stream_is_trained_on_frames_after_a_past(tmp_path):
    config = video_settings(tmp_path / "run", model={"layout": "st", "causal": True}, objective={"per_frame": True})
    task, calls = GenerateTask(config), []
    model = task.build()

    def called(sample, t, class_labels, return_dict, past=None):
        calls.append((t.shape, past))
        return model(sample, t, class_labels, return_dict, past)

    x0 = torch.rand(8, 3, 4, 16, 16)
    torch.manual_seed(1)
    losses = [task.loss(called, (x0, torch.zeros(8, dtype=torch.long)))["loss"].item() for _ in range(40)]  # type: ignore[arg-type]
    pasts = [past for shape, past in calls if past is not None and shape == (8, 4)]
    assert 20 < len(pasts) < 38, "three quarters"
    assert min(losses) > 1, "the head is zero: of noise - x0"
    off = torch.stack([(past - x0).flatten(1).std(dim=1) for past in pasts]).flatten()
    assert 0.3 < (off == 0).float().mean() < 0.7
    assert off.max() == pytest.approx(0.1, abs=0.01)


def test_parts_of_a_past_are_moved_by_as_much_as_is_said(tmp_path):
    config = video_settings(
        tmp_path / "run", model={"layout": "st", "causal": True}, objective={"per_frame": True},
        data={"past": {"noise": 0.0, "moves": 0.2}},
    )  # fmt: skip
    task, found = GenerateTask(config), []
    axis = torch.linspace(-1, 1, 32)  # what is moved by d pixels is lower by 2 d / 31
    for plane in (axis[:, None], axis[None]):
        torch.manual_seed(0)
        clips = plane.expand(200, 3, 4, 32, 32)
        moves = (clips - task._past(clips)) * 31 / 2
        assert torch.allclose(moves[:, 0], moves[:, 2]), "all channels alike"
        spread = moves[:, 0, :, 0, 0].square().mean(dim=1).sqrt()
        assert 0 < spread.min() < 0.05, "of each clip another one"
        assert spread.square().mean().sqrt() == pytest.approx(0.2 / 3**0.5, rel=0.15), "evenly from 0 to 0.2"
        found += [moves[:, 0, 0, 0, 0], moves[:, 0, 0, -1, -1], moves[:, 0, 1, 0, 0]]
    alike = torch.corrcoef(torch.stack(found)) - torch.eye(6)
    assert alike.abs().max() < 0.25, "ways, parts and frames by themselves"


def test_pasts_have_errors_of_their_bodies_for_models_that_stream(tmp_path):
    past = {"past": {"bodies": 0.3, "noise": 0.0}}
    attention = {"layout": "st", "causal": True, "mixer": "attention", "state_size": None}
    config = video_settings(tmp_path / "no", model=attention, objective={"per_frame": True}, data=past)
    with pytest.raises(UserError, match="for models that stream"):
        GenerateTask(config).build()
    config = video_settings(
        tmp_path / "run", model={"layout": "st", "causal": True}, objective={"per_frame": True}, data=past,
        train={"steps": 2},
    )  # fmt: skip
    task = GenerateTask(config)
    frames, label, own = (torch.as_tensor(part)[None] for part in task.train_data()[SampleKey(0, 0, 0)])
    assert not torch.equal(frames, own)
    model, pasts = task.build(), []

    def called(sample, t, class_labels, return_dict, past=None):
        pasts.append(past)
        return model(sample, t, class_labels, return_dict, past)

    for _ in range(30):
        task.loss(called, (frames, label, own))  # type: ignore[arg-type]
    assert all(torch.equal(past, to_unit(own)) for past in pasts), "never the frames as a clip"
    assert train(task, config.train).last.is_dir()


def test_weights_of_pictures_go_on_as_those_of_videos(pictures, tmp_path, capsys):
    config = settings(pictures, tmp_path / "p", data={"side": 16}, model={"layout": "st"}, train={"steps": 1})
    first = train(GenerateTask(config), config.train)
    video = video_settings(tmp_path / "v", model={"layout": "st"}, weights=str(first.last))
    model = GenerateTask(video).build()
    assert "tensors of the model taken" in capsys.readouterr().out
    trained = load_checkpoint(first.last)[0]["patches.weight"]
    torch.testing.assert_close(model.state_dict()["patches.weight"], trained)


def test_held_out_losses_are_paired_and_of_the_zero_model_known():
    model = DiM(width=32, depth=1, patch=4, sample_size=8).eval()
    held_out = (torch.full((64, 3, 8, 8), 255, dtype=torch.uint8), torch.zeros(64, dtype=torch.long))
    first = held_out_losses(model, held_out, Objective(), bins=4, classes=[])
    assert first == held_out_losses(model, held_out, Objective(), bins=4, classes=[])
    assert list(first) == ["loss t 0-250", "loss t 250-500", "loss t 500-750", "loss t 750-1000"]
    assert all(value == pytest.approx(2.0, abs=0.1) for value in first.values()), "of noise - 1"


def test_mistakes_are_told(pictures, tmp_path):
    with pytest.raises(UserError, match="--data.train"):
        run_train(GenerateConfig())
    odd = settings(pictures, tmp_path / "a", data={"side": 10})
    with pytest.raises(UserError, match=r"multiples of the patch \(4\), got 10 x 10"):
        train(GenerateTask(odd), odd.train)
    with pytest.raises(UserError, match="per_frame"):
        settings(pictures, tmp_path, objective={"per_frame": True})
    (tmp_path / "c").mkdir()
    with pytest.raises(UserError, match="nothing to resume"):
        run_train(GenerateConfig(), resume=tmp_path / "c" / "run")


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipes_can_be_read(name):
    assert load_config(GenerateConfig, name).train.steps


@pytest.mark.parametrize(("name", "most"), [("eurosat_dim", 4.0e6), ("shapes_stream", 1.5e6)])
def test_recipes_of_shipped_weights_are_small_enough(name, most, monkeypatch):
    config = load_config(GenerateConfig, name)
    task = GenerateTask.__new__(GenerateTask)
    task.settings, task.classes = config, ["class"] * (10 if name == "eurosat_dim" else 3)
    shape = (3, config.data.frames, config.data.side, config.data.side)
    arguments = task._arguments(shape if config.data.frames else shape[:1] + shape[2:])
    assert sum(parameter.numel() for parameter in DiM(**arguments).parameters()) <= most
    assert json.dumps(arguments)
