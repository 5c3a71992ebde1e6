"""Options of a training run. Imports no torch: the command line reads these classes for its flags."""

from dataclasses import dataclass, field
from typing import Literal

from vision_ssm.errors import UserError

WIDEST = 0.28
"""A power-function average cannot be much wider: 12 ** -0.5 is the mean of all steps."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser and its peak rates."""

    name: Literal["sgd", "adamw"] = "sgd"
    """sgd is with Nesterov momentum."""
    lr: float = 0.01
    """Learning rate at the end of the warm-up."""
    weight_decay: float = 5e-4
    """For all parameters but biases, norm weights and those marked ``_no_weight_decay``."""
    momentum: float = 0.937
    """Of sgd, after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of adamw."""

    def __post_init__(self) -> None:
        _require(self.name in ("sgd", "adamw"), "name", self.name, "sgd or adamw")
        _require(self.lr > 0, "lr", self.lr, "a positive number")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        _require(0 <= self.momentum < 1, "momentum", self.momentum, "a number from 0 to below 1")
        _require(all(0 <= beta < 1 for beta in self.betas), "betas", self.betas, "two numbers from 0 to below 1")


@dataclass(frozen=True)
class ScheduleConfig:
    """The course of learning rate and momentum: a warm-up, then a decay to the last step."""

    kind: Literal["linear", "cosine", "constant"] = "linear"
    """How the rate falls from ``lr`` to ``lr * final_ratio``."""
    final_ratio: float = 0.01
    warmup_epochs: float = 3.0
    """The warm-up lasts this many epochs or ``warmup_min_batches`` batches, whichever is longer."""
    warmup_min_batches: int = 100
    warmup_bias_lr: float = 0.0
    """Rate at which the biases begin; all other parameters begin at 0. The YOLO recipe with sgd has 0.1."""
    warmup_momentum: float = 0.8
    """Momentum of sgd at the beginning."""

    def __post_init__(self) -> None:
        kinds = ("linear", "cosine", "constant")
        _require(self.kind in kinds, "kind", self.kind, ", ".join(kinds))
        _require(0 <= self.final_ratio <= 1, "final_ratio", self.final_ratio, "a number from 0 to 1")
        _require(self.warmup_epochs >= 0, "warmup_epochs", self.warmup_epochs, "0 or more")
        _require(self.warmup_min_batches >= 0, "warmup_min_batches", self.warmup_min_batches, "0 or more")
        _require(self.warmup_bias_lr >= 0, "warmup_bias_lr", self.warmup_bias_lr, "0 or more")
        _require(0 <= self.warmup_momentum < 1, "warmup_momentum", self.warmup_momentum, "a number from 0 to below 1")


@dataclass(frozen=True)
class EmaConfig:
    """Moving average of the weights, with decay ``decay * (1 - exp(-t / warmup_steps))`` at its update t."""

    decay: float = 0.9999
    warmup_steps: int = 2000
    power_widths: tuple[float, ...] = ()
    """Relative widths of power-function averages (Karras et al. 2024, section 3.1), such as [0.05, 0.1], that are kept
    besides, in ``averages/WIDTH`` of the run; 0.1 averages over about the last tenth of the run, however long it is."""

    def __post_init__(self) -> None:
        _require(0 <= self.decay < 1, "decay", self.decay, "a number from 0 to below 1")
        _require(self.warmup_steps > 0, "warmup_steps", self.warmup_steps, "a positive number")
        widths = self.power_widths
        sensible = all(0 < width < WIDEST for width in widths) and len(set(widths)) == len(widths)
        _require(sensible, "power_widths", widths, f"different numbers above 0 and below {WIDEST}")


@dataclass(frozen=True)
class TrainConfig:
    """Everything the loop needs to know; what is trained on what is the task's business."""

    run_dir: str = "runs/train"
    """Folder of the run; if it is taken, run_dir2, run_dir3 and so on."""
    epochs: int | None = None
    """Length of the run in passes over the data; give this or ``steps``."""
    steps: int | None = None
    """Length of the run in optimiser steps; give this or ``epochs``."""
    batch_size: int = 16
    """Samples in a batch, over all processes together."""
    nominal_batch: int | None = None
    """Samples per optimiser step: gradients of ``round(nominal_batch / batch_size)`` batches are gathered (one at
    least), and weight decay is scaled by the samples that are in a step / nominal_batch."""
    workers: int = 8
    """Processes that load data, for each training process; 0 loads in the training process itself."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the forward pass under autocast; weights, losses and optimiser stay float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    graph: bool = False
    """Capture the network's forward and backward passes as CUDA graphs, one for each size of a batch: small networks
    then wait no more for Python. For one process; on a CPU it changes nothing."""
    compile: bool = False
    """Compile the network's repeated blocks by torch.compile: seconds to minutes at the beginning, then fewer and
    larger kernels; goes with ``graph``. Best where all blocks have one shape (DiM, transformers)."""
    seed: int = 0
    clip: float | None = 10.0
    """Largest norm of the gradient; null for no clipping."""
    patience: int | None = 100
    """Stop when the best score is this many epochs old; null never stops early."""
    val_every: int = 1
    """Epochs between two evaluations; the last epoch is always evaluated."""
    save_every: int | None = None
    """Steps between two checkpoints within an epoch."""
    save_epochs: int = 1
    """Epochs between two checkpoints at the end of one: more where an epoch takes a second. Evaluated epochs, and
    one at which the run ends or is stopped, are saved in any case."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            given = (
                "neither" if self.epochs is None else f"epochs={self.epochs} and steps={self.steps}: set one to null"
            )
            raise UserError(f"give the length of the run either in epochs or in steps, got {given}")
        for name in (
            "epochs",
            "steps",
            "nominal_batch",
            "patience",
            "save_every",
            "save_epochs",
            "batch_size",
            "val_every",
        ):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "1 or more")
        _require(self.workers >= 0, "workers", self.workers, "0 or more")
        _require(self.seed >= 0, "seed", self.seed, "0 or more")
        _require(self.precision in ("fp32", "bf16"), "precision", self.precision, "fp32 or bf16")
        _require(self.device in ("auto", "cpu", "cuda"), "device", self.device, "auto, cpu or cuda")
        _require(self.clip is None or self.clip > 0, "clip", self.clip, "a positive number or null")

    @property
    def accumulate(self) -> int:
        """Batches whose gradients make one optimiser step."""
        return max(1, round(self.nominal_batch / self.batch_size)) if self.nominal_batch else 1

    @property
    def scaled_weight_decay(self) -> float:
        """Weight decay for the number of samples that a step really has (Mamba-YOLO recipe)."""
        if self.nominal_batch is None:
            return self.optim.weight_decay
        return self.optim.weight_decay * self.batch_size * self.accumulate / self.nominal_batch


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise UserError(f"{name} must be {allowed}, got {value!r}")
