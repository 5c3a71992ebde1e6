"""`vssm restore VERB`: each function is a verb, its signature the flags, its docstring the help. Imports no torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from restoration.config import RestoreConfig

Task = Literal["denoise", "deblur", "motion", "sr2", "sr4", "sr8", "jpeg", "inpaint"]


def run(
    input: list[str],
    *,
    output: Path,
    task: Task | None = None,
    weights: str | None = None,
    mask: Path | None = None,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    device: str = "auto",
    max_memory: str | None = None,
    strip: int | None = None,
    tile: int | None = None,
    overlap: int | None = None,
    ensemble: bool = False,
    scratch: Path | None = None,
    format: Literal["png", "tif", "jpg", "webp"] | None = None,
    dry_run: bool = False,
) -> int:
    """Restore pictures, folders, glob patterns and videos.

    A picture is restored whole. One that does not fit into memory is restored in strips with the same result, and that
    is said; after an interruption the same command goes on with it. Depth, grey, transparency, colour profile, EXIF
    data and resolution are kept, of videos rate, length and sound.

    Args:
        input: Pictures, folders (searched to any depth), glob patterns (in quotes) or videos.
        output: Folder for the results, in which the tree is kept; or for one input the name of the result.
        task: denoise, deblur, motion, sr2, sr4, sr8, jpeg or inpaint; not needed with --weights.
        weights: Checkpoint folder, published MambaIR file, or name of shipped weights; by default those of the task.
        mask: For inpainting: a picture that is black where pixels are missing, or a folder of such pictures.
        precision: Of convolutions and projections; scans are in fp32. What is not finite is restored again in fp32.
        device: auto, cpu, cuda or mps.
        max_memory: Most memory to take on the device, such as 2GiB; by default what is free.
        strip: Lines of a strip, to restore in strips whatever the memory.
        tile: Side of independent tiles in pixels: quick, but not the result of the whole picture.
        overlap: Pixels that neighbouring tiles have in common; by default an eighth of a tile.
        ensemble: Average over the 8 flips and turns of the picture: a little better, 8 times as long.
        scratch: Folder for the temporary files of strips; by default beside the result.
        format: Format of the resulting pictures; by default that of each file.
        dry_run: Only predict method, memory and time of each file.
    """
    from restoration.restorer import Route
    from restoration.run import run_restore
    from vision_ssm.device import parse_size

    memory = None if max_memory is None else parse_size(max_memory)
    route = Route(
        tile=tile, overlap=overlap, strip=strip, max_memory=memory, precision=precision, ensemble=ensemble
    )  # fmt: skip
    return run_restore(
        input, output=output, task=task, weights=weights, mask=mask, device=device, route=route, scratch=scratch,
        format=format, dry_run=dry_run,
    )  # fmt: skip


def train(config: RestoreConfig, *, resume: Path | None = None) -> int:
    """Train or fine-tune a restorer on clean pictures, which are degraded on the fly, or on pairs.

    Args:
        resume: Folder of a run to go on with; its own settings count, only the data may have moved (--data.train,
            --data.val).
    """
    from restoration.train import run_train

    return run_train(config, resume=resume)


def eval(
    data: Path,
    *,
    task: Task,
    weights: list[str] = [],  # noqa: B006 (a default for the command line, never changed)
    method: list[str] = [],  # noqa: B006
    degradation: dict[str, Any] | None = None,
    channel: Literal["rgb", "y"] | None = None,
    border: int | None = None,
    lpips: Path | None = None,
    ensemble: bool = False,
    device: str = "auto",
    limit: int | None = None,
    output: Path = Path("runs/restore-eval"),
) -> int:
    """Score weights and classic methods on the same pixels: PSNR, SSIM, LPIPS; per picture and mean.

    Args:
        data: Folder of clean pictures, which are degraded, or of pairs.
        task: denoise, deblur, motion, sr2, sr4, sr8, jpeg or inpaint.
        weights: Checkpoint folders, published files or shipped names.
        method: Classic ones beside them: bicubic, lanczos, nlm, tv, wiener, richardson-lucy, telea, bm3d.
        degradation: Parameters that replace the task's, such as '{"sigma": 25}'.
        channel: rgb or y; by default y for enlarging, else rgb.
        border: Pixels left out at each side; by default the scale for enlarging, else 0.
        lpips: File with torchvision's AlexNet, to measure LPIPS too.
        ensemble: The networks also averaged over 8 flips and turns (`run --ensemble`), rows with a plus.
        device: auto, cpu or cuda.
        limit: Only so many pictures.
        output: Folder for scores.csv and scores.json.
    """
    from restoration.evaluate import run_eval

    return run_eval(
        data, task=task, weights=weights, methods=method, degradation=degradation, channel=channel, border=border,
        lpips=lpips, ensemble=ensemble, device=device, limit=limit, output=output,
    )  # fmt: skip


def degrade(
    source: Path,
    output: Path,
    *,
    task: Task,
    degradation: dict[str, Any] | None = None,
    seed: int = 0,
    format: Literal["png", "tiff"] = "png",
) -> int:
    """Make pairs of degraded and clean pictures, the same for everybody with the same seed.

    Args:
        source: Picture, folder (to any depth) or glob pattern.
        output: Folder for input/ and target/, and mask/ for inpainting.
        task: denoise, deblur, motion, sr2, sr4, sr8, jpeg or inpaint.
        degradation: Parameters that replace the task's, such as '{"sigma": 25}'.
        seed: Another one gives other noise, kernels and masks; they also follow from each file's name.
        format: png (clipped and rounded) or tiff (floats, noise kept exactly).
    """
    from restoration.pairs import run_degrade

    return run_degrade(source, output, task=task, degradation=degradation, seed=seed, format=format)


def bench(
    *,
    variant: Literal["fast", "small", "base", "base-p4", "large", "full-res"] = "base",
    resolutions: list[int] = [256, 512, 1024],  # noqa: B006
    batch_size: int = 1,
    device: str = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
    train: bool = False,
    output: Path | None = None,
) -> int:
    """Time, memory and work over resolutions, beside attention and convolutions of equal parameters.

    Args:
        variant: Size of Serpent, untrained.
        resolutions: Sides of the square pictures.
        batch_size: Pictures that go through the network together.
        device: auto, cpu or cuda.
        precision: fp32 or bf16.
        train: Measure training steps instead of inference.
        output: Folder for bench.json and a plot.
    """
    from restoration.bench import run_bench

    return run_bench(
        variant=variant, resolutions=resolutions, batch_size=batch_size, device=device, precision=precision,
        train=train, output=output,
    )  # fmt: skip


def convert(file: Path, output: Path) -> int:
    """Convert published MambaIR weights (.pth) to a checkpoint folder. No code in the file is run.

    Args:
        file: The .pth, .pt or .safetensors file.
        output: Folder to write, new or empty.
    """
    from restoration.pretrained import run_convert

    return run_convert(file, output)


def pack(weights: Path, output: Path) -> int:
    """Write weights in half precision, to pass on: half the size; they are computed with in single precision.

    Args:
        weights: Checkpoint folder (best or last of a run) or published file.
        output: Folder to write, new or empty.
    """
    from restoration.pretrained import run_pack

    return run_pack(weights, output)


def info(weights: str) -> int:
    """Task, size, multiply-adds, training data and licence of weights.

    Args:
        weights: Checkpoint folder, published file, or name of shipped weights.
    """
    from restoration.summary import run_info

    return run_info(weights)


COMMANDS: dict[str, Callable[..., int]] = {
    "run": run, "train": train, "eval": eval, "degrade": degrade, "bench": bench, "convert": convert, "pack": pack,
    "info": info,
}  # fmt: skip
