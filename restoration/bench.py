"""`vssm restore bench`: time, memory and work over resolutions, beside attention and convolutions of equal size."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch
from torch import Tensor, nn

from restoration.bench_networks import AttentionBlock, ConvolutionBlock, matched, parameters
from restoration.model import VARIANTS, Serpent, VariantName
from restoration.summary import COUNTING, count_operations
from vision_ssm.device import choose_device
from vision_ssm.errors import UserError
from vision_ssm.files import check_writable, write_text

Precision = Literal["fp32", "bf16"]
NetworkName = Literal["serpent", "attention", "convolution"]

_TITLES: dict[NetworkName, str] = {
    "serpent": "Serpent", "attention": "attention (as Restormer)", "convolution": "convolution (U-Net)",
}  # fmt: skip
_SECONDS = 3.0
"""Time spent on repeating a measurement."""
_RUNS = (3, 100)
"""Least and most repetitions."""


@dataclass(frozen=True)
class Case:
    """One row to measure: which network, on what, how."""

    network: NetworkName
    variant: VariantName
    resolution: int
    batch_size: int
    device: str
    precision: Precision
    train: bool


@dataclass(frozen=True)
class Row:
    """Measurements of one network at one resolution; ``problem`` says why there are none.

    Times are of a whole batch in seconds; ``macs`` and ``scan_flops`` of the forward pass of one picture; ``memory``
    in bytes: on a GPU the most that was allocated, on a CPU the most that the process held, Python and torch included.
    """

    network: NetworkName
    resolution: int
    parameters: int = 0
    macs: int = 0
    scan_flops: int = 0
    median: float = 0.0
    quartiles: tuple[float, float] = (0.0, 0.0)
    runs: int = 0
    memory: int | None = None
    problem: str | None = None


def run_bench(
    *,
    variant: VariantName = "base",
    resolutions: Sequence[int] = (256, 512, 1024),
    batch_size: int = 1,
    device: str = "auto",
    precision: Precision = "fp32",
    train: bool = False,
    output: str | Path | None = None,
) -> int:
    """Measure the three networks, print a table, write bench.json and a plot.

    Args:
        variant: of Serpent, untrained: time does not depend on the weights.
        resolutions: sides of the square pictures.
        batch_size: pictures that go through the network together.
        device: auto, cpu or cuda.
        precision: fp32, or bf16 by autocast.
        train: forward and backward pass instead of the forward pass.
        output: folder for bench.json and bench.png.

    Returns:
        Exit code: 0, or 1 if some row could not be measured.

    Raises:
        UserError: an argument out of range, no such device, or an unwritable folder.
    """
    if variant not in VARIANTS or batch_size < 1 or not resolutions or min(resolutions) < 1:
        raise UserError(
            f"variant must be one of {', '.join(VARIANTS)}, batch_size and resolutions 1 or more; got {variant!r}, "
            f"{batch_size}, {list(resolutions)}"
        )
    place = str(choose_device(device))
    if output is not None:
        check_writable(output)
    print(_heading(variant, place, precision, batch_size, train))
    rows = []
    for resolution in resolutions:
        for network in _TITLES:
            rows.append(_measure_alone(Case(network, variant, resolution, batch_size, place, precision, train)))
            print(_line(rows[-1]), flush=True)
    print(COUNTING)
    if output is not None:
        facts = {"variant": variant, "device": _device_name(place), "precision": precision, "batch_size": batch_size}
        facts |= {"train": train, "torch": torch.__version__, "rows": [asdict(row) for row in rows]}
        write_text(Path(output) / "bench.json", json.dumps(facts, indent=2) + "\n")
        _plot(rows, Path(output) / "bench.png")
        print(f"written to {output}")
    return int(any(row.problem for row in rows))


def _measure_alone(case: Case) -> Row:
    """Measure in a new process, so that running out of memory costs one row."""
    command = [sys.executable, "-m", "restoration.bench", json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        found = json.loads(done.stdout.splitlines()[-1])
        return Row(**found | {"quartiles": tuple(found["quartiles"])})
    last = done.stderr.strip().splitlines()[-1:] or ["killed: out of memory?"]
    return Row(case.network, case.resolution, problem=last[0])


def build(network: NetworkName, variant: VariantName) -> nn.Module:
    """An untrained network of the size of a Serpent variant."""
    if network == "serpent":
        return Serpent(variant)
    return matched(variant, AttentionBlock if network == "attention" else ConvolutionBlock)


def measure(case: Case) -> Row:
    """Measure in this process: one call to get going, then the median and the quartiles of repeated calls."""
    device = torch.device(case.device)
    model = build(case.network, case.variant)
    work = count_operations(model, case.resolution, case.resolution)
    model = model.to(device, memory_format=torch.channels_last).train(case.train)  # type: ignore[call-overload]
    images = torch.rand(case.batch_size, 3, case.resolution, case.resolution, device=device)
    once = _runner(model, case, images)
    with nullcontext() if case.train else torch.inference_mode():
        once()
        times: list[float] = []
        while len(times) < _RUNS[0] or (sum(times) < _SECONDS and len(times) < _RUNS[1]):
            start = time.perf_counter()
            once()
            times.append(time.perf_counter() - start)
    low, median, high = statistics.quantiles(times, n=4)
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_memory()
    return Row(
        case.network, case.resolution, parameters(model), work.macs, work.scan_flops, median, (low, high), len(times),
        memory,
    )  # fmt: skip


def _peak_memory() -> int | None:
    """Most memory that this process has held, in bytes; None where the system does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return getattr(psutil.Process().memory_info(), "peak_wset", None)  # Windows
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _runner(model: nn.Module, case: Case, images: Tensor) -> Callable[[], None]:
    device = images.device

    def once() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=case.precision == "bf16"):
            restored = model(images)
        if case.train:
            restored.float().abs().mean().backward()
            model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return once


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def _heading(variant: str, device: str, precision: str, batch_size: int, train: bool) -> str:
    what = "forward and backward pass" if train else "forward pass"
    return (
        f"Serpent {variant} and networks of equal parameters; {_device_name(device)}, {precision}, batch {batch_size}, "
        f"{what}\n{'network':<26}{'pixels':>7}{'params M':>10}{'GMAC':>9}{'scan GF':>9}{'median ms':>11}"
        f"{'quartiles ms':>18}{'memory MB':>11}"
    )


def _line(row: Row) -> str:
    start = f"{_TITLES[row.network]:<26}{row.resolution:>7}"
    if row.problem is not None:
        return f"{start}  not measured: {row.problem}"
    spread = f"{row.quartiles[0] * 1e3:.1f}..{row.quartiles[1] * 1e3:.1f}"
    memory = "-" if row.memory is None else f"{row.memory / 1e6:.0f}"
    return (
        f"{start}{row.parameters / 1e6:>10.2f}{row.macs / 1e9:>9.2f}{row.scan_flops / 1e9:>9.2f}"
        f"{row.median * 1e3:>11.1f}{spread:>18}{memory:>11}"
    )


def _plot(rows: Sequence[Row], path: Path) -> None:
    """Time, memory and work over the side of the picture, one panel each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    measured = [row for row in rows if row.problem is None]
    panels: list[tuple[str, Callable[[Row], float]]] = [
        ("time of a batch, ms", lambda row: row.median * 1e3),
        ("work of a picture, GMAC (2 FLOPs of a scan as 1)", lambda row: (row.macs + row.scan_flops / 2) / 1e9),
    ]
    if any(row.memory is not None for row in measured):
        panels.append(("memory, MB", lambda row: (row.memory or 0) / 1e6))
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for place, (label, value) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), place)
        for network, title in _TITLES.items():
            line = [(row.resolution, value(row)) for row in measured if row.network == network]
            axes.plot([side for side, _ in line], [y for _, y in line], marker="o", label=title)
        axes.set(xlabel="side of the picture, pixels", ylabel=label, xscale="log", yscale="log")
        sides = sorted({row.resolution for row in measured})
        axes.set_xticks(sides, [str(side) for side in sides])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.legend()
    FigureCanvasAgg(figure).print_png(str(path))


def main(arguments: list[str]) -> None:
    """Measure the case given as JSON and print the row as JSON."""
    print(json.dumps(asdict(measure(Case(**json.loads(arguments[0]))))))


if __name__ == "__main__":
    main(sys.argv[1:])
