"""Options of `vssm probe`: the flags of each verb, their help and what carries them out. Imports no torch."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vision_ssm.errors import UserError
from vision_ssm.mixer_config import ScanOptions

if TYPE_CHECKING:
    from vision_ssm.probe.stack import StackConfig

Pool = Literal["last", "mean"]
Task = Literal["linreg", "parity", "mqar", "retrieval"]
HIDDEN = 2
"""Signs whose product is the answer of parity."""
LEAST_PATHS = 1000


@dataclass(frozen=True, kw_only=True)
class StackOptions:
    """Of every probe: which stacks of mixers, and where the results go.

    A stack is written as a name (s6, ssd, nc_ssd, s4d, attention, gated_conv), which is taken for every layer, or layer
    by layer, s6+attention.
    """

    stacks: list[str] = field(kw_only=False)
    """Mixers to measure, such as s6 ssd s6+attention."""
    output: Path = Path("runs/probe")
    """Folder for the results."""
    layers: int = 2
    """Of a stack that is written as one name."""
    dim: int = 32
    """Width."""
    state_size: int | None = None
    """States of a scan; 16 for s6 and s4d, 64 for ssd and nc_ssd if not given."""
    polar: list[int] = field(default_factory=lambda: [0, 0])
    """Channels of a scan's state that never forget, and that hold the present input alone, such as 1 1."""
    smr: int = 0
    """Taps of the memory that is replayed into a scan's input, 0 for none."""
    causal: bool = True
    """Tokens see those before them only; --no-causal scans both ways."""

    def build(self) -> "list[StackConfig]":
        """The stacks that are named.

        Raises:
            UserError: An unknown mixer, or sizes and options that cannot be.
        """
        return self.of_depth(self.layers)

    def of_depth(self, layers: int) -> "list[StackConfig]":
        """The stacks that are named, with so many layers where one name is given."""
        from vision_ssm.probe.stack import StackConfig

        scan = ScanOptions(self.polar, self.smr)
        shared: dict[str, Any] = dict(dim=self.dim, state_size=self.state_size, causal=self.causal, options=scan)
        return [StackConfig.of(name, layers, **shared) for name in self.stacks]

    def settings(self, stacks: "list[StackConfig]") -> dict[str, Any]:
        """What is kept beside the results: the options of this probe alone, and each stack in full."""
        shared = {option.name for option in fields(StackOptions)}
        own = {name: value for name, value in vars(self).items() if name not in shared}
        return own | {"stacks": [vars(stack) for stack in stacks]}

    def at_least(self, least: int, *names: str) -> None:
        """Refuse options with smaller values."""
        for name in names:
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class RecencyOptions(StackOptions):
    """Of `vssm probe recency`."""

    pool: Pool = "last"
    """What the classifier reads: its last token, or the mean of all."""
    length: int = 256
    """Tokens of the sequences on which influence is measured."""
    steps: int = 400
    """Training steps of the digits classifier; 0 leaves out the corruption test."""
    seed: int = 0
    """Of weights and data."""

    def __post_init__(self) -> None:
        self.at_least(8, "length")
        self.at_least(0, "steps")


@dataclass(frozen=True, kw_only=True)
class SmoothOptions(StackOptions):
    """Of `vssm probe smooth`."""

    layers: int = 8
    causal: bool = False
    steps: int = 0
    """Training steps on digits before measuring; 0 for random weights."""
    seed: int = 0
    """Of weights and data."""

    def __post_init__(self) -> None:
        self.at_least(0, "steps")


@dataclass(frozen=True, kw_only=True)
class ExpressivityOptions(StackOptions):
    """Of `vssm probe expressivity`."""

    layers: list[int] = field(default_factory=lambda: [1, 2])  # pyright: ignore[reportIncompatibleVariableOverride]
    """Depths of a stack that is written as one name, each a row."""
    dim: int = 64
    causal: bool = field(default=True, init=False)
    references: bool = True
    """Begin with the random layers of the theory."""
    paths: int = 8000
    """Random paths; the last quarter is scored."""
    seed: int = 0
    """Of weights and paths."""

    def __post_init__(self) -> None:
        if self.paths < LEAST_PATHS:
            raise UserError(f"paths must be at least {LEAST_PATHS}, or the fit says nothing, got {self.paths}")

    def build(self) -> "list[StackConfig]":
        """The stacks at every depth, none twice."""
        return list(dict.fromkeys(stack for layers in self.layers for stack in self.of_depth(layers)))


@dataclass(frozen=True, kw_only=True)
class ICLOptions(StackOptions):
    """Of `vssm probe icl`."""

    task: Task
    """linreg (y = w x), parity (product of 2 hidden signs), mqar (recall of several keys' symbols) or retrieval (the
    vector that belongs to the nearest key)."""
    dim: int = 64
    causal: bool = field(default=True, init=False)
    dims: int = 5
    """Numbers in an x, a key or a value; parity needs at least 3."""
    points: int = 16
    """Examples or pairs in a sequence."""
    vocabulary: int = 256
    """Symbols of mqar, half of them keys."""
    steps: int = 2000
    """Training steps; every batch is new."""
    batch_size: int = 32
    """Sequences in a step."""
    lr: float = 2e-3
    """Peak learning rate."""
    seed: int = 0
    """Of weights and data."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def __post_init__(self) -> None:
        self.at_least(1, "points", "steps", "batch_size")
        if self.lr <= 0:
            raise UserError(f"lr must be above 0, got {self.lr}")
        least = HIDDEN + 1 if self.task == "parity" else 1
        if self.dims < least:
            raise UserError(f"dims must be at least {least} for {self.task}, got {self.dims}")
        if self.task == "mqar" and self.vocabulary < 2 * self.points:
            raise UserError(f"mqar needs a key of its own for each of {self.points} pairs: a vocabulary of at least "
                            f"{2 * self.points}, got {self.vocabulary}")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(StackOptions):
    """Of `vssm probe sampling`."""

    steps: int = 400
    """Training steps."""
    seeds: int = 3
    """Trainings of each stack; the table has mean and spread."""

    def __post_init__(self) -> None:
        self.at_least(1, "steps", "seeds")
