"""Checkpoints: what is written is read back; nothing complete is lost; every damage has a message."""

import errno
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vision_ssm import checkpoint
from vision_ssm.checkpoint import load_checkpoint, load_matching, save_checkpoint
from vision_ssm.errors import UserError


def small(width: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))


def test_round_trip(tmp_path):
    shared = torch.arange(12.0).view(3, 4)
    state = {
        "view": shared.T,
        "same": shared,
        "again": shared,
        "half": torch.ones(2, dtype=torch.bfloat16),
        "count": torch.tensor(3),
        "empty": torch.zeros(0, 2),
        "grad": nn.Parameter(torch.ones(2)),
    }
    config = {"size": "t", "names": ["cat", "dog"], "nested": {"lr": 0.1, "none": None}}
    save_checkpoint(tmp_path / "run" / "best", state, config)
    got, got_config = load_checkpoint(tmp_path / "run" / "best")
    assert got_config == config
    assert got.keys() == state.keys()
    for name, want in state.items():
        assert got[name].dtype == want.dtype
        assert torch.equal(got[name], want.detach())
    assert sorted(f.name for f in (tmp_path / "run" / "best").iterdir()) == ["config.json", "model.safetensors"]


def test_the_weights_file_alone_is_enough(tmp_path):
    save_checkpoint(tmp_path, {"a": torch.ones(1)}, {"size": "t"})
    (tmp_path / "config.json").unlink()
    tensors, config = load_checkpoint(tmp_path / "model.safetensors")
    assert (tensors["a"].item(), config) == (1.0, {"size": "t"})


def test_files_of_other_projects(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors", metadata={"config": "not json"})
    torch.save({"model": {"module.a": torch.ones(1)}}, tmp_path / "x.pt")
    for name in ("x.safetensors", "x.pt"):
        tensors, config = load_checkpoint(tmp_path / name)
        assert (list(tensors), config) == (["a"], {})


@pytest.mark.parametrize("fault", ["weights", "disk_full", "rename", "config"])
def test_a_failed_write_leaves_the_older_checkpoint_whole(tmp_path, monkeypatch, fault):
    save_checkpoint(tmp_path, {"a": torch.ones(4)}, {"epoch": 1})

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    def half(tensors, path, metadata):
        path.write_bytes(b"half of the bytes")
        raise checkpoint.SafetensorError("I/O error: No space left on device")

    config: dict = {"epoch": 2}
    if fault == "weights":
        monkeypatch.setattr(checkpoint, "save_file", half)
    elif fault == "disk_full":
        monkeypatch.setattr("os.fsync", fail)
    elif fault == "rename":
        monkeypatch.setattr("vision_ssm.files.os.replace", fail)
    else:
        config["bad"] = object()
    with pytest.raises((UserError, TypeError)):
        save_checkpoint(tmp_path, {"a": torch.zeros(4)}, config)
    monkeypatch.undo()
    tensors, config = load_checkpoint(tmp_path)
    assert (tensors["a"].tolist(), config) == ([1.0] * 4, {"epoch": 1})
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_damage_is_named(tmp_path):
    good = tmp_path / "good"
    save_checkpoint(good, {"a": torch.ones(100)}, {})
    weights, config = good / "model.safetensors", good / "config.json"
    whole = weights.read_bytes()

    def message(path):
        with pytest.raises(UserError) as caught:
            load_checkpoint(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no such file or folder; checkpoints there: " in message(tmp_path / "missing")
    assert "no config.json and no model.safetensors; checkpoints there" in message(tmp_path)
    for part in (0, 4, 50, len(whole) - 1):
        weights.write_bytes(whole[:part])
        assert f"{weights} is damaged or cut off" in message(good)
    weights.write_bytes(whole)
    for text in ("{", "[]"):
        config.write_text(text)
        assert f"{config} is damaged" in message(good)
    config.write_text(json.dumps({"vision_ssm": {"format": 2, "version": "0.7.0"}}))
    assert "written by vision-ssm 0.7.0, newer than this" in message(good)
    config.unlink()
    assert "it has no config.json" in message(good)
    (tmp_path / "a.txt").write_text("x")
    assert "is no checkpoint; give a folder" in message(tmp_path / "a.txt")


def test_tensors_only(tmp_path):
    with pytest.raises(TypeError, match=r"state_dict\['a'\] is a int"):
        save_checkpoint(tmp_path, {"a": 3}, {})  # pyright: ignore


def test_load_matching_takes_what_fits_and_says_what_does_not(tmp_path):
    model = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {name: torch.full_like(tensor, 2) for name, tensor in before.items()}
    state["0.weight"] = state["0.weight"].half()
    state["0.bias"] = torch.ones(5)
    state["head.weight"] = torch.ones(1)
    del state["1.running_var"]
    report = load_matching(model, state)
    after = model.state_dict()
    assert after["0.weight"].dtype == torch.float32
    for name, tensor in after.items():
        untouched = name in ("0.bias", "1.running_var")
        assert torch.equal(tensor, before[name] if untouched else torch.full_like(tensor, 2)), name
    assert report.other_shape == (("0.bias", (5,), (3,)),)
    assert (report.not_in_file, report.not_in_model) == (("1.running_var",), ("head.weight",))
    assert set(report.taken) == set(before) - {"0.bias", "1.running_var"}
    for part in ("5 of 7 tensors", "0.bias (file [5], model [3])", "not in the file: 1.running_var", "head.weight"):
        assert part in str(report)
    with pytest.raises(UserError, match=r"x\.pt belong to another model"):
        report.require_complete("x.pt")


def test_load_matching_complete():
    source, model = small(), small()
    report = load_matching(model, source.state_dict())
    assert report.complete
    report.require_complete("x.pt")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters(), strict=True))


def test_weights_of_another_model_are_refused():
    with pytest.raises(UserError, match="another model: 0 of 7"):
        load_matching(small(), {"x": torch.ones(1), "0.bias": torch.ones(4)})
