"""Configuration of a distillation: what its YAML may say. Imports no torch."""

from dataclasses import dataclass, field
from typing import Any, Literal

from vision_ssm.classify.config import ClassifyDataConfig
from vision_ssm.errors import UserError
from vision_ssm.training.config import EmaConfig, OptimConfig, ScheduleConfig, TrainConfig

StudentName = Literal["ssd", "nc_ssd", "s6", "ssd_causal"]
STAGES = 3


@dataclass(frozen=True)
class TeacherConfig:
    """The network to learn from, one of timm's vision transformers with a head for the classes of the data."""

    weights: str = ""
    """Checkpoint folder of `vssm classify train`; or, with `name`, a file of weights."""
    name: str = ""
    """timm's name, where `weights` is no checkpoint folder; without `weights`, timm's pretrained ones, which takes a
    network connection."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of timm.create_model for `name`."""

    def __post_init__(self) -> None:
        if self.options and not self.name:
            raise UserError("options belong to a name of timm's; a checkpoint folder brings its own")


@dataclass(frozen=True)
class StudentConfig:
    """What takes the place of attention."""

    mixer: StudentName = "nc_ssd"
    """nc_ssd has no order, as attention has none; ssd and s6 read both ways; ssd_causal, a control, reads one way."""
    state_size: int = 16
    """States of each head."""

    def __post_init__(self) -> None:
        if not 1 <= self.state_size <= 256:
            raise UserError(f"state_size must be 1 to 256, got {self.state_size}")


def _recipe() -> TrainConfig:
    """AdamW with the betas of the authors' configurations."""
    return TrainConfig(
        run_dir="runs/distill",
        steps=10_000,
        batch_size=64,
        workers=4,
        clip=1.0,
        patience=None,
        optim=OptimConfig(name="adamw", lr=1e-3, weight_decay=0.0, betas=(0.9, 0.95)),
        schedule=ScheduleConfig(kind="cosine", final_ratio=0.1, warmup_epochs=0, warmup_min_batches=50),
        ema=EmaConfig(decay=0.99, warmup_steps=50),
    )


@dataclass(frozen=True)
class DistillConfig:
    """A distillation: teacher, student, data, stages."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    data: ClassifyDataConfig = field(default_factory=ClassifyDataConfig)
    shares: tuple[float, float, float] = (0.2, 0.3, 0.5)
    """Parts of `train.steps` for the stages: matrices, hidden states, end to end. 0 leaves a stage out."""
    rates: tuple[float, float, float] = (1.0, 1.0, 0.5)
    """Learning rate of each stage as a multiple of `train.optim.lr`."""
    train: TrainConfig = field(default_factory=_recipe)
    """Of all stages together; each has a folder of its own in `run_dir`."""

    def __post_init__(self) -> None:
        if self.train.steps is None:
            raise UserError("the length of a distillation is given in train.steps, not in epochs")
        if min(self.shares) < 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise UserError(f"shares must be {STAGES} numbers from 0 that add up to 1, got {list(self.shares)}")
        if min(self.rates) <= 0:
            raise UserError(f"rates must be {STAGES} positive numbers, got {list(self.rates)}")

    def steps(self, stage: int) -> int:
        """Steps of a stage, 1 to 3."""
        return round((self.train.steps or 0) * self.shares[stage - 1])
