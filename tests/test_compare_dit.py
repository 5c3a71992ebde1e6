"""tools/compare_dit.py: DiM and a DiT of equal parameters go through one training and one judge."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from vision_ssm.viz import save_picture


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("compare_dit", "tools/compare_dit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 8)):
        for name in ("land", "sea"):
            for number in range(count):
                save_picture(root / split / name / f"{number}.png", rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    return root


def test_both_networks_go_through_training_and_judge(tool, data, tmp_path, monkeypatch, capsys):
    config = {
        "model": {"width": 96, "depth": 12, "patch": 4, "mixer": "ssd", "conditioning": "adaln_single"},
        "data": {"side": 16},
        "watch": {"samples": 2, "steps": 1, "held_out": 4},
        "train": {"batch_size": 4, "workers": 0, "device": "cpu", "precision": "fp32", "val_every": 1},
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    flags = ["--config", str(tmp_path / "small.yaml"), "--data", str(data), "--classifier", "eurosat", "--steps", "1"]
    flags += ["--count", "8", "--sample-steps", "1", "--out", str(tmp_path / "out")]
    for network in ("dim", "dit"):
        monkeypatch.setattr(sys, "argv", ["compare_dit", "--network", network, *flags])
        assert tool.main() == 0, capsys.readouterr().err
    reports = [json.loads((tmp_path / "out" / f"{network}_0.json").read_text()) for network in ("dim", "dit")]
    assert reports[1]["parameters"] == pytest.approx(reports[0]["parameters"], rel=0.1)
    table = capsys.readouterr().out.splitlines()[-3:]
    for line, report in zip(table, reports, strict=False):
        assert line.startswith(report["network"])
        assert f"{report['scores']['frechet']['value']:.4g}" in line
