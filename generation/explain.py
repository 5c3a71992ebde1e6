"""What a generated patch was made from: maps at several steps of the denoising, and frames by frames of a video."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from generation.dim import DiM, DiMBlock
from generation.generator import load_generator, streams
from generation.layouts import turned
from generation.objectives import sample_generators
from generation.pipelines import VideoDiMPipeline
from generation.sample import class_numbers
from generation.sampling import denoise, set_steps
from generation.streaming import VideoStream
from vision_ssm.device import choose_device
from vision_ssm.errors import UserError
from vision_ssm.explain.maps import Heat, combine, make_maps
from vision_ssm.explain.options import GenerateOptions
from vision_ssm.explain.page import Panel, point_of, write_page
from vision_ssm.explain.recording import Layer, Recording, record

READING = (
    "The patch in question is circled; bright places count most. Attribution: how much each place changed what the "
    "network predicts for the patch, through the scans. Raw and roll-out: what the scans read at the patch.",
    "Maps of early steps lie over the finished sample too: at that time the network saw mostly noise there.",
)


def run_explain(options: GenerateOptions) -> int:
    """Draw a sample and write maps of one patch.

    Raises:
        UserError: no such weights, class, pixel, frame or layer, or a number that does not fit.
    """
    pipeline: Any = load_generator(options.weights)
    pipeline.to(choose_device(options.device))
    explainer = Explainer(pipeline, options)
    panels = explainer.panels(_pictures(pipeline, explainer.sample()))
    what = f"{explainer.x}, {explainer.y}" + (f" in frame {options.frame}" if explainer.video else "")
    facts = {"weights": options.weights, "patch at": what, "class": options.name or "the first", "seed": options.seed,
             "steps": options.steps, "method": options.method, "layers": options.layer}  # fmt: skip
    write_page(options.output, f"What the patch at {what} was made from", panels, facts=facts, reading=READING)
    return 0


class Explainer:
    """Draws a sample; on the way it makes maps of the patch in question, at the steps that are wanted."""

    def __init__(self, pipeline: Any, options: GenerateOptions) -> None:
        self.pipeline, self.model, self.options = pipeline, pipeline.transformer, options
        self.video = isinstance(pipeline, VideoDiMPipeline)
        self.size = height, width = pipeline.latent_size(None, None)
        self.length = self._length()
        factor, self.patch = pipeline.vae_scale_factor, self.model.config["patch"]
        self.x, self.y = point_of(options.query, height * factor, width * factor)
        self.grid = height // self.patch, width // self.patch
        self.row, self.column = (p // factor // self.patch for p in (self.y, self.x))
        labels = class_numbers(pipeline, [] if options.name is None else [options.name], 1)
        self.labels = None if labels is None else torch.tensor(labels, device=pipeline.device)
        self.extra = 0 if self.model.token_positions is None else len(self.model.token_positions)
        self.wanted = {1 + round(k) for k in np.linspace(0, options.steps - 1, options.shown)}
        self.step = 0
        self.maps: list[tuple[str, Tensor]] = []
        self.matrices: list[tuple[str, Tensor]] = []

    def sample(self) -> Tensor:
        """(1, C, H, W) or (1, C, F, H, W) latent sample; of a model that streams, up to the frame in question."""
        if streams(self.pipeline):
            return _WatchedStream(self).up_to(self.options.frame)
        pipeline, generators = self.pipeline, sample_generators([self.options.seed])
        timesteps = set_steps(pipeline.scheduler, self.options.steps, pipeline.device)
        frames = (self.length,) if self.video else ()
        shape = (1, self.model.config["in_channels"], *frames, *self.size)
        noise = torch.randn(shape, generator=generators[0]).to(pipeline.device)
        return denoise(pipeline.scheduler, noise, timesteps, self.predict, generator=generators)

    def panels(self, pictures: np.ndarray) -> list[Panel]:
        """Maps over the frames (F, H, W, 3) that count most, then matrices."""
        panels = []
        for title, heat in self.maps:
            for number in _loudest(heat, self.options.frame):
                spot = (self.x, self.y) if number == self.options.frame else None
                of_frame = f", frame {number}" if self.video else ""
                panels.append(Panel(title + of_frame, heat[number].numpy(), pictures[number], point=spot))
        axes = ("frame that is read", "frame that reads")
        return panels + [Panel(title, matrix.numpy(), axes=axes) for title, matrix in self.matrices]

    def _length(self) -> int:
        frames, frame = self.options.frames, self.options.frame
        if frames is not None and (not self.video or frames < 1):
            kind = "" if self.video else " for pictures"
            raise UserError(f"--frames is for videos and at least 1, got {frames}{kind}")
        length = (frames or self.model.config["sample_frames"]) if self.video else 1
        if not 0 <= frame < length:
            raise UserError(f"frame must be 0 to {length - 1}, got {frame}")
        return frame + 1 if streams(self.pipeline) else length

    def predict(self, noisy: Tensor, t: Tensor) -> Tensor:
        """What the model predicts, explained at the steps that are wanted."""
        self.step += 1
        if self.step not in self.wanted:
            with torch.no_grad():
                return self.model(noisy, t, self.labels).sample
        with torch.enable_grad():
            with record(self.model) as recording:
                prediction = self.model(noisy.detach().requires_grad_(), t, self.labels).sample
            in_order(recording, self.model, self.length, self.grid)
            self._explain(recording.select(self.options.layer), prediction)
        return prediction.detach()

    def _explain(self, chosen: Recording, prediction: Tensor) -> None:
        options, when = self.options, f"step {self.step} of {self.options.steps}"
        picture = prediction[:, :, options.frame] if self.video else prediction
        top, left = self.row * self.patch, self.column * self.patch
        target = picture[0, :, top : top + self.patch, left : left + self.patch].square().sum()
        place = self.extra + self.row * self.grid[1] + self.column

        def seen_from(at: Layer) -> list[int]:
            return [options.frame * (at.places // self.length) + place]

        found = make_maps(chosen, options.method, target=target, query=seen_from, per_direction=options.per_direction)
        self.maps += [
            (f"{when}, {title}", _by_frame(heats, self.length, self.extra, self.grid)) for title, heats in found
        ]
        matrix = _frames_by_frames(chosen, self.model, self.length) if self.video else None
        if matrix is not None:
            self.matrices.append((f"{when}, frames by frames", matrix))


class _WatchedStream(VideoStream):
    """A stream of one video that lets the steps of a frame be explained, as part of the frames up to it."""

    def __init__(self, explainer: Explainer) -> None:
        options = explainer.options
        super().__init__(
            explainer.pipeline, seeds=[options.seed], class_labels=explainer.labels, num_inference_steps=options.steps
        )
        self.explainer = explainer
        self.finished: list[Tensor] = []

    def up_to(self, frame: int) -> Tensor:
        """(1, C, frame + 1, H, W) latents."""
        for _ in range(frame + 1):
            next(self)
        return torch.cat(self.finished, dim=2)

    def _predict(self, x: Tensor, timestep: Tensor) -> Tensor:
        if len(self.finished) < self.explainer.options.frame:
            return super()._predict(x, timestep)
        levels = torch.zeros(1, len(self.finished) + 1, device=x.device)  # finished frames are without noise
        levels[:, -1] = timestep
        return self.explainer.predict(torch.cat([*self.finished, x], dim=2), levels)[:, :, -1:]

    def _read(self, latents: Tensor) -> None:
        self.finished.append(latents)
        super()._read(latents)


def in_order(recording: Recording, model: DiM, frames: int, grid: tuple[int, int]) -> None:
    """Let all layers name their positions frame by frame and row by row.

    Some were given them in another order: those that read columns, and those along time whose mixers bring the axis
    that they read to the front.

    Args:
        recording: Of the model; changed in place.
        model: Whose layers they are.
        frames: Of the sample.
        grid: Rows and columns of its places.
    """
    for layer in recording.layers:
        block, places = _block(model, layer), torch.arange(layer.places, device=layer.mixings[0].output.device)
        if block.letter == "c":
            order = turned(places.view(1, frames, -1, 1), *grid)
        elif block.letter == "t" and not block.mixer.recurrent:
            order = places.view(frames, -1).T
        else:
            continue
        layer.mixings = [replace(mixing, order=order.flatten()) for mixing in layer.mixings]


def _block(model: DiM, layer: Layer) -> DiMBlock:
    blocks: Any = model.blocks
    return blocks[int(layer.name.split(".")[1])]


def _by_frame(heats: list[Heat], frames: int, extra: int, grid: tuple[int, int]) -> Tensor:
    """(F, rows, columns) of heats over F x (extra tokens + places)."""
    whole = torch.stack([heat.values.view(frames, -1)[:, extra:] for heat in heats]).sum(0)
    return combine([Heat(heats[0].layers, whole, None)], grid, grid=grid)


def _loudest(heat: Tensor, frame: int, most: int = 3) -> list[int]:
    """The frame in question and the others with the largest sums, in order."""
    order = heat.sum((1, 2)).argsort(descending=True).tolist()
    return sorted([frame, *[k for k in order if k != frame][: most - 1]])


def _frames_by_frames(recording: Recording, model: DiM, frames: int) -> Tensor | None:
    """(F, F): mean over places, channels and layers along time of |M|; None without such layers."""
    total = torch.zeros(frames, frames)
    with torch.no_grad():
        for layer in recording.layers:
            if _block(model, layer).letter != "t":
                continue
            for _, _, part in layer.directions():
                for _, block in part.blocks():
                    total += block.abs().float().sum((0, 1)).cpu() / (part.heads * len(part.value))
    return total if total.any() else None


def _pictures(pipeline: Any, sample: Tensor) -> np.ndarray:
    """(F, H, W, 3) uint8 of a sample."""
    flat = sample if sample.ndim == 4 else sample[0].transpose(0, 1)
    with torch.no_grad():
        pixels = (pipeline.decode(flat) / 2 + 0.5).clamp(0, 1).cpu()
    return (pixels.expand(-1, 3, -1, -1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
