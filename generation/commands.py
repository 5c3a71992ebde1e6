"""`vssm generate VERB`: each function is a verb, its signature the flags, its docstring the help. Imports no torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from generation.config import GenerateConfig, GenerateDataConfig


def sample(
    weights: Path,
    *,
    output: Path,
    classes: list[str] = [],  # noqa: B006 (a default for the command line, never changed)
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
    """Draw pictures or clips and write them as png, jpg, webp, mp4, avi, gif or npz, by the ending of --output.

    Sample i has the seed --seed + i and depends on nothing else. OUTPUT.json beside the output says how it was made.

    Args:
        weights: Checkpoint folder of a run (best, last, averages/0.1), or a folder of save_pretrained.
        output: File for all samples; a picture or film shows them side by side.
        classes: Names or numbers of classes, taken in turn; by default all of them.
        count: Number of samples.
        seed: Of the first sample.
        steps: Of the sampler.
        guidance: Above 1 stresses the class.
        scheduler: euler, heun, dpm++ or unipc for flow; dpm++, ddim, ddpm or unipc for eps, x0 and v.
        frames: Length of clips; by default that of the training. A causal model draws one frame after the other,
            for as long as you like, with constant memory.
        first_steps: Of a causal model's first two frames, which decide what is seen and how it moves; by default
            --steps.
        fps: Frames per second of films.
        batch_size: Samples that go through the network together; the result is the same for any.
        device: auto, cpu or cuda.
    """
    from generation.sample import run_sample

    return run_sample(
        weights, output=output, classes=classes, count=count, seed=seed, steps=steps, guidance=guidance,
        scheduler=scheduler, frames=frames, first_steps=first_steps, fps=fps, batch_size=batch_size, device=device,
    )  # fmt: skip


def train(config: GenerateConfig, *, resume: Path | None = None) -> int:
    """Train DiM on pictures, clips or latents, or on the built-in moving shapes (--data.train synthetic).

    Args:
        resume: Folder of a run to go on with; its own settings count, only the data may have moved (--data.train,
            --data.val).
    """
    from generation.train import run_train

    return run_train(config, resume=resume)


def eval(
    samples: Path,
    reference: str,
    *,
    classifier: Path | None = None,
    network: Path | None = None,
    count: int | None = None,
    steps: int = 50,
    guidance: float = 1.0,
    scheduler: str | None = None,
    seed: int = 0,
    frames: int | None = None,
    first_steps: int | None = None,
    batch_size: int = 128,
    rounds: int = 200,
    device: str = "auto",
    output: Path = Path("runs/generate-eval.json"),
) -> int:
    """Score samples against real ones: distances, precision and recall, conditional accuracy, attributes of clips.

    Args:
        samples: Weights, from which samples are drawn, or an .npz of `vssm generate sample`.
        reference: Folder of real pictures or clips, an .npz of `vssm generate reference`, shipped weights by name (for
            their data, without pictures), or synthetic.
        classifier: Weights of `vssm classify train`, for features and conditional accuracy.
        network: TorchScript file in its place, for real FID (Inception-v3) or FVD (I3D).
        count: Samples to draw, by default 5000, of moving shapes 1000; compare equal numbers only.
        steps: Of the sampler.
        guidance: Above 1 stresses the class.
        scheduler: By default that of the weights.
        seed: Of the first sample.
        frames: Length of clips; by default that of the training.
        first_steps: Of the first two frames of a causal model's clips; by default --steps.
        batch_size: Samples that go through the network together.
        rounds: Resamplings of the 95 % intervals.
        device: auto, cpu or cuda.
        output: JSON file for scores, protocol, counts and versions.
    """
    from generation.evaluate import Drawing, run_eval

    drawing = Drawing(count, steps, guidance, scheduler, seed, batch_size, frames, first_steps)
    return run_eval(
        samples, reference, classifier=classifier, network=network, drawing=drawing, output=output, device=device,
        rounds=rounds,
    )  # fmt: skip


def reference(
    data: str,
    output: Path,
    *,
    classifier: Path | None = None,
    network: Path | None = None,
    side: int = 64,
    frames: int = 0,
    count: int = 4000,
    keep: int = 2000,
    device: str = "auto",
) -> int:
    """Write the statistics of real samples to a small .npz without pictures, to score against later.

    Args:
        data: Folder of real pictures or clips, or synthetic.
        output: The .npz file.
        classifier: Weights of `vssm classify train`, for the features.
        network: TorchScript file in its place.
        side: Side of the square pictures or frames.
        frames: Length of clips; 0 for pictures.
        count: Synthetic clips to measure, at most 4096.
        keep: Features, or clips, that are kept; means and covariances are of all.
        device: auto, cpu or cuda.
    """
    from generation.evaluate import run_reference

    return run_reference(
        data, output, GenerateDataConfig(side=side, frames=frames), classifier=classifier, network=network, count=count,
        keep=keep, device=device,
    )  # fmt: skip


def encode(
    config: GenerateConfig,
    vae: Path,
    output: Path,
    *,
    split: Literal["train", "val"] = "train",
    batch_size: int = 32,
    device: str = "auto",
) -> int:
    """Encode the data of a configuration as latents of a local AutoencoderKL, to train on with --data.vae.

    Args:
        vae: Folder of diffusers' AutoencoderKL.
        output: The .npz file.
        split: train or val.
        batch_size: Pictures or frames that are encoded together.
        device: auto, cpu or cuda.
    """
    from generation.latents import run_encode

    return run_encode(config.data, vae, output, split=split, batch_size=batch_size, device=device)


def pack(weights: Path, output: Path) -> int:
    """Write weights in half precision as a folder of save_pretrained, to pass on; they are computed with in single.

    Args:
        weights: Checkpoint folder of a run (best, last, averages/0.1), or a folder of save_pretrained.
        output: Folder to write, new or empty.
    """
    from generation.generator import run_pack

    return run_pack(weights, output)


def convert(file: Path, output: Path) -> int:
    """Convert published weights of the SSM video U-Net to a folder of save_pretrained. No code in the file is run.

    Args:
        file: The .pt, .pth or .safetensors file.
        output: Folder to write, new or empty.
    """
    from generation.convert import run_convert

    return run_convert(file, output)


def bench(
    *,
    studies: list[Literal["tokens", "frames", "temporal"]] = ["tokens", "frames", "temporal"],  # noqa: B006
    width: int = 384,
    tokens: list[int] | None = None,
    frames: list[int] | None = None,
    repeats: int = 5,
    device: str = "auto",
    output: Path = Path("runs/generate-bench"),
) -> int:
    """Time and memory of layers of scans beside attention over tokens and frames, and where they cross.

    Args:
        studies: tokens (a DiM's mixers over a picture), frames (over a video, layouts j and sst), temporal (layers
            that mix frames place by place; one more frame of a stream).
        width: Channels of tokens and frames, a multiple of 64.
        tokens: Numbers of tokens; by default 256 to 65536 on a GPU, to 4096 on a CPU.
        frames: Numbers of frames; by default 16 to 512, for temporal 4096, on a GPU, to 64 and 256 on a CPU.
        repeats: Of each measurement.
        device: auto, cpu or cuda.
        output: Folder for bench.json, bench.md and bench.png.
    """
    from generation.bench import run_bench

    return run_bench(
        studies=studies, width=width, tokens=tokens, frames=frames, repeats=repeats, device=device, output=output
    )


COMMANDS: dict[str, Callable[..., int]] = {
    "sample": sample, "train": train, "eval": eval, "reference": reference, "encode": encode, "pack": pack,
    "convert": convert, "bench": bench,
}  # fmt: skip
