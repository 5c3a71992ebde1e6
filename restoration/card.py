"""What is known about the weights of a restorer, kept beside them. Imports no torch."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from restoration.tasks import find_task
from vision_ssm.errors import UserError

UNKNOWN = "not recorded"


@dataclass(frozen=True, kw_only=True)
class WeightsCard:
    """The network, what it was trained for and on what.

    ``degradation`` are the parameters of the operator that made its training inputs, as ``degradation_for(task,
    parameters)`` takes them; empty where they are not known or the training pairs were real.
    """

    model: Mapping[str, Any]
    """``name`` (serpent, mambair, mambair-unet) and the arguments that build it."""
    task: str
    degradation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scale: int = 1
    """The result is so many times larger than the input file."""
    trained_on: str = UNKNOWN
    licence: str = UNKNOWN
    """Licence of the weights, with what the training data asks for."""
    steps: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        task = find_task(self.task)
        if self.scale != task.scale:
            raise UserError(f"the task {self.task!r} enlarges {task.scale} times, the weights' card says {self.scale}")
        if not isinstance(self.model, Mapping) or not isinstance(self.model.get("name"), str):
            raise UserError("the weights' card lacks the name of the network (`model: {name: ...}`)")

    def to_dict(self) -> dict[str, Any]:
        """JSON values, as `from_dict` takes them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "WeightsCard":
        """Read what `to_dict` gave; keys that belong to others are left out.

        Raises:
            UserError: `model` or `task` are missing, or do not fit.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        missing = [name for name in ("model", "task") if name not in values]
        if missing:
            raise UserError(f"config.json lacks {' and '.join(missing)}; is this a checkpoint of `vssm restore`?")
        return cls(**{name: value for name, value in values.items() if name in known})
