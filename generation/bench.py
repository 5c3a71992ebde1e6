"""`vssm generate bench`: layers of scans beside attention over tokens and frames: time, memory, and where they cross.

Four studies: a DiM's mixers over the tokens of a picture; the same over the frames of a video, read jointly (layout j)
and as a video DiM does by default (layout sst); the layers that mix frames place by place, those of the video U-Net
among them; and one more frame of a stream, from a scan's state or from attention's whole cache of keys and values.
"""

import gc
import json
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generation.layouts import expand_layout, scanned
from generation.temporal import GLULayer, Scan
from vision_ssm.bench.measure import Stopwatch, Timing
from vision_ssm.bench.report import machine
from vision_ssm.device import choose_device
from vision_ssm.directions import HEAD_WIDTH, S6_STATES, SSD_STATES
from vision_ssm.errors import UserError, is_out_of_memory
from vision_ssm.files import check_writable, replacing, write_text
from vision_ssm.mixer_config import MixerName
from vision_ssm.mixers import build_mixer

# Shapes: B batch, F frames, L places (tokens) per frame, C channels, E heads, T length of the axis that is read.

StudyName = Literal["tokens", "frames", "temporal"]
ATTENTION = "attention"
MEASURED: tuple[MixerName, ...] = ("s6", "ssd")
_LONGEST_MS = 1000.0
"""A forward and backward pass that is expected to take longer is left out."""
_NO_ROOM = "out of memory"
_COLUMNS = (
    "study", "layer", "length", "forward ms", "forward + backward ms", "of attention's", "kept MiB", "peak MiB",
)  # fmt: skip
_CROSSING_COLUMNS = ("study", "layer", "faster from (forward)", "faster from (forward + backward)")
_LEGEND = (
    "Batch 1. Times: medians with the queue of the GPU kept full and a cold L2 cache. Kept: what the forward pass "
    "stores for the backward pass, without inputs and weights. Peak: the most that both passes take above inputs and "
    "weights. Attention: torch's scaled_dot_product_attention, heads of 64, with its projections. "
    "Faster from: the length from which the layer beats attention, by interpolation; the shortest where it always "
    "does, - where it does not at the longest that both were measured at."
)


@dataclass(frozen=True)
class Sizes:
    """What is measured where nothing else is asked for."""

    tokens: tuple[int, ...]
    video_frames: tuple[int, ...]
    video_places: int
    frames: tuple[int, ...]
    places: int
    channels: int
    """Of the temporal layers."""


_GPU = Sizes(
    tokens=tuple(2**i for i in range(8, 17)),
    video_frames=tuple(2**i for i in range(4, 10)),
    video_places=16 * 16,
    frames=(16, 32, 64, 128, 256, 400, 512, 1024, 2048, 4096),
    places=32 * 32,
    channels=256,
)
_CPU = Sizes((256, 1024, 4096), (16, 64), 4 * 4, (16, 64, 256), 8 * 8, 64)


class Attention(nn.Module):
    """Softmax attention along any axis but the last, heads of 64, with its projections; called as a ``Mixer`` is.

    Shape: (..., C) -> (..., C)

    Args:
        dim: C, a multiple of 64.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.heads = dim // HEAD_WIDTH
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def split(self, x: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (..., E, T, 64)."""
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).movedim((-3, axis), (0, -2))
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, axis: int) -> Tensor:
        """What ``split`` gave -> the output; there may be more keys than queries."""
        lead = q.shape[:-3]
        q, k, v = (t.flatten(0, -4) for t in (q, k, v))  # fused attention wants one batch axis
        y = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(y.unflatten(0, lead).movedim(-2, axis).flatten(-2))

    def forward(self, x: Tensor, axis: int) -> Tensor:
        """See the class."""
        return self.attend(*self.split(x, axis), axis)


class FrameLayer(nn.Module):
    """A layer of the video U-Net, scan, activation and gated linear unit, called as a ``Mixer`` is.

    Shape: (B, F, ..., C) -> (B, F, ..., C), read along axis 1.
    """

    def __init__(self, dim: int, *, ssm: Scan, state_size: int, bidirectional: bool) -> None:
        super().__init__()
        self.layer = GLULayer(dim, ssm=ssm, state_size=state_size, bidirectional=bidirectional, hidden=None)

    def forward(self, x: Tensor, axis: int) -> Tensor:
        """See the class."""
        assert axis == 1
        return self.layer(x)


class Stack(nn.Module):
    """Layers one after the other, each reading (B, F, L, C) as its letter says (`generation.layouts`)."""

    def __init__(self, letters: str, build: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.letters = expand_layout(letters, len(letters))
        self.layers = nn.ModuleList(build() for _ in letters)

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, L, C) -> (B, F, L, C)."""
        for layer, letter in zip(self.layers, self.letters, strict=True):
            x = layer(*scanned(x, letter)).view_as(x)
        return x


@dataclass(frozen=True)
class Study:
    """One curve per layer over a growing number of tokens or frames."""

    name: str
    counted: Literal["tokens", "frames"]
    lengths: tuple[int, ...]
    places: int
    """In a frame, where frames are counted."""
    width: int
    letters: str
    layers: dict[str, Callable[[], nn.Module]]

    def shape(self, length: int) -> tuple[int, int, int, int]:
        """(B, F, L, C)."""
        return (1, 1, length, self.width) if self.counted == "tokens" else (1, length, self.places, self.width)


@dataclass(frozen=True)
class Row:
    """One layer at one length; what was not measured is None, and ``problem`` says why."""

    study: str
    layer: str
    length: int
    forward: Timing | None = None
    both: Timing | None = None
    kept_bytes: int | None = None
    peak_bytes: int | None = None
    problem: str | None = None
    failed: bool = False
    """Whether the problem is neither memory nor time."""

    @property
    def beside(self) -> tuple[str, int]:
        """What it has in common with the row of attention that it is compared with."""
        return self.study, self.length


@dataclass(frozen=True)
class Crossing:
    """The length from which a layer is faster than attention, see `crossing`."""

    study: str
    layer: str
    forward: float | None
    both: float | None


def run_bench(
    *,
    studies: Sequence[StudyName] = get_args(StudyName),
    width: int = 384,
    tokens: Sequence[int] | None = None,
    frames: Sequence[int] | None = None,
    repeats: int = 5,
    device: str = "auto",
    output: str | Path = "runs/generate-bench",
) -> int:
    """Measure, print a table, write bench.json, bench.md and bench.png.

    Args:
        studies: any of tokens, frames, temporal.
        width: C of the first two, a multiple of 64.
        tokens: their numbers; by default 256 to 65,536 on a GPU, to 4,096 on a CPU.
        frames: their numbers; by default 16 to 512 (frames) and 4,096 (temporal) on a GPU, to 64 and 256 on a CPU.
        repeats: of each measurement.
        device: auto, cpu or cuda.
        output: folder for the files.

    Returns:
        Exit code: 1 if a layer failed otherwise than by memory or time.

    Raises:
        UserError: an argument out of range, no such device, or an unwritable folder.
    """
    _check(studies, width, tokens, frames, repeats)
    place = choose_device(device)
    if place.type not in ("cuda", "cpu"):
        raise UserError(f"device {device!r}: layers are measured on auto, cpu or cuda")
    folder = Path(output)
    check_writable(folder)
    found = _studies(studies, _GPU if place.type == "cuda" else _CPU, width, tokens, frames)
    stopwatch = Stopwatch(place, repeats)
    facts = machine(place) | {"precision": "bf16 autocast" if place.type == "cuda" else "float32"}
    report = [", ".join(f"{name} {value}" for name, value in facts.items()), "", _cells(*_COLUMNS), _rule(_COLUMNS)]
    print("\n".join(report))
    rows: list[Row] = []
    for row in chain.from_iterable(_measured(study, stopwatch) for study in found):
        rows.append(row)
        report.append(_line(row, next((r for r in rows if r.beside == row.beside and r.layer == ATTENTION), None)))
        print(report[-1], flush=True)
    crossings = [crossed for study in found for crossed in _crossings(study, rows)]
    end = ["", _cells(*_CROSSING_COLUMNS), _rule(_CROSSING_COLUMNS), *map(_crossing_line, crossings), "", _LEGEND]
    print("\n".join(end))
    results = {"machine": facts, "studies": [_facts(study) for study in found], "rows": [asdict(row) for row in rows]}
    results["crossings"] = [asdict(crossed) for crossed in crossings]
    write_text(folder / "bench.json", json.dumps(results, indent=2) + "\n")
    write_text(folder / "bench.md", "\n".join([*report, *end]) + "\n")
    _plot(found, rows, folder / "bench.png")
    print(f"written to {folder}")
    return int(any(row.failed for row in rows))


def _check(
    studies: Sequence[str], width: int, tokens: Sequence[int] | None, frames: Sequence[int] | None, repeats: int
) -> None:
    names = get_args(StudyName)
    if not studies or not set(studies) <= set(names):
        raise UserError(f"studies must be some of {', '.join(names)}; got {', '.join(studies) or 'none'}")
    if width < HEAD_WIDTH or width % HEAD_WIDTH:
        raise UserError(f"width must be a multiple of {HEAD_WIDTH}, so that attention has whole heads; got {width}")
    for name, lengths in (("tokens", tokens), ("frames", frames)):
        if lengths is not None and min(lengths, default=0) < 1:
            raise UserError(f"{name} must be numbers of 1 or more, got {list(lengths) or 'none'}")
    if repeats < 1:
        raise UserError(f"repeats must be 1 or more, got {repeats}")


def _studies(
    names: Sequence[str], sizes: Sizes, width: int, tokens: Sequence[int] | None, frames: Sequence[int] | None
) -> list[Study]:
    mixers = {ATTENTION: lambda: Attention(width)} | {
        f"{name} mixer, both ways": _mixer(name, width, causal=False) for name in MEASURED
    }
    video = _ascending(frames, sizes.video_frames), sizes.video_places, width
    found = {
        "tokens": [Study("tokens", "tokens", _ascending(tokens, sizes.tokens), 1, width, "s", mixers)],
        "frames": [Study(f"frames, layout {letters}", "frames", *video, letters, mixers) for letters in ("j", "sst")],
        "temporal": [
            Study(
                "temporal", "frames", _ascending(frames, sizes.frames), sizes.places, sizes.channels, "t",
                _temporal_layers(sizes.channels),
            )
        ],
    }  # fmt: skip
    return [study for name, group in found.items() if name in names for study in group]


def _ascending(given: Sequence[int] | None, default: tuple[int, ...]) -> tuple[int, ...]:
    return default if given is None else tuple(sorted(set(given)))


def _mixer(name: MixerName, dim: int, *, causal: bool) -> Callable[[], nn.Module]:
    return lambda: build_mixer(name, dim, state_size=None, causal=causal)


def _temporal_layers(dim: int) -> dict[str, Callable[[], nn.Module]]:
    layers: dict[str, Callable[[], nn.Module]] = {ATTENTION: lambda: Attention(dim)}
    for both, how in ((False, "causal"), (True, "both ways")):
        for name in MEASURED:
            layers[f"{name} mixer, {how}"] = _mixer(name, dim, causal=not both)
        layers[f"s6 layer, {how}"] = _frame_layer(dim, "s6", S6_STATES, both)
        layers[f"ssd layer, {how}"] = _frame_layer(dim, "ssd", SSD_STATES, both)
        layers[f"s4d layer, {how}"] = _frame_layer(dim, "s4d", SSD_STATES, both)
    return layers


def _frame_layer(dim: int, ssm: Scan, states: int, both: bool) -> Callable[[], nn.Module]:
    return lambda: FrameLayer(dim, ssm=ssm, state_size=states, bidirectional=both)


def _measured(study: Study, stopwatch: Stopwatch) -> Iterator[Row]:
    yield from _measure_lengths(study, stopwatch)
    if study.name == "temporal":
        yield from _measure_stream(study, stopwatch)


def _measure_lengths(study: Study, stopwatch: Stopwatch) -> Iterator[Row]:
    """Rows of all layers, short ones first; a length that would take too long, told by the one before, is left out."""
    for layer, build in study.layers.items():
        growth, last = (2 if layer == ATTENTION else 1), None
        for length in study.lengths:
            row = Row(study.name, layer, length)
            expected = 0.0
            if last is not None and last.both is not None:
                expected = last.both.median * (length / last.length) ** growth
            if expected > _LONGEST_MS:
                row = replace(row, problem=f"left out: would take about {expected / 1e3:.1f} s")
            else:
                measure = partial(_measure, study=study, build=build, stopwatch=stopwatch)
                row = _guarded(row, measure, stopwatch.device)
            last = row if row.both is not None else last
            yield row


def _guarded(row: Row, measure: Callable[[Row], Row], device: torch.device) -> Row:
    """The row measured; what goes wrong is told in it, so that the others are still measured."""
    try:
        row = measure(row)
    except Exception as error:  # one broken layer must not hide the others
        if is_out_of_memory(error):
            row = replace(row, problem=_NO_ROOM)
        else:
            traceback.print_exception(error, file=sys.stderr)
            reason = str(error).strip().partition("\n")[0]
            row = replace(row, problem=f"{type(error).__name__}: {reason}", failed=True)
    if device.type == "cuda":
        if row.problem is not None:
            gc.collect()  # what the failed call still holds
        torch.cuda.empty_cache()
    return row


def _measure(row: Row, study: Study, build: Callable[[], nn.Module], stopwatch: Stopwatch) -> Row:
    device = stopwatch.device
    torch.manual_seed(0)
    model = Stack(study.letters, build).to(device)
    x = torch.randn(study.shape(row.length), device=device, dtype=_dtype(device)).requires_grad_()
    leaves = [x, *model.parameters()]

    def run() -> Tensor:
        with _autocast(device):
            return model(x)

    with torch.no_grad():
        grad = torch.randn_like(run())
        forward = stopwatch.measure(run)
    row = replace(row, forward=forward.full)
    try:
        row = replace(row, kept_bytes=kept_bytes(run, leaves))
        both = stopwatch.measure(lambda: torch.autograd.grad(run(), leaves, grad))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return replace(row, problem=_NO_ROOM)
    return replace(row, both=both.full, peak_bytes=both.extra_bytes)


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def kept_bytes(run: Callable[[], Tensor], leaves: Sequence[Tensor]) -> int:
    """Bytes that a forward pass keeps for its backward pass, each storage once, those of ``leaves`` not counted."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = run()  # alive until the sum is done, so that no storage takes the place of another
    for leaf in leaves:
        storages.pop(leaf.untyped_storage().data_ptr(), None)
    del y
    return sum(storages.values())


@torch.no_grad()
def _measure_stream(study: Study, stopwatch: Stopwatch) -> list[Row]:
    """One more frame at the study's last: causal mixers from their state, attention from its whole cache."""
    frames, device = study.lengths[-1], stopwatch.device
    frame = torch.randn(study.shape(1), device=device, dtype=_dtype(device))

    def timed(row: Row, once: Callable[[], object]) -> Row:
        def run() -> None:
            with _autocast(device):
                once()

        return replace(row, forward=stopwatch.measure(run).full)

    def scan(row: Row, name: MixerName) -> Row:
        mixer = build_mixer(name, study.width, state_size=None, causal=True).to(device)
        with _autocast(device):
            state = mixer.advance(frame.expand(-1, 4, -1, -1).contiguous(), 1)[1]  # its size is that of any number
        return timed(row, lambda: mixer.advance(frame, 1, state))

    def attention(row: Row) -> Row:
        layer = Attention(study.width).to(device)
        shape = (1, study.places, layer.heads, frames, HEAD_WIDTH)
        keys, values = (torch.randn(shape, device=device, dtype=_dtype(device)) for _ in range(2))

        def once() -> None:
            q, k, v = layer.split(frame, 1)
            keys[..., -1:, :], values[..., -1:, :] = k, v
            layer.attend(q, keys, values, 1)

        return timed(row, once)

    name = "one streamed frame"
    rows = [_guarded(Row(name, ATTENTION, frames), attention, device)]
    for mixer in MEASURED:
        rows.append(_guarded(Row(name, f"{mixer} mixer, causal", frames), partial(scan, name=mixer), device))
    return rows


def _crossings(study: Study, rows: Sequence[Row]) -> list[Crossing]:
    def times(layer: str, passes: str) -> dict[int, float]:
        timings = {row.length: getattr(row, passes) for row in rows if (row.study, row.layer) == (study.name, layer)}
        return {length: timing.median for length, timing in timings.items() if timing is not None}

    def found(layer: str, passes: str) -> float | None:
        return crossing(times(layer, passes), times(ATTENTION, passes))

    layers = [layer for layer in study.layers if layer != ATTENTION]
    return [Crossing(study.name, layer, found(layer, "forward"), found(layer, "both")) for layer in layers]


def crossing(ours: dict[int, float], theirs: dict[int, float]) -> float | None:
    """The length from which on ``ours`` is the faster.

    Args:
        ours: Length -> time.
        theirs: The same; only lengths that both have count.

    Returns:
        The shortest length if ours is faster at all; None if it is slower at the longest; else by interpolation of
        both logarithms between the last length where it is slower and the next.
    """
    lengths = sorted(ours.keys() & theirs.keys())
    gaps = [math.log(ours[length] / theirs[length]) for length in lengths]
    last = max((i for i, gap in enumerate(gaps) if gap > 0), default=-1)
    if last == len(lengths) - 1:
        return None
    if last < 0:
        return float(lengths[0])
    part = gaps[last] / (gaps[last] - gaps[last + 1])
    return lengths[last] * (lengths[last + 1] / lengths[last]) ** part


def _facts(study: Study) -> dict[str, Any]:
    return {key: value for key, value in vars(study).items() if key != "layers"}


def _cells(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _rule(columns: Sequence[str]) -> str:
    return _cells(*["---"] * len(columns))


def _line(row: Row, attention: Row | None) -> str:
    start = (row.study, row.layer, str(row.length))
    times = [row.forward, row.both]
    spread = ["-" if t is None else f"{t.median:.3f} ({t.low:.3f}..{t.high:.3f})" for t in times]
    if row.problem is not None:
        spread[1] = row.problem
    others = [None, None] if attention is None else [attention.forward, attention.both]
    parts = [
        "-" if t is None or a is None else f"{t.median / a.median:.2f}" for t, a in zip(times, others, strict=True)
    ]
    memory = ["-" if n is None else f"{n / 2**20:.1f}" for n in (row.kept_bytes, row.peak_bytes)]
    return _cells(*start, *spread, " / ".join(parts), *memory)


def _crossing_line(c: Crossing) -> str:
    return _cells(c.study, c.layer, *("-" if x is None else f"{x:.0f}" for x in (c.forward, c.both)))


def _plot(studies: Sequence[Study], rows: Sequence[Row], path: Path) -> None:
    """A column per study: time of forward and backward pass above, memory kept for the backward pass below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    panels: list[tuple[str, Callable[[Row], float | None]]] = [
        ("forward + backward, ms", lambda row: row.both and row.both.median),
        ("kept for backward, MiB", lambda row: row.kept_bytes and row.kept_bytes / 2**20),
    ]
    figure = Figure(figsize=(6 * len(studies), 9), layout="constrained")
    for at, (label, value) in enumerate(panels):
        for column, study in enumerate(studies, start=1):
            axes = figure.add_subplot(len(panels), len(studies), at * len(studies) + column)
            axes.set(title=study.name, xlabel=study.counted, ylabel=label)
            for layer in study.layers:
                mine = [row for row in rows if (row.study, row.layer) == (study.name, layer) and value(row) is not None]
                if mine:
                    style = "k--" if layer == ATTENTION else "-"
                    lengths = [row.length for row in mine]
                    axes.loglog(lengths, [value(row) for row in mine], style, marker="o", markersize=3, label=layer)
            if not axes.lines:
                continue  # nothing fitted: an empty panel has no logarithms
            axes.set_xticks(study.lengths, [str(length) for length in study.lengths], rotation=45)
            axes.minorticks_off()
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7)
    with replacing(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))
