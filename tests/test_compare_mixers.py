"""tools/compare_mixers.py: widths that give equal numbers of parameters, a run with its report and table."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from detection.config import DetectConfig, ModelConfig
from restoration.config import RestoreConfig
from tests.restoration.photographs import write_set
from vision_ssm.errors import UserError


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("compare_mixers", "tools/compare_mixers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("task", ["detect", "restore"])
def test_equal_numbers_of_parameters(tool, task, monkeypatch):
    config, widths = (DetectConfig(), (0.25, 0.28)) if task == "detect" else (RestoreConfig(), (54, 60))
    monkeypatch.setitem(tool.WIDTHS, task, [w for w in tool.WIDTHS[task] if widths[0] <= w <= widths[1]])
    wanted = tool.parameters(tool.network(task, config))
    other = tool.matched(task, config, "gated_conv")
    assert (other.model.mixer, other.model.mixer_pattern) == ("gated_conv", "same")
    assert tool.parameters(tool.network(task, other)) == pytest.approx(wanted, rel=tool.NEAR)
    monkeypatch.setitem(tool.WIDTHS, task, [tool.WIDTHS[task][0]])
    with pytest.raises(UserError, match="no width gives a network of gated_conv about"):
        tool.matched(task, DetectConfig(ModelConfig(size="b")) if task == "detect" else config, "gated_conv")


def test_a_run_is_told_and_goes_into_the_table(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(tool.WIDTHS, "restore", [8])
    folders = {split: write_set(tmp_path / split, 32 + (split == "val")) for split in ("train", "val")}
    changes = {
        "model.variant": "fast", "model.width": 8, "model.depths": "[1, 1, 1, 1]", "data.train": folders["train"],
        "data.val": folders["val"], "data.epoch_samples": 4, "data.crops": "[[32, 1.0]]", "train.steps": 1,
        "train.batch_size": 2, "train.workers": 0, "train.precision": "fp32", "train.device": "cpu",
    }  # fmt: skip
    command = ["restore", *(f"{k}={v}" for k, v in changes.items()), "--config", "restoration/denoise", "--mixer", "s6"]
    monkeypatch.setattr(sys, "argv", ["compare_mixers", *command, "--side", "32", "--out", str(tmp_path / "out")])
    assert tool.main() == 0
    report = json.loads(Path(tmp_path / "out" / "restore_s6_0.json").read_text())
    assert report["steps"] == 1
    assert report["width"] == 8
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith("s6")
    assert f"{report['parameters']:,}" in row
    assert f"{report['scores']['psnr']:.4g}" in row
    monkeypatch.setattr(sys, "argv", [*sys.argv, "train.optim.lr=0.01"])
    assert tool.main() == 2, "the run that is there has other settings"
    assert "restore_s6_0 has other settings (train)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("data.train",), "settings are key=value, got 'data.train'"),
        (("--side", "0"), "--side must be a multiple of 32, got 0"),
    ],
)
def test_what_cannot_be_is_told_before_training(tool, monkeypatch, capsys, arguments, part):
    command = ["restore", "--config", "restoration/denoise", "--mixer", "s6"]
    monkeypatch.setattr(sys, "argv", ["compare_mixers", *command, *arguments])
    with pytest.raises(SystemExit, match="2"):
        tool.main()
    assert part in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[]", '{"task": "restore"}', '{"task": "detect", "scores": {"psnr": 1}}'])
def test_damaged_reports_are_named(tool, tmp_path, text):
    with pytest.raises(UserError, match="no reports in"):
        tool.show(tmp_path)
    (tmp_path / "restore_s6_0.json").write_text(text)
    with pytest.raises(UserError, match=r"restore_s6_0\.json is no report, or damaged"):
        tool.show(tmp_path)
