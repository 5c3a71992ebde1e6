"""The selective scan as an obvious loop: the definition every back end is compared with.

Shapes: B batch, H/W height and width, L positions of one reading order, K directions, D channels, G groups, N states,
R rank of delta. Canonical tensors are (B, H, W, ...), channels last; see op.py for how the public calls reduce to them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS, COLUMNS, ROWS_REVERSED, COLUMNS_REVERSED, LINES, LINES_REVERSED = range(6)
"""Reading orders: four over a whole image, two over the lines along axis H (every (b, w) is its own sequence)."""


def sequences_and_length(x: Tensor, orders: tuple[int, ...]) -> tuple[int, int]:
    """How many sequences x (B, H, W, D) is read as, and their length: B of H * W, or B * W lines of H."""
    batch, height, width, _ = x.shape
    return (batch * width, height) if orders[0] >= LINES else (batch, height * width)


def read_in_order(tensor: Tensor, order: int) -> Tensor:
    """(B, H, W, ...) -> (sequences, L, ...): the positions as `order` visits them.

    Images give B sequences of H * W positions, lines give B * W sequences of H.
    """
    if order in (LINES, LINES_REVERSED, COLUMNS, COLUMNS_REVERSED):
        tensor = tensor.transpose(1, 2)
    first = slice(0, 2) if order in (LINES, LINES_REVERSED) else slice(1, 3)
    sequences = tensor.flatten(first.start, first.stop - 1)
    return sequences.flip(1) if order in (ROWS_REVERSED, COLUMNS_REVERSED, LINES_REVERSED) else sequences


def write_in_order(sequences: Tensor, order: int, batch: int, height: int, width: int) -> Tensor:
    """Inverse of `read_in_order`: (sequences, L, ...) -> (B, H, W, ...)."""
    rest = sequences.shape[2:]
    if order in (ROWS_REVERSED, COLUMNS_REVERSED, LINES_REVERSED):
        sequences = sequences.flip(1)
    if order in (ROWS, ROWS_REVERSED):
        return sequences.reshape(batch, height, width, *rest)
    return sequences.reshape(batch, width, height, *rest).transpose(1, 2)


def state_of_sequences(state: Tensor, k: int, order: int) -> Tensor:
    """Direction k of a canonical state, (B, K, D, N) or (B, W, 1, D, N), as (sequences, D, N)."""
    return state[:, :, 0].flatten(0, 1) if order in (LINES, LINES_REVERSED) else state[:, k]


def stack_states(states: list[Tensor], orders: tuple[int, ...], batch: int, width: int) -> Tensor:
    """Inverse of `state_of_sequences` over all directions."""
    if orders[0] in (LINES, LINES_REVERSED):
        return states[0].unflatten(0, (batch, width)).unsqueeze(2).contiguous()
    return torch.stack(states, dim=1)


def step_sizes(
    delta: Tensor, delta_weight: Tensor | None, delta_bias: Tensor | None, *, softplus: bool, dtype: torch.dtype
) -> Tensor:
    """Step sizes (..., D) of one direction from delta (..., D), or from (..., R) with delta_weight (D, R)."""
    dt = delta.to(dtype)
    if delta_weight is not None:
        dt = dt @ delta_weight.to(dtype).T
    if delta_bias is not None:
        dt = dt + delta_bias
    return F.softplus(dt) if softplus else dt


def scan_loop(u: Tensor, dt: Tensor, A: Tensor, Bm: Tensor, C: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t and y_t = <C_t, h_t>, one position after the other.

    Args:
        u, dt: (S, L, D) inputs and step sizes.
        A: (D, N), negative.
        Bm, C: (S, L, G, N); channel d reads group d // (D / G).
        start: (S, D, N) state before the first position, or None for zero.

    Returns:
        y (S, L, D) and the final state (S, D, N).
    """
    sequences, _, channels = u.shape
    per_group = channels // Bm.shape[2]
    Bm, C = (t.repeat_interleave(per_group, dim=2) for t in (Bm, C))  # (S, L, D, N)
    h = u.new_zeros(sequences, channels, A.shape[1]) if start is None else start
    outputs = []
    for t in range(u.shape[1]):
        decay = torch.exp(dt[:, t, :, None] * A)
        h = decay * h + (dt[:, t] * u[:, t])[..., None] * Bm[:, t]
        outputs.append((h * C[:, t]).sum(-1))
    return torch.stack(outputs, dim=1), h


def selective_scan_reference(
    x: Tensor, delta: Tensor, A: Tensor, Bm: Tensor, C: Tensor, D: Tensor | None, delta_weight: Tensor | None,
    delta_bias: Tensor | None, z: Tensor | None, initial_state: Tensor | None, *,
    orders: tuple[int, ...], softplus: bool, merge: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The whole operator in canonical form (see op.py); gradients by autograd through the loop."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, height, width, _ = x.shape
    outputs, finals = [], []
    for k, order in enumerate(orders):
        u, d_k, b_k, c_k = (read_in_order(t, order) for t in (x, delta[:, :, :, k], Bm[:, :, :, k], C[:, :, :, k]))
        dt = step_sizes(
            d_k, None if delta_weight is None else delta_weight[k], None if delta_bias is None else delta_bias[k],
            softplus=softplus, dtype=acc,
        )  # fmt: skip
        start = None if initial_state is None else state_of_sequences(initial_state, k, order)
        y, final = scan_loop(u.to(acc), dt, A[k], b_k.to(acc), c_k.to(acc), start)
        if D is not None:
            y = y + D[k] * u
        outputs.append(write_in_order(y, order, batch, height, width))
        finals.append(final)
    y = torch.stack(outputs, dim=3)
    y = y.sum(3) if merge else y
    if z is not None:
        y = y * F.silu(z.to(acc))
    return y.to(x.dtype), stack_states(finals, orders, batch, width)
