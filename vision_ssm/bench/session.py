"""`vssm bench kernels` from its options to its files."""

import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import choose_backend
from vision_ssm.bench import catalogue, report
from vision_ssm.bench.accuracy import long_cases
from vision_ssm.bench.check import check_float64_forms, check_workload, forms_agree
from vision_ssm.bench.floors import Rates
from vision_ssm.bench.measure import Measured, Stopwatch, measure_rates
from vision_ssm.bench.report import Point, Results, Row
from vision_ssm.bench.workloads import SSD, Attention, Scan1D, Scan2D, Workload
from vision_ssm.errors import UserError
from vision_ssm.files import check_writable

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
_LENGTHS = {"cuda": (256, 1024, 4096, 16384, 65536), "cpu": (64, 256, 1024, 4096)}
"""Squares, so that an image has as many pixels."""
_LONGEST_ATTENTION = 0.5
"""Seconds of a forward pass beyond which attention is left out, by a guess from the matrix-product rate."""


@dataclass(frozen=True)
class Options:
    """What `vssm bench kernels` was asked for; see `commands.bench_kernels`."""

    workloads: tuple[str, ...] | None
    shapes: tuple[str, ...]
    dtype: str
    backends: tuple[str, ...]
    device: str
    repeats: int
    check: bool
    quick: bool
    output: Path


def run_session(options: Options) -> int:
    """Measure everything that was asked for, print it, and write results.json, results.md and two plots.

    Returns:
        0, or 1 when a result is wrong or a workload could not be run.

    Raises:
        UserError: an option that cannot be followed.
    """
    if options.repeats < 1:
        raise UserError(f"--repeats must be at least 1, got {options.repeats}")
    device = _device(options.device)
    gpu = device.type == "cuda"
    dtype = DTYPES[options.dtype if options.dtype != "auto" else "bf16" if gpu else "fp32"]
    workloads = catalogue.choose(options.workloads, options.shapes, on_gpu=gpu)
    names = {_backend(name, device, dtype): None for name in options.backends}
    check_writable(options.output)
    stopwatch = Stopwatch(
        device, max(min(3, options.repeats), options.repeats // 4) if options.quick else options.repeats
    )
    results = Results(report.machine(device), dtype, measure_rates(stopwatch, dtype))
    print(results.heading(), flush=True)
    if options.check:
        results = replace(results, float64_forms=check_float64_forms(list(workloads.values())))
        print(results.float64_line(), flush=True)
    print(report.table_head(), flush=True)
    attention: dict[Attention, tuple[Measured, Measured] | None] = {}
    for name, workload in workloads.items():
        for backend in names:
            if backend == "c" and not workload.has_c_form:
                continue
            row = _row(name, workload, backend, options.check, stopwatch, dtype)
            asked = workload.attention
            if asked is not None:
                if asked not in attention:
                    attention[asked] = _attention(asked, stopwatch, dtype, results.rates)
                row = replace(row, attention=attention[asked])
            results.rows.append(row)
            print(report.line(row, results), flush=True)
    if options.check:
        _check_lengths(results, device, next(iter(names)), quick=options.quick)
    _measure_lengths(results, stopwatch, next(iter(names)), quick=options.quick)
    report.write(results, options.output)
    print(f"written to {options.output}")
    return 0 if results.passed and forms_agree(results.float64_forms) else 1


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"device {name!r} cannot be used: {str(error).splitlines()[0]}; take auto, cpu or cuda"
        ) from None
    if device.type not in ("cuda", "cpu"):
        raise UserError(f"device {name!r}: kernels are measured on auto, cpu or cuda")
    return device


def _backend(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The back end's name, once it is sure that it can run here."""
    try:
        choose_backend(name, device, dtype)
    except RuntimeError as error:
        raise UserError(str(error)) from None
    return name


def _row(name: str, workload: Workload, backend: str, check: bool, stopwatch: Stopwatch, dtype: torch.dtype) -> Row:
    """Checks and times one workload; what goes wrong is told in the row, so that the others are still measured."""
    device = stopwatch.device
    runs = choose_backend(backend, device, dtype)
    row = Row(name, workload, runs if runs != "c" or workload.has_c_form else "torch")
    try:
        row = replace(row, first_seconds=_first_call(workload, dtype, device, backend))
        if check:
            row = replace(row, check=check_workload(workload, dtype, device, backend))
        forward, both = _passes(workload, workload.tensors(dtype, device), backend, stopwatch)
        return replace(row, forward=forward, both=both)
    except torch.OutOfMemoryError:
        return replace(row, problem="out of memory")
    except Exception as error:  # one broken kernel must not hide the others
        return replace(row, problem=_told(error))
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _first_call(workload: Workload, dtype: torch.dtype, device: torch.device, backend: str) -> float:
    """Seconds of one forward and backward pass before any other."""
    leaves = {name: v.requires_grad_() for name, v in workload.tensors(dtype, device).items()}
    start = time.perf_counter()
    workload.run(leaves, backend).sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _told(error: Exception) -> str:
    """The first line of an error; its trace goes to the screen."""
    traceback.print_exception(error, file=sys.stderr)
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _passes(workload: Workload, t: dict[str, Tensor], backend: str, stopwatch: Stopwatch) -> tuple[Measured, Measured]:
    leaves = {name: v.requires_grad_() for name, v in t.items()}
    return _forward_and_both(lambda: workload.run(leaves, backend), list(leaves.values()), stopwatch)


def _forward_and_both(
    run: Callable[[], Tensor], leaves: list[Tensor], stopwatch: Stopwatch
) -> tuple[Measured, Measured]:
    """Measures a call without gradients, then the call and its gradients."""
    with torch.no_grad():
        grad = torch.randn_like(run())
        forward = stopwatch.measure(run)
    return forward, stopwatch.measure(lambda: torch.autograd.grad(run(), leaves, grad))


def _attention(
    a: Attention, stopwatch: Stopwatch, dtype: torch.dtype, rates: Rates
) -> tuple[Measured, Measured] | None:
    """Forward, and forward + backward, of torch's attention; None where it would take too long or too much memory."""
    flops = 4.0 * a.batch * a.heads * a.tokens**2 * a.head_dim
    if flops / (0.2 * rates.matmul) > _LONGEST_ATTENTION:
        return None
    shape = (a.batch, a.heads, a.tokens, a.head_dim)
    try:
        q, k, v = (torch.randn(shape, device=stopwatch.device).to(dtype).requires_grad_() for _ in range(3))
        return _forward_and_both(lambda: F.scaled_dot_product_attention(q, k, v), [q, k, v], stopwatch)
    except torch.OutOfMemoryError:
        return None


def _check_lengths(results: Results, device: torch.device, backend: str, *, quick: bool) -> None:
    for case in long_cases(results.kinds, device, quick=quick):
        try:
            found = case.check(device, backend)
            results.accuracy.append((case, found))
            print(f"{case}: {found}", flush=True)
        except Exception as error:  # as in _row
            results.problems.append(f"{case}: {_told(error)}")


def _measure_lengths(results: Results, stopwatch: Stopwatch, backend: str, *, quick: bool) -> None:
    """Points of the first plot: one sequence, 768 channels (256 on a CPU), growing length, for the kinds measured."""
    gpu = stopwatch.device.type == "cuda"
    width = 768 if gpu else 256
    for length in _LENGTHS[stopwatch.device.type][:: 2 if quick else 1]:
        side = round(length**0.5)
        curves: dict[str, Workload] = {
            "S6": Scan1D(batch=1, length=length, channels=width),
            "S6, four directions": Scan2D(batch=1, height=side, width=side, channels=width),
            "SSD": SSD(batch=1, length=length, heads=width // 64),
        }
        curves = {curve: workload for curve, workload in curves.items() if workload.kind in results.kinds}
        for curve, workload in curves.items():
            row = _row(curve, workload, backend, False, stopwatch, results.dtype)
            if row.forward and row.both:
                results.points.append(Point(curve, length, row.forward.full.median, row.both.full.median))
            else:
                results.problems.append(f"{curve} of length {length}: {row.problem}")
        shape = Attention(1, width // 64, length, 64)
        found = _attention(shape, stopwatch, results.dtype, results.rates) if curves else None
        if found:
            results.points.append(Point("attention", length, found[0].full.median, found[1].full.median))
