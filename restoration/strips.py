"""Passes over pictures that do not fit in memory: maps lie in files, a pass reads and writes them strip by strip.

A network becomes a list of passes, each of which reads maps and writes one new map. Because no pass changes what it
reads, an interrupted run goes on at the pass it was in.
"""

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from restoration.scratch import Map, Scratch
from vision_ssm.errors import UserError

# Shapes: H/W height and width of a map, C its channels, h/w those of a strip with its halo.

_FLOAT = 4


Tick = Callable[[float], object]
"""Gets the share of the work that was just done."""


@dataclass(frozen=True)
class Limits:
    """How thick strips are: a number of lines, or what fits into a number of bytes (one of the two is given)."""

    lines: int | None = None
    bytes: int | None = None

    def lines_of(self, name: str, line_bytes: int, halo: int) -> int:
        """Lines of a strip without its halo.

        Raises:
            UserError: not even one line fits.
        """
        if self.lines is not None:
            return self.lines
        assert self.bytes is not None
        lines = self.bytes // line_bytes - 2 * halo
        if lines < 1:
            needed = (1 + 2 * halo) * line_bytes
            raise UserError(
                f"{self.bytes / 2**20:.2f} MiB are too few for one line of this picture: {name} needs "
                f"{needed / 2**20:.2f} MiB beside the picture itself; allow more memory"
            )
        return lines


@dataclass(frozen=True)
class Machine:
    """Where and how the tensors of a strip are computed."""

    device: torch.device
    precision: torch.dtype = torch.float32

    def computing(self) -> AbstractContextManager:
        """Context in which networks compute in `precision`; parameters and scans stay float32, and float32 is exact."""
        if self.precision != torch.float32:
            return torch.autocast(self.device.type, dtype=self.precision)
        if self.device.type != "cuda":
            return nullcontext()
        # cuDNN would round to TF32, by itself and not for every shape: strips would differ from the whole picture.
        cudnn = torch.backends.cudnn
        return cudnn.flags(
            enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False
        )


@dataclass(frozen=True)
class LocalPass:
    """A function whose every output depends on few lines above and below: convolutions, norms, shuffles, sums.

    Attributes:
        name: for messages.
        inputs: maps it reads; heights are whole multiples of the smallest height among inputs and output, a *unit*.
        output: the map it writes.
        function: strips (1, C, h, w) of the inputs -> strip of the output.
        halo: units above and below that an output line depends on.
        work: floats that live at once for one pixel of the output, beside inputs and output.
        everywhere: 1 x 1 maps that the function gets after the inputs.
    """

    name: str
    inputs: tuple[Map, ...]
    output: Map
    function: Callable[..., Tensor]
    halo: int = 0
    work: int = 0
    everywhere: tuple[Map, ...] = ()

    @property
    def reads(self) -> tuple[Map, ...]:
        """All maps it needs."""
        return (*self.inputs, *self.everywhere)

    @property
    def units(self) -> int:
        """Strips are cut between units."""
        return min(one.height for one in (*self.inputs, self.output))

    @property
    def work_bytes(self) -> int:
        """Memory for the whole picture at once, beside the maps."""
        return self.work * self.output.height * self.output.width * _FLOAT

    def line_bytes(self) -> int:
        """Memory for one unit; a strip is in memory twice, as it was read and on the device."""
        maps = sum(one.bytes for one in (*self.inputs, self.output))
        return (2 * maps + self.work_bytes) // self.units + 1

    def run(self, scratch: Scratch, limits: Limits, machine: Machine, tick: Tick) -> None:
        """Do the pass; `tick` gets the share that is done."""
        total, halo = self.units, self.halo
        lines = limits.lines_of(self.name, self.line_bytes(), halo)
        constants = [scratch.read(one, slice(0, 1), slice(0, 1)).to(machine.device) for one in self.everywhere]
        scale = self.output.height // total
        for start in range(0, total, lines):
            stop = min(start + lines, total)
            low, high = max(start - halo, 0), min(stop + halo, total)
            strips = [
                scratch.read(one, slice(low * k, high * k), slice(0, one.width)).to(machine.device)
                for one in self.inputs
                for k in (one.height // total,)
            ]
            with machine.computing():
                result = self.function(*strips, *constants)
            del strips
            result = result[:, :, (start - low) * scale : (stop - low) * scale]
            scratch.write(self.output, slice(start * scale, stop * scale), slice(0, self.output.width), result)
            tick((stop - start) / total)


@dataclass(frozen=True)
class MeanPass:
    """The mean of a map over all pixels, a 1 x 1 map: what channel attention looks at."""

    name: str
    inputs: tuple[Map]
    output: Map

    halo: ClassVar[int] = 0

    @property
    def units(self) -> int:
        """Rows of the map."""
        return self.inputs[0].height

    @property
    def reads(self) -> tuple[Map, ...]:
        """All maps it needs."""
        return self.inputs

    @property
    def work_bytes(self) -> int:
        """Memory for the whole picture at once, beside the maps."""
        return 0

    def line_bytes(self) -> int:
        """Memory for one line: as read, and in float64."""
        return 3 * self.inputs[0].bytes // self.units

    def run(self, scratch: Scratch, limits: Limits, machine: Machine, tick: Tick) -> None:
        """Do the pass; `tick` gets the share that is done."""
        (source,) = self.inputs
        lines = limits.lines_of(self.name, self.line_bytes(), 0)
        total = torch.zeros(1, source.channels, 1, 1, dtype=torch.float64)
        for start in range(0, source.height, lines):
            rows = slice(start, min(start + lines, source.height))
            # Float64, so that the sum does not depend on where the strips are cut.
            total += scratch.read(source, rows, slice(0, source.width)).sum((2, 3), keepdim=True, dtype=torch.float64)
            tick((rows.stop - rows.start) / source.height)
        scratch.write(self.output, slice(0, 1), slice(0, 1), total / (source.height * source.width))


ScanStep = Callable[[Tensor, slice, Tensor | None], tuple[Tensor, Tensor]]
"""(strip with halo, lines of it that count, state before them) -> (scan of these lines, state after them)."""


@dataclass(frozen=True)
class ScanPass:
    """A scan in one direction, with the state carried from strip to strip, added to the scans before it.

    Attributes:
        name: for messages.
        inputs: the map that is scanned, and the sum of earlier scans if there are any.
        output: the map it writes.
        step: see `ScanStep`; lines are rows, or columns where `columns`.
        finish: (lines of the input, sum of all scans) -> lines of the output.
        columns: strips are columns, read from the left; else rows, read from the top.
        reverse: read from the other end.
        work: floats that live at once for one pixel, beside inputs and output.
    """

    name: str
    inputs: tuple[Map, ...]
    output: Map
    step: ScanStep
    finish: Callable[[Tensor, Tensor], Tensor] | None
    columns: bool
    reverse: bool
    work: int

    halo: ClassVar[int] = 1  # the depthwise 3 x 3 convolution before a scan

    @property
    def reads(self) -> tuple[Map, ...]:
        """All maps it needs."""
        return self.inputs

    @property
    def units(self) -> int:
        """Rows or columns, whichever the strips are made of."""
        return self.output.width if self.columns else self.output.height

    @property
    def work_bytes(self) -> int:
        """Memory for the whole picture at once, beside the maps."""
        return self.work * self.output.height * self.output.width * _FLOAT

    def line_bytes(self) -> int:
        """Memory for one line; a strip is in memory twice, as it was read and on the device."""
        maps = sum(one.bytes for one in (*self.inputs, self.output))
        return (2 * maps + self.work_bytes) // self.units

    def run(self, scratch: Scratch, limits: Limits, machine: Machine, tick: Tick) -> None:
        """Do the pass; `tick` gets the share that is done."""
        total = self.units
        lines = limits.lines_of(self.name, self.line_bytes(), self.halo)
        starts = range(0, total, lines)
        state = None
        for start in reversed(starts) if self.reverse else starts:
            stop = min(start + lines, total)
            low, high = max(start - self.halo, 0), min(stop + self.halo, total)
            strip = scratch.read(self.inputs[0], *self._window(low, high)).to(machine.device)
            inner = slice(start - low, stop - low)
            with machine.computing():
                result, state = self.step(strip, inner, state)
                result = result.float()
                for earlier in self.inputs[1:]:
                    result += scratch.read(earlier, *self._window(start, stop)).to(machine.device)
                if self.finish is not None:
                    own = strip[..., inner] if self.columns else strip[:, :, inner]
                    result = self.finish(own, result)
            scratch.write(self.output, *self._window(start, stop), result)
            tick((stop - start) / total)

    def _window(self, start: int, stop: int) -> tuple[slice, slice]:
        if self.columns:
            return slice(0, self.output.height), slice(start, stop)
        return slice(start, stop), slice(0, self.output.width)


Pass = LocalPass | MeanPass | ScanPass


@dataclass(frozen=True)
class Program:
    """A network over one picture: passes from the map `source` to the map `result`."""

    source: Map
    passes: tuple[Pass, ...]
    result: Map

    def live(self, index: int) -> set[Map]:
        """Maps that exist while pass `index` runs: what it or a later one reads, and what it writes."""
        written = {self.source} | {one.output for one in self.passes[: index + 1]}
        needed = {one for later in self.passes[index:] for one in later.reads}
        return (written & needed) | {self.passes[index].output, self.result} & written

    @property
    def scratch_bytes(self) -> int:
        """Most bytes of maps that exist at once."""
        return max(sum(one.bytes for one in self.live(k)) for k in range(len(self.passes)))


def run_program(
    program: Program,
    scratch: Scratch,
    *,
    limits: Limits,
    machine: Machine,
    tick: Tick,
) -> None:
    """Do the passes that are not done yet; the source map is there already.

    Args:
        program: what to do.
        scratch: where the maps are; after an interruption, what is done stays done.
        limits: thickness of the strips.
        machine: device and precision.
        tick: gets shares of the whole, 1 in all.

    Raises:
        UserError: the disk has no room, or not one line fits into memory.
    """
    work = [max(one.line_bytes(), 1) * one.units for one in program.passes]
    total = sum(work)
    tick(sum(work[: scratch.done]) / total)
    _check_disk(program, scratch)
    try:
        for index in range(scratch.done, len(program.passes)):
            one = program.passes[index]
            scratch.make(one.output)
            one.run(scratch, limits, machine, lambda share, of=work[index]: tick(share * of / total))
            scratch.note(index + 1)
            if index + 1 < len(program.passes):
                for dead in program.live(index) - program.live(index + 1):
                    scratch.drop(dead)
    except BaseException:
        scratch.note(scratch.done, stopped=True)
        raise


def _check_disk(program: Program, scratch: Scratch) -> None:
    free = shutil.disk_usage(scratch.folder).free
    needed = program.scratch_bytes - scratch.bytes
    if needed > free:
        raise UserError(
            f"the scratch folder {scratch.folder} needs {needed / 2**30:.1f} GiB more, its disk has "
            f"{free / 2**30:.1f} GiB free; choose another with --scratch, or restore in tiles with --tile"
        )


def maps_in_memory(program: Program) -> int:
    """Most bytes that the network would hold if every map were in memory: maps and the work of a pass."""
    return max(
        sum(one.bytes for one in program.live(k)) + current.work_bytes for k, current in enumerate(program.passes)
    )


def strip_in_memory(program: Program, limits: Limits) -> int:
    """Most bytes of the tensors of a strip.

    Raises:
        UserError: not one line fits.
    """

    def of(one: Pass) -> int:
        lines = min(limits.lines_of(one.name, one.line_bytes(), one.halo) + 2 * one.halo, one.units)
        return lines * one.line_bytes()

    return max(of(one) for one in program.passes)
