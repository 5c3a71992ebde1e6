"""Training a generator: what generation adds to the shared loop."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from generation.config import GenerateConfig, GenerateDataConfig
from generation.data import PerturbedSamples, Samples, to_pixels, to_unit
from generation.dim import DiM
from generation.generator import build_pipeline, draw, load_generator
from generation.objectives import STEPS, Objective
from generation.outputs import picture_grid
from generation.sources import find_source
from vision_ssm.checkpoint import load_checkpoint, load_matching
from vision_ssm.config import from_dict, to_dict
from vision_ssm.errors import UserError
from vision_ssm.training import RunInfo, Task, last_run_dir, read_run_config, train
from vision_ssm.training.environment import is_main_process
from vision_ssm.viz import save_picture

# Shapes: B batch, F frames.

_STREAMED = 0.75
"""Share of the batches of a per-frame objective in which every frame follows a past without noise levels, as in a
stream; in the others frames see one another's noise, as where a clip is drawn at once. With `data.past.bodies` all of
them, as the frames are no clip."""
_PARTS = 3
"""Rows and columns of points of a past frame that move by themselves, and what is between them with them."""


class GenerateTask(Task):
    """DiM on pictures or clips; the best checkpoint is the one of lowest held-out loss."""

    primary = "loss"
    higher_is_better = False

    def __init__(self, config: GenerateConfig, *, resumed: bool = False) -> None:
        self.settings, self.resumed = config, resumed
        self.streams = False  # whether the network that was built learns frames after their past
        source = find_source(config.data, "train")
        self.samples = (PerturbedSamples if config.data.past.bodies else Samples)(source, config.data)
        self.classes = list(source.classes) if self.samples.labelled else []
        held_out = Samples(find_source(config.data, "val", self.classes or None), config.data, augment=False)
        self.held_out = held_out.held_out(config.watch.held_out)
        self.objective = Objective(
            config.objective.kind,
            config.objective.schedule,
            config.objective.shift,
            config.objective.min_snr_gamma,
            config.objective.sampler_shift,
            clip_sample=config.data.vae is None,
        )
        self.arguments = self._arguments(tuple(self.held_out[0].shape[1:]))
        if is_main_process():
            kind = "clips" if config.data.frames else "pictures"
            print(
                f"{len(self.samples)} {kind} to train on, {len(held_out)} held out (loss on {len(self.held_out[0])}), "
                f"{len(self.classes) or 'no'} classes",
                flush=True,
            )

    def config(self) -> dict[str, Any]:
        """What builds the model and its pipeline again, and the run's settings."""
        settings = to_dict(self.settings)
        settings.pop("train")  # the loop adds it
        return {
            "task": "generate",
            "model": self.arguments,
            "objective": asdict(self.objective),
            "classes": self.classes,
            "video": bool(self.settings.data.frames),
            "vae": settings["data"]["vae"],
            "settings": settings,
        }

    def build(self) -> nn.Module:
        """The network, with the weights it starts from (a resumed run has its own)."""
        model = DiM(**self.arguments)
        self.streams = self.settings.objective.per_frame and model.can_stream
        past = self.settings.data.past
        if (past.moves or past.bodies) and not self.streams:
            raise UserError(
                "data.past.moves and data.past.bodies are for models that stream: set model.causal and "
                "objective.per_frame to true and take scans along time, or leave them 0"
            )
        if self.settings.model.recompute:
            model.enable_gradient_checkpointing()
        if self.settings.weights is not None and not self.resumed:
            report = load_matching(model, load_checkpoint(self.settings.weights)[0])
            if is_main_process():
                print(f"starting from {self.settings.weights}\n{report}")
        return model

    def train_data(self) -> Dataset:
        """Augmented pictures or clips."""
        return self.samples

    def loss(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """Weighted squared error of the prediction."""
        samples, labels, *past = batch
        x0 = to_unit(samples)
        shape = (len(x0), x0.shape[2]) if self.settings.objective.per_frame else (len(x0),)
        given = {"class_labels": labels if self.classes else None}
        if self.streams and (torch.rand(()) < _STREAMED or past):
            given["past"] = self._past(to_unit(past[0]) if past else x0)
        t = self.objective.sample_timesteps(shape, device=x0.device)
        noisy, target, weight = self.objective.add_noise(x0, t, torch.randn_like(x0))
        prediction = model(noisy, t, **given, return_dict=False)[0]
        return {"loss": (weight * (prediction.float() - target).square()).mean()}

    def evaluate(self, model: nn.Module, run: RunInfo) -> dict[str, float]:
        """Held-out loss over all noise levels and in each bin of them; saves sample pictures."""
        bins = held_out_losses(
            model, self.held_out, self.objective, bins=self.settings.watch.bins, classes=self.classes,
            streamed=self.streams,
        )  # fmt: skip
        self._save_samples(model, run)
        return {"loss": sum(bins.values()) / len(bins), **bins}

    def first_batch(self, batch: Any, run_dir: Path) -> None:
        """Save the first batch as a picture, of clips some frames side by side."""
        if self.settings.data.vae is None:
            save_picture(run_dir / "first_batch.png", picture_grid(_frames_first(to_pixels(to_unit(batch[0][:16])))))

    def _past(self, frames: Tensor) -> Tensor:
        """What a stream has drawn before: frames (B, C, F, H, W) with its small errors."""
        errors, rows, device = self.settings.data.past, (len(frames), 1, 1, 1, 1), frames.device
        noise = errors.noise * torch.rand(rows, device=device) * torch.randint(2, rows, device=device)
        drawn = frames + noise * torch.randn_like(frames)
        if not errors.moves:
            return drawn
        points = torch.randn(len(frames), 2 * frames.shape[2], _PARTS, _PARTS, device=device)
        moves = F.interpolate(points, frames.shape[-2:], mode="bilinear", align_corners=True).unflatten(1, (2, 1, -1))
        slopes = torch.stack(torch.gradient(frames, dim=(-2, -1)), dim=1)  # (B, 2, C, F, H, W)
        return drawn - errors.moves * torch.rand(rows, device=device) * (moves * slopes).sum(dim=1)  # to first order

    def _arguments(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """Arguments of the network for samples (C, ...)."""
        model, data = self.settings.model, self.settings.data
        return {
            "size": model.size,
            "patch": model.patch,
            "in_channels": shape[0],
            "sample_size": shape[-1] if shape[-1] == shape[-2] else list(shape[-2:]),
            "sample_frames": data.frames or 1,
            "num_classes": len(self.classes) or None,
            "mixer": model.mixer,
            "mixer_pattern": model.mixer_pattern,
            "polar": list(model.polar),
            "smr": model.smr,
            "conditioning": model.conditioning,
            "layout": model.layout or ("sst" if data.frames else "s"),
            "causal": model.causal,
            "objective": self.settings.objective.kind,
            "label_dropout": model.label_dropout,
            "width": model.width,
            "depth": model.depth,
            "state_size": model.state_size,
        }

    def _save_samples(self, model: nn.Module, run: RunInfo) -> None:
        """A grid in samples/ and in TensorBoard, always of the same seeds and classes."""
        from torch.utils.tensorboard import SummaryWriter

        watch = self.settings.watch
        pipeline = build_pipeline(model, self.config())  # type: ignore[arg-type]
        if pipeline.vae is not None:
            pipeline.vae.to(run.device)
        labels = [i % len(self.classes) for i in range(watch.samples)] if self.classes else None
        seeds = list(range(watch.samples))
        picture = picture_grid(draw(pipeline, labels, seeds, steps=watch.steps, guidance=watch.guidance))
        save_picture(run.run_dir / "samples" / f"step_{run.step:06d}.png", picture)
        with SummaryWriter(str(run.run_dir / "tensorboard"), filename_suffix=".samples") as board:
            board.add_image("samples", picture, run.step, dataformats="HWC")


@torch.no_grad()
def held_out_losses(
    model: nn.Module,
    held_out: tuple[Tensor, Tensor],
    objective: Objective,
    *,
    bins: int,
    classes: Any,
    streamed: bool = False,
    batch_size: int = 64,
) -> dict[str, float]:
    """Squared error on held-out samples in equal bins of the noise levels.

    Noise and levels are the same at every call, so that two models or two times are compared in pairs.

    Args:
        model: in eval mode.
        held_out: (n, C, ...) samples and (n,) classes.
        objective: what the model predicts.
        bins: number of bins.
        classes: whether (if not empty) classes are given to the model.
        streamed: every frame follows the real ones before it.
        batch_size: samples that go through the network together.

    Returns:
        "loss t 0-125" and so on -> mean squared error.
    """
    samples, labels = held_out
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    found: dict[str, float] = {}
    for number in range(bins):
        low, high = STEPS * number / bins, STEPS * (number + 1) / bins
        total = 0.0
        for part, given in zip(samples.split(batch_size), labels.split(batch_size), strict=True):
            x0 = to_unit(part)
            t = low + (high - low) * torch.rand(len(x0), generator=generator)
            t = t if objective.kind == "flow" else t.long().clamp_max(STEPS - 1)
            noise = torch.randn(x0.shape, generator=generator)
            noisy, target, _ = objective.add_noise(x0, t, noise)
            shared = {"class_labels": given.to(device) if classes else None, "return_dict": False}
            if streamed:
                shared["past"] = x0.to(device)
            prediction = model(noisy.to(device), t.to(device), **shared)[0]
            total += float((prediction.float().cpu() - target).square().mean()) * len(x0)
        found[f"loss t {low:.0f}-{high:.0f}"] = total / len(samples)
    return found


def run_train(config: GenerateConfig, *, resume: Path | None = None) -> int:
    """Train as the configuration says, or go on with the run in the folder `resume`; save the best as a pipeline.

    Raises:
        UserError: bad data, weights or settings, or nothing to resume.
        SystemExit: stopped by Ctrl-C (130) or SIGTERM (143); the state is saved.
    """
    if resume is not None:
        config, resume = resumed_config(resume, data=config.data)
    result = train(GenerateTask(config, resumed=resume is not None), config.train, resume=resume)
    if is_main_process() and result.best is not None:
        load_generator(result.best).save_pretrained(result.run_dir / "pipeline")
        print(f"{result.run_dir} is done; best: held-out loss {result.metrics['loss']:.4f} in {result.best}")
    return 0


def resumed_config(run: Path, *, data: GenerateDataConfig) -> tuple[GenerateConfig, Path]:
    """Settings of a run that is to go on, and its folder: `run` itself, or the newest of run, run2, ...

    Raises:
        UserError: nothing to resume there.
    """
    folder = last_run_dir(run)
    saved = read_run_config(folder)
    if saved.get("task") != "generate":
        raise UserError(f"{folder} is no run of `vssm generate train`: so says its last/config.json")
    config = from_dict(GenerateConfig, {**saved["settings"], "train": saved["train"]}, str(folder / "last"))
    moved = replace(config.data, train=data.train or config.data.train, val=data.val or config.data.val)
    return replace(config, data=moved), folder


def _frames_first(samples: Tensor) -> Tensor:
    """(n, C, F, H, W) -> (n, F, C, H, W); pictures as they are."""
    return samples.transpose(1, 2) if samples.ndim == 5 else samples
