"""The folder of a run: its name, its checkpoints, and what a resumed run starts from."""

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vision_ssm.checkpoint import load_checkpoint, read_config, save_checkpoint
from vision_ssm.errors import UserError
from vision_ssm.files import to_disk

_STATE = Path("training") / "state.pt"


def new_run_dir(run_dir: str | Path) -> Path:
    """Create the folder of a new run: ``run_dir``, or run_dir2, run_dir3 ... if it is taken.

    Raises:
        UserError: the folder cannot be created.
    """
    base = Path(run_dir)
    number = 1
    while True:
        path = base if number == 1 else base.with_name(f"{base.name}{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            if path.is_dir() and not any(path.iterdir()):
                return path
            number += 1
        except OSError as error:
            raise UserError(f"cannot create the run folder {path}: {error}; choose another run_dir") from None
        else:
            return path


def last_run_dir(run_dir: str | Path) -> Path:
    """The newest of run_dir, run_dir2, run_dir3 ... that has a checkpoint to resume from.

    Raises:
        UserError: there is none.
    """
    base = Path(run_dir)
    pattern = re.compile(rf"{re.escape(base.name)}\d*")
    siblings = [path for path in base.parent.glob("*") if pattern.fullmatch(path.name)]
    states = [state for path in siblings if (state := _settle(path / "last") / _STATE).is_file()]
    if not states:
        raise UserError(f"nothing to resume: no run in {base} (or {base.name}2, ...) has saved a checkpoint yet")
    return max(states, key=lambda state: state.stat().st_mtime).parents[2]


def read_run_config(run_dir: str | Path) -> dict[str, Any]:
    """The ``config.json`` of the run's last checkpoint; its key ``train`` is the ``TrainConfig``.

    Raises:
        UserError: the folder holds no checkpoint to resume from, or a damaged one.
    """
    last = _settle(Path(run_dir) / "last")
    if not (last / _STATE).is_file():
        raise UserError(f"nothing to resume: {run_dir} has no last/{_STATE.as_posix()}; give the folder of a run")
    return read_config(last)


def save(folder: Path, weights: dict[str, Tensor], config: dict[str, Any], state: dict[str, Any] | None = None) -> None:
    """Write a checkpoint folder as a whole, so that whatever happens the old or the new one is there.

    Args:
        weights: For ``model.safetensors``.
        config: For ``config.json``.
        state: For ``training/state.pt``: what resuming needs beyond the weights; plain containers and tensors.

    Raises:
        UserError: it cannot be written, e.g. because the disk is full.
    """
    fresh = folder.with_name(folder.name + ".new")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        save_checkpoint(fresh, weights, config)
        if state is not None:
            (fresh / _STATE).parent.mkdir()
            torch.save(state, fresh / _STATE)
            to_disk(fresh / _STATE)
        _put_in_place(fresh, folder)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise UserError(f"cannot write the checkpoint {folder}: {error}; the one before it is kept") from error


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read weights and state of a folder written by ``save`` with a state.

    Raises:
        UserError: it is not there or damaged.
    """
    state_file = _settle(folder) / _STATE
    if not state_file.is_file():
        raise UserError(f"nothing to resume: {state_file} does not exist; give the folder of a run that has saved one")
    try:
        state = torch.load(state_file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{state_file} is damaged ({error}); start a new run from {folder} as weights") from error
    return load_checkpoint(folder)[0], state


def _old(folder: Path) -> Path:
    return folder.with_name(folder.name + ".old")


def _put_in_place(fresh: Path, folder: Path) -> None:
    old = _old(folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    fresh.rename(folder)
    to_disk(folder.parent)  # the old one may go only when the new name is sure to last
    shutil.rmtree(old, ignore_errors=True)


def _settle(folder: Path) -> Path:
    # killed between the two renames of _put_in_place: the old one is the last complete checkpoint
    old = _old(folder)
    if not folder.exists() and old.exists():
        old.rename(folder)
    return folder
