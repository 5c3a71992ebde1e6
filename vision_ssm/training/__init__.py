"""The one training loop of the suite; see ``loop.py`` for the loop and ``task.py`` for what a task provides."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vision_ssm.training.batches import SampleKey
    from vision_ssm.training.config import EmaConfig, OptimConfig, ScheduleConfig, TrainConfig
    from vision_ssm.training.loop import TrainResult, train
    from vision_ssm.training.runs import last_run_dir, new_run_dir, read_run_config
    from vision_ssm.training.task import RunInfo, Task

_MODULE_OF = {
    "SampleKey": "batches",
    "EmaConfig": "config",
    "OptimConfig": "config",
    "ScheduleConfig": "config",
    "TrainConfig": "config",
    "TrainResult": "loop",
    "train": "loop",
    "last_run_dir": "runs",
    "new_run_dir": "runs",
    "read_run_config": "runs",
    "RunInfo": "task",
    "Task": "task",
}

__all__ = [
    "EmaConfig",
    "OptimConfig",
    "RunInfo",
    "SampleKey",
    "ScheduleConfig",
    "Task",
    "TrainConfig",
    "TrainResult",
    "last_run_dir",
    "new_run_dir",
    "read_run_config",
    "train",
]


def __getattr__(name: str) -> Any:
    # late, because config.py is read by the command line, which must start without importing torch
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
