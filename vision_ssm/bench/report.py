"""What `vssm bench kernels` tells: lines on the screen, results.json, results.md and two plots."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import vision_ssm
from vision_ssm.bench.accuracy import LongCase
from vision_ssm.bench.check import Check
from vision_ssm.bench.floors import FORWARD_SLOTS, Rates
from vision_ssm.bench.measure import Measured
from vision_ssm.bench.workloads import SSD, Convolution, Workload
from vision_ssm.files import replacing, write_text

COLUMNS = (
    "workload", "back end", "error against float64", "fwd ms (quartiles)", "fwd+bwd ms (quartiles)", "eager ms",
    "floor ms", "% of floor", "GB/s", "G state-steps/s", "extra MiB", "first call s", "attention ms",
)  # fmt: skip
LEGEND = (
    "Pairs are forward / forward + backward. Times are medians with the queue of the GPU kept full and a cold L2 "
    "cache; eager: on an idle GPU, Python's time included. Floor: the slowest of bytes, exponentials, instruction "
    "slots and matrix products that the shapes make unavoidable, at the rates measured in this run. GB/s: these bytes "
    "over the forward time. Extra MiB: peak above the inputs. First call: forward and backward, with compilation "
    "unless Triton's cache on disk had it. Attention: torch's scaled_dot_product_attention over the same tokens in "
    "heads of at most 64 (images: at half the channels), without its projections."
)


@dataclass(frozen=True)
class Row:
    """One workload on one back end; what was not measured is None."""

    name: str
    workload: Workload
    backend: str
    check: Check | None = None
    forward: Measured | None = None
    both: Measured | None = None
    attention: tuple[Measured, Measured] | None = None
    problem: str | None = None
    first_seconds: float = 0.0
    """The first forward and backward pass, with compilation where Triton's cache on disk did not have it."""

    @property
    def passed(self) -> bool:
        """Whether it ran, and right."""
        return self.problem is None and (self.check is None or self.check.passed)


@dataclass(frozen=True)
class Point:
    """One point of the plot over length; milliseconds."""

    curve: str
    length: int
    forward: float
    both: float


@dataclass(frozen=True)
class Results:
    """Everything a session found."""

    machine: dict[str, str]
    dtype: torch.dtype
    rates: Rates
    float64_forms: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    accuracy: list[tuple[LongCase, Check]] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def kinds(self) -> set[str]:
        """Kinds of the workloads that were measured."""
        return {row.workload.kind for row in self.rows}

    @property
    def passed(self) -> bool:
        """Whether everything ran, and right."""
        return (
            not self.problems and all(r.passed for r in self.rows) and all(check.passed for _, check in self.accuracy)
        )

    def heading(self) -> str:
        """Machine and rates."""
        r = self.rates
        slots = "" if r.slots is None else f", {r.slots:.2e} instruction slots/s (8 for each exponential)"
        facts = ", ".join(f"{name} {value}" if name != "device" else value for name, value in self.machine.items())
        return (
            f"{facts}; {_dtype(self.dtype)}\n"
            f"measured limits: copy {r.copy / 1e12:.3g} TB/s, {r.exp2:.3g} exp2/s, matrix product "
            f"{r.matmul / 1e12:.3g} TFLOP/s{slots}\n"
        )

    def float64_line(self) -> str:
        """How far the two float64 forms differ."""
        found = ", ".join(f"{kind} {d:.0e}" for kind, d in self.float64_forms.items())
        return f"blocked float64 against the position-by-position reference: {found}\n"


def machine(device: torch.device) -> dict[str, str]:
    """What the numbers belong to."""
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else f"CPU {platform.machine()}"
    facts = {
        "device": name if gpu else f"{name}, {torch.get_num_threads()} threads",
        "torch": torch.__version__, "Python": platform.python_version(), "vision-ssm": vision_ssm.__version__,
    }  # fmt: skip
    if gpu:
        import triton

        facts["triton"] = triton.__version__
    return facts


def table_head() -> str:
    """The first two lines of the table."""
    return f"{_table_row(COLUMNS)}\n{_table_row(['---'] * len(COLUMNS))}"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _table_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _pair(forward: float | None, both: float | None, *, digits: int = 3) -> str:
    return " / ".join("-" if v is None else f"{v:.{digits}f}" for v in (forward, both))


def line(row: Row, results: Results) -> str:
    """One row of the table in Markdown."""
    size = "" if ":" in row.name else f" {row.workload}"
    start = [row.name + size, row.backend, "-" if row.check is None else str(row.check)]
    if row.forward is None or row.both is None:
        return _table_row([*start, f"not measured: {row.problem}", *["-"] * (len(COLUMNS) - len(start) - 1)])
    times = [m.full for m in (row.forward, row.both)]
    floors = floor_ms(row, results)
    figures = derived(row, results)
    memory = ["-" if m.extra_bytes is None else f"{m.extra_bytes / 2**20:.0f}" for m in (row.forward, row.both)]
    attention = "-" if row.attention is None else _pair(*(m.full.median for m in row.attention))
    return _table_row(
        [
            *start,
            *(f"**{t.median:.3f}** ({t.low:.3f}..{t.high:.3f})" for t in times),
            _pair(row.forward.eager.median, row.both.eager.median),
            _pair(*floors),
            _pair(100 * floors[0] / times[0].median, 100 * floors[1] / times[1].median, digits=0),
            f"{figures['gigabytes_per_second']:.0f}",
            _pair(figures["state_steps_per_second"] / 1e9, figures["state_steps_per_second_both"] / 1e9, digits=0),
            " / ".join(memory),
            f"{row.first_seconds:.1f}",
            attention,
        ]
    )


def floor_ms(row: Row, results: Results) -> tuple[float, float]:
    """Floor of forward, and of forward + backward, in milliseconds."""
    forward, both = row.workload.cost(results.dtype.itemsize).floors(results.rates)
    return forward * 1e3, both * 1e3


def derived(row: Row, results: Results) -> dict[str, float]:
    """What follows from the times of a measured row."""
    assert row.forward is not None
    assert row.both is not None
    forward, both = row.forward.full.median * 1e-3, row.both.full.median * 1e-3
    floors = floor_ms(row, results)
    cost = row.workload.cost(results.dtype.itemsize)
    return {
        "floor_ms": floors[0], "floor_ms_both": floors[1],
        "part_of_floor": floors[0] * 1e-3 / forward, "part_of_floor_both": floors[1] * 1e-3 / both,
        "gigabytes_per_second": cost.forward.bytes / forward / 1e9,
        "state_steps_per_second": row.workload.state_steps / forward,
        "state_steps_per_second_both": row.workload.state_steps / both,
    }  # fmt: skip


def write(results: Results, folder: Path) -> None:
    """results.json, results.md, time_over_length.png and roofline.png."""
    write_text(folder / "results.json", json.dumps(_as_json(results), indent=2) + "\n")
    head = [results.heading(), results.float64_line(), table_head()]
    table = [*head, *(line(row, results) for row in results.rows), "", LEGEND, ""]
    table += [f"- {case}: {check}" for case, check in results.accuracy] + [f"- {p}" for p in results.problems]
    write_text(folder / "results.md", "\n".join(table) + "\n")
    _plot_lengths(results, folder / "time_over_length.png")
    _plot_roofline(results, folder / "roofline.png")


def _as_json(results: Results) -> dict[str, Any]:
    rows = []
    for row in results.rows:
        entry = asdict(row) | {"kind": row.workload.kind, "passed": row.passed}
        entry["state_steps"] = row.workload.state_steps
        entry["cost"] = row.workload.cost(results.dtype.itemsize).as_dict()
        if row.forward is not None and row.both is not None:
            entry |= derived(row, results)
        rows.append(entry)
    return {
        "machine": results.machine, "dtype": _dtype(results.dtype), "rates": asdict(results.rates),
        "float64_forms": results.float64_forms, "rows": rows,
        "accuracy": [{"case": str(c), "check": asdict(k), "passed": k.passed} for c, k in results.accuracy],
        "over_length": [asdict(p) for p in results.points], "problems": results.problems, "passed": results.passed,
    }  # fmt: skip


def _figure(title: str, **axes: Any) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    plot = figure.add_subplot()
    plot.set(title=title, xscale="log", yscale="log", **axes)
    plot.grid(alpha=0.3)
    return figure


def _save(figure: Any, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.axes[0].legend(fontsize=8, bbox_to_anchor=(1.02, 1), loc="upper left")
    with replacing(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))


def _plot_lengths(results: Results, path: Path) -> None:
    """Time over length, forward drawn through and forward + backward dashed."""
    figure = _figure(
        f"one sequence on {results.machine['device']}, {_dtype(results.dtype)}", xlabel="length", ylabel="ms"
    )
    plot = figure.axes[0]
    for i, curve in enumerate(dict.fromkeys(p.curve for p in results.points)):
        points = [p for p in results.points if p.curve == curve]
        lengths = [p.length for p in points]
        plot.plot(lengths, [p.forward for p in points], f"C{i}o-", label=f"{curve}, forward")
        plot.plot(lengths, [p.both for p in points], f"C{i}s--", label=f"{curve}, forward + backward")
    _save(figure, path)


def _plot_roofline(results: Results, path: Path) -> None:
    """Forward state-steps a second over unavoidable bytes a state-step, under the measured limits."""
    figure = _figure(
        f"forward, {results.machine['device']}, {_dtype(results.dtype)}",
        xlabel="unavoidable bytes per state-step", ylabel="state-steps per second",
    )  # fmt: skip
    from matplotlib import colormaps

    plot, rates, colours = figure.axes[0], results.rates, colormaps["tab20"].colors  # pyright: ignore
    drawn = [r for r in results.rows if r.forward is not None and not isinstance(r.workload, Convolution)]
    for i, row in enumerate(drawn):
        assert row.forward is not None
        bytes_per_step = row.workload.cost(results.dtype.itemsize).forward.bytes / row.workload.state_steps
        rate = row.workload.state_steps / (row.forward.full.median * 1e-3)
        marker = "^" if isinstance(row.workload, SSD) else "os"[i // len(colours) % 2]
        colour = colours[i % len(colours)]
        plot.plot([bytes_per_step], [rate], marker, color=colour, label=f"{row.name}, {row.backend}")
    low, high = 0.03, 20.0
    plot.plot([low, high], [rates.copy / low, rates.copy / high], "k-", label="copy bandwidth")
    plot.axhline(rates.exp2, color="k", ls="--", label="one exp2 per state-step")
    if rates.slots is not None:
        plot.axhline(rates.slots / FORWARD_SLOTS, color="k", ls=":", label=f"{FORWARD_SLOTS} slots per state-step")
    plot.axhline(rates.matmul / 4, color="0.6", ls="-.", label="4 FLOP per state-step in matrix products (SSD, ^)")
    _save(figure, path)
