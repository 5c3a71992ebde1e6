"""One reading direction of a scanning mixer: short convolution, then S6, SSD, S4D, or nothing (the control).

What it has read goes on as a state of fixed size, so that a sequence can be continued later.
"""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import causal_conv1d, ssd
from vision_ssm.errors import UserError
from vision_ssm.mamba import DirectionalScan, output_and_state
from vision_ssm.memory_replay import MemoryReplay
from vision_ssm.mixer_config import NO_OPTIONS, ScanOptions
from vision_ssm.s4d import S4D
from vision_ssm.scan_parameters import DT_FLOOR, DT_MAX, DT_MIN, exact, spare_from_decay

# Shapes: ... batch axes, L the axis that is read, C model width, D = 2 C inner channels, E heads, P = D / E channels
# per head, N state size, R rank of the step size, T taps of the convolution.

EXPAND, TAPS = 2, 4
S6_STATES, SSD_STATES, HEAD_WIDTH = 16, 64, 64


class ScanState(NamedTuple):
    """What a direction has read so far; its size does not depend on how much that was."""

    conv: Tensor
    """The last T - 1 inputs of the convolution: the mixer's axes with T - 1 in place of L."""
    scan: Tensor
    """(..., D, N) for s6, (..., E, P, N) for ssd, (..., D, N / 2, 2) for s4d, (..., 0) for gated_conv, without the axis
    that is read; float32."""
    memory: Tensor | None = None
    """The last inputs of the memory replay, as ``conv``; None without."""

    def rows(self, count: int) -> "ScanState":
        """The state of the first sequences of a batch."""
        return ScanState(self.conv[:count], self.scan[:count], None if self.memory is None else self.memory[:count])

    def clone(self) -> "ScanState":
        """The same in memory of its own."""
        return ScanState(self.conv.clone(), self.scan.clone(), None if self.memory is None else self.memory.clone())

    def copy_(self, other: "ScanState") -> None:
        """Take over another state of the same form, in place."""
        for mine, theirs in zip(self, other, strict=True):
            if mine is not None:
                assert theirs is not None
                assert mine.shape == theirs.shape
                mine.copy_(theirs)


Read = tuple[Tensor, ScanState | None]
"""Outputs, and what goes on to the next piece; None after the last."""
Parts = tuple[Tensor, ...]
"""Of one projection, split once for all who read them, so that its gradient is put together once."""


class Direction(ABC):
    """One reading direction of a mixer."""

    @abstractmethod
    def read(self, given: Parts, axis: int, state: ScanState | None, *, last: bool = False) -> Read:
        """Read a piece of the sequence.

        Args:
            given: What the mixer's input projection gives, channels last, in parts.
            axis: The axis that is read.
            state: Of the same direction after the piece before (in reading order), None at the beginning.
            last: Nothing follows: no state is made, which of short sequences is most of the numbers there are.

        Returns:
            (..., D) outputs in place, and the state after the piece, None after the last.
        """


class S6Direction(DirectionalScan, Direction):
    """Short convolution, projections and gated selective scan; the parameters are those of ``DirectionalScan``."""

    def __init__(self, dim: int, *, state_size: int, reverse: bool, options: ScanOptions = NO_OPTIONS) -> None:
        super().__init__(
            EXPAND * dim,
            state_size=state_size,
            rank=math.ceil(dim / 16),
            conv_size=TAPS,
            reverse=reverse,
            backend="auto",
            options=options,
        )
        spare_from_decay(self.scan.A_log, self.scan.D)

    def read(self, given: Parts, axis: int, state: ScanState | None, *, last: bool = False) -> Read:
        """See ``Direction``; ``given`` are value and gate."""
        value, gate = given
        u, conv = _convolve(value, self.conv, axis, state, reverse=self.reverse, last=last)
        start, memory = (None, None) if state is None else (state.scan, state.memory)
        y, scan, memory = self.scanned(u, gate, axis, start, memory, last=last)
        return y, _state(conv, scan, memory)


class SSDDirection(nn.Module, Direction):
    """Short convolution of input, B and C, then SSD with one decay per head.

    Of the heads, the first ``polar[0]`` have decay 1, the last ``polar[1]`` decay 0.
    """

    def __init__(self, dim: int, *, state_size: int, reverse: bool, options: ScanOptions = NO_OPTIONS) -> None:
        super().__init__()
        inner = EXPAND * dim
        self.reverse, self.options = reverse, options
        self.heads = heads_of(inner)
        learned = learned_heads(self.heads, options)
        self.split = (inner, state_size, state_size)
        self.conv = nn.Conv1d(sum(self.split), sum(self.split), TAPS, groups=sum(self.split))
        self.A_log = nn.Parameter(torch.empty(learned).uniform_(1, 16).log())  # the range that Mamba-2 starts from
        self.D = nn.Parameter(torch.ones(self.heads))
        self.dt_bias = nn.Parameter(first_steps(self.heads))
        self.replay = MemoryReplay(inner, options.smr, reverse=reverse) if options.smr else None
        spare_from_decay(self.A_log, self.D)

    def read(self, given: Parts, axis: int, state: ScanState | None, *, last: bool = False) -> Read:
        """See ``Direction``; ``given`` are the gate, which it leaves to the mixer, input with B and C, step sizes."""
        _, xBC, dt = given
        xBC, conv = _convolve(xBC, self.conv, axis, state, reverse=self.reverse, last=last)
        x, B, C = xBC.split(self.split, dim=-1)
        start, memory = (None, None) if state is None else (state.scan, state.memory)
        if self.replay is not None:
            x, memory = self.replay(x, axis, memory)
        ones, zeros = self.options.polar
        kept = self.heads - zeros
        x, B, C = x.unflatten(-1, (self.heads, -1)), B.unsqueeze(-2), C.unsqueeze(-2)
        D, dt_bias = exact(self.D, x), exact(self.dt_bias, x)
        result = ssd(
            x[..., :kept, :],
            dt[..., :kept],
            F.pad(-exact(self.A_log, x).exp(), (ones, 0)),
            B,
            C,
            D[:kept],
            dt_bias=dt_bias[:kept],
            softplus=True,
            reverse=self.reverse,
            dim=axis,
            initial_state=start,
            return_final_state=not last,
        )
        y, scan = output_and_state(result)
        if zeros:
            now = present_heads(x[..., kept:, :], dt[..., kept:], B, C, D[kept:], dt_bias[kept:])
            y = torch.cat([y, now], dim=-2)
        return y.flatten(-2), _state(conv, scan, memory)

    def branch(self, given: Parts, axis: int) -> Tensor:
        """See ``Mixer.branch``; single positions, for scans without options.

        One scan over both, side and main position in turn: a step of 0 lets a side position read the state and leaves
        it as it is. What that step would have done to its own output, one decay per head and its own input, is put in
        afterwards.
        """
        _, xBC, dt = given
        weight, (side, main) = self.conv.weight.squeeze(1), xBC.chunk(2)
        mixed, _ = output_and_state(causal_conv1d(main, weight, self.conv.bias, dim=axis))
        side, main = F.silu(mixed + weight[:, -1].to(side.dtype) * (side - main)), F.silu(mixed)
        A, D, dt_bias = -exact(self.A_log, side).exp(), exact(self.D, side), exact(self.dt_bias, side)
        side_step, main_step = F.softplus(dt.to(dt_bias.dtype) + dt_bias).chunk(2)
        steps = _in_turn(torch.zeros_like(side_step), main_step, axis)
        x, B, C = self._by_heads(_in_turn(side, main, axis))
        y, _ = output_and_state(ssd(x, steps, A, B, C, dim=axis))
        side_y, main_y = y.unflatten(axis, (-1, 2)).unbind(axis + 1)
        x, B, C = self._by_heads(side)
        decay = (side_step * A).exp().unsqueeze(-1).to(x.dtype)
        side_y = decay * side_y + present_heads(x, dt[: len(x)], B, C, D, dt_bias)
        main_y = main_y + D.unsqueeze(-1).to(x.dtype) * self._by_heads(main)[0]
        return torch.cat([side_y, main_y]).flatten(-2)

    def _by_heads(self, xBC: Tensor) -> Parts:
        """Input (..., E, P), B and C (..., 1, N)."""
        x, B, C = xBC.split(self.split, dim=-1)
        return x.unflatten(-1, (self.heads, -1)), B.unsqueeze(-2), C.unsqueeze(-2)


class S4DDirection(nn.Module, Direction):
    """Short convolution and gated S4D: an ``S6Direction`` whose coefficients do not depend on the input."""

    def __init__(self, dim: int, *, state_size: int, reverse: bool, options: ScanOptions = NO_OPTIONS) -> None:
        super().__init__()
        inner = EXPAND * dim
        self.reverse = reverse
        self.conv = nn.Conv1d(inner, inner, TAPS, groups=inner)
        self.scan = S4D(inner, state_size=state_size, reverse=reverse, total=options.polar[0] > 0)
        self.replay = MemoryReplay(inner, options.smr, reverse=reverse) if options.smr else None

    def read(self, given: Parts, axis: int, state: ScanState | None, *, last: bool = False) -> Read:
        """See ``Direction``; ``given`` are value and gate."""
        value, gate = given
        u, conv = _convolve(value, self.conv, axis, state, reverse=self.reverse, last=last)
        start, memory = (None, None) if state is None else (state.scan, state.memory)
        if self.replay is not None:
            u, memory = self.replay(u, axis, memory)
        y, scan = (self.scan(u, axis), None) if last and start is None else self.scan.advance(u, axis, start)
        return y * F.silu(gate), _state(conv, scan, memory)


class ConvDirection(nn.Module, Direction):
    """Short convolution and gate, what is left of an ``S6Direction`` without its scan."""

    def __init__(self, dim: int, *, reverse: bool) -> None:
        super().__init__()
        inner = EXPAND * dim
        self.reverse = reverse
        self.conv = nn.Conv1d(inner, inner, TAPS, groups=inner)

    def read(self, given: Parts, axis: int, state: ScanState | None, *, last: bool = False) -> Read:
        """See ``Direction``; ``given`` are value and gate."""
        value, gate = given
        u, conv = _convolve(value, self.conv, axis, state, reverse=self.reverse, last=last)
        return u * F.silu(gate), _state(conv, u.select(axis, 0)[..., :0].float(), None)


def learned_heads(heads: int, options: ScanOptions) -> int:
    """How many of an SSD's heads have a decay that is learned.

    Raises:
        UserError: None would be left.
    """
    left = heads - sum(options.polar)
    if left < 1:
        raise UserError(
            f"polar {list(options.polar)} takes {sum(options.polar)} of ssd's heads, and this width has {heads}: at "
            "least one must be left to learn its decay; take fewer, or a wider network"
        )
    return left


def first_steps(count: int) -> Tensor:
    """Biases of step sizes, log-uniform after the softplus (Mamba, section 3.6)."""
    steps = torch.empty(count).uniform_(math.log(DT_MIN), math.log(DT_MAX)).exp().clamp(min=DT_FLOOR)
    return steps + torch.log(-torch.expm1(-steps))  # inverse of softplus


def present_heads(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    """SSD's heads of decay 0: y_t = (dt_t <B_t, C_t> + D) x_t, which no rate is low enough to give exactly in a scan.

    Args:
        x: (..., E, P).
        dt: (..., E).
        B: (..., 1, N).
        C: As B.
        D: (E,).
        dt_bias: (E,).

    Returns:
        (..., E, P) in x's dtype.
    """
    gain = F.softplus(dt.to(dt_bias.dtype) + dt_bias) * (B * C).sum(-1) + D
    return (gain.unsqueeze(-1) * x).to(x.dtype)


def heads_of(inner: int) -> int:
    """How many heads fill the inner channels.

    Raises:
        UserError: None do.
    """
    width = min(HEAD_WIDTH, inner)
    if inner % width:
        raise UserError(
            f"width must be a multiple of 32 for the mixers ssd and nc_ssd and their heads, got {inner // 2}"
        )
    return inner // width


def _convolve(
    x: Tensor, conv: nn.Conv1d, axis: int, state: ScanState | None, *, reverse: bool, last: bool
) -> tuple[Tensor, Tensor | None]:
    """Causal depthwise convolution and SiLU; also the inputs that the next piece needs, unless this is the last."""
    result = causal_conv1d(
        x,
        conv.weight.squeeze(1),
        conv.bias,
        activation="silu",
        reverse=reverse,
        dim=axis,
        initial_state=None if state is None else state.conv,
        return_final_state=not last,
    )
    return output_and_state(result)


def _in_turn(a: Tensor, b: Tensor, axis: int) -> Tensor:
    """a_1, b_1, a_2, b_2, ... along an axis."""
    return torch.stack([a, b], dim=axis + 1).flatten(axis, axis + 1)


def _state(conv: Tensor | None, scan: Tensor | None, memory: Tensor | None) -> ScanState | None:
    return None if conv is None or scan is None else ScanState(conv, scan, memory)
