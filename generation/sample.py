"""`vssm generate sample`: pictures, clips and streams from trained weights, and a file that says how."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from generation.generator import Pipeline, draw, load_generator, streams, weights_hash
from generation.objectives import STEPS
from generation.outputs import check_format, save_samples, write_facts
from generation.pipelines import VideoDiMPipeline
from vision_ssm.device import choose_device, free_memory, size_text
from vision_ssm.errors import UserError
from vision_ssm.files import check_writable

CHANNELS = 3
"""Of a picture, at most."""
SLOWEST, FASTEST = 0.01, 1000
"""Frames per second that every format of a film can say."""


def run_sample(
    weights: Path,
    *,
    output: Path,
    classes: Sequence[str] = (),
    count: int = 16,
    seed: int = 0,
    steps: int = 50,
    guidance: float = 1.0,
    scheduler: str | None = None,
    frames: int | None = None,
    first_steps: int | None = None,
    fps: float = 8.0,
    batch_size: int = 64,
    device: str = "auto",
) -> int:
    """Draw samples, write them, and beside them NAME.json with what it takes to draw them again.

    Args:
        weights: checkpoint folder or file of a run, or a pipeline's folder.
        output: file; its ending chooses the format.
        classes: names or numbers, taken in turn; by default all that there are.
        count: number of samples.
        seed: sample i has the seed `seed` + i, and depends on nothing else.
        steps: of the sampler.
        guidance: above 1 stresses the class.
        scheduler: by default the weights' own.
        frames: of clips.
        first_steps: of a causal model's first two frames, by default `steps`.
        fps: of films.
        batch_size: samples that go through the network together.
        device: auto, cpu or cuda.

    Raises:
        UserError: weights, class, format, sampler or number that does not fit.
    """
    for name, value in (("count", count), ("steps", steps), ("batch_size", batch_size)):
        if value <= 0:
            raise UserError(f"{name} must be above 0, got {value}")
    if not SLOWEST <= fps <= FASTEST:
        raise UserError(f"fps must be {SLOWEST} to {FASTEST}, got {fps}")
    pipeline = load_generator(weights, scheduler=scheduler)
    check_format(output, video=isinstance(pipeline, VideoDiMPipeline))
    check_request(pipeline, weights, count=count, frames=frames, first_steps=first_steps)
    check_writable(output.parent)
    labels = class_numbers(pipeline, classes, count)
    pipeline.to(choose_device(device))
    seeds = list(range(seed, seed + count))
    samples = draw(
        pipeline, labels, seeds, steps=steps, first_steps=first_steps, guidance=guidance, frames=frames,
        batch_size=batch_size, progress=True,
    )  # fmt: skip
    save_samples(output, samples, labels, fps=fps)
    facts = {
        "weights": str(weights),
        "weights_sha256": weights_hash(weights),
        "model": plain_config(pipeline.transformer.config),
        "scheduler": type(pipeline.scheduler).__name__,
        "steps": steps,
        "guidance": guidance,
        "seeds": seeds,
        "labels": labels,
        "frames": frames,
        "stream": streams(pipeline),
        "first_steps": first_steps,
        "shape": list(samples.shape),
    }
    facts_file = write_facts(output, facts)
    print(f"{count} samples in {output}; how they were made in {facts_file}")
    return 0


def check_request(
    pipeline: Pipeline, weights: str | Path, *, count: int, frames: int | None, first_steps: int | None
) -> None:
    """Refuse samples that these weights cannot draw, or that do not fit into memory together.

    Raises:
        UserError: frames of pictures, less than one frame, a first frame where none is drawn first, or too many
            samples.
    """
    video = isinstance(pipeline, VideoDiMPipeline)
    if frames is not None and not video:
        raise UserError(f"{weights} makes pictures; --frames is for videos")
    if frames is not None and frames < 1:
        raise UserError(f"frames must be 1 or more, got {frames}")
    if first_steps is not None and not streams(pipeline):
        what = "draws all frames at once" if video else "makes pictures"
        raise UserError(f"{weights} {what}; --first-steps is for causal models of videos")
    if first_steps is not None and not 1 <= first_steps <= STEPS:
        raise UserError(f"first_steps must be 1 to {STEPS}, got {first_steps}")
    length = (frames or pipeline.transformer.config["sample_frames"]) if video else 1
    size = count * length * CHANNELS * math.prod(pipeline.latent_size(None, None)) * pipeline.vae_scale_factor**2
    if size > (free := free_memory(torch.device("cpu"))):
        raise UserError(
            f"{count} samples take {size_text(size)} of memory, {size_text(free)} are free: draw fewer at a time, the "
            "others with another --seed"
        )


def class_numbers(pipeline: Pipeline, classes: Sequence[str], count: int) -> list[int] | None:
    """Classes of `count` samples, those given in turn; None for a model without classes.

    Raises:
        UserError: the model has no such class.
    """
    number = pipeline.transformer.config.num_classes  # type: ignore[union-attr]
    if number is None:
        if classes:
            raise UserError(f"these weights were trained without classes; leave {', '.join(classes)} away")
        return None
    wanted = [int(name) if name.isdecimal() and int(name) < number else name for name in classes] or list(range(number))
    ids = pipeline.get_label_ids(wanted)
    assert ids is not None
    chosen = ids.tolist()
    return [chosen[i % len(chosen)] for i in range(count)]


def plain_config(config: Any) -> dict[str, Any]:
    """A model's arguments without diffusers' private entries."""
    return {name: value for name, value in dict(config).items() if not name.startswith("_")}
