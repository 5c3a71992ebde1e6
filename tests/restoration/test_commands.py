"""The command line of `vssm restore`: help, flags, mistakes end in one line and exit code 2."""

import inspect
import re

import numpy as np
import pytest
from PIL import Image

from restoration import commands
from restoration.tasks import TASKS
from tests.restoration.tiny_weights import save_tiny
from vision_ssm import cli
from vision_ssm.cli import main


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("weights") / "denoise")


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture(autouse=True)
def wired(monkeypatch):
    monkeypatch.setitem(cli.TASKS, "restore", ("restoration.commands", "restore pictures"))


@pytest.mark.parametrize("verb", commands.COMMANDS)
def test_every_verb_and_flag_has_help(verb, capsys):
    assert main(["restore", verb, "--help"]) == 0
    shown = capsys.readouterr().out
    doc = inspect.getdoc(commands.COMMANDS[verb])
    assert doc is not None
    for name, parameter in inspect.signature(commands.COMMANDS[verb]).parameters.items():
        if name == "config":
            assert "--degradation" in shown
            continue
        assert (f"--{name}" if parameter.kind is inspect.Parameter.KEYWORD_ONLY else name) in shown
        assert re.search(rf"^\s+{name}: \w", doc, re.MULTILINE), f"{verb} --{name} is not explained"


def test_the_tasks_are_those_of_the_package():
    assert set(commands.Task.__args__) == set(TASKS)


def test_run_restores(weights, picture, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--task", "denoise", "--weights", str(weights), "--device", "cpu", "--max-memory", "2GiB"]
    assert main(["restore", "run", str(picture), "--output", str(out), *flags]) == 0
    assert "1 pictures restored, 0 failed" in capsys.readouterr().out
    assert (out / "a.png").is_file()


def test_info_names_the_task(weights, capsys):
    assert main(["restore", "info", str(weights)]) == 0
    assert "denoise" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "sr3"], "sr3"),
        (["--task", "motion"], "vssm restore train --config restoration/motion"),
        (["--task", "sr2", "--weights", "WEIGHTS"], "are for the task 'denoise', not 'sr2'"),
        (["--weights", "WEIGHTS", "--max-memory", "lots"], "not an amount of memory"),
        (["--weights", "WEIGHTS", "--tile", "64", "--strip", "2"], "not both"),
        (["--weights", "WEIGHTS", "--device", "tpu9"], "device"),
        (["--weights", "nowhere"], "no weights 'nowhere'"),
        (["--weights", "WEIGHTS", "--tiles", "64"], "--tile"),
        ([], "give --task, or --weights"),
    ],
)
def test_mistakes_end_in_one_line(flags, message, weights, picture, tmp_path, capsys):
    given = [str(weights) if flag == "WEIGHTS" else flag for flag in flags]
    assert main(["restore", "run", str(picture), "--output", str(tmp_path / "out"), *given]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_nothing_to_restore(weights, tmp_path, capsys):
    assert main(["restore", "run", str(tmp_path / "no*"), "--output", str(tmp_path), "--weights", str(weights)]) == 2
    assert "no pictures" in capsys.readouterr().err
