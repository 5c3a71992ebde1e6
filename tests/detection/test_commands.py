"""Mistakes at the command line of `vssm detect`: one readable line and exit code 2, before work is done or lost."""

import json
from pathlib import Path

import pytest

from detection.model import MambaYOLO
from detection.train import resumed_config
from tests.detection.drawn_sets import voc_tree, yolo_tree
from vision_ssm.checkpoint import save_checkpoint
from vision_ssm.cli import main
from vision_ssm.errors import UserError

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
        ({"names": 3}, "names"),
        ({"image_size": "large"}, "image_size"),
        ({"category_ids": [1]}, "category_ids"),
    ],
)
def test_damaged_config_of_weights(capsys, weights: Path, tmp_path: Path, change: dict, part: str) -> None:
    damaged = _copy_with(weights, tmp_path / "damaged", change)
    assert part in _refused(capsys, "convert", damaged, tmp_path / "out")
    assert not (tmp_path / "out").exists()


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
