"""`vssm explain VERB`: each function is a verb, its signature the flags, its docstring the help. Imports no torch.

The verbs of a task are carried out by its module `explain`, imported by name when it is used.
"""

import importlib
from collections.abc import Callable
from pathlib import Path

from vision_ssm.explain import Method


def detect(
    picture: Path,
    *,
    weights: Path,
    output: Path = Path("runs/explain"),
    box: int = 0,
    name: str | None = None,
    layer: str = "all",
    method: Method = "attribution",
    per_direction: bool = False,
    conf: float = 0.25,
    image_size: int | None = None,
    device: str = "auto",
) -> int:
    """Why this box: what added to the class score of one detection.

    Args:
        picture: The picture.
        weights: Checkpoint folder, or name of shipped weights.
        output: Folder for the maps and the page index.html.
        box: Number of the detection, from 0, best first.
        name: Count only detections of this class.
        layer: Layers to use: all, the beginning of a name, or a pattern such as 'neck.*'.
        method: attribution (what added to the score), raw or rollout (what the scans read at the box).
        per_direction: A map for each reading direction too.
        conf: Least score of a detection.
        image_size: Long side that the network sees; by default that of the training.
        device: auto, cpu, cuda or mps.
    """
    return importlib.import_module("detection.explain").run_explain(
        picture, weights=weights, output=output, box=box, name=name, layer=layer, method=method,
        per_direction=per_direction, conf=conf, image_size=image_size, device=device,
    )  # fmt: skip


def restore(
    picture: Path,
    *,
    weights: str,
    query: str,
    output: Path = Path("runs/explain"),
    layer: str = "all",
    method: Method = "raw",
    per_direction: bool = False,
    window: int = 192,
    device: str = "auto",
) -> int:
    """Which pixels repaired this one: where the scans of a restorer read, and its effective receptive field.

    Args:
        picture: The degraded picture.
        weights: Checkpoint folder, published MambaIR file, or name of shipped weights.
        query: The pixel as x,y, counted from the upper left.
        output: Folder for the maps and the page index.html.
        layer: Layers to use: all, the beginning of a name, or a pattern such as 'encoder.0.*'.
        method: raw (rows of the mixing matrices), rollout, or attribution (what added to the pixel's value).
        per_direction: A map for each reading direction too.
        window: Side of the square around the pixel that is restored.
        device: auto, cpu, cuda or mps.
    """
    return importlib.import_module("restoration.explain").run_explain(
        picture, weights=weights, query=query, output=output, layer=layer, method=method,
        per_direction=per_direction, window=window, device=device,
    )  # fmt: skip


def generate(
    weights: Path,
    *,
    query: str,
    output: Path = Path("runs/explain"),
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
    """What a generated patch was made from, at several steps of the denoising; of videos also frame by frame.

    Args:
        weights: Checkpoint folder or file of a run, or a pipeline's folder.
        query: A pixel of the patch as x,y, counted from the upper left.
        output: Folder for the maps and the page index.html.
        name: Class to draw, by name or number; by default the first.
        frame: Frame of the patch, from 0.
        frames: Length of a video; by default the model's.
        layer: Layers to use: all, the beginning of a name, or a pattern such as 'blocks.1*'.
        method: attribution (what added to the prediction), raw or rollout (what the scans read).
        per_direction: A map for each reading direction too.
        steps: Of the sampler.
        shown: How many of the steps are explained, evenly spread.
        seed: Of the sample.
        device: auto, cpu or cuda.
    """
    return importlib.import_module("generation.explain").run_explain(
        weights, query=query, output=output, name=name, frame=frame, frames=frames, layer=layer, method=method,
        per_direction=per_direction, steps=steps, shown=shown, seed=seed, device=device,
    )  # fmt: skip


def classify(
    picture: Path,
    *,
    weights: Path,
    output: Path = Path("runs/explain"),
    name: str | None = None,
    layer: str = "all",
    method: Method = "attribution",
    per_direction: bool = False,
    device: str = "auto",
) -> int:
    """What a class was recognised by: any network of `vssm classify` that has scans or attention.

    Args:
        picture: The picture.
        weights: Checkpoint folder or .safetensors file.
        output: Folder for the maps and the page index.html.
        name: Class to explain; by default the likeliest.
        layer: Layers to use: all, the beginning of a name, or a pattern such as 'blocks.1*'.
        method: attribution (what added to the class), raw or rollout (what the scans read, mean over all places).
        per_direction: A map for each reading direction too.
        device: auto, cpu or cuda.
    """
    from vision_ssm.explain.classifier import run_explain

    return run_explain(
        picture, weights=weights, output=output, name=name, layer=layer, method=method, per_direction=per_direction,
        device=device,
    )  # fmt: skip


def perturb(
    weights: Path,
    data: Path,
    *,
    output: Path | None = None,
    layer: str = "all",
    method: list[Method] = ["raw", "rollout", "attribution"],  # noqa: B006 (a default for the command line, never changed)
    cells: int = 8,
    count: int = 200,
    batch_size: int = 20,
    seed: int = 0,
    device: str = "auto",
) -> int:
    """Test maps by blanking what they name: accuracy with the most relevant cells gone first, last, and at random.

    Args:
        weights: Classifier: checkpoint folder or .safetensors file.
        data: Folder with a folder per class, with splits (val or test is taken), or with idx files.
        output: JSON file for the numbers.
        layer: Layers to use: all, the beginning of a name, or a pattern such as 'blocks.1*'.
        method: Maps to test: raw, rollout, attribution.
        cells: Cells along a side of the picture that are blanked, each as a whole.
        count: Pictures, drawn at random.
        batch_size: Pictures that go through the network together.
        seed: Of the drawing and of the random orders.
        device: auto, cpu or cuda.
    """
    from vision_ssm.explain.classifier import run_perturb

    return run_perturb(
        weights, data, output=output, layer=layer, methods=method, cells=cells, count=count, batch_size=batch_size,
        seed=seed, device=device,
    )  # fmt: skip


COMMANDS: dict[str, Callable[..., int]] = {
    "detect": detect,
    "restore": restore,
    "generate": generate,
    "classify": classify,
    "perturb": perturb,
}
