"""State space duality (Mamba-2) as an obvious loop: the definition every back end is compared with.

Shapes: B batch, H/W height and width, L positions of one reading order, K directions, E heads, P head_dim, G groups,
N states. Canonical tensors are (B, H, W, ...), channels last; see op.py for how the public calls reduce to them.
"""

import torch
from torch import Tensor

from ..selective_scan.reference import (
    COLUMNS_REVERSED,
    LINES,
    LINES_REVERSED,
    ROWS_REVERSED,
    read_in_order,
    step_sizes,
    write_in_order,
)  # fmt: skip

REVERSED = (ROWS_REVERSED, COLUMNS_REVERSED, LINES_REVERSED)
"""Reading orders that start at the last position."""


def lines_of(x: Tensor, orders: tuple[int, ...]) -> int:
    """Sequences per batch item: W for scans along axis H alone, 1 for reading orders of a whole image."""
    return x.shape[2] if orders[0] >= LINES else 1


def length_of(x: Tensor, orders: tuple[int, ...]) -> int:
    """Positions of one sequence."""
    return x.shape[1] if orders[0] >= LINES else x.shape[1] * x.shape[2]


def ssd_loop(
    x: Tensor, dt: Tensor, A: Tensor, Bm: Tensor, C: Tensor, start: Tensor | None, *, strict: bool
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T and y_t = h_t C_t, one position after the other.

    Args:
        x: (S, L, E, P) inputs.
        dt: (S, L, E) step sizes.
        A: (E,), negative.
        Bm, C: (S, L, G, N); head e reads group e // (E / G).
        start: (S, E, P, N) state before the first position, or None for zero.
        strict: leave a position's own input out of its output.

    Returns:
        y (S, L, E, P) and the final state (S, E, P, N).
    """
    sequences, length, heads, head_dim = x.shape
    Bm, C = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (Bm, C))  # (S, L, E, N)
    h = x.new_zeros(sequences, heads, head_dim, Bm.shape[3]) if start is None else start
    outputs = []
    for t in range(length):
        decayed = torch.exp(dt[:, t] * A)[..., None, None] * h
        h = decayed + (dt[:, t, :, None] * x[:, t])[..., None] * Bm[:, t, :, None]
        outputs.append(((decayed if strict else h) * C[:, t, :, None]).sum(-1))
    return torch.stack(outputs, dim=1), h


def ssd_reference(
    x: Tensor, dt: Tensor, A: Tensor, Bm: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, *,
    orders: tuple[int, ...], softplus: bool, merge: bool, strict: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The whole operator in canonical form (see op.py); gradients by autograd through the loop."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, height, width = x.shape[:3]
    outputs, finals = [], []
    for k, order in enumerate(orders):
        u, dt_k, b_k, c_k = (
            read_in_order(t, order).to(acc) for t in (x, dt[:, :, :, k], Bm[:, :, :, k], C[:, :, :, k])
        )
        steps = step_sizes(dt_k, None, None if dt_bias is None else dt_bias[k], softplus=softplus, dtype=acc)
        start = None if initial_state is None else initial_state[:, :, k].flatten(0, 1)
        y, final = ssd_loop(u, steps, A[k], b_k, c_k, start, strict=strict and order in REVERSED)
        if D is not None:
            y = y + D[k][:, None] * u
        outputs.append(write_in_order(y, order, batch, height, width))
        finals.append(final.unflatten(0, (batch, -1)))
    y = torch.stack(outputs, dim=3)
    return (y.sum(3) if merge else y).to(x.dtype), torch.stack(finals, dim=2)
