"""Configs: YAML and overrides into frozen dataclasses; every mistake in one readable message."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from vision_ssm import config
from vision_ssm.config import all_keys, from_dict, load_config, resolve_config, to_dict
from vision_ssm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Optim:
    name: Literal["adamw", "sgd"] = "sgd"
    lr: float = 0.01

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")


@dataclass(frozen=True, kw_only=True)
class Config:
    data: Path
    epochs: int = 3
    amp: bool = True
    size: tuple[int, int] = (640, 640)
    names: tuple[str, ...] = ()
    seed: int | None = None
    optim: Optim = field(default_factory=lambda: Optim(lr=0.5))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def test_file_over_defaults_and_overrides_over_file(tmp_path):
    path = write(tmp_path, "data: d\nepochs: 5\noptim: {name: adamw}\nsize: [1, 2]\nnames: [a, b]\nseed: 4\n")
    got = load_config(Config, path, {"optim.lr": "1e-3", "epochs": 6, "seed": None})
    assert got == Config(
        data=Path("d"), epochs=6, size=(1, 2), names=("a", "b"), optim=Optim(name="adamw", lr=1e-3), seed=None
    )


def test_a_partly_given_group_keeps_the_defaults_of_its_owner():
    assert load_config(Config, overrides={"data": "d", "optim": {"name": "adamw"}}).optim == Optim(name="adamw", lr=0.5)


def test_yaml_exponent_without_dot_is_a_number(tmp_path):
    assert load_config(Config, write(tmp_path, "data: d\noptim: {lr: 1e-4}")).optim.lr == 1e-4


def test_result_is_frozen():
    cfg = load_config(Config, overrides={"data": "d"})
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.epochs = 1  # pyright: ignore


def test_to_dict_is_json_and_round_trips():
    cfg = Config(data=Path("a/b"), names=("x",), optim=Optim(lr=0.25))
    assert from_dict(Config, json.loads(json.dumps(to_dict(cfg)))) == cfg


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("data: d\nepoch: 3", ["mine.yaml", "'epoch'", "did you mean 'epochs'"]),
        ("data: d\noptim: {lrr: 3}", ["mine.yaml", "'optim.lrr'", "did you mean 'optim.lr'"]),
        ("data: d\nlr: 3", ["'lr'", "did you mean 'optim.lr'"]),
        ("data: d\nxyzzy: 3", ["'xyzzy'", "known here: data, epochs"]),
        ("data: d\nepochs: many", ["mine.yaml", "epochs is 'many'", "a whole number"]),
        ("data: d\nepochs: 2.5", ["epochs is 2.5", "a whole number"]),
        ("data: d\nepochs:", ["epochs is null", "a whole number"]),
        ("data: d\nepochs: true", ["epochs is True", "a whole number"]),
        ("data: d\noptim: {lr: true}", ["optim.lr is True", "a number"]),
        ("data: d\nsize: [1, 2, 3]", ["size is [1, 2, 3]", "a list of 2"]),
        ("data: d\nseed: soon", ["seed is 'soon'", "a whole number or null"]),
        ("data: d\noptim: {name: adam}", ["optim.name is 'adam'", "one of adamw, sgd"]),
        ("data: d\noptim: fast", ["optim is 'fast'", "name, lr"]),
        ("data: d\noptim: {lr: -1}", ["mine.yaml", "optim: lr must be positive, got -1.0"]),
        ("epochs: 3", ["data needs a value", "--data"]),
        ("[1, 2]", ["mine.yaml", "a mapping"]),
        ("a: [1", ["mine.yaml", "not valid YAML", "line 1"]),
    ],
)
def test_mistakes_are_named(tmp_path, text, parts):
    with pytest.raises(UserError) as caught:
        load_config(Config, write(tmp_path, text))
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mistakes_on_the_command_line_say_so(tmp_path):
    with pytest.raises(UserError, match="command line: epochs is 'x'"):
        load_config(Config, write(tmp_path, "data: d\nepochs: 4"), {"epochs": "x"})


def test_all_keys():
    assert all_keys(Config) == ["data", "epochs", "amp", "size", "names", "seed", "optim.name", "optim.lr"]


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    for name in ("detection/tiny.yaml", "detection/both.yaml", "smoke/both.yaml"):
        (tmp_path / "configs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "configs" / name).write_text("data: d\n")
    monkeypatch.setattr(config, "_PACKAGE", tmp_path / "vision_ssm")
    return tmp_path / "configs"


@pytest.mark.parametrize("name", ["tiny", "tiny.yaml", "detection/tiny", "configs/detection/tiny.yaml"])
def test_shipped_configs_are_found_by_name(shipped, name):
    assert resolve_config(name) == shipped / "detection/tiny.yaml"


def test_an_existing_file_goes_before_a_shipped_name(shipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny").write_text("data: d\n")
    assert resolve_config("tiny") == Path("tiny")


@pytest.mark.parametrize(
    ("name", "part"),
    [("tinny", "did you mean 'tiny'"), ("both", "detection/both, smoke/both"), ("no/such.yaml", "no such file")],
)
def test_unknown_configs_are_explained(shipped, name, part):
    with pytest.raises(UserError, match=part):
        resolve_config(name)


def test_a_folder_is_not_a_config(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        resolve_config(tmp_path)
