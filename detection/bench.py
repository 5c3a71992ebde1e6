"""Time, FLOPs and memory of a detector over resolutions, beside a convolutional detector of about its size.

Run as it is, compiled or as a captured CUDA graph, with any back end of the scan; on a GPU also the share of the time
that scan kernels take.

Each row is measured in a process of its own, so that its memory is its own and a row that runs out of memory costs only
itself. The convolutional detector is put together from timm's ResNet, torchvision's feature pyramid and our head, with
about as many parameters. It is untrained: it stands for what ordinary convolutions cost, not for an accuracy.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from detection.exported import peak_memory
from detection.head import STRIDES, DetectionHead
from detection.loss import DetectionLoss
from detection.model import SCALES, MambaYOLO, SizeName
from detection.pretrained import load_model, resolve_weights
from detection.summary import summarize
from kernels import choose_backend
from vision_ssm.bench.measure import Stopwatch
from vision_ssm.device import choose_device
from vision_ssm.errors import UserError
from vision_ssm.files import check_writable, write_text
from vision_ssm.flops import COUNTING
from vision_ssm.ss2d import SS2D

Precision = Literal["fp32", "bf16"]
Mode = Literal["eager", "compiled", "graph", "compiled_graph"]
"""torch.compile, a captured CUDA graph of the network as it is, and one of the compiled network."""
Scan = Literal["auto", "torch", "c", "triton"]
"""Back ends of the scan, see `kernels.selective_scan`."""

_BASELINES: dict[str, tuple[str, int]] = {"t": ("resnet10t", 96), "b": ("resnet34", 96), "l": ("resnet152", 64)}
"""For each size the timm network and the width of the feature pyramid that come closest in parameters."""
_RUNS = 100
"""Most repetitions of a measurement; `Stopwatch` stops a slow one earlier."""


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
    mode: Mode = "eager"
    scan: Scan = "auto"


@dataclass(frozen=True)
class Row:
    """Measurements of one model at one resolution; ``problem`` says why there are none.

    Times are of a whole batch in seconds; ``first`` holds compilation and capture; ``flops`` of one picture; ``memory``
    in bytes: on a GPU the most that was allocated, on the CPU the most that the process held, Python and torch
    included; ``scan`` is the back end that ran, None for convolutions; ``scan_share`` is what its kernels take of all
    time that GPU kernels take, known for Triton alone.
    """

    model: str
    resolution: int
    batch_size: int
    mode: Mode
    scan: str | None
    parameters: int = 0
    flops: int = 0
    first: float = 0.0
    median: float = 0.0
    quartiles: tuple[float, float] = (0.0, 0.0)
    runs: int = 0
    memory: int | None = None
    scan_share: float | None = None
    problem: str | None = None


def run_bench(
    *,
    size: SizeName = "t",
    weights: str | Path | None = None,
    resolutions: Sequence[int] = (320, 640),
    batch_size: Sequence[int] = (1,),
    device: str = "auto",
    precision: Precision = "fp32",
    threads: int | None = None,
    train: bool = False,
    modes: Sequence[Mode] = ("eager",),
    scan: Sequence[Scan] = ("auto",),
    output: str | Path | None = None,
) -> int:
    """Measure Mamba-YOLO and a convolutional detector, print a table, write `bench.json` and a plot.

    Args:
        size: t, b or l, untrained (time does not depend on the weights), where no weights are given.
        weights: checkpoint folder or file.
        resolutions: sides of the square pictures, multiples of 32.
        batch_size: numbers of pictures that go through the network together.
        device: auto, cpu, cuda, ...
        precision: fp32, or bf16 by autocast.
        threads: threads of the CPU; by default torch's choice.
        train: measure training steps (forward, loss, backward, optimiser) instead of inference; FLOPs stay those of
            the forward pass.
        modes: how the network is run.
        scan: back ends that Mamba-YOLO's scan is measured with.
        output: folder for bench.json and bench.png.

    Returns:
        Exit code: 0, or 1 if some row could not be measured.

    Raises:
        UserError: an argument out of range, or no such device or weights.
    """
    _check_arguments(size, resolutions, batch_size, threads)
    place = str(choose_device(device))
    _check_modes(modes, place, train)
    for name in scan:
        _scan_that_runs(name, place)
    num_classes = 80
    if weights is not None:
        config = load_model(weights)[0].config
        size, num_classes = config["size"], config["num_classes"]
    if output is not None:
        check_writable(Path(output))
    path = None if weights is None else str(resolve_weights(weights).resolve())
    print(_heading(place, precision, threads, train))
    rows = []
    for resolution, batch, mode in product(resolutions, batch_size, modes):
        shared = (resolution, batch, place, precision, threads, train, mode)
        tasks = [Task("mamba", size, num_classes, path, *shared, name) for name in scan]
        for task in (*tasks, Task("convolutional", size, num_classes, None, *shared)):
            rows.append(measure_alone(task))
            print(_line(rows[-1]), flush=True)
    print(COUNTING)
    if output is not None:
        facts = {"device": _device_name(place), "precision": precision, "threads": threads, "train": train}
        facts |= {"torch": torch.__version__, "rows": [asdict(row) for row in rows]}
        write_text(Path(output) / "bench.json", json.dumps(facts, indent=2) + "\n")
        _plot(rows, Path(output) / "bench.png")
        print(f"written to {output}")
    return int(any(row.problem for row in rows))


def _check_arguments(size: str, resolutions: Sequence[int], batches: Sequence[int], threads: int | None) -> None:
    if size not in SCALES:
        raise UserError(f"Mamba-YOLO has the sizes {', '.join(SCALES)}; got {size!r}")
    wrong = [side for side in resolutions if side < STRIDES[-1] or side % STRIDES[-1]]
    if wrong or not resolutions:
        raise UserError(f"resolutions must be multiples of {STRIDES[-1]}, got {wrong or 'none'}")
    if min(batches, default=0) < 1 or (threads is not None and threads < 1):
        raise UserError(f"batch_size and threads must be at least 1, got {list(batches)} and {threads}")


def _check_modes(modes: Sequence[Mode], device: str, train: bool) -> None:
    wrong = [mode for mode in modes if mode not in get_args(Mode)]
    if wrong or not modes:
        raise UserError(f"modes must be some of {', '.join(get_args(Mode))}; got {', '.join(wrong) or 'none'}")
    graphs = ", ".join(mode for mode in modes if mode.endswith("graph"))
    if graphs and train:
        raise UserError(f"mode {graphs}: a CUDA graph is captured for inference; with --train take eager or compiled")
    if graphs and not device.startswith("cuda"):
        raise UserError(f"mode {graphs}: a CUDA graph needs a GPU, this runs on {device}; take eager or compiled")


def _scan_that_runs(name: str, device: str) -> str:
    """The back end that ``name`` means on a device, once it is sure that it can run there."""
    try:
        return choose_backend(name, torch.device(device), torch.float32)
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error).replace("backend=", "scan ")) from None


def measure_alone(task: Task) -> Row:
    """Measure in a new process."""
    command = [sys.executable, "-m", "detection.bench", json.dumps(asdict(task))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        found = json.loads(done.stdout.splitlines()[-1])
        return Row(**found | {"quartiles": tuple(found["quartiles"])})
    last = done.stderr.strip().splitlines()[-1:] or ["killed: out of memory?"]
    return Row(*_what(task, _NAMES[task.model].format(task.size.upper())), problem=last[0])


_NAMES = {"mamba": "Mamba-YOLO-{}", "convolutional": "convolutional {}"}


def _what(task: Task, name: str) -> tuple[str, int, int, Mode, str | None]:
    """The first columns of a row."""
    scan = _scan_that_runs(task.scan, task.device) if task.model == "mamba" else None
    return name, task.resolution, task.batch_size, task.mode, scan


def measure(task: Task) -> Row:
    """Measure in this process: the first call, then the median and the quartiles of repeated calls."""
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    device = torch.device(task.device)
    model, flops = _build(task)
    model = model.to(device).to(memory_format=torch.channels_last)
    images = torch.rand(task.batch_size, 3, task.resolution, task.resolution, device=device)
    start = time.perf_counter()
    with nullcontext() if task.train else torch.inference_mode():
        once = _training_step(model, task, images) if task.train else _inference(model, task, images)
        once()
        _wait(device)
        first = time.perf_counter() - start
        once()
        _wait(device)
        memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
        timing = Stopwatch(device, _RUNS).eager(once)
        what = _what(task, _NAMES[task.model].format(getattr(model, "name", task.size.upper())))
        share = _scan_share(once) if what[-1] == "triton" else None
    return Row(
        *what,
        parameters=sum(p.numel() for p in model.parameters()),
        flops=flops,
        first=first,
        median=timing.median * 1e-3,
        quartiles=(timing.low * 1e-3, timing.high * 1e-3),
        runs=timing.runs,
        memory=memory,
        scan_share=share,
    )


def _scan_share(once: Callable[[], object]) -> float | None:
    """Time of our scan kernels over that of all kernels, in three calls; None where the profiler sees none."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(3):
            once()
        torch.cuda.synchronize()
    events = [e for e in profiled.key_averages() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    ours = tuple(_scan_kernels())
    scans = sum(e.self_device_time_total for e in events if e.key.startswith(ours))
    everything = sum(e.self_device_time_total for e in events)
    return scans / everything if everything else None


def _scan_kernels() -> set[str]:
    """Names under which the Triton kernels that have been loaded show up in a profile."""
    loaded = [module for name, module in sys.modules.items() if name.startswith("kernels.selective_scan.")]
    return {name for module in loaded for name in vars(module) if name.endswith("_kernel")}


def _autocast(task: Task, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=task.precision == "bf16")


def _inference(model: nn.Module, task: Task, images: Tensor) -> Callable[[], object]:
    network = _as_run(model.eval(), task.mode)

    def once() -> None:
        with _autocast(task, images.device):
            network(images)

    return _captured(once) if task.mode.endswith("graph") else once


def _as_run(model: nn.Module, mode: Mode) -> Callable[[Tensor], Any]:
    return torch.compile(model) if mode.startswith("compiled") else model


def _captured(function: Callable[[], object]) -> Callable[[], object]:
    """Replays one call of ``function``, which must always work on the same tensors."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what the first calls do (tuning, compilation, libraries) cannot be captured
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            function()
    except Exception as error:  # whatever it is, the row says that it was the capture
        reason = str(error).strip().partition("\n")[0]
        raise RuntimeError(f"the CUDA graph could not be captured: {type(error).__name__}: {reason}") from error
    return graph.replay


def _training_step(model: nn.Module, task: Task, images: Tensor) -> Callable[[], object]:
    """One step of SGD on random boxes, ten in each picture."""
    network = _as_run(model.train(), task.mode)
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
            raw = network(images)
        criterion(raw, targets)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return once


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _build(task: Task) -> tuple[nn.Module, int]:
    """The model on the CPU, and its FLOPs for one picture."""
    if task.model == "mamba":
        model = MambaYOLO(task.size, task.num_classes) if task.weights is None else load_model(task.weights)[0]
        for module in model.modules():
            if isinstance(module, SS2D):
                module.backend = task.scan
        return model, summarize(model, task.resolution).flops
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        twin = ConvolutionalDetector(task.size, task.num_classes).eval()
        twin(torch.empty(1, 3, task.resolution, task.resolution))
    return ConvolutionalDetector(task.size, task.num_classes), counter.get_total_flops()


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def _heading(device: str, precision: str, threads: int | None, train: bool) -> str:
    cpu = f", {threads or torch.get_num_threads()} threads" if device == "cpu" else ""
    measured, time = ("training steps", "ms/step") if train else ("network without NMS", "median ms")
    return (
        f"{_device_name(device)}{cpu}, {precision}; {measured}\n"
        f"{'model':<24}{'pixels':>7}{'batch':>6} {'mode':<15}{'scan':<7}{'params M':>9}{'GFLOPs':>8}{'first ms':>9}"
        f"{time:>10}{'quartiles ms':>17}{'images/s':>9}{'peak MB':>8}{'scan %':>7}"
    )


def _line(row: Row) -> str:
    start = f"{row.model:<24}{row.resolution:>7}{row.batch_size:>6} {row.mode:<15}{row.scan or '-':<7}"
    if row.problem is not None:
        return f"{start}  not measured: {row.problem}"
    spread = f"{row.quartiles[0] * 1e3:.2f}..{row.quartiles[1] * 1e3:.2f}"
    memory = "?" if row.memory is None else f"{row.memory / 1e6:.0f}"
    share = "-" if row.scan_share is None else f"{100 * row.scan_share:.1f}"
    return (
        f"{start}{row.parameters / 1e6:>9.2f}{row.flops / 1e9:>8.2f}{row.first * 1e3:>9.0f}{row.median * 1e3:>10.2f}"
        f"{spread:>17}{row.batch_size / row.median:>9.1f}{memory:>8}{share:>7}"
    )


def _plot(rows: Sequence[Row], path: Path) -> None:
    """Median time over resolution, with the quartiles as a band."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    measured = [row for row in rows if row.problem is None]
    for label in dict.fromkeys(_label(row) for row in measured):
        of_model = [row for row in measured if _label(row) == label]
        sides = [row.resolution for row in of_model]
        axes.plot(sides, [row.median * 1e3 for row in of_model], marker="o", label=label)
        low, high = zip(*(row.quartiles for row in of_model), strict=True)
        axes.fill_between(sides, [t * 1e3 for t in low], [t * 1e3 for t in high], alpha=0.2)
    axes.set(xlabel="side of the picture, pixels", ylabel="time of a batch, ms", yscale="log")
    if measured:
        axes.legend(fontsize="small")
    FigureCanvasAgg(figure).print_png(str(path))


def _label(row: Row) -> str:
    scan = "" if row.scan is None else f", {row.scan} scan"
    return f"{row.model}{scan}, batch {row.batch_size}, {row.mode}"


def main(arguments: list[str]) -> None:
    """Measure the task given as JSON and print the row as JSON."""
    print(json.dumps(asdict(measure(Task(**json.loads(arguments[0]))))))


if __name__ == "__main__":
    main(sys.argv[1:])
