"""Times, memory and the machine's own limits.

On a GPU a call is timed by events, with the L2 cache flushed before it. Two times are taken: with the queue kept full,
so that the GPU never waits for Python (what a training step or a CUDA graph sees), and eager, where the call starts on
an idle GPU and Python's own time counts. On the CPU both are the wall time.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vision_ssm.bench.floors import SLOTS_PER_EXP2, Rates

_SECONDS = 2.0
"""Time after which a measurement is not repeated any more."""
_CLOCKS = 2_000_000
"""GPU clocks in a millisecond, about."""
_HEAD_START, _LONGEST = 2.0, 200.0
"""Milliseconds that a full queue begins with, at least and at most; in between twice what Python takes for the call."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds: the median of the runs, and their quartiles."""

    median: float
    low: float
    high: float
    runs: int


@dataclass(frozen=True)
class Measured:
    """One call: queue full, eager, and the peak of memory above what was allocated before (None on the CPU)."""

    full: Timing
    eager: Timing
    extra_bytes: int | None


class Stopwatch:
    """Measures calls on one device.

    Args:
        device: CPU or CUDA.
        repeats: runs of each measurement, at least 1; fewer where a run is slow.
    """

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        self._flush = None
        if device.type == "cuda":
            size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(max(size, 64 << 20), dtype=torch.int8, device=device)

    def measure(self, function: Callable[[], object]) -> Measured:
        """Time and memory of `function`, after two calls that do not count."""
        function()
        self._wait()
        function()
        if self._flush is None:
            wall = self._repeat(function, self._on_cpu)
            return Measured(wall, wall, None)
        memory = self._peak(function)
        head_start = min(max(_HEAD_START, 2 * self._on_host(function)), _LONGEST)
        full = self._repeat(function, lambda f: self._on_gpu(f, head_start))
        return Measured(full, self.eager(function), memory)

    def eager(self, function: Callable[[], object]) -> Timing:
        """Eager time of a function that has been called before."""
        return self._repeat(function, self._on_cpu if self._flush is None else lambda f: self._on_gpu(f, 0))

    def _repeat(self, function: Callable[[], object], once: Callable[[Callable[[], object]], float]) -> Timing:
        times: list[float] = []
        while len(times) < self.repeats and sum(times) < _SECONDS * 1e3:
            times.append(once(function))
        if len(times) == 1:
            return Timing(times[0], times[0], times[0], 1)
        low, median, high = statistics.quantiles(times, n=4, method="inclusive")
        return Timing(median, low, high, len(times))

    def _on_cpu(self, function: Callable[[], object]) -> float:
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start) * 1e3

    def _on_host(self, function: Callable[[], object]) -> float:
        """Milliseconds until Python has started everything on the GPU."""
        self._wait()
        return self._on_cpu(function)

    def _on_gpu(self, function: Callable[[], object], head_start: float) -> float:
        assert self._flush is not None
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._wait()
        self._flush.zero_()
        if head_start:
            torch.cuda._sleep(round(head_start * _CLOCKS))
        else:
            self._wait()
        start.record()
        function()
        end.record()
        self._wait()
        return start.elapsed_time(end)

    def _peak(self, function: Callable[[], object]) -> int:
        self._wait()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        function()
        self._wait()
        return torch.cuda.max_memory_allocated(self.device) - before

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure_rates(stopwatch: Stopwatch, dtype: torch.dtype) -> Rates:
    """The machine's limits: copy bandwidth, exponentials and matrix products of `dtype` a second.

    Slots follow from the exponentials on a GPU (see `floors.SLOTS_PER_EXP2`) and are unknown on a CPU.
    """
    device = stopwatch.device
    gpu = device.type == "cuda"

    def seconds(function: Callable[[], object]) -> float:
        return stopwatch.measure(function).full.median * 1e-3

    size = (1 << 30) if gpu else (1 << 26)
    pair = torch.zeros(2, size, dtype=torch.int8, device=device)
    copy = 2 * size / seconds(lambda: pair[0].copy_(pair[1]))
    side = 8192 if gpu else 512
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    matmul = 2 * side**3 / seconds(lambda: left @ right)
    exp2 = _exp2_rate_gpu(device, seconds) if gpu else _exp2_rate_cpu(seconds)
    return Rates(copy=copy, exp2=exp2, slots=SLOTS_PER_EXP2 * exp2 if gpu else None, matmul=matmul)


def _exp2_rate_gpu(device: torch.device, seconds: Callable[[Callable[[], object]], float]) -> float:
    from vision_ssm.bench import exp2_kernel

    programs = 16 * torch.cuda.get_device_properties(device).multi_processor_count
    out = torch.empty(programs * exp2_kernel.BLOCK, device=device)
    rounds = 256
    return exp2_kernel.launch(out, rounds) / seconds(lambda: exp2_kernel.launch(out, rounds))


def _exp2_rate_cpu(seconds: Callable[[Callable[[], object]], float]) -> float:
    values = torch.zeros(1 << 16)  # stays in the cache
    out = torch.empty_like(values)
    return 64 * values.numel() / seconds(lambda: [torch.exp2(values, out=out) for _ in range(64)])
