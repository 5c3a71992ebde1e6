"""Configuration of a restorer's training: what `configs/restoration/*.yaml` may say. Imports no torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from restoration.tasks import find_task
from vision_ssm.errors import UserError
from vision_ssm.mixer_config import MapPattern, MixerName, MixerStack, ScanOptions
from vision_ssm.training.config import EmaConfig, OptimConfig, ScheduleConfig, TrainConfig

Cache = Literal["auto", "ram", "none"]
MOST_DETAIL = 64
"""Blocks of convolutions on either side: far more than help, few enough to be built."""
Folders = str | tuple[str, ...]


@dataclass(frozen=True)
class ModelConfig:
    """The network; `restoration.model.Serpent` explains the variants."""

    variant: Literal["fast", "small", "base", "base-p4", "large", "full-res"] = "base"
    width: int | None = None
    """Channels of the finest level instead of the variant's."""
    depths: tuple[int, ...] | None = None
    """Blocks per level instead of the variant's."""
    detail: int = 0
    """Blocks of convolutions at full resolution on both sides of the scans; 0 for none."""
    mixer: MixerName = "s6"
    """What mixes the pixels: s6 and ssd scan in four directions, nc_ssd has no order, s4d scans rows and columns,
    attention costs the square of the number of pixels, gated_conv is the control without a scan."""
    mixer_pattern: MapPattern = "same"
    """Where attention stands among the blocks of a level: alternating, or last_half_attention at the two coarsest."""
    polar: tuple[int, int] = (0, 0)
    """States of decay 1 and of decay 0 beside the learned ones, such as [1, 1] (of s6 and ssd; s4d has [1, 0])."""
    smr: int = 0
    """Taps of the memory that is replayed into a scan's input; 0 for none. Experimental."""
    recompute: bool = False
    """Keep no activations inside of blocks: less memory, about a third more time."""

    def __post_init__(self) -> None:
        if not 0 <= self.detail <= MOST_DETAIL:
            raise UserError(f"detail must be 0 to {MOST_DETAIL} blocks, got {self.detail}")
        MixerStack(
            self.mixer, self.mixer_pattern, ScanOptions(self.polar, self.smr), maps=True
        )  # refuses what cannot be


@dataclass(frozen=True)
class RestoreDataConfig:
    """Pictures to train on and to be scored on: clean ones, which are degraded on the fly, or pairs."""

    train: Folders = ""
    """Folder, or a list of folders, of clean pictures or of pairs (GoPro, SIDD, DIV2K with its LR folders, or twin
    folders such as input/ and target/); nested to any depth."""
    val: Folders = ""
    """The same for scoring; where it is the folder of `train`, that must have splits (train, val or test)."""
    crops: tuple[tuple[int, float], ...] = ((256, 1.0),)
    """Side of the training crops in pixels of the target, each with its share of the run, in order."""
    epoch_samples: int = 32_000
    """Crops in an epoch, at least one of each picture; an epoch ends with scoring and a checkpoint."""
    cache: Cache = "auto"
    """Whether decoded pictures stay in memory; auto: if they take at most half of what is free."""
    flips: bool = True
    """Mirror and turn by 90 degrees at random."""
    shrink: float = 1.0
    """Clean pictures are made smaller by a random factor from this to 1 before they are cropped: more and sharper
    detail than few or soft pictures have. 1 leaves them as they are; pairs always stay as they are."""
    val_side: int | None = 512
    """Largest side of the middle part of a picture that is scored during training; null for whole pictures."""
    val_pictures: int | None = 100
    """Pictures that are scored during training, evenly spaced in the set; null for all."""
    about: str = ""
    """Name of the data, for the card of the weights; by default the names of the folders."""
    licence: str = "not recorded"
    """What the data asks of weights that are trained on it, for their card."""

    def __post_init__(self) -> None:
        shares = [share for _, share in self.crops]
        if not self.crops or min(side for side, _ in self.crops) < 1 or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
            raise UserError(f"crops must be [side, share] pairs with shares that add up to 1, got {self.crops}")
        if not 0 < self.shrink <= 1:
            raise UserError(f"shrink must be above 0 and at most 1, got {self.shrink}")
        for name in ("epoch_samples", "val_side", "val_pictures"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be 1 or more, got {value}")

    def crop_at(self, done: float) -> int:
        """Side of the crops when the share ``done`` (0 to 1) of the run is over."""
        for side, share in self.crops:
            done -= share
            if done < -1e-9:
                return side
        return self.crops[-1][0]


@dataclass(frozen=True)
class LossConfig:
    """What is minimised."""

    name: Literal["l1", "charbonnier"] = "l1"
    frequency: float = 0.0
    """Weight of the L1 distance of the Fourier transforms."""

    def __post_init__(self) -> None:
        if self.frequency < 0:
            raise UserError(f"frequency must be 0 or more, got {self.frequency}")


def _recipe() -> TrainConfig:
    """Ours: AdamW 3e-4, cosine to 1e-6, EMA 0.999, bf16 with the scan in float32."""
    return TrainConfig(
        run_dir="runs/restore",
        steps=100_000,
        batch_size=32,
        precision="bf16",
        clip=1.0,
        patience=None,
        optim=OptimConfig(name="adamw", lr=3e-4, weight_decay=1e-4, betas=(0.9, 0.99)),
        schedule=ScheduleConfig(kind="cosine", final_ratio=1 / 300, warmup_epochs=0, warmup_min_batches=2_000),
        ema=EmaConfig(decay=0.999, warmup_steps=500),
    )


@dataclass(frozen=True)
class RestoreConfig:
    """A restoration run: task, network, data, loss, training."""

    task: str = "denoise"
    """denoise, deblur, motion, sr2, sr4, sr8, jpeg or inpaint."""
    degradation: dict[str, Any] = field(default_factory=dict)
    """Parameters of the operator that makes the inputs where they differ from the task's (`restoration.degrade`);
    `kind` takes another operator. Of no use with pairs."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: RestoreDataConfig = field(default_factory=RestoreDataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=_recipe)
    weights: Path | None = None
    """Start from these weights (a checkpoint folder, .safetensors or shipped name): taken by name and shape."""

    def __post_init__(self) -> None:
        find_task(self.task)
