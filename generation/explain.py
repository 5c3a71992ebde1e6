"""What a generated patch was made from: maps at several steps of the denoising, and frames by frames of a video."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from generation.generator import load_generator
from generation.objectives import sample_generators
from generation.pipelines import VideoDiMPipeline
from generation.sample import class_numbers
from generation.sampling import denoise, set_steps
from vision_ssm.device import choose_device
from vision_ssm.errors import UserError
from vision_ssm.explain import Method
from vision_ssm.explain.maps import Heat, combine, make_maps
from vision_ssm.explain.page import Panel, point_of, write_page
from vision_ssm.explain.recording import Layer, Recording, record

READING = (
    "The patch in question is circled; bright places count most. Attribution: how much each place changed what the "
    "network predicts for the patch, through the scans. Raw and roll-out: what the scans read at the patch.",
    "Maps of early steps lie over the finished sample too: at that time the network saw mostly noise there.",
)


def run_explain(
    weights: Path,
    *,
    query: str,
    output: Path,
    name: str | None = None,
    frame: int = 0,
    frames: int | None = None,
    layer: str = "all",
    method: Method = "attribution",
    per_direction: bool = False,
    steps: int = 20,
    shown: int = 3,
    seed: int = 0,
    device: str = "auto",
) -> int:
    """Draw a sample and write maps of one patch; arguments as `vssm explain generate`.

    Raises:
        UserError: no such weights, class, pixel, frame or layer, or a number that does not fit.
    """
    if not 1 <= shown <= steps:
        raise UserError(f"shown must be 1 to the number of steps ({steps}), got {shown}")
    pipeline: Any = load_generator(weights)
    pipeline.to(choose_device(device))
    video, model = isinstance(pipeline, VideoDiMPipeline), pipeline.transformer
    height, width = pipeline.latent_size(None, None)
    if frames is not None and (not video or frames < 1):
        raise UserError(f"--frames is for videos and at least 1, got {frames}" + ("" if video else " for pictures"))
    length = (frames or model.config["sample_frames"]) if video else 1
    if not 0 <= frame < length:
        raise UserError(f"frame must be 0 to {length - 1}, got {frame}")
    factor, patch = pipeline.vae_scale_factor, model.config["patch"]
    x, y = point_of(query, height * factor, width * factor)
    rows, columns = height // patch, width // patch
    place = y // factor // patch * columns + x // factor // patch
    labels = class_numbers(pipeline, [] if name is None else [name], 1)
    numbers = None if labels is None else torch.tensor(labels, device=pipeline.device)
    wanted = {round(k) for k in np.linspace(0, steps - 1, shown)}
    step, maps, matrices = 0, [], []

    def explain(noisy: Tensor, t: Tensor) -> Tensor:
        """The prediction; on the way, maps of the steps that are wanted."""
        nonlocal step
        step += 1
        if step - 1 not in wanted:
            with torch.no_grad():
                return model(noisy, t, numbers).sample
        with torch.enable_grad(), record(model) as recording:
            prediction = model(noisy.detach().requires_grad_(), t, numbers).sample
        picture = prediction if not video else prediction[:, :, frame]
        top, left = place // columns * patch, place % columns * patch
        target = picture[0, :, top : top + patch, left : left + patch].square().sum()
        chosen = recording.select(layer)
        extra = 0 if model.token_positions is None else len(model.token_positions)

        def seen_from(at: Layer) -> list[int]:
            return [frame * (at.places // length) + extra + place]

        found = make_maps(chosen, method, target=target, query=seen_from, per_direction=per_direction)
        for title, heats in found:
            maps.append((f"step {step} of {steps}, {title}", _by_frame(heats, length, extra, (rows, columns))))
        if video:
            matrices.append((f"step {step} of {steps}, frames by frames", _frames_by_frames(chosen, length)))
        return prediction.detach()

    timesteps = set_steps(pipeline.scheduler, steps, pipeline.device)
    shape = (1, model.config["in_channels"], *((length,) if video else ()), height, width)
    generators = sample_generators([seed])
    noise = torch.randn(shape, generator=generators[0]).to(pipeline.device)
    sample = denoise(pipeline.scheduler, noise, timesteps, explain, generator=generators)
    pictures = _pictures(pipeline, sample)
    panels = []
    for title, heat in maps:
        for number in _loudest(heat, frame):
            spot = (x, y) if number == frame else None
            of_frame = f", frame {number}" if video else ""
            panels.append(Panel(title + of_frame, heat[number].numpy(), pictures[number], point=spot))
    panels += [
        Panel(title, matrix.numpy(), axes=("frame that is read", "frame that reads"))
        for title, matrix in matrices
        if matrix is not None
    ]
    what = f"{x}, {y}" + (f" in frame {frame}" if video else "")
    facts = {"weights": weights, "patch at": what, "class": name or "the first", "seed": seed, "steps": steps,
             "method": method, "layers": layer}  # fmt: skip
    write_page(output, f"What the patch at {what} was made from", panels, facts=facts, reading=READING)
    return 0


def _by_frame(heats: list[Heat], frames: int, extra: int, grid: tuple[int, int]) -> Tensor:
    """(F, rows, columns) of heats over F x (extra tokens + places)."""
    whole = torch.stack([heat.values.view(frames, -1)[:, extra:] for heat in heats]).sum(0)
    return combine([Heat(heats[0].layers, whole, None)], grid, grid=grid)


def _loudest(heat: Tensor, frame: int, most: int = 3) -> list[int]:
    """The frame in question and the others with the largest sums, in order."""
    order = heat.sum((1, 2)).argsort(descending=True).tolist()
    return sorted([frame, *[k for k in order if k != frame][: most - 1]])


def _frames_by_frames(recording: Recording, frames: int) -> Tensor | None:
    """(F, F): mean over places, channels and layers along time of |M|; None without such layers."""
    total = torch.zeros(frames, frames)
    with torch.no_grad():
        for layer in recording.layers:
            for _, _, part in layer.directions():
                if part.value.shape[1] != frames:
                    continue
                for _, block in part.blocks():
                    total += block.abs().float().sum((0, 1)).cpu() / (part.heads * len(part.value))
    return total if total.any() else None


def _pictures(pipeline: Any, sample: Tensor) -> np.ndarray:
    """(F, H, W, 3) uint8 of a sample."""
    flat = sample if sample.ndim == 4 else sample[0].transpose(0, 1)
    with torch.no_grad():
        pixels = (pipeline.decode(flat) / 2 + 0.5).clamp(0, 1).cpu()
    return (pixels.expand(-1, 3, -1, -1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
