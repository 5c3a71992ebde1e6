"""Time, FLOPs and memory of a detector over resolutions, beside a convolutional detector of about its size.

Each row is measured in a process of its own, so that its memory is its own and a row that runs out of memory costs only
itself. The convolutional detector is put together from timm's ResNet, torchvision's feature pyramid and our head, with
about as many parameters. It is untrained: it stands for what ordinary convolutions cost, not for an accuracy.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from detection.exported import peak_memory
from detection.head import STRIDES, DetectionHead
from detection.loss import DetectionLoss
from detection.model import SCALES, MambaYOLO, SizeName
from detection.pretrained import load_model, resolve_weights
from detection.summary import summarize
from vision_ssm.device import choose_device
from vision_ssm.errors import UserError
from vision_ssm.files import check_writable, write_text
from vision_ssm.flops import COUNTING

Precision = Literal["fp32", "bf16"]

_BASELINES: dict[str, tuple[str, int]] = {"t": ("resnet10t", 96), "b": ("resnet34", 96), "l": ("resnet152", 64)}
"""For each size the timm network and the width of the feature pyramid that come closest in parameters."""
_SECONDS = 3.0
"""Time spent on repeating a measurement."""
_RUNS = (5, 100)
"""Least and most repetitions."""


class ConvolutionalDetector(nn.Module):
    """A ResNet (arXiv 1512.03385) with a feature pyramid and the same head as Mamba-YOLO; untrained.

    Shape: (B, 3, H, W) -> three maps (B, 64 + num_classes, H / stride, W / stride) at strides 8, 16, 32.

    Args:
        size: the Mamba-YOLO that it is to be compared with.
        num_classes: number of classes.
    """

    def __init__(self, size: SizeName = "t", num_classes: int = 80) -> None:
        super().__init__()
        import timm
        from torchvision.ops import FeaturePyramidNetwork

        self.name, width = _BASELINES[size]
        backbone: Any = timm.create_model(self.name, features_only=True, out_indices=(2, 3, 4), pretrained=False)
        self.backbone = backbone
        self.pyramid = FeaturePyramidNetwork(backbone.feature_info.channels(), width)
        self.head = DetectionHead([width] * len(STRIDES), num_classes)

    def forward(self, images: Tensor) -> list[Tensor]:
        """See the class."""
        maps = dict(zip("345", self.backbone(images), strict=True))
        return self.head(list(self.pyramid(maps).values()))


@dataclass(frozen=True)
class Task:
    """One row to measure: which model, on what, how."""

    model: Literal["mamba", "convolutional"]
    size: SizeName
    num_classes: int
    weights: str | None
    resolution: int
    batch_size: int
    device: str
    precision: Precision
    threads: int | None
    train: bool = False


@dataclass(frozen=True)
class Row:
    """Measurements of one model at one resolution; ``problem`` says why there are none.

    Times are of a whole batch in seconds; ``flops`` of one picture; ``memory`` in bytes: on a GPU the most that was
    allocated, on the CPU the most that the process held, Python and torch included.
    """

    model: str
    resolution: int
    parameters: int = 0
    flops: int = 0
    first: float = 0.0
    median: float = 0.0
    quartiles: tuple[float, float] = (0.0, 0.0)
    runs: int = 0
    memory: int | None = None
    problem: str | None = None


def run_bench(
    *,
    size: SizeName = "t",
    weights: str | Path | None = None,
    resolutions: Sequence[int] = (320, 640),
    batch_size: int = 1,
    device: str = "auto",
    precision: Precision = "fp32",
    threads: int | None = None,
    train: bool = False,
    output: str | Path | None = None,
) -> int:
    """Measure Mamba-YOLO and a convolutional detector, print a table, write `bench.json` and a plot.

    Args:
        size: t, b or l, untrained (time does not depend on the weights), where no weights are given.
        weights: checkpoint folder or file.
        resolutions: sides of the square pictures, multiples of 32.
        batch_size: pictures that go through the network together.
        device: auto, cpu, cuda, ...
        precision: fp32, or bf16 by autocast.
        threads: threads of the CPU; by default torch's choice.
        train: measure training steps (forward, loss, backward, optimiser) instead of inference; FLOPs stay those of
            the forward pass.
        output: folder for bench.json and bench.png.

    Returns:
        Exit code: 0, or 1 if some row could not be measured.

    Raises:
        UserError: an argument out of range, or no such device or weights.
    """
    _check_arguments(size, resolutions, batch_size, threads)
    place = str(choose_device(device))
    num_classes = 80
    if weights is not None:
        config = load_model(weights)[0].config
        size, num_classes = config["size"], config["num_classes"]
    if output is not None:
        check_writable(Path(output))
    rows = []
    print(_heading(place, precision, batch_size, threads, train))
    for resolution in resolutions:
        for model in ("mamba", "convolutional"):
            path = None if weights is None or model == "convolutional" else str(resolve_weights(weights).resolve())
            task = Task(model, size, num_classes, path, resolution, batch_size, place, precision, threads, train)
            rows.append(measure_alone(task))
            print(_line(rows[-1], batch_size), flush=True)
    print(COUNTING)
    if output is not None:
        facts = {
            "device": _device_name(place),
            "precision": precision,
            "batch_size": batch_size,
            "threads": threads,
            "train": train,
        }
        facts |= {"torch": torch.__version__, "rows": [asdict(row) for row in rows]}
        write_text(Path(output) / "bench.json", json.dumps(facts, indent=2) + "\n")
        _plot(rows, Path(output) / "bench.png")
        print(f"written to {output}")
    return int(any(row.problem for row in rows))


def _check_arguments(size: str, resolutions: Sequence[int], batch_size: int, threads: int | None) -> None:
    if size not in SCALES:
        raise UserError(f"Mamba-YOLO has the sizes {', '.join(SCALES)}; got {size!r}")
    wrong = [side for side in resolutions if side < STRIDES[-1] or side % STRIDES[-1]]
    if wrong or not resolutions:
        raise UserError(f"resolutions must be multiples of {STRIDES[-1]}, got {wrong or 'none'}")
    if batch_size < 1 or (threads is not None and threads < 1):
        raise UserError(f"batch_size and threads must be at least 1, got {batch_size} and {threads}")


def measure_alone(task: Task) -> Row:
    """Measure in a new process."""
    command = [sys.executable, "-m", "detection.bench", json.dumps(asdict(task))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        found = json.loads(done.stdout.splitlines()[-1])
        return Row(**found | {"quartiles": tuple(found["quartiles"])})
    last = done.stderr.strip().splitlines()[-1:] or ["killed: out of memory?"]
    return Row(_NAMES[task.model].format(task.size.upper()), task.resolution, problem=last[0])


_NAMES = {"mamba": "Mamba-YOLO-{}", "convolutional": "convolutional {}"}


def measure(task: Task) -> Row:
    """Measure in this process: the first call, then the median and the quartiles of repeated calls."""
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    device = torch.device(task.device)
    model, flops = _build(task)
    model = model.to(device).to(memory_format=torch.channels_last)
    images = torch.rand(task.batch_size, 3, task.resolution, task.resolution, device=device)
    once = _training_step(model, task, images) if task.train else _inference(model, task, images)
    with nullcontext() if task.train else torch.inference_mode():
        first = _timed(once)
        once()
        times: list[float] = []
        while len(times) < _RUNS[0] or (sum(times) < _SECONDS and len(times) < _RUNS[1]):
            times.append(_timed(once))
    low, median, high = statistics.quantiles(times, n=4)
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
    name = _NAMES[task.model].format(getattr(model, "name", task.size.upper()))
    parameters = sum(p.numel() for p in model.parameters())
    return Row(name, task.resolution, parameters, flops, first, median, (low, high), len(times), memory)


def _autocast(task: Task, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=task.precision == "bf16")


def _inference(model: nn.Module, task: Task, images: Tensor) -> Callable[[], None]:
    model.eval()

    def once() -> None:
        with _autocast(task, images.device):
            model(images)
        _wait(images.device)

    return once


def _training_step(model: nn.Module, task: Task, images: Tensor) -> Callable[[], None]:
    """One step of SGD on random boxes, ten in each picture."""
    model.train()
    device, count = images.device, 10 * len(images)
    criterion = DetectionLoss(task.num_classes)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-4, momentum=0.9, nesterov=True)
    targets = {
        "batch_index": torch.arange(len(images), device=device).repeat_interleave(10),
        "labels": torch.randint(task.num_classes, (count,), device=device),
        "boxes": 0.25 + 0.5 * torch.rand(count, 4, device=device),
    }

    def once() -> None:
        with _autocast(task, device):
            raw = model(images)
        criterion(raw, targets)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        _wait(device)

    return once


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _build(task: Task) -> tuple[nn.Module, int]:
    """The model on the CPU, and its FLOPs for one picture."""
    if task.model == "mamba":
        model = MambaYOLO(task.size, task.num_classes) if task.weights is None else load_model(task.weights)[0]
        return model, summarize(model, task.resolution).flops
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        twin = ConvolutionalDetector(task.size, task.num_classes).eval()
        twin(torch.empty(1, 3, task.resolution, task.resolution))
    return ConvolutionalDetector(task.size, task.num_classes), counter.get_total_flops()


def _timed(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def _heading(device: str, precision: str, batch_size: int, threads: int | None, train: bool) -> str:
    cpu = f", {threads or torch.get_num_threads()} threads" if device == "cpu" else ""
    measured, time = ("training steps", "ms/step") if train else ("network without NMS", "median ms")
    return (
        f"{_device_name(device)}{cpu}, {precision}, batch {batch_size}; {measured}\n"
        f"{'model':<28}{'pixels':>7}{'params M':>10}{'GFLOPs':>9}{'first ms':>10}{time:>11}"
        f"{'quartiles ms':>18}{'images/s':>10}{'peak MB':>11}"
    )


def _line(row: Row, batch_size: int) -> str:
    start = f"{row.model:<28}{row.resolution:>7}"
    if row.problem is not None:
        return f"{start}  not measured: {row.problem}"
    spread = f"{row.quartiles[0] * 1e3:.1f}..{row.quartiles[1] * 1e3:.1f}"
    memory = "?" if row.memory is None else f"{row.memory / 1e6:.0f}"
    return (
        f"{start}{row.parameters / 1e6:>10.2f}{row.flops / 1e9:>9.2f}{row.first * 1e3:>10.1f}{row.median * 1e3:>11.1f}"
        f"{spread:>18}{batch_size / row.median:>10.2f}{memory:>11}"
    )


def _plot(rows: Sequence[Row], path: Path) -> None:
    """Median time over resolution, with the quartiles as a band."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(row.model for row in rows if row.problem is None):
        of_model = [row for row in rows if row.model == name and row.problem is None]
        sides = [row.resolution for row in of_model]
        axes.plot(sides, [row.median * 1e3 for row in of_model], marker="o", label=name)
        low, high = zip(*(row.quartiles for row in of_model), strict=True)
        axes.fill_between(sides, [t * 1e3 for t in low], [t * 1e3 for t in high], alpha=0.2)
    axes.set(xlabel="side of the picture, pixels", ylabel="time of a batch, ms", yscale="log")
    axes.legend()
    FigureCanvasAgg(figure).print_png(str(path))


def main(arguments: list[str]) -> None:
    """Measure the task given as JSON and print the row as JSON."""
    print(json.dumps(asdict(measure(Task(**json.loads(arguments[0]))))))


if __name__ == "__main__":
    main(sys.argv[1:])
