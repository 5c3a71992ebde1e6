"""The console command: grammar, flags from signatures, and one readable line for every mistake."""

import errno
import os
import subprocess
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import cv2
import pytest
import torch

import vision_ssm
from vision_ssm import cli
from vision_ssm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Optim:
    """How the weights move."""

    lr: float = 0.01
    """Peak learning rate."""
    nesterov: bool = False

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    data: Path
    epochs: int = 3
    optim: Optim = field(default_factory=Optim)


def train(config: Config, *, resume: bool = False, device: Literal["auto", "cpu"] = "auto") -> None:
    """Train a model.

    Args:
        resume: Go on with an interrupted run.
    """
    calls.append((config, resume, device))


def predict(
    model: Path, source: list[Path], *, conf: float = 0.25, max_det: int = 300, save: bool = True,
    classes: list[str] | None = None,
) -> int:  # fmt: skip
    """Find objects in pictures.

    Args:
        model: Checkpoint folder.
        source: Pictures or folders.
        conf: Least score that counts.
    """
    calls.append((model, source, conf, max_det, save, classes))
    return 1


def score(
    *, weights: Path, splits: list[Literal["train", "val"]] = ["val"], limit: int | None = None, sides: list[int] = [9]  # noqa: B006
) -> None:  # fmt: skip
    """Score weights."""
    calls.append((weights, splits))


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where from."""

    source: Path = field(kw_only=False)
    """A picture."""
    limit: int = 3
    """Most pictures."""
    names: list[str] = field(default_factory=lambda: ["a", "b"])


@dataclass(frozen=True, kw_only=True)
class CountOptions(Source):
    """Where from and how."""

    weights: str
    limit: int = 5

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise UserError(f"limit must not be negative, got {self.limit}")


def count(options: CountOptions, *, output: Path = Path("runs")) -> None:
    """Count objects."""
    calls.append((options, output))


def fail(kind: str) -> None:
    """Raise an error of some kind."""
    raise ERRORS[kind]


class OutOfMemoryError(RuntimeError):
    """Has the name of torch's error."""


calls: list = []
ERRORS = {
    "user": UserError("no such data set"),
    "missing": FileNotFoundError(errno.ENOENT, "No such file or directory", "a.yaml"),
    "denied": PermissionError(errno.EACCES, "Permission denied", "b.yaml"),
    "full": OSError(errno.ENOSPC, "No space left on device"),
    "oom": OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
    "memory": MemoryError(),
    "host": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes\nmore"),
    "size": RuntimeError("Storage size calculation overflowed with sizes=[9, 9]"),
    "opencv": cv2.error("OpenCV: (-4:Insufficient memory) Failed to allocate 9 bytes"),
    "extra": ModuleNotFoundError("No module named 'onnx'", name="onnx"),
    "interrupt": KeyboardInterrupt(),
    "bug": ZeroDivisionError("division by zero"),
}


@pytest.fixture(autouse=True)
def _commands(monkeypatch):
    module = types.ModuleType("stand_in_commands")
    module.COMMANDS = {"train": train, "predict": predict, "score": score, "count": count, "fail": fail}  # pyright: ignore
    monkeypatch.setitem(sys.modules, "stand_in_commands", module)
    monkeypatch.setattr(cli, "TASKS", {"detect": ("stand_in_commands", "find objects")})
    monkeypatch.delenv("RANK", raising=False)
    calls.clear()


def run(line: str) -> int:
    return cli.main(line.split())


def test_positionals_lists_and_flags():
    assert run("detect predict m a.jpg b.jpg --conf 0.4 --max-det=5 --no-save --classes x y") == 1
    assert calls == [(Path("m"), [Path("a.jpg"), Path("b.jpg")], 0.4, 5, False, ["x", "y"])]


def test_defaults_of_the_function_hold():
    assert run("detect predict m a.jpg") == 1
    assert calls == [(Path("m"), [Path("a.jpg")], 0.25, 300, True, None)]


def test_keyword_only_parameters_without_default_are_required_flags():
    assert run("detect score --weights w") == 0
    assert run("detect score --weights w --splits val train") == 0
    assert calls == [(Path("w"), ["val"]), (Path("w"), ["val", "train"])]


def test_config_from_file_and_dotted_flags(tmp_path):
    (tmp_path / "c.yaml").write_text("data: d\nepochs: 7\noptim: {lr: 0.5}\n")
    assert run(f"detect train --config {tmp_path}/c.yaml --optim.lr 1e-3 --optim.nesterov --resume --device cpu") == 0
    assert calls == [(Config(data=Path("d"), epochs=7, optim=Optim(lr=1e-3, nesterov=True)), True, "cpu")]
    assert run("detect train --data e --optim.nesterov false") == 0
    assert calls[1] == (Config(data=Path("e")), False, "auto")


def test_fields_of_options_are_parameters(capsys):
    assert run("detect count p.jpg --weights w") == 0
    assert run("detect count p.jpg --weights w --limit 1 --names c -o r") == 0
    options = CountOptions(Path("p.jpg"), weights="w", limit=1, names=["c"])
    assert calls == [(CountOptions(Path("p.jpg"), weights="w"), Path("runs")), (options, Path("r"))]
    assert run("detect count --help") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "count --weights WEIGHTS [--limit LIMIT]" in out
    assert "Most pictures. (type: int, default: 5)" in out
    assert "(type: str, default: ['a', 'b'])" in out
    for line, told in (("", "missing: SOURCE, --weights"), ("p --weights w --limit -1", "must not be negative"),
                       ("p --weights w --limits 3", "did you mean '--limit'?")):  # fmt: skip
        assert run(f"detect count {line}") == 2
        assert told in capsys.readouterr().err


def test_help_has_docstrings_types_and_defaults(capsys):
    assert run("detect predict --help") == 0
    out = capsys.readouterr().out
    for part in ("vssm detect predict", "Find objects in pictures.", "Checkpoint folder.", "Least score", "0.25"):
        assert part in out
    assert run("detect train --help") == 0
    out = capsys.readouterr().out
    for part in ("--config", "--optim.lr", "Peak learning rate.", "How the weights move", "0.01", "{auto,cpu}"):
        assert part in out


def test_menus_and_version(capsys):
    assert run("--help") == 0
    assert "find objects" in capsys.readouterr().out
    assert run("detect --help") == 0
    assert "Train a model." in capsys.readouterr().out
    assert (run(""), run("detect")) == (2, 2)
    capsys.readouterr()
    assert run("--version") == 0
    assert capsys.readouterr().out == f"vssm {vision_ssm.__version__}\n"


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("detct", ["'detct'", "detect, doctor", "did you mean 'detect'"]),
        ("detect trian", ["'trian'", "train, predict, score, count, fail", "did you mean 'train'"]),
        ("detect predict m a --cnf 3", ["unknown flag --cnf", "did you mean '--conf'", "--help"]),
        ("detect predict m a --conf x", ["--conf is 'x'", "a number"]),
        ("detect predict m a --max-det 2.5", ["--max_det is '2.5'", "a whole number"]),
        ("detect predict m", ["missing: SOURCE"]),
        ("detect score", ["missing: --weights"]),
        ("detect score --weights w --splits val tset", ["--splits is 'tset'", "one of train, val"]),
        ("detect predict m a --conf 1 b", ["unexpected argument 'b'"]),
        ("detect train --data d --lr 1", ["unknown flag --lr", "did you mean '--optim.lr'"]),
        ("detect train --data d --optim.lr fast", ["--optim.lr is 'fast'", "a number"]),
        ("detect train --data d --epoch.lr 3", ["unknown flag --epoch.lr", "did you mean '--optim.lr'"]),
        ("detect train --data d --optim.nesterov maybe", ["--optim.nesterov is 'maybe'", "true or false"]),
        ("detect score --weights w --limit few", ["--limit is 'few'; allowed is a whole number or null"]),
        ("detect train --data d --optim.lr -1", ["optim: lr must be positive, got -1.0"]),
        ("detect train --data d --device gpu", ["--device is 'gpu'", "one of auto, cpu"]),
        ("detect train --data", ["--data needs a value: a path", "--data=VALUE"]),
        ("detect score --weights", ["--weights needs a value", "begins with - is written --weights=VALUE"]),
        ("detect score --weights w --splits", ["--splits needs a value: one of train, val"]),
        ("detect train", ["data needs a value", "--data"]),
        ("detect train --config nowhere.yaml", ["nowhere.yaml", "no such file"]),
        ("detect fail user", ["no such data set"]),
        ("detect fail missing", ["No such file or directory: a.yaml"]),
        ("detect fail denied", ["Permission denied: b.yaml"]),
        ("detect fail full", ["disk is full"]),
        ("detect fail oom", ["out of GPU memory", "batch size", "Tried to allocate 2 GiB"]),
        ("detect fail memory", ["out of memory", "batch size"]),
        ("detect fail host", ["out of memory", "batch size", "you tried to allocate 9 bytes)"]),
        ("detect fail size", ["out of memory", "sizes=[9, 9]"]),
        ("detect fail opencv", ["out of memory", "Failed to allocate 9 bytes"]),
        (f"detect score --weights w --limit {2**63}", [f"--limit is {2**63}", f"to {2**63 - 1}"]),
        (f"detect score --weights w --sides 1 -{2**63}", [f"--sides is -{2**63}"]),
        ("detect fail extra", ["pip install 'vision-ssm[export]'"]),
    ],
)
def test_mistakes_end_in_one_line_and_code_2(capsys, line, parts):
    assert run(line) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("vssm: error: ")
    assert captured.err.count("\n") == 1
    for part in parts:
        assert part in captured.err


def test_a_mistake_under_torchrun_names_the_rank(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert run("detect fail user") == 2
    assert "[rank 3] no such data set" in capsys.readouterr().err


class Broken(torch.utils.data.Dataset):
    """A data set whose first picture is unreadable in one of two ways."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        raise ERRORS[self.kind]


@pytest.mark.parametrize(("kind", "part"), [("user", "no such data set"), ("missing", "'a.yaml'")])
def test_a_mistake_found_by_a_data_worker_is_one_line_too(capsys, monkeypatch, kind, part):
    def count() -> int:
        """Load everything."""
        return len(list(torch.utils.data.DataLoader(Broken(kind), num_workers=1)))

    monkeypatch.setattr(sys.modules["stand_in_commands"], "COMMANDS", {"count": count})
    assert run("detect count") == 2
    message = capsys.readouterr().err
    assert part in message
    assert message.count("\n") == 1


def test_interrupt(capsys):
    assert run("detect fail interrupt") == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_bug_keeps_its_traceback_and_asks_for_a_report():
    with pytest.raises(ZeroDivisionError) as caught:
        run("detect fail bug")
    assert "please report" in caught.value.__notes__[0]


def test_a_closed_pipe_is_quiet():
    """Writing to a reader that has gone, as `vssm --help | head -0` does."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "vision_ssm.cli", "--help"], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("module", ["vision_ssm", "vision_ssm.cli"])
def test_runs_as_a_module(module):
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"vssm {vision_ssm.__version__}\n", "")
