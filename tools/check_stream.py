"""A stream of moving shapes: time and memory of its frames, attributes early and late, identity, a strip to look at.

    python tools/check_stream.py shapes_stream --streams 50 --frames 1000 --steps 4 --first-steps 50

Writes stream.json and strip.png to --out (frames 1, 64, 256 and the last of the first streams). Exit code 1 when a
frame near the end takes over 10 % more time than one at the beginning, memory grows, an attribute is over twice as far
from real clips late as early, or fewer than 80 % of the streams keep number and colours of their bodies to frame 256.
Told besides: how far bodies are from where they would be in the frame that follows 16 real ones.
"""

import argparse
import ctypes
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from generation.attributes import centroids, stream_scores
from generation.config import GenerateDataConfig
from generation.generator import load_generator
from generation.outputs import picture_grid
from generation.pipelines import VideoDiMPipeline
from generation.reference import attribute_reference
from generation.sample import class_numbers
from generation.streaming import VideoStream
from generation.synthetic import MovingShapes
from vision_ssm.device import choose_device
from vision_ssm.errors import UserError
from vision_ssm.viz import save_picture

WINDOW, SETTLED = 16, 64
"""Frames that are measured together, and those before the late ones."""
SEED = 77
"""Of the real clips that streams go on from."""
WARM = 4
"""First frames, whose time is not counted: kernels are compiled then."""


def memory(device: torch.device) -> int:
    """Bytes that tensors take on a GPU, else those of the process (with glibc without what is free)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
    return psutil.Process().memory_info().rss


def draw(stream: VideoStream, frames: int, device: torch.device) -> tuple[Tensor, list[float], list[int]]:
    """Frames (n, F, C, S, S) uint8, seconds of each, and memory early and late without the frames kept here."""
    kept, seconds, sizes = [], [], []
    for number in range(frames):
        clock = time.perf_counter()
        frame = next(stream)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - clock)
        kept.append((frame.cpu().float().clamp(0, 1) * 255).round().to(torch.uint8))
        del frame
        if number in (WARM, frames - 1):
            sizes.append(memory(device) - (0 if device.type == "cuda" else sum(k.nbytes for k in kept)))
    return torch.stack(kept, dim=1), seconds, sizes


def next_frame_error(pipeline: VideoDiMPipeline, steps: int, *, clips: int = 64, given: int = WINDOW) -> Tensor:
    """Pixels between the centroids of frames that are drawn after `given` real ones, and of the real frames there."""
    side = pipeline.transformer.config["sample_size"]
    source = MovingShapes(clips, frames=given + 1, side=side, seed=SEED)
    real = np.stack([source.read(index) for index in range(clips)])
    labels = [source.label(index) for index in range(clips)]
    stream = VideoStream(pipeline, seeds=list(range(clips)), class_labels=labels, num_inference_steps=steps)
    stream.push(torch.from_numpy(real[:, :given]).permute(0, 1, 4, 2, 3) / 255)
    drawn = next(stream).cpu().permute(0, 2, 3, 1).double().numpy()
    places = [centroids(frames.max(axis=-1)) for frames in (drawn, real[:, given] / 255)]
    return torch.from_numpy(np.linalg.norm(places[0] - places[1], axis=1))


def main() -> int:
    """Draw, measure, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--streams", type=int, default=50)
    parser.add_argument("--frames", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--first-steps", type=int, default=50, help="of the first two frames")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/check_stream"))
    options = parser.parse_args()
    try:
        return check(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def check(options: argparse.Namespace) -> int:
    """The report, its file and the verdict."""
    if options.frames < SETTLED + WINDOW:
        raise UserError(f"--frames must be {SETTLED + WINDOW} or more, got {options.frames}: late is after {SETTLED}")
    pipeline, device = load_generator(options.weights), choose_device(options.device)
    if not isinstance(pipeline, VideoDiMPipeline):
        raise UserError(f"{options.weights} makes pictures, no videos")
    pipeline.to(device)
    stream = VideoStream(
        pipeline,
        seeds=list(range(options.streams)),
        class_labels=class_numbers(pipeline, (), options.streams),
        num_inference_steps=options.steps,
        first_steps=options.first_steps,
        guidance_scale=options.guidance,
    )
    samples, seconds, sizes = draw(stream, options.frames, device)
    shown = [index for index in (0, 63, 255, options.frames - 1) if index < options.frames]
    save_picture(options.out / "strip.png", picture_grid(samples[:8, shown]))
    real = attribute_reference(2_000, GenerateDataConfig(side=samples.shape[-1], frames=WINDOW)).attributes
    assert real is not None
    clips = [np.ascontiguousarray(clip.permute(0, 2, 3, 1).numpy()) for clip in samples]
    part = max(1, (options.frames - WARM) // 10)
    errors = next_frame_error(pipeline, options.steps)
    report = {
        **{name: str(value) for name, value in vars(options).items() if name != "out"},
        "next_frame_error": {name: float(errors.quantile(share)) for name, share in (("median", 0.5), ("90 %", 0.9))},
        **stream_scores(clips, real, window=WINDOW, settled=SETTLED),
        "first_seconds_per_frame": statistics.median(seconds[WARM : WARM + part]),
        "last_seconds_per_frame": statistics.median(seconds[-part:]),
        "state_bytes": stream.state_bytes,
        "first_memory": sizes[0],
        "last_memory": sizes[-1],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
    (options.out / "stream.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))
    verdicts = {
        "constant time": report["last_seconds_per_frame"] <= 1.1 * report["first_seconds_per_frame"],
        "constant memory": report["last_memory"] <= 1.02 * report["first_memory"],
        "late at most twice early": max(report["late_by_early"].values()) <= 2,
        "identity kept in 80 %": report["identity_kept"] >= 0.8,
    }
    print("\n".join(f"{'yes' if good else 'NO':<5}{name}" for name, good in verdicts.items()))
    return int(not all(verdicts.values()))


if __name__ == "__main__":
    sys.exit(main())
