"""Videos without end, and long videos in pieces: what a scan has read is a state of fixed size, which goes on.

``VideoStream`` makes frame after frame with a causal model trained on a noise level per frame (Diffusion Forcing,
2407.01392): every denoising step of a frame starts from the state of the finished frames, and when the frame is done,
one pass over it at the clean level moves the state on. ``forward_chunked`` computes a given video in pieces, layer by
layer, with the result of the whole, also for layers that read both ways.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from generation.dim import DiM, DiMBlock
from generation.layouts import TEMPORAL
from generation.objectives import STEPS, check_scheduler
from generation.pipelines import Labels, VideoDiMPipeline
from generation.sampling import Guidance, check_guidance, denoise, set_steps
from generation.stream_graphs import StreamGraphs
from vision_ssm.directions import ScanState
from vision_ssm.errors import UserError
from vision_ssm.files import replacing

# Shapes: B videos, F frames, C channels, H/W height and width; R = B, or 2 B rows with guidance (without class last).

FORMAT = 1
DECIDING = 2
"""First frames of a stream: one decides what is to be seen, the next how it moves, and chance decides both."""
_MARK = "vssm_video_stream"


class VideoStream:
    """Draws videos frame by frame for as long as asked, with constant memory and time per frame.

    Iterate over it, or call ``next``: each frame is (B, C, H, W) in [0, 1]. The noise of a frame depends on its
    video's seed and its number only, so a stream does not depend on the others beside it, and one that was saved and
    loaded again goes on exactly as it would have.

    Args:
        pipeline: Around a causal model; its scheduler is used.
        seeds: One per video.
        class_labels: One per video, numbers or names, or None.
        num_inference_steps: Steps per frame.
        first_steps: Of the first ``DECIDING`` ones; None for as many. What follows is nearly known, and few steps draw
            it best (docs/generation.md).
        guidance_scale: Above 1 the class is stressed; the model then runs on twice the rows.
        guidance_interval: Noise levels from 0 to 1 between which it is.
        height: In pixels; None for the model's own.
        width: As ``height``.
        graph: On a GPU, capture the network's passes as CUDA graphs: small networks draw many times as fast. Hooks in
            the network are not called then.

    Raises:
        UserError: The model is not causal, or something does not fit it.
    """

    def __init__(
        self,
        pipeline: VideoDiMPipeline,
        *,
        seeds: Sequence[int] = (0,),
        class_labels: Labels = None,
        num_inference_steps: int = 25,
        first_steps: int | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        height: int | None = None,
        width: int | None = None,
        graph: bool = True,
    ) -> None:
        self.pipeline = pipeline
        self.model: DiM = pipeline.transformer
        self.model.require_causal()
        check_scheduler(self.model.config["objective"], pipeline.scheduler)
        self.seeds = [int(seed) for seed in seeds]
        self.labels = pipeline.get_label_ids(class_labels)
        self.guidance = Guidance(guidance_scale, guidance_interval)
        check_guidance(self.guidance, self.labels)
        if first_steps is not None and not 1 <= first_steps <= STEPS:
            raise UserError(f"first_steps must be 1 to {STEPS}, got {first_steps}")
        if not self.seeds or min(self.seeds) < 0:
            raise UserError(f"seeds must be whole numbers from 0, one per video, got {self.seeds}")
        if self.labels is not None and len(self.labels) != len(self.seeds):
            raise UserError(f"{len(self.labels)} class_labels for {len(self.seeds)} seeds: give one of each per video")
        self.steps, self.first_steps = num_inference_steps, first_steps
        self.size = pipeline.latent_size(height, width)
        self.frame_index = 0
        """Number of the next frame."""
        self.graph = graph
        self._states: list[ScanState] | None = None  # R rows
        self._graphs: StreamGraphs | None = None

    def __iter__(self) -> Iterator[Tensor]:
        return self

    @torch.no_grad()
    def __next__(self) -> Tensor:
        """The next frame of every video: (B, C, H, W) in [0, 1]."""
        generators = [_frame_generator(seed, self.frame_index) for seed in self.seeds]
        shape = (1, self.model.config["in_channels"], 1, *self.size)
        noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
        device = self.pipeline._execution_device
        steps = self.steps if self.first_steps is None or self.frame_index >= DECIDING else self.first_steps
        timesteps = set_steps(self.pipeline.scheduler, steps, device)
        latents = denoise(
            self.pipeline.scheduler, noise.to(device), timesteps, self._predict, generator=generators
        )  # fmt: skip
        self._read(latents)
        return self._pixels(self.pipeline.decode(latents.squeeze(2)))

    @torch.no_grad()
    def push(self, frames: Tensor) -> None:
        """Let the videos go on from given frames, as if the stream had drawn them.

        Args:
            frames: (B, F, C, H, W) in [0, 1].

        Raises:
            UserError: Another number of videos, or another size.
        """
        if frames.ndim != 5 or len(frames) != len(self.seeds) or not frames.shape[1]:
            raise UserError(
                f"push takes frames ({len(self.seeds)} videos, frames, channels, height, width), "
                f"got {tuple(frames.shape)}"
            )
        pixels = 2 * frames.flatten(0, 1).to(self.pipeline._execution_device, torch.float32) - 1
        latents = self.pipeline.encode(pixels).unflatten(0, frames.shape[:2]).transpose(1, 2)
        expected = (self.model.config["in_channels"], *self.size)
        if (latents.shape[1], *latents.shape[3:]) != expected:
            raise UserError(f"frames of this stream are {expected} (channels, height, width), got {frames.shape[2:]}")
        for i in range(frames.shape[1]):
            self._read(latents[:, :, i : i + 1])

    def save(self, path: str | Path) -> None:
        """Write the stream to one ``.safetensors`` file; weights are not part of it.

        Raises:
            UserError: It cannot be written.
        """
        tensors = {
            f"{i}.{name}": tensor.detach().cpu().contiguous()
            for i, state in enumerate(self._states or ())
            for name, tensor in state._asdict().items()
            if tensor is not None
        }
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt", _MARK: json.dumps(self._card())})

    @classmethod
    def load(cls, path: str | Path, pipeline: VideoDiMPipeline, *, graph: bool = True) -> "VideoStream":
        """Go on with a stream that ``save`` wrote, around the same weights and scheduler; ``graph`` as for a new one.

        Raises:
            UserError: No such file, damaged, or of another model.
        """
        card, tensors = _read_file(Path(path))
        if card["model"] != _fingerprint(pipeline.transformer):
            raise UserError(f"{path} is a stream of another model: configuration or weights differ")
        scale = pipeline.vae_scale_factor
        stream = cls(
            pipeline,
            seeds=card["seeds"],
            class_labels=card["labels"],
            num_inference_steps=card["steps"],
            first_steps=card.get("first_steps"),
            guidance_scale=card["guidance_scale"],
            guidance_interval=card["guidance_interval"],
            height=card["size"][0] * scale,
            width=card["size"][1] * scale,
            graph=graph,
        )
        stream.frame_index = card["frame_index"]
        device = pipeline._execution_device
        parts: list[dict[str, Tensor]] = [{} for name in tensors if name.endswith(".scan")]
        for name, tensor in tensors.items():
            i, _, part = name.partition(".")
            parts[int(i)][part] = tensor.to(device)
        if stream.frame_index:
            stream._go_on_from([ScanState(**part) for part in parts])
        return stream

    @property
    def state_bytes(self) -> int:
        """What the stream remembers of all frames so far."""
        return sum(t.nbytes for state in self._states or () for t in state if t is not None)

    def _predict(self, x: Tensor, timestep: Tensor) -> Tensor:
        """Guided prediction for one frame (B, C, 1, H, W) that follows the finished ones."""

        def rows(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
            if self._graphs is not None:
                return self._graphs.predict(x.to(self.model.dtype), t, labels)
            states = self._states
            if states is not None and len(x) != self._rows:  # no guidance at this noise level: the first half is enough
                states = [state.rows(len(x)) for state in states]
            return self.model.advance(x.to(self.model.dtype), t, labels, states, last=True)[0]

        return self.guidance.predict(rows, x, timestep, self.labels, self.model.config["num_classes"])

    def _read(self, latents: Tensor) -> None:
        """Move the states past a finished frame (B, C, 1, H, W): one pass at the clean level."""
        labels, x = self.labels, latents.to(self.model.dtype)
        if self._rows > len(x) and labels is not None:
            labels = torch.cat([labels, torch.full_like(labels, self.model.config["num_classes"])])
            x = torch.cat([x, x])
        clean = torch.zeros((), device=x.device)
        if self._graphs is not None:
            self._graphs.read(x, clean, labels)
        else:
            self._go_on_from(self.model.advance(x, clean, labels, self._states)[1])
        self.frame_index += 1

    def _go_on_from(self, states: list[ScanState]) -> None:
        self._states = states
        if self.graph and self.pipeline._execution_device.type == "cuda":
            self._graphs = StreamGraphs(self.model, states)
            self._states = self._graphs.states

    @property
    def _rows(self) -> int:
        return len(self.seeds) * (2 if self.guidance.scale > 1 else 1)

    def _pixels(self, decoded: Tensor) -> Tensor:
        return (decoded.float() / 2 + 0.5).clamp(0, 1)

    def _card(self) -> dict[str, Any]:
        """Everything but the states that goes on."""
        return {
            "format": FORMAT,
            "model": _fingerprint(self.model),
            "frame_index": self.frame_index,
            "seeds": self.seeds,
            "labels": None if self.labels is None else self.labels.tolist(),
            "steps": self.steps,
            "first_steps": self.first_steps,
            "guidance_scale": self.guidance.scale,
            "guidance_interval": self.guidance.interval,
            "size": self.size,
        }


@torch.no_grad()
def forward_chunked(
    model: DiM,
    sample: Tensor,
    timestep: Tensor | float,
    class_labels: Tensor | None = None,
    *,
    frames_at_once: int,
) -> Tensor:
    """What ``model(sample, ...)`` gives, computed a few frames at a time, layer by layer.

    The tokens of all frames are kept; what a layer makes of them, several times as much, exists for a few frames only.
    A layer that reads both ways along time takes two passes: one from the end that keeps the backward states at the
    borders, one from the beginning that gives the result.

    Args:
        model: Causal or not.
        sample: (B, C, F, H, W).
        timestep: As in ``DiM.forward``.
        class_labels: As in ``DiM.forward``.
        frames_at_once: Length of a piece; the last one may be shorter.

    Returns:
        The prediction, shaped as ``sample``.

    Raises:
        UserError: Not a video, or no positive length.
    """
    if sample.ndim != 5 or frames_at_once < 1:
        raise UserError(
            f"forward_chunked takes a video (B, C, F, H, W) and frames_at_once of at least 1, "
            f"got {tuple(sample.shape)} and {frames_at_once}"
        )
    x, conditions = model.embed(sample, timestep, class_labels)
    locating, grid = model.locating_layer(sample), model.grid(sample)
    for i, block in enumerate(model.layers(sample)):
        if i == locating:
            x = model.locate_frames(x)
        x = _layer_in_pieces(block, x, conditions.layers, frames_at_once, grid)
    return model.unembed(x, conditions, sample)


def _layer_in_pieces(block: DiMBlock, x: Tensor, condition: Tensor, length: int, grid: tuple[int, int]) -> Tensor:
    pieces = x.split(length, dim=1)
    per_frame = condition.shape[1] == x.shape[1] > 1
    conditions = condition.split(length, dim=1) if per_frame else [condition] * len(pieces)
    if block.letter not in TEMPORAL:
        return torch.cat([block(piece, c, grid) for piece, c in zip(pieces, conditions, strict=True)], dim=1)
    after: list[ScanState | None] = [None] * len(pieces)  # backward states at the end of each piece
    for i in range(len(pieces) - 1, 0, -1):
        after[i - 1] = block.look_back(pieces[i], conditions[i], after[i])
    results, state = [], None
    for piece, c, end in zip(pieces, conditions, after, strict=True):
        y, state = block.advance(piece, c, state, end)
        results.append(y)
    return torch.cat(results, dim=1)


def _frame_generator(seed: int, frame: int) -> torch.Generator:
    """Source of noise of one frame of one video."""
    mixed = np.random.SeedSequence([seed, frame]).generate_state(1, np.uint64)[0]
    return torch.Generator("cpu").manual_seed(int(mixed >> np.uint64(1)))


def _fingerprint(model: DiM) -> str:
    """Changes when the configuration or the weights do, not with the folder that they came from."""
    arguments = {name: value for name, value in model.config.items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise UserError(f"no stream at {path}: no such file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or cut off: {error}") from None
    if _MARK not in metadata:
        raise UserError(f"{path} is no saved stream")
    card = json.loads(metadata[_MARK])
    if card["format"] > FORMAT:
        raise UserError(f"{path} was written by a newer version; update vision-ssm to read it")
    return card, tensors
