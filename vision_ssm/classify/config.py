"""Configuration of a classifier's training: what `configs/classify/*.yaml` may say. Imports no torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vision_ssm.errors import UserError
from vision_ssm.training.config import EmaConfig, OptimConfig, ScheduleConfig, TrainConfig

Statistics = Literal["plain", "imagenet"]


@dataclass(frozen=True)
class NetworkConfig:
    """The network."""

    name: str = "resnet10t"
    """Any of timm's names (`timm.list_models()`), or ours: vssm_vim_*, vssm_vmamba_*, mamba_yolo_*."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of timm.create_model for it, such as {"drop_rate": 0.1} or {"channels": [32, 48, 64, 96]}."""


@dataclass(frozen=True)
class ClassifyDataConfig:
    """Pictures to train on and to be scored on."""

    train: str = ""
    """Folder with a folder per class, with splits (train, val) of such, or with idx files."""
    val: str = ""
    """The same for scoring; by default the val (or test) split of `train`."""
    side: int = 64
    """Side of the squares that the network sees: the middle of each picture, resized."""
    augment: Literal["turns", "mirror", "none"] = "mirror"
    """turns: all 8 ways in which a square can lie (views from above); mirror: left and right."""
    shift: float = 0.1
    """Largest random shift, as a share of the side; what leaves the picture is reflected."""
    color: float = 0.2
    """Strength of random brightness and contrast."""
    statistics: Statistics = "plain"
    """Mean and deviation that pixels are normalised by; imagenet: those that published weights expect."""

    def __post_init__(self) -> None:
        if self.side < 8:
            raise UserError(f"side must be 8 or more, got {self.side}")
        for name in ("shift", "color"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be a number from 0 to below 1, got {getattr(self, name)}")


def _recipe() -> TrainConfig:
    """AdamW 1e-3, cosine to 0, EMA 0.999."""
    return TrainConfig(
        run_dir="runs/classify",
        epochs=60,
        batch_size=64,
        workers=4,
        clip=1.0,
        patience=None,
        optim=OptimConfig(name="adamw", lr=1e-3, weight_decay=0.05),
        schedule=ScheduleConfig(kind="cosine", final_ratio=0.0, warmup_epochs=2, warmup_min_batches=0),
        ema=EmaConfig(decay=0.999, warmup_steps=200),
    )


@dataclass(frozen=True)
class ClassifyConfig:
    """A classifier's run: network, data, training."""

    network: NetworkConfig = field(default_factory=NetworkConfig)
    data: ClassifyDataConfig = field(default_factory=ClassifyDataConfig)
    label_smoothing: float = 0.1
    train: TrainConfig = field(default_factory=_recipe)
    weights: Path | None = None
    """Start from these weights (a checkpoint folder or file): taken by name and shape."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing must be a number from 0 to below 1, got {self.label_smoothing}")
