"""The selective scan in standard operators, for `torch.export` and ONNX: any batch, height, width and length.

The recurrence is exact, never divided by running products. An outer loop (torch's scan operator, ONNX `Scan`) walks
blocks of T positions and carries the state. In a block, step sizes, decays and inputs of all positions are formed at
once, one multiply-add after the other advances the state, and one batched product with C gives the outputs. Decays and
states exist for one block only, so that memory does not grow with length x states. The multiply-adds are an inner loop
for onnxruntime; for torch, where each operator costs microseconds of its own, they are written out and fewer.

Shapes: L positions of one reading order, T of a block, S sequences, K directions, G groups, P = D / G channels of a
group, N states, R rank of delta. Inside a block the positions come first, (T, S, K, G, ...), channels last.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan

_BLOCK = 32
"""Positions of one step of the outer loop: 32 to 128 take about equal time in onnxruntime."""
_UNROLLED_BLOCK = 64
"""The same in the form for torch, whose graph holds every one of them."""
_NO_STEP = -1e4
"""Before softplus: a step size of 0."""
_WORTH_AN_OPERATOR = 16384
"""Elements of a position from which one operator for it takes no longer than half the work on a pair."""

_enabled = False
_unrolled = False


@contextmanager
def export_mode(*, unrolled: bool = False) -> Iterator[None]:
    """Within this context the public scans run (and are traced) as standard operators instead of a back end.

    For export only: inference, no gradients. One thread at a time.

    Args:
        unrolled: the form that torch runs fastest, with the inner loop written out; onnxruntime is faster with the
            loop.
    """
    global _enabled, _unrolled
    before = _enabled, _unrolled
    _enabled, _unrolled = True, unrolled
    try:
        yield
    finally:
        _enabled, _unrolled = before


def active() -> bool:
    """Whether `export_mode` is on."""
    return _enabled


class _Constants(NamedTuple):
    """What is the same at all positions."""

    A: Tensor  # (K, G, N, P)
    weight: Tensor | None  # (S, K, G, R, P)
    bias: Tensor | None  # (K, G, 1, P)
    softplus: bool


class _Sequences(NamedTuple):
    """What differs between positions, of one direction, in reading order."""

    u: Tensor  # (S, L, G, P)
    delta: Tensor  # (S, L, G, P | R)
    B: Tensor  # (S, L, G, N)
    C: Tensor  # (S, L, G, N)


def selective_scan_export(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, *,
    delta_weight: Tensor | None = None, delta_bias: Tensor | None = None, softplus: bool = False,
    z: Tensor | None = None, reverse: bool = False, dim: int = 1, initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`kernels.selective_scan` in standard operators; arguments and results as there.

    Args:
        u, z: (..., channels), scanned over axis `dim`.
        delta: (..., channels), or (..., R) with delta_weight (channels, R).
        A: (channels, N), negative.
        B, C: (..., N) or (..., G, N).
        D, delta_bias: (channels,).
        initial_state: u's shape without `dim`, then N.

    Returns:
        y like u, and with `return_final_state` the state after the last position read.
    """
    dim = dim % u.ndim
    acc = _accumulator(u)
    B, C = (t.unsqueeze(-2) if t.ndim == u.ndim else t for t in (B, C))
    length, batch = u.shape[dim], (*u.shape[:dim], *u.shape[dim + 1 : -1])
    last = u.ndim - 2

    def read(t: Tensor) -> Tensor:
        t = _copied(t.movedim(dim, last)).reshape(math.prod(batch), length, *t.shape[last + 1 :])
        return t.flip(1) if reverse else t

    ordered = [read(t) for t in (u, delta, B, C)]
    weight, bias = (None if t is None else t[None] for t in (delta_weight, delta_bias))
    constants = _constants(A[None], weight, bias, ordered[2], softplus, acc)
    y, final = _recurrence([_sequences(ordered, constants, acc)], constants, initial_state)
    y = _join(y[:, :, :, 0], length)
    y = (y.flip(1) if reverse else _copied(y)).reshape(*batch, length, u.shape[-1]).movedim(last, dim)
    if D is not None:
        y = y + u.to(acc) * D
    if z is not None:
        y = y * F.silu(z.to(acc))
    y = y.to(u.dtype)
    return (y, final.reshape(*batch, *A.shape)) if return_final_state else y


def selective_scan_2d_export(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, *,
    directions: Sequence[str] = ("rows", "columns", "rows_reversed", "columns_reversed"),
    delta_weight: Tensor | None = None, delta_bias: Tensor | None = None, softplus: bool = False,
    merge: str = "sum", initial_state: Tensor | None = None, return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`kernels.selective_scan_2d` in standard operators; arguments and results as there.

    Args:
        x: (batch, height, width, channels).
        delta, B, C: (batch, height, width, K, channels | R | N).
        A: (K, channels, N), negative. D, delta_bias: (K, channels). delta_weight: (K, channels, R).
        initial_state: (batch, K, channels, N), each direction's in its own reading order.

    Returns:
        (batch, height, width, channels), or with a K axis before channels for merge="none"; with
        `return_final_state` also the states.
    """
    acc = _accumulator(x)
    B, C = B.unsqueeze(-2), C.unsqueeze(-2)
    constants = _constants(A, delta_weight, delta_bias, B, softplus, acc)
    inputs = []
    for k, name in enumerate(directions):
        ordered = [_read(t, name) for t in (x, delta[:, :, :, k], B[:, :, :, k], C[:, :, :, k])]
        inputs.append(_sequences(ordered, constants, acc))
    y, final = _recurrence(inputs, constants, initial_state)
    maps = [_write(_join(y[:, :, :, k], x.shape[1] * x.shape[2]), name, x) for k, name in enumerate(directions)]
    if merge == "sum":
        y = sum(maps[1:], maps[0])
        y = y if D is None else y + x.to(acc) * D.sum(0)
    else:
        y = torch.stack(maps, dim=3)
        y = y if D is None else y + x.to(acc).unsqueeze(3) * D
    y = y.to(x.dtype)
    return (y, final.reshape(-1, *A.shape)) if return_final_state else y


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _copied(t: Tensor) -> Tensor:
    """A contiguous copy. `reshape` alone asks whether a view will do, and so fixes the sizes for which it does."""
    return t.clone(memory_format=torch.contiguous_format)


def _read(t: Tensor, direction: str) -> Tensor:
    """(B, H, W, ...) -> (B, L, ...), the positions as `direction` visits them."""
    t = t.transpose(1, 2) if direction.startswith("columns") else t
    t = _copied(t).flatten(1, 2)
    return t.flip(1) if direction.endswith("_reversed") else t


def _write(y: Tensor, direction: str, x: Tensor) -> Tensor:
    """(B, L, D) in reading order -> (B, H, W, D), the positions of x."""
    batch, height, width, channels = x.shape
    y = y.flip(1) if direction.endswith("_reversed") else _copied(y)
    if direction.startswith("columns"):
        return y.reshape(batch, width, height, channels).transpose(1, 2)
    return y.reshape(batch, height, width, channels)


def _constants(
    A: Tensor, weight: Tensor | None, bias: Tensor | None, B: Tensor, softplus: bool, dtype: torch.dtype
) -> _Constants:
    """From A (K, D, N), delta_weight (K, D, R), delta_bias (K, D) and B (S, ..., G, N)."""

    def grouped(t: Tensor) -> Tensor:
        return t.to(dtype).reshape(t.shape[0], B.shape[-2], -1, *t.shape[2:])

    return _Constants(
        A=_copied(grouped(A).transpose(2, 3)),
        # For each sequence: `@` would repeat it in every block, by a rule that asks for the sizes.
        weight=None if weight is None else _copied(grouped(weight).transpose(2, 3).expand(B.shape[0], -1, -1, -1, -1)),
        bias=None if bias is None else _copied(grouped(bias).unsqueeze(2)),
        softplus=softplus,
    )


def _sequences(ordered: Sequence[Tensor], constants: _Constants, dtype: torch.dtype) -> _Sequences:
    """From u (S, L, D), delta (S, L, D | R) and B, C (S, L, G, N)."""
    u, delta, B, C = (t.to(dtype) for t in ordered)
    shape = (*B.shape[:3], constants.A.shape[-1])
    delta = delta.reshape(shape) if constants.weight is None else delta.unsqueeze(2).expand(-1, -1, shape[2], -1)
    return _Sequences(u.reshape(shape), delta, B, C)


def _cut(t: Tensor, after_end: float) -> Tensor:
    """(S, L, G, X) -> (blocks, T, S, G, X), filled up after the end."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # half a second, and only for export

    sequences, length, *rest = t.shape
    size = _UNROLLED_BLOCK if _unrolled else _BLOCK
    count = (length + size - 1) // size
    # Asking `length % T == 0` of a traced size would fix it to the example's answer.
    if not statically_known_true(length % size == 0):
        t = F.pad(t, (0, 0, 0, 0, 0, count * size - length), value=after_end)
    return t.reshape(sequences, count, size, *rest).permute(1, 2, 0, 3, 4)


def _blocks(parts: Sequence[Tensor], after_end: float = 0.0) -> Tensor:
    """One (S, L, G, X) for each direction -> (blocks, T, S, K, G, X), filled up after the end."""
    return torch.stack([_cut(t, after_end) for t in parts], dim=3)


def _join(y: Tensor, length: int) -> Tensor:
    """(blocks, T, S, G, P) -> (S, L, D), not contiguous."""
    y = _copied(y.permute(2, 0, 1, 3, 4))
    return y.flatten(3, 4).flatten(1, 2).narrow(1, 0, length)


_LOG1P = (0.0005499566077, 0.00218477795, 0.01250768601, 0.08333290205, 1.000000004)
"""Coefficients of log1p(z) / t, t = z / (1 + z / 2), in powers of t^2, highest first: 2 artanh(t / 2) / t
interpolated at the Chebyshev points of 0 <= t^2 <= 4/9 (0 <= z <= 1), exact to 4e-9."""


def _softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) as max(x, 0) + log1p(e^-|x|).

    Unlike log(1 + z) exact for small step sizes too, and five times as fast in onnxruntime as its Softplus.
    """
    z = torch.exp(-x.abs())
    t = z / (1 + 0.5 * z)
    square = t * t
    series = square * _LOG1P[0] + _LOG1P[1]
    for coefficient in _LOG1P[2:]:
        series = series * square + coefficient
    return x.relu() + t * series


def _step_sizes(delta: Tensor, weight: Tensor | None, bias: Tensor | None, softplus: bool) -> Tensor:
    """Step sizes (S, K, G, T, P) of a block."""
    dt = delta if weight is None else delta @ weight
    dt = dt if bias is None else dt + bias
    if not softplus:
        return dt
    return F.softplus(dt) if dt.dtype == torch.float64 else _softplus(dt)


Advance = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, Tensor]]
"""From the state (S, K, G, N, P) and what a block needs to the state after it and its outputs (T, S, K, G, P)."""


def _recurrence(inputs: Sequence[_Sequences], constants: _Constants, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t and y_t = <C_t, h_t>.

    Args:
        inputs: One for each of the K directions.
        constants: Of all directions.
        state: (S, K, D, N) or a shape with as many elements, before the first position; zero if not given.

    Returns:
        y (blocks, T, S, K, G, P), and the state after the last position (S, K, D, N).
    """
    blocks, advance = (_written_out if _unrolled else _looped)(inputs, constants)
    directions, groups, states, channels = constants.A.shape
    sequences = inputs[0].u.shape[0]
    if state is None:
        start = blocks[0].new_zeros(sequences, *constants.A.shape)
    else:
        start = state.to(constants.A.dtype).reshape(sequences, directions, groups, channels, states)
        start = _copied(start.transpose(3, 4))
    # Sizes that are not traced are exact, above all those of 1; else the loop's tracer frees the constants' sizes.
    with torch._dynamo.config.patch(assume_static_by_default=True, automatic_dynamic_shapes=False):
        final, y = scan(advance, start, blocks)
    return y, _copied(final.transpose(3, 4)).reshape(sequences, directions, groups * channels, states)


def _looped(inputs: Sequence[_Sequences], constants: _Constants) -> tuple[tuple[Tensor, ...], Advance]:
    """The blocks, and the step from one to the next with a loop over its positions: what onnxruntime is fast at."""
    u, delta, B, C = (_blocks(parts) for parts in zip(*inputs, strict=True))
    delta = _copied(delta.movedim(1, 4))
    A, weight, bias, softplus = constants
    length = inputs[0].u.shape[1]
    positions = torch.arange(u.shape[0] * _BLOCK, device=u.device).reshape(-1, 1, 1, 1, _BLOCK, 1)
    live = (positions < length).to(u.dtype)  # step size 0 after the end keeps the final state

    def step(h: Tensor, position: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        decay, gain = position
        h = decay * h + gain
        return h, h.clone()  # results of a loop must not share memory

    def advance(h: Tensor, block: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        u, delta, B, C, live = block
        dt = _step_sizes(delta, weight, bias, softplus) * live
        dt = dt.movedim(3, 0).unsqueeze(-2)  # (T, S, K, G, 1, P)
        decays = torch.exp(dt * A)
        gains = B.unsqueeze(-1) @ (dt * u.unsqueeze(-2))
        h, history = scan(step, h, (decays, gains))
        return h, (C.unsqueeze(-2) @ history).squeeze(-2)

    return (u, delta, B, C, live), advance


def _written_out(inputs: Sequence[_Sequences], constants: _Constants) -> tuple[tuple[Tensor, ...], Advance]:
    """As `_looped`, for torch: one small operator for each position, all others large and in place."""
    A, weight, bias, softplus = constants
    u, raw, B, C = map(list, zip(*inputs, strict=True))
    if weight is not None:
        raw = [torch.einsum("slgr,grp->slgp", delta, weight[0, k]) for k, delta in enumerate(raw)]
    if bias is not None and not softplus:  # before the end is filled up with steps of 0
        raw, bias = [delta + bias[k, :, 0] for k, delta in enumerate(raw)], None
    after_end = _NO_STEP if softplus else 0.0  # step size 0 keeps the final state
    blocks = (_blocks(u), _blocks(raw, after_end), _blocks(B), _blocks(C))
    A = A * math.log2(math.e)  # torch takes a fifth of the time for 2^x that it takes for e^x

    def advance(h: Tensor, block: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        u, dt, B, C = block
        dt = dt if bias is None else dt + bias.squeeze(2)
        dt = _softplus_for_torch(dt) if softplus else dt
        decays = (dt.unsqueeze(-2) * A).exp2_()
        states = B.unsqueeze(-1) * (dt * u).unsqueeze(-2)  # (T, S, K, G, N, P), here without what came before
        _connect(decays, states, h)
        return states[-1].clone(), (C.unsqueeze(-2) @ states).squeeze(-2)

    return blocks, advance


def _connect(decays: Tensor, states: Tensor, h: Tensor) -> None:
    """In place s_0 += a_0 h, then s_t += a_t s_{t-1} for t = 1, 2, ... along the first axis.

    Where positions are too small for an operator each they are taken in pairs: the second of each pair follows from
    the second of the pair before (with the product of two decays), then all first ones follow at once.
    """
    if len(states) > 2 and math.prod(states.shape[2:]) * _UNROLLED_BLOCK // len(states) < _WORTH_AN_OPERATOR:
        first, second = states[0::2], states[1::2]
        first_decays, second_decays = decays[0::2], decays[1::2]
        second.addcmul_(second_decays, first)
        _connect(first_decays * second_decays, second, h)
        first[0].addcmul_(first_decays[0], h)
        first[1:].addcmul_(first_decays[1:], second[:-1])
    else:
        for decay, state in zip(decays.unbind(), states.unbind(), strict=True):
            h = state.addcmul_(decay, h)


def _softplus_for_torch(x: Tensor) -> Tensor:
    """log(1 + e^x) as max(x, 0) + 2 artanh(z / (2 + z)), z = e^-|x|: as exact, and some processors are 20 times as slow
    in torch's log1p."""
    z = x.abs().mul_(-math.log2(math.e)).exp2_()
    return x.relu().add_(z.div_(z + 2).atanh_(), alpha=2)
