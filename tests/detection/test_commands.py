"""Mistakes at the command line of `vssm detect`: one readable line and exit code 2, before work is done or lost."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from detection.config import DetectConfig
from detection.model import MambaYOLO
from detection.train import resumed_config
from tests.detection.drawn_sets import draw, voc_tree, yolo_tree
from vision_ssm.checkpoint import save_checkpoint
from vision_ssm.cli import main
from vision_ssm.errors import UserError

ROOT = Path(__file__).parents[2]
TRAIN = ["--train.device=cpu", "--train.workers=0", "--train.batch_size=2", "--data.image_size=64"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained checkpoint of the classes cat and dog."""
    folder = tmp_path_factory.mktemp("weights") / "best"
    config = {"task": "detect", "model": {"size": "t", "num_classes": 2}, "names": ["cat", "dog"], "image_size": 64}
    save_checkpoint(folder, MambaYOLO("t", 2).state_dict(), config)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two pictures to train on, one to validate on."""
    boxes = [("cat", 5, 5, 30, 30), ("dog", 20, 10, 60, 40)]
    return voc_tree(tmp_path / "data", {"train": {"a": boxes, "b": boxes}, "val": {"c": boxes}})


def _copy_with(weights: Path, folder: Path, change: dict) -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((weights / "model.safetensors").read_bytes())
    config = json.loads((weights / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    assert main(["detect", *map(str, arguments)]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("vssm: error: ")
    return message


@pytest.mark.parametrize(
    ("flag", "part"),
    [
        ("--batch-size=0", "batch_size must be at least 1"),
        ("--workers=-1", "workers must be at least 0"),
        ("--image-size=0", "image_size must be at least 32"),
        ("--image-size=big", "'big'; allowed is a whole number"),
    ],
)
def test_val_refuses_numbers_out_of_range(capsys, weights: Path, data: Path, tmp_path: Path, flag: str, part: str):
    assert part in _refused(capsys, "val", weights, data, "--device=cpu", f"--output={tmp_path / 'out'}", flag)


def test_val_looks_at_the_output_before_it_works(capsys, weights: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert main(["detect", "val", str(weights), str(data), "--device=cpu", f"--output={tmp_path / 'file'}"]) == 2
    printed = capsys.readouterr()
    assert "cannot write to the output folder" in printed.err
    assert "AP50" not in printed.out
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"model": 3}, "num_classes"),
        ({"model": {"size": "t"}}, "num_classes"),
        ({"model": {"size": "t", "num_classes": 5}}, "belong to another model"),
        ({"model": {"size": "t", "num_classes": 2, "depth": 1}}, "depth"),
        ({"model": {"size": "q", "num_classes": 2}}, "config.json is damaged: Mamba-YOLO has the sizes t, b, l"),
        ({"names": 3}, "wrong is names: 3"),
        ({"names": ["cat", 3]}, "wrong is names"),
        ({"image_size": "large"}, "wrong is image_size: large"),
        ({"image_size": 0}, "wrong is image_size: 0"),
        ({"category_ids": 7}, "wrong is category_ids: 7"),
        ({"category_ids": [1]}, "category_ids"),
    ],
)
def test_damaged_config_of_weights(capsys, weights: Path, tmp_path: Path, change: dict, part: str) -> None:
    damaged = _copy_with(weights, tmp_path / "damaged", change)
    assert part in _refused(capsys, "convert", damaged, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_of_another_model_are_named(capsys, tmp_path: Path) -> None:
    torch.save({"layer": torch.zeros(3)}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name, part in (("other.pt", "not the weights of a Mamba-YOLO"), ("list.pt", "no weights found")):
        message = _refused(capsys, "convert", tmp_path / name, tmp_path / "out")
        assert str(tmp_path / name) in message
        assert part in message


def test_conversion_replaces_nothing(capsys, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert f"{tmp_path} is not empty" in _refused(capsys, "convert", weights, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_bench_looks_at_the_output_before_it_measures(capsys, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert main(["detect", "bench", "--resolutions=64", "--device=cpu", f"--output={tmp_path / 'file'}"]) == 2
    printed = capsys.readouterr()
    assert "cannot write to the output folder" in printed.err
    assert not printed.out


def test_the_table_of_the_guide_is_what_training_does() -> None:
    """docs/detection.md: batch, batches gathered, pictures in a step, lr, weight decay."""
    lines = (
        (ROOT / "docs/detection.md").read_text(encoding="utf-8").split("| batch | batches gathered |")[1].splitlines()
    )
    rows = [[cell.strip() for cell in line.split("|")[1:6]] for line in lines[2:] if line.startswith("| ")]
    assert [int(row[0].split()[0]) for row in rows[:7]] == [8, 12, 16, 24, 32, 48, 64]
    for batch, gathered, pictures, lr, decay in rows[:7]:
        recipe = dataclasses.replace(DetectConfig().train, batch_size=int(batch.split()[0]))
        assert (recipe.accumulate, recipe.accumulate * recipe.batch_size) == (int(gathered), int(pictures))
        assert recipe.optim.lr == float(lr)
        assert recipe.scaled_weight_decay == pytest.approx(float(decay), rel=5e-3)


def test_train_refuses_sets_without_pictures_or_classes(capsys, data: Path, tmp_path: Path) -> None:
    empty = voc_tree(tmp_path / "empty", {"train": {"a": []}, "val": {"b": []}})
    assert "no classes" in _refused(capsys, "train", f"--data.path={empty}", *TRAIN)
    pictures = yolo_tree(tmp_path / "yolo", {"train": {"a": "0 .5 .5 .2 .2"}, "val": {"b": ""}})
    (pictures / "images/val/b.jpg").unlink()
    assert "no pictures in its split 'val'" in _refused(capsys, "train", f"--data.path={pictures}", *TRAIN)


def test_resume_does_not_need_the_weights_it_began_with(weights: Path, data: Path, tmp_path: Path) -> None:
    start = _copy_with(weights, tmp_path / "start", {})
    run = tmp_path / "run"
    common = [f"--data.path={data}", *TRAIN, "--train.epochs=2", f"--train.run_dir={run}", f"--weights={start}"]
    assert main(["detect", "train", *common]) == 0
    config = json.loads((run / "last/config.json").read_text())
    config["train"]["epochs"] = 3
    (run / "last/config.json").write_text(json.dumps(config))
    for file in start.iterdir():
        file.unlink()
    start.rmdir()
    assert main(["detect", "train", f"--resume={run}"]) == 0
    assert len((run / "metrics.csv").read_text().splitlines()) == 4


def test_resume_of_another_task_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run/last/training").mkdir(parents=True)
    (tmp_path / "run/last/training/state.pt").write_bytes(b"")
    (tmp_path / "run/last/config.json").write_text(json.dumps({"task": "restore", "model": {}}))
    with pytest.raises(UserError, match="no run of `vssm detect train`"):
        resumed_config(tmp_path / "run")


@pytest.mark.parametrize("split", ["train", "val"])
def test_train_looks_at_every_picture_before_it_begins(capsys, data: Path, tmp_path: Path, split: str) -> None:
    """The annotations give the sizes, so that nothing but decoding finds the damage."""
    picture = data / "JPEGImages" / {"train": "b.jpg", "val": "c.jpg"}[split]
    whole = picture.read_bytes()
    run = tmp_path / "run"
    for damaged in (whole[: len(whole) // 2], b"no picture"):
        picture.write_bytes(damaged)
        assert main(["detect", "train", f"--data.path={data}", *TRAIN, f"--train.run_dir={run}"]) == 2
        message = capsys.readouterr().err
        assert f"({split}) has 1 errors" in message
        assert f"JPEGImages/{picture.name}" in message
        assert not run.exists()
    draw(picture, 32, 32)
    assert main(["detect", "train", f"--data.path={data}", *TRAIN, f"--train.run_dir={run}"]) == 2
    assert "is 32x32 pixels, its annotation says 64x48" in capsys.readouterr().err


@pytest.mark.parametrize("width", ["0", "-1", "1e9"])
def test_train_looks_at_the_width_before_the_data(capsys, tmp_path: Path, width: str) -> None:
    said = _refused(capsys, "train", "--data.path", tmp_path / "none", "--model.width", width)
    assert "width must be above 0 and at most 4" in said


def test_freeze_needs_weights(capsys, data: Path) -> None:
    message = _refused(capsys, "train", f"--data.path={data}", *TRAIN, "--freeze=backbone")
    assert "freeze backbone without weights" in message
    assert "--weights" in message


@pytest.mark.parametrize("classes", [("cat", "bird"), ("cat", "dog", "eel"), ("dog",)], ids=len)
def test_resume_compares_the_classes(capsys, data: Path, tmp_path: Path, classes: tuple[str, ...]) -> None:
    run = tmp_path / "run"
    common = [f"--data.path={data}", *TRAIN, "--train.epochs=2", f"--train.run_dir={run}"]
    assert main(["detect", "train", *common]) == 0
    config = json.loads((run / "last/config.json").read_text())
    config["train"]["epochs"] = 3
    (run / "last/config.json").write_text(json.dumps(config))
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    boxes = [(name, 5, 5, 30, 30) for name in classes]
    other = voc_tree(tmp_path / "other", {"train": {"a": boxes, "b": boxes}, "val": {"c": boxes}})
    message = _refused(capsys, "train", f"--resume={run}", f"--data.path={other}")
    assert f"was trained on the classes cat, dog; {other} has {', '.join(sorted(classes))}" in message
    assert f"--weights {run / 'last'}" in message
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


LATE_DAMAGE = """
import sys
from detection import train
from vision_ssm.cli import main
train.refuse_unreadable = lambda dataset: None  # as if the pictures had been whole when the run began
sys.exit(main())
"""


def test_one_of_two_processes_fails_and_its_message_can_be_read(data: Path, tmp_path: Path) -> None:
    (data / "JPEGImages/b.jpg").write_bytes(b"no picture")
    (tmp_path / "vssm.py").write_text(LATE_DAMAGE)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        tmp_path / "vssm.py",
    ]
    options = [f"--data.path={data}", *TRAIN, "--data.augment.mosaic=0", f"--train.run_dir={tmp_path / 'run'}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "detect", "train", *options], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("vssm: error: ")]
    (failed,) = [line for line in told if "cannot read the picture" in line]
    rank = int(failed.removeprefix("vssm: error: [rank ")[0])
    assert "JPEGImages/b.jpg: no known picture format" in failed
    # torchrun may end the other process before it notices
    other = (
        f"vssm: error: [rank {1 - rank}] stopped, because another process of this run has ended: its message says why"
    )
    assert told in ([failed], [failed, other], [other, failed])
    assert done.stderr.count("Traceback") == done.stderr.count("ChildFailedError: ") == 1  # torchrun's own
