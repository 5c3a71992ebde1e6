"""Configuration of a generator's training: what `configs/generation/*.yaml` may say. Imports no torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vision_ssm.errors import UserError
from vision_ssm.mixer_config import MixerName, MixerPattern, MixerStack, ScanOptions
from vision_ssm.training.config import EmaConfig, OptimConfig, ScheduleConfig, TrainConfig

SYNTHETIC = "synthetic"
"""In place of a folder: the built-in moving shapes."""


@dataclass(frozen=True)
class ModelConfig:
    """The network; `generation.DiM` explains the variants."""

    size: Literal["tiny", "mini", "S", "B", "L", "XL"] = "mini"
    width: int | None = None
    """Instead of the size's."""
    depth: int | None = None
    """Instead of the size's."""
    patch: int = 2
    mixer: MixerName = "s6"
    """What lets tokens see one another: the scans s6, ssd and s4d, nc_ssd without an order, attention, or gated_conv,
    the control without a scan."""
    mixer_pattern: MixerPattern = "same"
    """Where attention stands among the layers: alternating, last_half_attention, or first_scan_without_positions."""
    polar: tuple[int, int] = (0, 0)
    """States of decay 1 and of decay 0 beside the learned ones, such as [1, 1] (of s6 and ssd; s4d has [1, 0])."""
    smr: int = 0
    """Taps of the memory that is replayed into a scan's input; 0 for none. Experimental."""
    conditioning: Literal["adaln_zero", "adaln_single", "token"] = "adaln_zero"
    layout: str = ""
    """Letters s (scan over the tokens of a frame row by row), c (column by column), t (over the frames at a place), j
    (over all), repeated over the depth; by default "s" for pictures and "sst" for videos."""
    causal: bool = False
    """Scans over frames go forward only: what `VideoStream` needs."""
    state_size: int | None = None
    label_dropout: float = 0.1
    """Share of the training samples whose class is hidden, for guidance."""
    recompute: bool = False
    """Keep no activations inside of blocks: less memory, about a third more time."""

    def __post_init__(self) -> None:
        MixerStack(self.mixer, self.mixer_pattern, ScanOptions(self.polar, self.smr))  # may refuse them


@dataclass(frozen=True)
class PastConfig:
    """Errors of the past that each frame is learned after, such as a stream's own frames will have.

    How large they are is drawn for each clip, evenly from 0 to the number here.
    """

    noise: float = 0.1
    """Standard deviation of noise in half of the clips; frames reach from -1 to 1."""
    moves: float = 0.0
    """Standard deviation, in pixels and each way, of how far each of 3 x 3 points of a frame is moved, and with them
    what is between; at most 0.3. A motion that is read from two frames keeps their errors; if each frame is a little
    off, it is read from many."""
    bodies: float = 0.0
    """Standard deviation, in pixels, of errors in x, y and radius of every body in every frame; at most 0.5. The next
    frame goes on from there, with the clip's own velocity and size, which can be read from many frames only. For
    moving shapes; all batches have such pasts then."""

    def __post_init__(self) -> None:
        for name, most in (("noise", 1.0), ("moves", 0.3), ("bodies", 0.5)):
            if not 0 <= getattr(self, name) <= most:
                raise UserError(f"data.past.{name} must be 0 to {most:g}, got {getattr(self, name)}")


@dataclass(frozen=True)
class GenerateDataConfig:
    """What to train on, and what the held-out loss is measured on."""

    train: str = ""
    """Folder of pictures (with a folder per class, idx files, or no classes), of videos (a folder per class, UCF-101,
    MineRL or no classes), of .tar shards; an .npy or .npz file; or "synthetic" for moving shapes."""
    val: str = ""
    """The same, held out; by default the val (or test) split of `train`, or new synthetic clips."""
    side: int = 32
    """Side of the square pictures or frames: their middle, resized."""
    channels: Literal[1, 3] = 3
    frames: int = 0
    """Length of the clips; 0 for pictures."""
    stride: int = 1
    """Every so many-th frame of a video is taken."""
    labels: bool = True
    """Whether classes, where there are some, are a condition."""
    augment: Literal["turns", "mirror", "none"] = "mirror"
    """turns: all 8 ways in which a square can lie (views from above); mirror: left and right."""
    clips: int = 20_000
    """Synthetic clips in an epoch."""
    split_number: Literal[1, 2, 3] = 1
    """Which of UCF-101's official splits."""
    cache_gib: float = 4.0
    """Decoded pictures and videos stay in memory if they take no more than this."""
    vae: Path | None = None
    """Folder of a diffusers AutoencoderKL: `train` is an .npz of latents that `vssm generate encode` made with it."""
    past: PastConfig = field(default_factory=PastConfig)
    """Of models that stream."""

    def __post_init__(self) -> None:
        for name, least in (("side", 8), ("frames", 0), ("stride", 1), ("clips", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be {least} or more, got {getattr(self, name)}")
        if self.train == SYNTHETIC and (self.frames < 2 or self.side < 16 or self.channels != 3):
            raise UserError(
                "synthetic moving shapes are clips of 2 frames or more, 16 pixels or more, 3 channels; got frames "
                f"{self.frames}, side {self.side}, channels {self.channels}"
            )
        if self.past.bodies and self.train and self.train != SYNTHETIC:
            raise UserError(
                f"data.past.bodies moves bodies that are known, as of moving shapes (data.train {SYNTHETIC}); leave "
                f"it 0 for {self.train}"
            )


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the network learns to predict, and how noise is mixed in (`generation.objectives`)."""

    kind: Literal["flow", "eps", "x0", "v"] = "flow"
    schedule: Literal["cosine", "linear"] = "cosine"
    """Of eps, x0 and v."""
    shift: float = 1.0
    """Of flow: above 1 moves noise levels up, for large pictures."""
    sampler_shift: float | None = None
    """The same where samples are drawn; by default as in training."""
    min_snr_gamma: float = 5.0
    """Limit of the loss weights of eps, x0 and v."""
    per_frame: bool = False
    """Every frame of a clip has its own noise level: what `VideoStream` needs."""


@dataclass(frozen=True)
class WatchConfig:
    """What is done at every evaluation: the held-out loss per timestep bin, and sample pictures."""

    samples: int = 20
    """Pictures or clips that are drawn with the averaged weights."""
    steps: int = 25
    guidance: float = 1.5
    """For networks with classes; 1 is none."""
    held_out: int = 256
    """Held-out pictures or clips for the loss."""
    bins: int = 8
    """Equal parts of the noise levels."""

    def __post_init__(self) -> None:
        for name in ("samples", "steps", "held_out", "bins"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be 1 or more, got {getattr(self, name)}")


def _recipe() -> TrainConfig:
    """Ours: AdamW, constant rate after the warm-up, EMA 0.9999, bf16 with the scan in float32."""
    return TrainConfig(
        run_dir="runs/generate",
        steps=50_000,
        batch_size=64,
        precision="bf16",
        clip=1.0,
        patience=None,
        val_every=5,
        optim=OptimConfig(name="adamw", lr=1e-4, weight_decay=0.0, betas=(0.9, 0.99)),
        schedule=ScheduleConfig(kind="constant", warmup_epochs=0, warmup_min_batches=1_000),
        ema=EmaConfig(decay=0.9999, warmup_steps=2_000),
    )


@dataclass(frozen=True)
class GenerateConfig:
    """A generator's run: network, data, objective, what to watch, training."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: GenerateDataConfig = field(default_factory=GenerateDataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    train: TrainConfig = field(default_factory=_recipe)
    weights: Path | None = None
    """Start from these weights (a run's checkpoint folder or file): taken by name and shape, so that a model of
    pictures goes on as one of videos."""

    def __post_init__(self) -> None:
        if self.objective.per_frame and not self.data.frames:
            raise UserError("objective.per_frame gives every frame its own noise level: it needs data.frames")
        if self.model.causal and self.data.frames and not self.objective.per_frame:
            raise UserError(
                "a causal model draws frame after frame, and learns that with objective.per_frame true only"
            )
