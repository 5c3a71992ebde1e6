"""`vssm classify VERB`: each function is a verb, its signature the flags, its docstring the help. Imports no torch."""

from collections.abc import Callable
from pathlib import Path

from vision_ssm.classify.config import ClassifyConfig


def train(config: ClassifyConfig, *, resume: Path | None = None) -> int:
    """Train a classifier, one of timm's networks, on a folder per class or on idx files.

    Args:
        resume: Folder of a run to go on with; its own settings count, only the data may have moved (--data.train,
            --data.val).
    """
    from vision_ssm.classify.train import run_train

    return run_train(config, resume=resume)


def val(weights: Path, data: Path, *, device: str = "auto", output: Path | None = None) -> int:
    """Score a classifier on pictures whose classes are known.

    Args:
        weights: Checkpoint folder or .safetensors file.
        data: Folder with a folder per class, with splits (val or test is taken), or with idx files.
        device: auto, cpu or cuda.
        output: JSON file for the scores.
    """
    from vision_ssm.classify.predict import run_val

    return run_val(weights, data, device=device, output=output)


def predict(weights: Path, input: list[str], *, top: int = 3, device: str = "auto", output: Path | None = None) -> int:
    """Name the likeliest classes of pictures.

    Args:
        weights: Checkpoint folder or .safetensors file.
        input: Pictures, folders (searched to any depth) or glob patterns (in quotes).
        top: How many classes to name.
        device: auto, cpu or cuda.
        output: CSV file for the results.
    """
    from vision_ssm.classify.predict import run_predict

    return run_predict(weights, input, top=top, device=device, output=output)


def pack(weights: Path, output: Path) -> int:
    """Write weights in half precision, to pass on: half the size; they are computed with in single precision.

    Args:
        weights: Checkpoint folder or .safetensors file.
        output: Folder to write, new or empty.
    """
    from vision_ssm.classify.predict import run_pack

    return run_pack(weights, output)


def convert(file: Path, output: Path) -> int:
    """Convert published Vim or VMamba weights (.pth) to a checkpoint folder. No code in the file is run.

    Args:
        file: The .pth, .pt or .safetensors file.
        output: Folder to write, new or empty.
    """
    from vision_ssm.classify.convert import run_convert

    return run_convert(file, output)


def summary(network: str, *, classes: int = 1000, side: int = 224) -> int:
    """Parameters and FLOPs of a network; scans are counted, and it says how.

    Args:
        network: A name of timm's, or vssm_vim_*, vssm_vmamba_*, mamba_yolo_*.
        classes: Classes of its last layer.
        side: Of the square image, in pixels.
    """
    from vision_ssm.classify.summary import run_summary

    return run_summary(network, classes=classes, side=side)


COMMANDS: dict[str, Callable[..., int]] = {
    "train": train,
    "val": val,
    "predict": predict,
    "pack": pack,
    "convert": convert,
    "summary": summary,
}
