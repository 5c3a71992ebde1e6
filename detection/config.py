"""Configuration of a detector: what `configs/detection/*.yaml` may say. Imports no torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from detection.data_config import DataConfig
from vision_ssm.classify.config import Statistics
from vision_ssm.errors import UserError
from vision_ssm.mixer_config import MapPattern, MixerName, MixerStack, ScanOptions
from vision_ssm.training.config import EmaConfig, OptimConfig, ScheduleConfig, TrainConfig

MOST_WIDTH = 4


def check_width(width: float | None) -> None:
    """Refuse a multiplier of widths that is not positive or far too large.

    Raises:
        UserError: It is; None is the size's own.
    """
    if width is not None and not 0 < width <= MOST_WIDTH:
        raise UserError(f"width must be above 0 and at most {MOST_WIDTH}, got {width}")


@dataclass(frozen=True)
class BackboneConfig:
    """A network of timm in place of Mamba-YOLO's backbone."""

    weights: str = ""
    """Checkpoint folder of `vssm classify train` or `vssm distill train`: the network and the weights to start with."""
    name: str = ""
    """timm's name of an untrained one, where there is no checkpoint."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of timm.create_model for `name`."""
    statistics: Statistics = "plain"
    """What its pixels are normalised by; a checkpoint says so itself."""

    def __post_init__(self) -> None:
        if self.weights and self.name:
            raise UserError("a backbone has weights, which bring their network, or a name (with options), not both")
        if not self.name and (self.options or self.statistics != "plain"):
            raise UserError("backbone options and statistics belong to a name of timm's; weights bring their own")


@dataclass(frozen=True)
class ModelConfig:
    """The network; `detection.model.MambaYOLO` explains the options."""

    size: Literal["t", "b", "l"] = "t"
    lsblock: bool = True
    """The local block before every scan (released code and first paper version: yes)."""
    stage_repeats: tuple[int, int, int, int] = (3, 3, 9, 3)
    """Blocks per backbone stage before depth scaling (released code 3,3,9,3; second paper version 3,6,6,3)."""
    width: float | None = None
    """Multiplier of all widths, instead of the size's 0.25, 0.5 or 0.75."""
    init: Literal["official", "vmamba"] = "official"
    """Initial values of the scans: as the released code, or as Mamba and VMamba."""
    mixer: MixerName = "s6"
    """What mixes the pixels: s6 and ssd scan in four directions, nc_ssd has no order, s4d scans rows and columns,
    attention costs the square of the number of pixels, gated_conv is the control without a scan."""
    mixer_pattern: MapPattern = "same"
    """Where attention stands in the backbone: alternating in each stage, or last_half_attention of the last two."""
    polar: tuple[int, int] = (0, 0)
    """States of decay 1 and of decay 0 beside the learned ones, such as [1, 1] (of s6 and ssd; s4d has [1, 0])."""
    smr: int = 0
    """Taps of the memory that is replayed into a scan's input; 0 for none. Experimental."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """Another backbone than Mamba-YOLO's."""

    def __post_init__(self) -> None:
        check_width(self.width)
        MixerStack(
            self.mixer, self.mixer_pattern, ScanOptions(self.polar, self.smr), maps=True
        )  # refuses what cannot be


def _recipe() -> TrainConfig:
    """The released recipe for one GPU (Mamba-YOLO code: SGD, nominal batch 64, clip 10, EMA)."""
    return TrainConfig(
        run_dir="runs/detect",
        epochs=300,
        batch_size=16,
        nominal_batch=64,
        precision="bf16",
        optim=OptimConfig(name="sgd", lr=0.01, momentum=0.937, weight_decay=5e-4),
        schedule=ScheduleConfig(kind="linear", final_ratio=0.01, warmup_bias_lr=0.1),
        ema=EmaConfig(),
    )


@dataclass(frozen=True)
class DetectConfig:
    """A detection run: network, data, training."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=_recipe)
    weights: Path | None = None
    """Start from these weights (a checkpoint folder, also of a mamba_yolo_* classifier, .safetensors or foreign .pt):
    taken by name and shape."""
    freeze: Literal["none", "backbone", "all_but_head"] = "none"
    """Part of the network that keeps the values it starts with, for fine-tuning on few pictures; needs weights."""

    def __post_init__(self) -> None:
        if self.freeze != "none" and self.weights is None:
            raise UserError(
                f"freeze {self.freeze} without weights would keep random values that nothing ever trains: name the "
                "weights to start from (--weights), or leave --freeze out"
            )
