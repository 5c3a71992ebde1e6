"""The selective scan in standard operators, for `torch.export` and ONNX: any batch, height, width and length.

The recurrence is exact, never divided by running products: a loop (`torch.export`'s scan operator, ONNX `Scan`) walks
blocks of T positions and carries the state. In a block, step sizes, decays and inputs of all positions are formed at
once, T multiply-adds advance the state, and one batched product with C gives the outputs. Step sizes, decays and states
exist for one block only, so that memory does not grow with length x states.

Shapes: L positions of one reading order, T of a block, S sequences, K directions, G groups, P = D / G channels of a
group, N states, R rank of delta. A block is (S, K, G, T, ...), channels last.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan

_BLOCK = 16
"""Positions of one loop step: 8 to 64 take about equal time in onnxruntime, and short blocks keep the graph small."""

_enabled = False


@contextmanager
def export_mode() -> Iterator[None]:
    """Within this context the public scans run (and are traced) as standard operators instead of a back end.

    For export only: inference, no gradients. One thread at a time.
    """
    global _enabled
    before, _enabled = _enabled, True
    try:
        yield
    finally:
        _enabled = before


def active() -> bool:
    """Whether `export_mode` is on."""
    return _enabled


class _Constants(NamedTuple):
    """What is the same at all positions."""

    A: Tensor  # (S, K, G, 1, N, P)
    weight: Tensor | None  # (S, K, G, R, P)
    bias: Tensor | None  # (S, K, G, 1, P)
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
    parameters = [None if t is None else t[None] for t in (A, delta_weight, delta_bias)]
    constants = _constants(*parameters, ordered[2], softplus, acc)
    y, final = _recurrence([_sequences(*ordered, constants, acc)], constants, initial_state)
    y = _join(y[:, :, 0], length)
    y = (y.flip(1) if reverse else y).reshape(*batch, length, u.shape[-1]).movedim(last, dim)
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
        ordered = (_read(t, name) for t in (x, delta[:, :, :, k], B[:, :, :, k], C[:, :, :, k]))
        inputs.append(_sequences(*ordered, constants, acc))
    y, final = _recurrence(inputs, constants, initial_state)
    maps = [_write(_join(y[:, :, k], x.shape[1] * x.shape[2]), name, x) for k, name in enumerate(directions)]
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
    y = y.flip(1) if direction.endswith("_reversed") else y
    if direction.startswith("columns"):
        return y.reshape(batch, width, height, channels).transpose(1, 2)
    return y.reshape(batch, height, width, channels)


def _constants(
    A: Tensor, weight: Tensor | None, bias: Tensor | None, B: Tensor, softplus: bool, dtype: torch.dtype
) -> _Constants:
    """From A (K, D, N), delta_weight (K, D, R), delta_bias (K, D) and B (S, ..., G, N).

    Repeated for the S sequences: the loop's tracer keeps the sizes of a tensor exactly only if one of them is traced,
    and `@` would repeat the weight in every block.
    """

    def grouped(t: Tensor) -> Tensor:
        return t.to(dtype).reshape(t.shape[0], B.shape[-2], -1, *t.shape[2:])

    def repeated(t: Tensor) -> Tensor:
        return _copied(t.expand(sequences, *t.shape))

    sequences = B.shape[0]
    return _Constants(
        A=repeated(grouped(A).transpose(2, 3).unsqueeze(2)),
        weight=None if weight is None else repeated(grouped(weight).transpose(2, 3)),
        bias=None if bias is None else repeated(grouped(bias).unsqueeze(2)),
        softplus=softplus,
    )


def _sequences(u: Tensor, delta: Tensor, B: Tensor, C: Tensor, constants: _Constants, dtype: torch.dtype) -> _Sequences:
    """From u (S, L, D), delta (S, L, D | R) and B, C (S, L, G, N)."""
    shape = (*B.shape[:3], constants.A.shape[-1])
    delta = delta.reshape(shape) if constants.weight is None else delta.unsqueeze(2).expand(-1, -1, shape[2], -1)
    return _Sequences(u.reshape(shape).to(dtype), delta.to(dtype), B.to(dtype), C.to(dtype))


def _cut(t: Tensor) -> Tensor:
    """(S, L, G, X) -> (blocks, S, G, T, X), zeros after the end."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # half a second, and only for export

    sequences, length, *rest = t.shape
    count = (length + _BLOCK - 1) // _BLOCK
    # Asking `length % T == 0` of a traced size would fix it to the example's answer.
    if not statically_known_true(length % _BLOCK == 0):
        t = F.pad(t, (0, 0, 0, 0, 0, count * _BLOCK - length))
    return t.reshape(sequences, count, _BLOCK, *rest).permute(1, 0, 3, 2, 4)


def _join(y: Tensor, length: int) -> Tensor:
    """(blocks, S, G, T, P) -> (S, L, D)."""
    y = _copied(y.permute(1, 0, 3, 2, 4))
    return _copied(y.flatten(3, 4).flatten(1, 2).narrow(1, 0, length))


def _softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) as max(x, 0) + log1p(z), z = e^-|x|, with log1p(z) = 2 atanh(z / (2 + z)) as a series.

    Exact to 2e-8 of its value for small step sizes as well, where log(1 + z) is not, and five times as fast in
    onnxruntime as its Softplus.
    """
    z = torch.exp(-x.abs())
    t = z / (z + 2)
    square = t * t
    series = 2 / 13 * square + 2 / 11
    for odd in (9, 7, 5, 3, 1):
        series = series * square + 2 / odd
    return x.relu() + t * series


def _step_sizes(delta: Tensor, weight: Tensor | None, bias: Tensor | None, softplus: bool) -> Tensor:
    """Step sizes (S, K, G, T, P) of a block."""
    dt = delta if weight is None else delta @ weight
    dt = dt if bias is None else dt + bias
    if not softplus:
        return dt
    return F.softplus(dt) if dt.dtype == torch.float64 else _softplus(dt)


def _recurrence(inputs: Sequence[_Sequences], constants: _Constants, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t and y_t = <C_t, h_t>.

    Args:
        inputs: One for each of the K directions.
        constants: Of all directions.
        state: (S, K, D, N) or a shape with as many elements, before the first position; zero if not given.

    Returns:
        y (blocks, S, K, G, T, P), and the state after the last position (S, K, D, N).
    """
    u, delta, B, C = (torch.stack([_cut(t) for t in parts], dim=2) for parts in zip(*inputs, strict=True))
    A, weight, bias, softplus = constants
    sequences, directions, groups, _, states, channels = A.shape
    if state is None:
        start = torch.zeros_like(A)
    else:
        start = state.to(A.dtype).reshape(sequences, directions, groups, 1, channels, states)
        start = _copied(start.transpose(4, 5))
    length = inputs[0].u.shape[1]
    positions = torch.arange(u.shape[0] * _BLOCK, device=u.device).reshape(-1, 1, 1, 1, _BLOCK, 1)
    live = (positions < length).to(u.dtype)

    def advance(h: Tensor, block: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        u, delta, B, C, live = block
        dt = _step_sizes(delta, weight, bias, softplus) * live
        decays = torch.exp(dt.unsqueeze(-2) * A)
        gains = B.unsqueeze(-1) * (dt * u).unsqueeze(-2)
        history = []
        for decay, gain in zip(decays.split(1, dim=3), gains.split(1, dim=3), strict=True):
            h = decay * h + gain
            history.append(h)
        return h, (C.unsqueeze(-2) @ torch.cat(history, dim=3)).squeeze(-2)

    final, y = scan(advance, start, (u, delta, B, C, live))
    return y, _copied(final.transpose(4, 5)).reshape(sequences, directions, groups * channels, states)
