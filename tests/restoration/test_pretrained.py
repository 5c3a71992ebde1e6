"""Weights and their cards: writing, reading, published files, the tasks, what is said of wrong ones."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import restoration
from restoration import pretrained, tasks
from restoration.card import WeightsCard
from restoration.mambair import MambaIR
from restoration.model import Serpent
from restoration.networks import model_config
from restoration.pretrained import load_model, run_convert, run_pack, save_weights
from restoration.summary import run_info
from restoration.tasks import SHIPPED, TASKS, find_task, shipped_weights, weights_for
from tests.golden import ASSETS, fill
from vision_ssm.checkpoint import save_checkpoint
from vision_ssm.errors import UserError


def small() -> Serpent:
    torch.manual_seed(0)
    model = Serpent("small", width=8, depths=(1, 1))
    nn.init.normal_(model.get_parameter("head.out.weight"), std=0.1)
    return model.eval()


def card_of(model: Serpent, **values: object) -> WeightsCard:
    return WeightsCard(model=model_config(model), task="denoise", **values)  # pyright: ignore[reportArgumentType]


def published_light_file(path: Path) -> Path:
    shapes = json.loads((ASSETS / "restoration" / "mambair_light_x2.shapes.json").read_text())
    torch.save({"params": {name: fill(name, tuple(shape)) for name, shape in shapes.items()}}, path)
    return path


def test_saved_weights_come_back_with_their_card(tmp_path: Path) -> None:
    model = small()
    card = card_of(model, degradation={"sigma": [0, 50]}, trained_on="CID22", licence="CC BY-SA", steps=7, seed=3)
    save_weights(tmp_path / "denoiser", model, card)
    loaded, read = load_model(tmp_path / "denoiser")
    assert not loaded.training
    assert read.to_dict() == json.loads(json.dumps(card.to_dict()))
    image = torch.rand(1, 3, 9, 10)
    with torch.no_grad():
        assert torch.equal(loaded(image), model(image))
    readme = (tmp_path / "denoiser" / "README.md").read_text()
    for said in ("# denoiser", "denoise", "CID22", "CC BY-SA", "sigma [0, 50]"):
        assert said in readme


def test_packed_weights_are_half_as_large(tmp_path: Path) -> None:
    model = small()
    save_weights(tmp_path / "w", model, card_of(model))
    assert run_pack(tmp_path / "w", tmp_path / "packed") == 0
    for folder, size in (("w", 4), ("packed", 2)):
        expected = size * sum(tensor.numel() for tensor in model.parameters())
        assert abs((tmp_path / folder / "model.safetensors").stat().st_size - expected) < 16_000
    loaded, read = load_model(tmp_path / "packed")
    assert read == load_model(tmp_path / "w")[1]
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    image = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        assert 0 < (loaded(image) - model(image)).abs().max() < 1e-3


def test_packing_and_converting_replace_nothing(tmp_path: Path) -> None:
    model = small()
    save_weights(tmp_path / "w", model, card_of(model))
    before = (tmp_path / "w" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="w is not empty, and nothing in it is replaced: give a new folder"):
        run_pack(tmp_path / "w", tmp_path / "w")
    with pytest.raises(UserError, match="w is not empty"):
        run_convert(published_light_file(tmp_path / "light.pth"), tmp_path / "w")
    assert (tmp_path / "w" / "model.safetensors").read_bytes() == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot write to the output folder .*file"):
        run_pack(tmp_path / "w", tmp_path / "file")


def test_published_file_runs_as_it_is_and_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = published_light_file(tmp_path / "light.pth")
    direct, card = load_model(file)
    assert (card.task, card.scale, dict(card.model)) == ("sr2", 2, {"name": "mambair", "kind": "light", "scale": 2})
    assert isinstance(direct, MambaIR)
    assert direct.scale == 2
    assert run_convert(file, tmp_path / "light") == 0
    assert "name mambair, kind light, scale 2; task sr2" in capsys.readouterr().out
    converted, read = load_model(tmp_path / "light")
    assert read == card
    for (name, want), got in zip(direct.named_parameters(), converted.parameters(), strict=True):
        assert torch.equal(got, want), name


def test_conversion_refuses_what_is_no_mambair(tmp_path: Path) -> None:
    torch.save({"params": {"conv1.weight": torch.zeros(2, 2)}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth: no published MambaIR"):
        run_convert(tmp_path / "other.pth", tmp_path / "out")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(UserError, match=r"text\.pth"):
        run_convert(tmp_path / "text.pth", tmp_path / "out")
    with pytest.raises(UserError, match="no such file"):
        run_convert(tmp_path / "none.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_info_tells_what_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small()
    card = card_of(
        model, degradation={"sigma": [0, 50]}, trained_on="CID22 train", licence="CC BY-SA 4.0", steps=12_000
    )
    save_weights(tmp_path / "denoiser", model, card)
    assert run_info(tmp_path / "denoiser") == 0
    said = capsys.readouterr().out
    parameters = sum(p.numel() for p in model.parameters())
    for fact in ("denoise", "sigma [0, 50]", "CID22 train", "CC BY-SA 4.0", "12,000", f"{parameters:,}", "256x256"):
        assert fact in said
    assert "512x512" in said
    assert "GMAC" in said


def test_weights_of_others_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    model = small()
    with pytest.raises(UserError, match="no weights 'nothing'.*shipped name"):
        load_model("nothing")
    save_checkpoint(tmp_path / "detector", {"a": torch.zeros(1)}, {"task": "detect", "model": {"size": "t"}})
    with pytest.raises(UserError, match="detector: no task 'detect'; there are denoise"):
        load_model(tmp_path / "detector")
    save_checkpoint(tmp_path / "bare", model.state_dict(), {})
    with pytest.raises(UserError, match="bare: config.json lacks model and task"):
        load_model(tmp_path / "bare")
    larger = model_config(Serpent("small", width=16, depths=(1, 1)))
    save_checkpoint(tmp_path / "mixed", model.state_dict(), {"task": "denoise", "model": larger})
    with pytest.raises(UserError, match="mixed belong to another model"):
        load_model(tmp_path / "mixed")
    other = WeightsCard(model=larger, task="denoise")
    with pytest.raises(UserError, match="'width': 16.*the model is.*'width': 8"):
        save_weights(tmp_path / "wrong", model, other)
    with pytest.raises(UserError, match="'sr4' enlarges 4 times, the weights' card says 1"):
        WeightsCard(model=larger, task="sr4")
    with pytest.raises(UserError, match="lacks the name of the network"):
        WeightsCard(model={}, task="denoise")


def test_tasks_say_which_weights_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(TASKS) == ["denoise", "deblur", "motion", "sr2", "sr4", "sr8", "jpeg", "inpaint"]
    assert [TASKS[name].scale for name in ("sr2", "sr4", "sr8", "jpeg")] == [2, 4, 8, 1]
    assert find_task("inpaint").in_channels == 4
    with pytest.raises(UserError, match="no task 'debulr'.*did you mean 'deblur'"):
        find_task("debulr")
    for module in (tasks, pretrained):
        monkeypatch.setattr(module, "SHIPPED", tmp_path)
    with pytest.raises(UserError, match=r"shipped are: none.*vssm restore train --config restoration/jpeg"):
        weights_for("jpeg")
    model = small()
    save_weights(tmp_path / "serpent_noise", model, card_of(model))
    assert weights_for("denoise") == ["serpent_noise"]
    assert shipped_weights() == {"serpent_noise": "denoise"}
    with pytest.raises(UserError, match=r"shipped are: serpent_noise \(denoise\)"):
        weights_for("jpeg")
    assert load_model("serpent_noise")[1].task == "denoise"
    with pytest.raises(UserError, match="did you mean 'serpent_noise'"):
        load_model("serpent_nose")


@pytest.mark.parametrize("name", sorted(shipped_weights()) or ["none"])
def test_shipped_weights_load_and_say_what_they_are(name: str) -> None:
    if name == "none":
        assert not list(SHIPPED.glob("*/model.safetensors"))
        return
    model, card = load_model(name)
    assert model_config(model)["name"] == card.model["name"]
    assert (SHIPPED / name / "README.md").is_file()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert dataclasses.asdict(card)["trained_on"] != "not recorded"


def test_public_names_import() -> None:
    for name in restoration.__all__:
        assert getattr(restoration, name).__name__ == name
    with pytest.raises(AttributeError, match="'restoration' has no attribute 'Nothing'"):
        restoration.Nothing


def test_a_classifier_with_a_published_name_is_no_restorer(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "vim", {"patch_embed.proj.weight": torch.zeros(2)}, {"task": "classify"})
    with pytest.raises(UserError, match=r"vim: config\.json lacks model"):
        load_model(tmp_path / "vim")
