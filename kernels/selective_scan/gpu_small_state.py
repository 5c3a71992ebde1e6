"""Triton back end of the selective scan for one or two states; same contract as `gpu`, whose kernels suit 16 states.

Each sequence is walked once, every input read once and every output written once; the kernels are those of
`gpu_small_kernels` and `gpu_small_gradient`. The forward pass keeps the state before every tile of STEPS steps. The
directions of an image that are summed are walked one after the other by the same programs, which add to a float32
buffer; backward, each direction has programs of its own.

There is no splitting of a sequence over programs, so there must be sequences enough: see `suits`.
"""

# num_warps is an argument of every launch that the kernels' signatures do not have:
# pyright: reportCallIssue=false, reportArgumentType=false
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .gpu import MAX_RANK, WANT, _full_delta, _Inputs, _on, _pack, back_to_low_rank, needs_of_full_delta
from .gpu_small_gradient import small_gradient_kernel
from .gpu_small_kernels import small_forward_kernel
from .reference import COLUMNS, COLUMNS_REVERSED, LINES, LINES_REVERSED, ROWS_REVERSED, sequences_and_length

MAX_STATES = 2
WANT_ORDER = ("x", "delta", "A", "B", "C", "D", "weight", "bias", "z")
"""The inputs of a scan but the initial state, by their names in `gpu.WANT`."""
STEPS = 64
"""Steps of a tile, forward and backward, since backward starts from the saved states between tiles."""
MAX_PROGRAMS = 4096
"""Most programs of a launch; each has a scratch of its own, which must not grow with the number of sequences."""


@dataclass(frozen=True)
class Tile:
    """How a program works: channels, warps, and segments of a tile (of 1, 2, 4 or 8 steps each)."""

    channels: int
    segments: int
    warps: int
    registers: int
    """Most registers of a thread."""

    @property
    def options(self) -> dict[str, int]:
        """Options of a launch."""
        limit = {} if torch.version.hip else {"maxnreg": self.registers}
        return {"num_warps": self.warps, **limit}


SLIM = Tile(channels=16, segments=16, warps=4, registers=168)
"""Three programs on a multiprocessor: 6144 channels of all sequences together run at once on 132 of them."""
ROOMY = Tile(channels=16, segments=16, warps=4, registers=255)
"""Where the limit of SLIM would spill much."""
LOW_RANK = Tile(channels=32, segments=16, warps=4, registers=255)
"""Wider, since each block of channels has its own share of the gradient of the low-rank signal."""


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _launches(programs: int) -> list[tuple[int, int]]:
    """The launches that run so many programs: (first one, how many)."""
    return [(first, min(MAX_PROGRAMS, programs - first)) for first in range(0, programs, MAX_PROGRAMS)]


def suits(x: Tensor, orders: tuple[int, ...], state: int) -> bool:
    """Whether these kernels are the better choice: few states, long enough sequences, enough of them to fill a GPU."""
    sequences, length = sequences_and_length(x, orders)
    programs = sequences * _cdiv(x.shape[3], SLIM.channels)
    return state <= MAX_STATES and length >= STEPS // 2 and programs >= 96 and _pixel_stride(x, orders) is not None


def _is_lines(orders: tuple[int, ...]) -> bool:
    return orders[0] >= LINES


def _pixel_stride(t: Tensor, orders: tuple[int, ...]) -> int | None:
    """Distance of neighbouring pixels of (B, H, W, ...) in row order, or of steps of a line; None if there is none."""
    height, width = t.shape[1:3]
    if _is_lines(orders) or width == 1:
        return t.stride(1)
    return t.stride(2) if height == 1 or t.stride(1) == width * t.stride(2) else None


def _even(t: Tensor, orders: tuple[int, ...]) -> Tensor:
    """The tensor, copied only if the last axis is strided or pixels have no common stride (a window of an image)."""
    return t if t.stride(-1) == 1 and _pixel_stride(t, orders) is not None else t.contiguous()


def _strides(t: Tensor | None, orders: tuple[int, ...], axes: str) -> tuple[int, ...]:
    """Strides (batch, line, pixel, direction, group, share); ``axes`` names those beyond pixels: of s (first), k, g."""
    if t is None:
        return (0,) * 6
    share = t.stride(0) if "s" in axes else 0
    t = t[0] if "s" in axes else t
    s = t.stride()
    pixel = _pixel_stride(t, orders)
    assert pixel is not None
    line = s[2] if _is_lines(orders) else 0
    return s[0], line, pixel, s[3] if "k" in axes else 0, s[4] if "g" in axes else 0, share


def _state_strides(t: Tensor | None, orders: tuple[int, ...]) -> tuple[int, ...]:
    """Strides (batch, line, direction, channel, state) of (B, K, D, N) or, for lines, (B, W, 1, D, N)."""
    if t is None:
        return (0,) * 5
    s = t.stride()
    return s if _is_lines(orders) else (s[0], 0, *s[1:])


@dataclass(frozen=True)
class _Plan:
    """Sizes of one call, and what all launches have in common."""

    batch: int
    height: int
    width: int
    channels: int
    directions: int
    groups: int
    states: int
    rank: int
    orders: tuple[int, ...]
    softplus: bool
    exact: bool
    """Whether the inputs are float32, so that approximations fit for half precision are not enough."""

    @staticmethod
    def of(x: Tensor, A: Tensor, Bm: Tensor, weight: Tensor | None, orders: tuple[int, ...], softplus: bool) -> "_Plan":
        rank = 0 if weight is None else weight.shape[2]
        exact = x.dtype == torch.float32
        return _Plan(*x.shape, len(orders), Bm.shape[4], A.shape[2], rank, orders, softplus, exact)

    @property
    def lines(self) -> int:
        return self.width if _is_lines(self.orders) else 1

    @property
    def sequences(self) -> int:
        return self.batch * self.lines

    @property
    def length(self) -> int:
        return self.height if _is_lines(self.orders) else self.height * self.width

    @property
    def tiles(self) -> int:
        return _cdiv(self.length, STEPS)

    @property
    def border(self) -> tuple[int, ...]:
        """Shape of the states before each tile."""
        return (self.sequences, self.directions, self.tiles, self.states, self.channels)

    @property
    def axes(self) -> list[tuple[bool, list[int]]]:
        """Directions by the axis they run along: (whether along columns, directions)."""
        columns = [k for k, o in enumerate(self.orders) if o in (COLUMNS, COLUMNS_REVERSED)]
        rows = [k for k in range(self.directions) if k not in columns]
        return [(flag, axis) for flag, axis in ((False, rows), (True, columns)) if axis]

    def wide(self, *tensors: Tensor | None) -> bool:
        """Whether 32 bits do not address the pixels of one sequence (along columns; along rows, those of a tile)."""
        span = STEPS if _is_lines(self.orders) else self.length
        strides = [abs(_pixel_stride(t, self.orders) or 0) for t in tensors if t is not None]
        return span * max(strides) + self.channels >= 1 << 31

    def block(self, tile: Tile) -> int:
        """Channels of a program."""
        return max(16, min(tile.channels, triton.next_power_of_2(self.channels // self.groups)))

    def blocks(self, tile: Tile) -> int:
        """Channel blocks of one group."""
        return _cdiv(self.channels // self.groups, self.block(tile))

    def arguments(self, tile: Tile) -> dict[str, int | bool | str]:
        """What the launches of a pass are called with."""
        backwards = (ROWS_REVERSED, COLUMNS_REVERSED, LINES_REVERSED)
        return {
            "height": self.height, "width": self.width, "lines": self.lines, "length": self.length,
            "backwards": sum(1 << k for k, o in enumerate(self.orders) if o in backwards), "K": self.directions,
            "channels": self.channels, "group_channels": self.channels // self.groups, "rank": self.rank,
            "n_tiles": self.tiles, "N": self.states, "S": tile.segments, "U": STEPS // tile.segments,
            "BD": self.block(tile), "RP": max(16, triton.next_power_of_2(self.rank)) if self.rank else 0,
            "EVEN": self.channels // self.groups % self.block(tile) == 0, "SOFTPLUS": self.softplus,
            "EXACT": self.exact, "PRECISION": "tf32x3" if self.exact else "tf32",
            **tile.options,
        }  # fmt: skip


def saved_shape(x: Tensor, orders: tuple[int, ...], groups: int, state: int) -> tuple[int, ...]:
    """Shape of the states that `forward` keeps: (sequences, K, tiles, N, D)."""
    sequences, length = sequences_and_length(x, orders)
    return (sequences, len(orders), _cdiv(length, STEPS), state, x.shape[3])


def forward(
    x: Tensor, delta: Tensor, A: Tensor, Bm: Tensor, C: Tensor, D: Tensor | None, delta_weight: Tensor | None,
    delta_bias: Tensor | None, z: Tensor | None, initial_state: Tensor | None,
    *, orders: tuple[int, ...], softplus: bool, merge: bool, need_backward: bool, want_final: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, final states if wanted, and the states kept for `backward` (canonical form: see op.py)."""
    if delta_weight is not None and delta_weight.shape[2] > MAX_RANK:
        delta, delta_weight = _full_delta(delta, delta_weight), None
    weight = None if delta_weight is None else delta_weight.contiguous()
    x, delta, Bm, C = (_even(t, orders) for t in (x, delta, Bm, C))
    z = None if z is None else _even(z, orders)
    plan = _Plan.of(x, A, Bm, weight, orders, softplus)
    tile = SLIM if plan.states == 1 else ROOMY
    y = x.new_empty(x.shape if merge else (*x.shape[:3], plan.directions, plan.channels))
    sum_of_several = merge and plan.directions > 1
    total = torch.empty_like(y, dtype=torch.float32) if sum_of_several else None
    lead = (plan.batch, plan.width) if _is_lines(orders) else (plan.batch,)
    final = A.new_empty(*lead, plan.directions, plan.channels, plan.states) if want_final else None
    border = A.new_empty(plan.border) if need_backward else None
    each = plan.states * 2 * tile.segments * plan.block(tile) + (2 * STEPS * plan.block(tile) if plan.rank else 0)
    common = plan.arguments(tile)
    programs = plan.sequences * plan.groups * plan.blocks(tile)
    wide = plan.wide(x, z, Bm, C, delta, y)
    strides = (
        _strides(x, orders, ""), _strides(z, orders, ""), _strides(Bm, orders, "kg"), _strides(C, orders, "kg"),
        _strides(delta, orders, "k"), _state_strides(initial_state, orders), _state_strides(final, orders),
        _strides(total, orders, ""), _strides(y, orders, "" if merge else "k"),
    )  # fmt: skip
    with _on(x):
        for number, (columns, axis) in enumerate(plan.axes):
            n_dirs, fan = (len(axis), 1) if merge else (1, len(axis))
            for first, count in _launches(programs * fan):
                small_forward_kernel[(count,)](
                    x, z, Bm, C, delta, weight, A, D, delta_bias, initial_state, border, final, total, y,
                    A.new_empty(count * each), *strides, **common, dirs=_pack(axis), n_dirs=n_dirs, fan=fan,
                    is_first=int(number == 0), is_last=int(number == len(plan.axes) - 1), first_program=first,
                    COLUMNS=columns, ACCUMULATE=sum_of_several, WIDE=wide,
                )  # fmt: skip
    final, border = (A.new_empty(0) if t is None else t for t in (final, border))
    return y, final, border


def backward(
    grad_y: Tensor, grad_final: Tensor | None, x: Tensor, delta: Tensor, A: Tensor, Bm: Tensor, C: Tensor,
    D: Tensor | None, delta_weight: Tensor | None, delta_bias: Tensor | None, z: Tensor | None,
    initial_state: Tensor | None, saved: Tensor,
    *, orders: tuple[int, ...], softplus: bool, merge: bool, needs: tuple[bool, ...],
) -> list[Tensor | None]:  # fmt: skip
    """The gradients that ``needs`` asks for, in the order of the inputs; the same bits at every call."""
    grad_y, x, Bm, C = (_even(t, orders) for t in (grad_y, x, Bm, C))
    z = None if z is None else _even(z, orders)
    if delta_weight is None or delta_weight.shape[2] <= MAX_RANK:
        weight = None if delta_weight is None else delta_weight.contiguous()
        inputs = _Inputs(x, _even(delta, orders), A, Bm, C, D, weight, delta_bias, z, None)
        return _gradients(grad_y, grad_final, inputs, saved, orders, softplus, merge, needs)
    inputs = _Inputs(x, _full_delta(delta, delta_weight), A, Bm, C, D, None, delta_bias, z, None)
    found = _gradients(grad_y, grad_final, inputs, saved, orders, softplus, merge, needs_of_full_delta(needs))
    return back_to_low_rank(found, delta, delta_weight, needs)


def _gradients(
    grad_y: Tensor, grad_final: Tensor | None, inputs: _Inputs, saved: Tensor,
    orders: tuple[int, ...], softplus: bool, merge: bool, needs: tuple[bool, ...],
) -> list[Tensor | None]:  # fmt: skip
    x, delta, A, Bm, C, D, weight, bias, z, _ = inputs
    plan = _Plan.of(x, A, Bm, weight, orders, softplus)
    tile = SLIM if z is None else ROOMY
    if plan.rank or plan.states > 1:
        tile = LOW_RANK if plan.states == 1 else ROOMY
    want = sum(WANT[name] for name, need in zip(WANT_ORDER, needs, strict=False) if need)
    blocks = plan.blocks(tile)

    def shares(name: str, like: Tensor | None, count: int, dtype: torch.dtype | None = None) -> Tensor | None:
        """Buffer (count, *like.shape), float32 where several shares are to be added, else in like's dtype."""
        if like is None or not want & WANT[name]:
            return None
        return like.new_empty((count, *like.shape), dtype=dtype or (torch.float32 if count > 1 else like.dtype))

    gx = shares("x", x, plan.directions, x.dtype)
    gz = shares("z", z, 1)
    g_delta = shares("delta", delta, plan.groups * blocks if plan.rank else 1)
    gb, gc = shares("B", Bm, blocks), shares("C", C, blocks)
    sums = [
        shares(name, like, plan.sequences, torch.float32)
        for name, like in (("A", A), ("D", D), ("weight", weight), ("bias", bias))
    ]
    lead = (plan.batch, plan.width) if _is_lines(orders) else (plan.batch,)
    g_start = A.new_empty(*lead, plan.directions, plan.channels, plan.states) if needs[9] else None
    each = (4 * tile.segments + (3 * STEPS if plan.rank else 0)) * plan.block(tile)
    common = plan.arguments(tile)
    programs = plan.sequences * plan.groups * blocks
    wide = plan.wide(x, z, grad_y, Bm, C, delta, *(None if t is None else t[0] for t in (gx, g_delta)))
    s_gx = (*_strides(gx, orders, "s")[:3], gx.stride(0), 0, 0) if gx is not None else (0,) * 6
    strides = (
        _strides(x, orders, ""), _strides(z, orders, ""), _strides(grad_y, orders, "" if merge else "k"),
        _strides(Bm, orders, "kg"), _strides(C, orders, "kg"), _strides(delta, orders, "k"),
        _state_strides(grad_final, orders), s_gx, _strides(gz, orders, "s"), _strides(g_delta, orders, "sk"),
        _strides(gb, orders, "skg"), _strides(gc, orders, "skg"), _state_strides(g_start, orders),
    )  # fmt: skip
    with _on(x):
        for columns, axis in plan.axes:
            for first, count in _launches(programs * len(axis)):
                small_gradient_kernel[(count,)](
                    x, z, grad_y, Bm, C, delta, weight, A, D, bias, saved, grad_final,
                    gx, gz, g_delta, gb, gc, *sums, g_start, A.new_empty(count * each), *strides, **common,
                    dirs=_pack(axis), n_dirs=len(axis), first_program=first, COLUMNS=columns, WANT=want, WIDE=wide,
                )  # fmt: skip
    parts = [gx, g_delta, sums[0], gb, gc, sums[1], sums[2], sums[3], gz]
    return [_total(part, like) for part, like in zip(parts, inputs, strict=False)] + [g_start]


def _total(parts: Tensor | None, like: Tensor | None) -> Tensor | None:
    """Sum of the shares in the dtype of the input; None for what was not wanted."""
    if parts is None or like is None:
        return None
    return (parts[0] if parts.shape[0] == 1 else parts.sum(0)).to(like.dtype)
