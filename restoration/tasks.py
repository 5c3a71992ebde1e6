"""The tasks of restoration: what each does, how its input is made, which shipped weights do it. Imports no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vision_ssm.config import near_match
from vision_ssm.errors import UserError

SHIPPED = Path(__file__).resolve().parent / "weights"


@dataclass(frozen=True)
class Task:
    """One thing that a restorer can be trained for."""

    name: str
    what: str
    """One line for people."""
    degradation: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of the operator that makes its input, as ``degradation_for(name, parameters)`` takes them; a pair
    of numbers is a range drawn from anew for every image."""
    scale: int = 1
    """The result is so many times larger than the input file."""
    in_channels: int = 3
    """Channels that the network reads: RGB, and a mask (1.0 where pixels are known) where there are four."""

    @property
    def recipe(self) -> str:
        """Name of the shipped configuration that trains it."""
        return f"restoration/{self.name}"


_ALL = (
    Task("denoise", "remove Gaussian noise of any strength up to 50 of 255", {"sigma": (0.0, 50.0)}),
    Task("deblur", "undo a Gaussian blur", {"sigma": 3.0, "kernel": 61, "noise": 0.05}),
    Task("motion", "undo the blur of a moving camera", {"intensity": 0.5, "kernel": 61, "noise": 0.05}),
    Task("sr2", "enlarge 2 times", {"scale": 2}, scale=2),
    Task("sr4", "enlarge 4 times", {"scale": 4}, scale=4),
    Task("sr8", "enlarge 8 times", {"scale": 8}, scale=8),
    Task("jpeg", "remove the blocks of strong JPEG compression", {"quality": (10, 40)}),
    Task("inpaint", "fill in what a mask marks as missing", {"mask": "box", "size": 128}, in_channels=4),
)
TASKS: dict[str, Task] = {task.name: task for task in _ALL}


def find_task(name: str) -> Task:
    """The task of that name.

    Raises:
        UserError: There is none; lists those there are.
    """
    if name not in TASKS:
        raise UserError(f"no task {name!r}; there are {', '.join(TASKS)}{near_match(name, TASKS)}")
    return TASKS[name]


def shipped_weights() -> dict[str, str]:
    """The weights that come with the package: name -> task."""
    return {file.parent.name: _task_in(file) for file in sorted(SHIPPED.glob("*/config.json"))}


def weights_for(name: str) -> list[str]:
    """Names of the shipped weights for a task, at least one.

    Raises:
        UserError: No such task, or no weights for it; says which exist and which command trains one.
    """
    task = find_task(name)
    shipped = shipped_weights()
    found = [weights for weights, its_task in shipped.items() if its_task == name]
    if not found:
        exist = ", ".join(f"{weights} ({its_task})" for weights, its_task in shipped.items()) or "none"
        raise UserError(
            f"no weights for the task {name!r} ({task.what}) come with the package; shipped are: {exist}. Train them "
            f"by `vssm restore train --config {task.recipe}`, then give the folder by --weights"
        )
    return found


def _task_in(config: Path) -> str:
    return str(json.loads(config.read_text(encoding="utf-8"))["task"])
