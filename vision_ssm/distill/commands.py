"""`vssm distill VERB`: each function is a verb, its signature the flags, its docstring the help. Imports no torch."""

from collections.abc import Callable
from pathlib import Path

from vision_ssm.distill.config import DistillConfig


def train(config: DistillConfig, *, resume: Path | None = None) -> int:
    """Make a state-space network of a trained vision transformer, in three stages.

    Args:
        resume: Folder of a distillation to go on with; its own settings count.
    """
    from vision_ssm.distill.train import run_distill

    run_distill(config, resume=resume)
    return 0


def digits(output: Path = Path("runs/distill-digits"), *, steps: int = 90) -> int:
    """Distil a small teacher of scikit-learn's digits into every kind of student and print how well each does.

    Args:
        output: Folder to write, new or empty.
        steps: Of each student, all stages together, and of each network that is trained from scratch.
    """
    from vision_ssm.distill.digits import run_digits

    return run_digits(output, steps)


COMMANDS: dict[str, Callable[..., int]] = {"train": train, "digits": digits}
