"""Triton back end of the selective scan: chooses tiles and launches the kernels of `gpu_kernels` and `gpu_gradient`.

Forward: the end state of every chunk of the sequence (all chunks at once), their combination to true start states,
then the output. Backward: the adjoint of every chunk, combined from the last to the first, then all gradients with the
states recomputed from the saved chunk starts. A sequence of one chunk needs only the last kernel of each pass.
"""

# num_warps is an argument of every launch that the kernels' signatures do not have:
# pyright: reportCallIssue=false, reportArgumentType=false
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache, cached_property
from math import gcd
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from .gpu_gradient import scan_gradient_kernel
from .gpu_kernels import scan_chunk_kernel, scan_combine_kernel, scan_output_kernel
from .reference import COLUMNS, COLUMNS_REVERSED, LINES, LINES_REVERSED, ROWS_REVERSED, sequences_and_length

MAX_RANK = 32
"""Largest rank of delta that is multiplied out inside the kernels; beyond it the product is formed by torch."""
TWIN_STATES, TWIN_CHUNK = 16, 64
"""The Gluon twins take all states at once and keep a chunk's states in shared memory."""
WANT = {name: 1 << i for i, name in enumerate(("x", "delta", "B", "C", "A", "D", "weight", "bias", "z"))}
"""Bits by which the gradient kernel is told what to compute."""
MAX_PLANS = 256
"""Plans, with their launches, that are remembered; then all are forgotten."""


class _Inputs(NamedTuple):
    """The canonical tensors of one call."""

    x: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    z: Tensor | None
    initial: Tensor | None


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(n: int) -> int:
    """The smallest power of two that is not below n (Triton's own takes microseconds, several times a launch)."""
    return 1 << (n - 1).bit_length()


@cache
def _gluon() -> ModuleType | None:
    """The Gluon twins where they can run: NVIDIA's Ampere or later, Triton 3.6 or later."""
    if not torch.cuda.is_available() or torch.version.hip or torch.cuda.get_device_capability()[0] < 8:
        return None
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
        return None
    from . import gluon_gradient

    return gluon_gradient


def _has_twin(x: Tensor, states: int) -> bool:
    return x.is_cuda and states <= TWIN_STATES and _gluon() is not None


def _pixel_stride(t: Tensor) -> int | None:
    """Elements from one pixel of (B, H, W, ...) to the next; None if rows do not follow one another so."""
    _, height, width = t.shape[:3]
    row, pixel = t.stride()[1:3]
    if width == 1:
        return row
    return pixel if height == 1 or row == width * pixel else None


def _chunking(x: Tensor, orders: tuple[int, ...], states: int) -> tuple[int, int]:
    """Chunk length (a multiple of 4) and number of chunks: enough work for a large GPU, few states to combine."""
    sequences, length = sequences_and_length(x, orders)
    warps = sequences * len(orders) * _cdiv(x.shape[3], 64)
    if length <= 32 or (length <= 256 and warps >= 2048 and not _has_twin(x, states)):
        return _cdiv(length, 4) * 4, 1
    chunk = TWIN_CHUNK if _has_twin(x, states) else 128
    while chunk > 32 and warps * _cdiv(length, chunk) < 3072:
        chunk //= 2
    count = _cdiv(length, chunk)
    chunk = _cdiv(_cdiv(length, count), 4) * 4
    return chunk, _cdiv(length, chunk)


def saved_shape(x: Tensor, orders: tuple[int, ...], groups: int, state: int) -> tuple[int, ...]:
    """Shape of the states that `forward` keeps: (B, W or 1, K, chunks + 1, N, D), or (0,) for one chunk."""
    batch, _, width, channels = x.shape
    _, count = _chunking(x, orders, state)
    if count == 1:
        return (0,)
    return (batch, width if orders[0] >= LINES else 1, len(orders), count + 1, state, channels)


def _alignment(t: Tensor) -> int:
    """Bytes up to 16 on which every row of the last axis starts."""
    steps = [s * t.element_size() for s, n in zip(t.stride()[:-1], t.shape[:-1], strict=True) if n > 1]
    return gcd(16, t.data_ptr(), *steps)


def _state_strides(t: Tensor | None, lines: bool) -> tuple[int, ...]:
    """Strides (batch, width, direction, chunk, state, channel) of (B, K, D, N) or, for lines, (B, W, 1, D, N)."""
    if t is None:
        return (0,) * 6
    s = t.stride()
    return (s[0], s[1] if lines else 0, s[-3], 0, s[-1], s[-2])


def _twin_width(channels: int) -> int:
    """Channels of a twin's tile: 64, or 32 where that is a sixth less channels to compute (80, 96, 160)."""
    narrow, wide = (_cdiv(channels, width) * width for width in (32, 64))
    return 32 if 6 * narrow <= 5 * wide else 64


@dataclass(frozen=True)
class _Plan:
    """Sizes and tiles of one call; everything the three or four launches have in common."""

    batch: int
    height: int
    width: int
    channels: int
    directions: int
    groups: int
    states: int
    rank: int
    orders: tuple[int, ...]
    chunk: int
    count: int
    softplus: bool
    twin: bool
    elements: int
    """Of the largest tensor of the call."""
    memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    """What calls with this plan found out once: compiled launches and the shares of the gradient kernel."""

    @staticmethod
    def of(inputs: _Inputs, orders: tuple[int, ...], softplus: bool) -> "_Plan":
        x, delta, A, Bm, C, _, weight, _, z, _ = inputs
        batch, height, width, channels = x.shape
        rank = 0 if weight is None else weight.shape[2]
        states = A.shape[2]
        images = [t for t in (x, delta, Bm, C, z) if t is not None]
        twin = _has_twin(x, states) and all(_pixel_stride(t) is not None for t in images)
        sizes = batch, height, width, channels, len(orders), Bm.shape[4], states, rank
        elements = max(t.numel() for t in images)
        return _Plan(*sizes, orders, *_chunking(x, orders, states), softplus, twin, elements)

    @property
    def is_lines(self) -> bool:
        return self.orders[0] >= LINES

    @property
    def lines(self) -> int:
        return self.width if self.is_lines else 1

    @property
    def length(self) -> int:
        return self.height if self.is_lines else self.height * self.width

    @property
    def sequences(self) -> int:
        return self.batch * self.lines

    @property
    def group_channels(self) -> int:
        return self.channels // self.groups

    def tile(self, *, gradient: bool = False) -> dict[str, int]:
        """Block sizes and launch options: 16 states, two channels a lane; more channels where they have few states."""
        states = min(16, _power_of_2(self.states))
        width = max(32, _power_of_2(self.group_channels))
        common = {"RP": _power_of_2(self.rank) if self.rank else 0, "SOFTPLUS": self.softplus}
        if not self.twin:
            return {"BN": states, "BD": min(64 if states >= 8 else 128, width), "num_warps": 1, **common}
        states, width = max(4, states), min(_twin_width(self.group_channels), width)
        if gradient:
            lanes = states // 4
            warps = max(1, min(4, width * lanes // 64))
            # What lets three programs share a multiprocessor's memory.
            block = 16 if common["RP"] <= 8 else 8
            steps = {"SN": 4, "TB": block, "KEPT": TWIN_CHUNK // 8 - 1, "W": warps, "num_warps": warps, "maxnreg": 168}
        else:
            warps = width // 32
            steps = {"SN": min(8, states), "TB": 16, "CHUNK": TWIN_CHUNK}
            steps |= {"W": warps, "num_warps": warps, "maxnreg": 128}
        # Partial sums have a copy of B and C for each block of channels.
        wide = self.elements * _cdiv(self.group_channels, width) >= 2**31
        return {"BN": states, "BD": width, "WIDE": wide, **steps, **common}

    def strides(self, t: Tensor | None) -> tuple[int, ...]:
        """Strides of (B, H, W, ...) but the last; the twins' are (batch, pixel, ...)."""
        if t is None:
            return (0,) * 3
        given = t.stride()[:-1]
        return (given[0], _pixel_stride(t) or 0, *given[3:]) if self.twin else given

    @cached_property
    def state_blocks(self) -> int:
        return _cdiv(self.states, self.tile()["BN"])

    def channel_blocks(self, *, gradient: bool = False) -> int:
        """Channel blocks of one group."""
        return _cdiv(self.group_channels, self.tile(gradient=gradient)["BD"])

    @property
    def kernels(self) -> ModuleType | None:
        """The twins' module if they are to be used."""
        return _gluon() if self.twin else None

    @property
    def order_bits(self) -> int:
        """Two bits a direction: column, reversed."""
        columns = (COLUMNS, COLUMNS_REVERSED, LINES, LINES_REVERSED)
        backwards = (ROWS_REVERSED, COLUMNS_REVERSED, LINES_REVERSED)
        return sum(((o in columns) + 2 * (o in backwards)) << (2 * k) for k, o in enumerate(self.orders))

    @cached_property
    def axes(self) -> list[list[int]]:
        """Directions by the axis they run along; those of one axis share chunks of pixels."""
        columns = [k for k, o in enumerate(self.orders) if o in (COLUMNS, COLUMNS_REVERSED)]
        rows = [k for k in range(self.directions) if k not in columns]
        return [axis for axis in (rows, columns) if axis]

    @property
    def geometry(self) -> dict[str, int]:
        return {
            "height": self.height, "width": self.width, "lines": self.lines, "length": self.length,
            "orders": self.order_bits, "channels": self.channels, "group_channels": self.group_channels,
            "n_states": self.states, "rank": self.rank, "chunk": self.chunk, "n_chunks": self.count,
            **({} if self.twin else {"one": 1}),
        }  # fmt: skip


_plans: dict[tuple, _Plan] = {}


def _plan(
    inputs: _Inputs, others: tuple[Tensor | None, ...], orders: tuple[int, ...], softplus: bool, *flags: object
) -> _Plan:
    """The plan of a call. Calls that are alike in all that a launch is compiled and computed from share one."""
    x, states = inputs.x, inputs.A.shape[2]
    how = (orders, softplus, flags, x.device, _has_twin(x, states), _chunking(x, orders, states))
    key = (*how, *(t if t is None else _likeness(t) for t in (*inputs, *others)))
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= MAX_PLANS:
            _plans.clear()
        plan = _plans[key] = _Plan.of(inputs, orders, softplus)
    return plan


def _likeness(t: Tensor) -> tuple[object, ...]:
    return t.shape, t.stride(), t.dtype, t.data_ptr() % 16


def _launch(
    plan: _Plan, name: object, kernel: Any, tensors: dict[str, Tensor | None],
    rest: Callable[[], tuple[int, dict[str, Any]]],
) -> None:  # fmt: skip
    """Launches a kernel with ``tensors`` and with the programs and the other arguments that ``rest`` gives.

    Those depend on the plan and the launch's ``name`` alone, and so does what Triton makes of them in a tenth of a
    millisecond of the host's time; a second launch is the first one with other tensors.
    """
    known = plan.memo.get(name)
    if known is not None:
        compiled, grid, arguments, places = known
        arguments = arguments.copy()
        for place, tensor in zip(places, tensors.values(), strict=True):
            arguments[place] = tensor
        compiled[grid](*arguments)
        return
    programs, others = rest()
    grid = (programs, 1, 1)
    compiled = kernel[grid](**tensors, **others)
    # On AMD's GPUs it also depends on how large the tensors' storages are.
    if isinstance(compiled, CompiledKernel) and not torch.version.hip:
        names = kernel.arg_names
        arguments = [None if n in tensors else others[n] for n in names]
        plan.memo[name] = compiled, grid, arguments, [names.index(n) for n in tensors]


def _pack(directions: list[int]) -> int:
    return sum(k << (4 * i) for i, k in enumerate(directions))


def _on(t: Tensor):
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


def _full_delta(delta: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("bhwkr,kdr->bhwkd", delta.float(), weight.float())


def _combine_tile(count: int, is_cuda: bool) -> tuple[int, int, int]:
    """Columns, chunks at a time and warps of the combination: chunks side by side where one sequence has many."""
    if not is_cuda:
        return 64, 2, 1
    return (128, 8, 1) if count <= 64 else (32, 64, 4) if count <= 1024 else (16, 256, 8)


def _chunk_states(
    plan: _Plan, value: Tensor, gate: Tensor | None, row: Tensor, delta: Tensor, weight: Tensor | None, A: Tensor,
    bias: Tensor | None, border: Tensor | None, last: Tensor | None, *, adjoint: bool,
) -> Tensor:  # fmt: skip
    """True states at all chunk borders (B, W, K, chunks + 1, N, D); writes the one at the end into ``last``."""
    shape = (plan.batch, plan.lines, plan.directions, plan.count + 1, plan.states, plan.channels)
    states = A.new_empty(shape)
    decay_sum = A.new_empty(*shape[:3], plan.count, plan.channels)
    chunk_kernel = plan.kernels.scan_chunk_kernel if plan.kernels else scan_chunk_kernel

    def chunk_launch() -> tuple[int, dict[str, Any]]:
        blocks = plan.state_blocks * plan.groups * plan.channel_blocks()
        names = ("s_value", "s_gate", "s_row", "s_delta")
        strides = {n: plan.strides(t) for n, t in zip(names, (value, gate, row, delta), strict=True)}
        own = {"s_states": states.stride(), "K": plan.directions, "ADJOINT": adjoint, "ALIGN": _alignment(row)}
        return plan.sequences * plan.directions * plan.count * blocks, strides | plan.geometry | plan.tile() | own

    tensors = {
        "value": value, "gate": gate, "row": row, "delta": delta, "weight": weight, "a": A, "bias": bias,
        "states": states, "decay_sum": decay_sum,
    }  # fmt: skip
    _launch(plan, ("chunk", adjoint), chunk_kernel, tensors, chunk_launch)

    def combine_launch() -> tuple[int, dict[str, Any]]:
        size = plan.states * plan.channels
        block, rows, warps = _combine_tile(plan.count, states.is_cuda)
        return plan.sequences * plan.directions * _cdiv(size, block), {
            "s_border": _state_strides(border, plan.is_lines), "s_last": _state_strides(last, plan.is_lines),
            "lines": plan.lines, "K": plan.directions, "channels": plan.channels, "n_states": plan.states,
            "n_chunks": plan.count, "one": 1, "BC": rows, "BE": block, "ADJOINT": adjoint, "num_warps": warps,
        }  # fmt: skip

    tensors = {"states": states, "decay_sum": decay_sum, "a": A, "border": border, "last": last}
    _launch(plan, ("combine", adjoint, last is None), scan_combine_kernel, tensors, combine_launch)
    return states


def forward(
    x: Tensor, delta: Tensor, A: Tensor, Bm: Tensor, C: Tensor, D: Tensor | None, delta_weight: Tensor | None,
    delta_bias: Tensor | None, z: Tensor | None, initial_state: Tensor | None,
    *, orders: tuple[int, ...], softplus: bool, merge: bool, need_backward: bool, want_final: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, final states if wanted, and the chunk states kept for `backward` (canonical form: see op.py)."""
    if delta_weight is not None and delta_weight.shape[2] > MAX_RANK:
        delta, delta_weight = _full_delta(delta, delta_weight), None
    delta_weight = None if delta_weight is None else delta_weight.contiguous()
    inputs = _Inputs(x, delta, A, Bm, C, D, delta_weight, delta_bias, z, initial_state)
    plan = _plan(inputs, (), orders, softplus, merge)
    y = x.new_empty(x.shape if merge else (*x.shape[:3], plan.directions, plan.channels))
    lead = (plan.batch, plan.width) if plan.is_lines else (plan.batch,)
    final = A.new_empty(*lead, plan.directions, plan.channels, plan.states) if want_final else None
    with _on(x):
        states = None
        if plan.count > 1:
            states = _chunk_states(
                plan, x.unsqueeze(3).expand(-1, -1, -1, plan.directions, -1), None, Bm, delta, delta_weight, A,
                delta_bias, initial_state, final, adjoint=False,
            )  # fmt: skip
        y = _output(plan, x, z, Bm, C, delta, delta_weight, A, D, delta_bias, initial_state, states, final, y, merge)
    saved = states if need_backward and states is not None else A.new_empty(0)
    return y, A.new_empty(0) if final is None else final, saved


def _output(
    plan: _Plan, x: Tensor, z: Tensor | None, Bm: Tensor, C: Tensor, delta: Tensor, weight: Tensor | None, A: Tensor,
    D: Tensor | None, bias: Tensor | None, initial: Tensor | None, states: Tensor | None, final: Tensor | None,
    y: Tensor, merge: bool,
) -> Tensor:  # fmt: skip
    """Launches the output kernel once for each axis (merged) or once for all directions."""
    sweeps = plan.state_blocks * (plan.directions if merge else 1)
    total = torch.empty_like(y, dtype=torch.float32) if sweeps > 1 else y
    start, s_start = (initial, _state_strides(initial, plan.is_lines)) if states is None else (states, states.stride())
    axes = plan.axes if merge else [list(range(plan.directions))]
    output_kernel = plan.kernels.scan_output_kernel if plan.kernels else scan_output_kernel
    final_here = final if states is None else None
    tensors = {
        "x": x, "gate": z, "bm": Bm, "cm": C, "delta": delta, "weight": weight, "a": A, "skip": D, "bias": bias,
        "start": start, "final": final_here, "y": total, **({"out": y} if plan.twin else {}),
    }  # fmt: skip

    def output_launch(number: int, axis: list[int]) -> tuple[int, dict[str, Any]]:
        each, fan = (len(axis), 1) if merge else (1, len(axis))
        blocks = plan.groups * plan.channel_blocks()
        names = ("s_x", "s_gate", "s_b", "s_c", "s_delta")
        strides = {n: plan.strides(t) for n, t in zip(names, (x, z, Bm, C, delta), strict=True)}
        own = {
            "s_start": s_start, "s_final": _state_strides(final, plan.is_lines), "s_y": (*plan.strides(y), 0),
            "dirs": _pack(axis), "n_dirs": each, "fan": fan, "is_first": int(number == 0),
            "is_last": int(number == len(axes) - 1), "ACCUMULATE": sweeps > 1, "ALIGN_B": _alignment(Bm),
            "ALIGN_C": _alignment(C),
        }  # fmt: skip
        return plan.sequences * fan * plan.count * blocks, strides | plan.geometry | plan.tile() | own

    for number, axis in enumerate(axes):
        name = ("output", number, final_here is None)
        _launch(plan, name, output_kernel, tensors, lambda n=number, a=axis: output_launch(n, a))
    return y if plan.twin else total.to(y.dtype)


def backward(
    grad_y: Tensor, grad_final: Tensor | None, x: Tensor, delta: Tensor, A: Tensor, Bm: Tensor, C: Tensor,
    D: Tensor | None, delta_weight: Tensor | None, delta_bias: Tensor | None, z: Tensor | None,
    initial_state: Tensor | None, saved: Tensor,
    *, orders: tuple[int, ...], softplus: bool, merge: bool, needs: tuple[bool, ...],
) -> list[Tensor | None]:  # fmt: skip
    """The gradients that ``needs`` asks for, in the order of the inputs; the same bits at every call."""
    inputs = _Inputs(x, delta, A, Bm, C, D, delta_weight, delta_bias, z, initial_state)
    if grad_y.stride(-1) != 1:
        grad_y = grad_y.contiguous()
    if delta_weight is not None and delta_weight.shape[2] <= MAX_RANK:
        inputs = inputs._replace(weight=delta_weight.contiguous())
    if delta_weight is None or delta_weight.shape[2] <= MAX_RANK:
        return _gradients(grad_y, grad_final, inputs, saved, orders, softplus, merge, needs)
    full = inputs._replace(delta=_full_delta(delta, delta_weight), weight=None)
    found = _gradients(grad_y, grad_final, full, saved, orders, softplus, merge, needs_of_full_delta(needs))
    return back_to_low_rank(found, delta, delta_weight, needs)


def needs_of_full_delta(needs: tuple[bool, ...]) -> tuple[bool, ...]:
    """What is needed where torch has multiplied delta and its weight out."""
    return (needs[0], needs[1] or needs[6], *needs[2:6], False, *needs[7:])


def back_to_low_rank(
    found: list[Tensor | None], delta: Tensor, weight: Tensor, needs: tuple[bool, ...]
) -> list[Tensor | None]:
    """Gradients with that of the full delta (B, H, W, K, D) turned into those of the low-rank delta and its weight."""
    full = found[1]
    if full is not None:
        low = torch.einsum("bhwkd,kdr->bhwkr", full, weight.float()).to(delta.dtype) if needs[1] else None
        turned = torch.einsum("bhwkd,bhwkr->kdr", full, delta.float()).to(weight.dtype) if needs[6] else None
        found[1], found[6] = low, turned
    return found


def _gradients(
    grad_y: Tensor, grad_final: Tensor | None, inputs: _Inputs, saved: Tensor,
    orders: tuple[int, ...], softplus: bool, merge: bool, needs: tuple[bool, ...],
) -> list[Tensor | None]:  # fmt: skip
    x, delta, A, _, C, _, weight, bias, z, _ = inputs
    plan = _plan(inputs, (grad_y, grad_final, saved), orders, softplus, merge, needs)
    if plan.twin and _pixel_stride(grad_y) is None:
        grad_y = grad_y.contiguous()
    dy = grad_y.unsqueeze(3).expand(-1, -1, -1, plan.directions, -1) if merge else grad_y
    lead = (plan.batch, plan.width) if plan.is_lines else (plan.batch,)
    g_start = A.new_empty(*lead, plan.directions, plan.channels, plan.states) if needs[9] else None
    with _on(x):
        behind = None
        if plan.count > 1:
            behind = _chunk_states(plan, dy, z, C, delta, weight, A, bias, grad_final, g_start, adjoint=True)
        if "gradient" not in plan.memo:
            plan.memo["gradient"] = _Gradient(plan, needs)
        return plan.memo["gradient"].run(dy, grad_final, inputs, saved, behind, g_start)


class _Gradient:
    """Buffers and launches of the gradient kernel.

    Channel blocks are dealt to ``shares``; a share sums over its channels in place, the shares' partial sums are added
    here. ``reps`` programs work on each share, each with its own partial sums over pixels.
    """

    def __init__(self, plan: _Plan, needs: tuple[bool, ...]) -> None:
        self.plan, self.needs = plan, needs
        names = ("x", "delta", "A", "B", "C", "D", "weight", "bias", "z")
        self.want = sum(WANT[name] for name, need in zip(names, needs, strict=False) if need)
        self.tasks = plan.sequences * plan.count
        processors = 3
        if torch.cuda.is_available():
            processors = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
            processors *= 4 if plan.twin else 8
        blocks = plan.channel_blocks(gradient=True)
        shares = blocks if plan.twin else 1
        while shares < blocks and 2 * self.tasks * plan.groups * shares < 3 * processors:
            shares += 1
        self.per_share = _cdiv(blocks, shares)
        self.shares = _cdiv(blocks, self.per_share)
        if plan.twin:  # several programs for each place, so that the last ones to finish are short
            each = max(1, self.tasks * self.shares * plan.groups // (4 * processors))
            self.reps = _cdiv(self.tasks, each)
        else:
            self.reps = max(1, min(self.tasks, processors // (self.shares * plan.groups)))

    def _partial(self, name: str, like: Tensor, parts: int, again: bool) -> Tensor:
        """Buffer (parts, *like.shape): float32 if it is added to later, else the final dtype; a dummy if unwanted."""
        if not self.want & WANT[name]:
            return like.unsqueeze(0)
        dtype = torch.float32 if again or parts > 1 else like.dtype
        return like.new_empty((parts, *like.shape), dtype=dtype)

    def _sums(self, name: str, like: Tensor | None) -> Tensor | None:
        """Buffer (reps, *like.shape) for sums over pixels."""
        if like is None or not self.want & WANT[name]:
            return None
        return like.new_empty((self.reps, *like.shape), dtype=torch.float32)

    def run(
        self, dy: Tensor, grad_final: Tensor | None, inputs: _Inputs, saved: Tensor,
        behind: Tensor | None, g_start: Tensor | None,
    ) -> list[Tensor | None]:  # fmt: skip
        """Launches one kernel for each axis and adds up the partial sums."""
        x, delta, A, Bm, C, D, weight, bias, z, initial = inputs
        plan = self.plan
        several = plan.state_blocks > 1
        acc = {"x": plan.directions > 1 or several, "delta": several or (plan.rank > 0 and self.per_share > 1)}
        acc["B"] = acc["C"] = self.per_share > 1
        gx = self._partial("x", x, 1, acc["x"])
        gz = None if z is None else self._partial("z", z, 1, acc["x"])
        g_delta = self._partial("delta", delta, self.shares * plan.groups if plan.rank else 1, acc["delta"])
        gb = self._partial("B", Bm, self.shares, acc["B"])
        gc = self._partial("C", C, self.shares, acc["C"])
        pixel_sums = [self._sums(n, t) for n, t in (("A", A), ("D", D), ("weight", weight), ("bias", bias))]
        programs = self.reps * self.shares * plan.groups
        tile = plan.tile(gradient=True)
        if plan.kernels:
            kernel = plan.kernels.scan_gradient_kernel
            gx_out = x.new_empty(x.shape) if self.want & WANT["x"] and acc["x"] else gx[0]
            own = {"gx_out": gx_out}
        else:
            kernel, gx_out = scan_gradient_kernel, None
            own = {"scratch": A.new_empty(programs * (plan.chunk // 4) * tile["BN"] * tile["BD"])}
        if behind is None:
            start, s_start, after, s_after = initial, _state_strides(initial, plan.is_lines), grad_final, (0,) * 6
            if grad_final is not None:
                s_after = _state_strides(grad_final, plan.is_lines)
        else:
            start, s_start, after, s_after = saved, saved.stride(), behind[:, :, :, 1:], behind.stride()
        tensors = {
            "x": x, "gate": z, "dy": dy, "bm": Bm, "cm": C, "delta": delta, "weight": weight, "a": A, "skip": D,
            "bias": bias, "start": start, "behind": after, "gx": gx, "ggate": gz, "gdelta": g_delta, "gb": gb, "gc": gc,
            "ga": pixel_sums[0], "gskip": pixel_sums[1], "gweight": pixel_sums[2], "gbias": pixel_sums[3],
            "gstart": g_start if behind is None else None, **own,
        }  # fmt: skip

        def gradient_launch(number: int, axis: list[int]) -> tuple[int, dict[str, Any]]:
            names = ("s_x", "s_gate", "s_dy", "s_b", "s_c", "s_delta", "s_gx")
            strides = {n: plan.strides(t) for n, t in zip(names, (x, z, dy, Bm, C, delta, gx[0]), strict=True)}
            for n, t in (("s_gdelta", g_delta), ("s_gb", gb), ("s_gc", gc)):
                strides[n] = (*plan.strides(t[0]), t.stride(0))
            last = int(number == len(plan.axes) - 1)
            return programs, {
                **strides, "s_start": s_start, "s_behind": s_after, "s_gstart": _state_strides(g_start, plan.is_lines),
                **plan.geometry, "K": plan.directions, "dirs": _pack(axis), "n_dirs": len(axis),
                "is_first": int(number == 0), **({"is_last": last} if plan.twin else {"per_share": self.per_share}),
                "n_tasks": self.tasks, "n_shares": self.shares, **tile, "WANT": self.want,
                "ACC": sum(WANT[name] for name, flag in acc.items() if flag), "ALIGN_B": _alignment(Bm),
                "ALIGN_C": _alignment(C),
            }  # fmt: skip

        for number, axis in enumerate(plan.axes):
            _launch(plan, ("gradient", number), kernel, tensors, lambda n=number, a=axis: gradient_launch(n, a))
        tensors.clear()  # what is summed below needs the memory of what is only read
        if gx_out is not None:
            gx = gx_out.unsqueeze(0)
        parts = [gx, g_delta, pixel_sums[0], gb, gc, pixel_sums[1], pixel_sums[2], pixel_sums[3], gz]
        return [
            _total(part, like) if need and part is not None and like is not None else None
            for part, like, need in zip(parts, inputs, self.needs, strict=False)
        ] + [g_start]


def _total(parts: Tensor, like: Tensor) -> Tensor:
    """Sum of the partial results in the dtype of the input."""
    return (parts[0] if parts.shape[0] == 1 else parts.sum(0)).to(like.dtype)
