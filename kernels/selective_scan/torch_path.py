"""The selective scan in plain torch operators: runs on every device and in every dtype.

A sequence is cut into about sqrt(L) chunks of about sqrt(L) steps. One pass over the steps, for all chunks at once,
finds where each chunk ends when it starts from zero; a short loop over the chunks turns that into the true start
states; a second pass forms the outputs. The backward pass recomputes the states of a block of channels from the start
states, so that neither pass ever stores L x D x N numbers.

Shapes: S sequences, Q chunks, T steps of a chunk, P = S * Q, G groups, E = D / G channels of a group, N states. Inside,
everything is step-major, (T, P, G, ., .), with channels last, so that the innermost loop of every operator runs over
channels.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import (
    read_in_order,
    sequences_and_length,
    stack_states,
    state_of_sequences,
    step_sizes,
    write_in_order,
)  # fmt: skip

_FORWARD_BLOCK = 1 << 22
"""Numbers in one buffer of the forward pass on the CPU (16 MB in float32); larger batches are cut into blocks."""
_BACKWARD_BLOCK = 1 << 24
"""Numbers in one buffer of recomputed states in the backward pass (64 MB in float32)."""


class _Chunks(NamedTuple):
    """One direction of a block of sequences, cut into chunks, step-major."""

    dt: Tensor  # (T, P, G, 1, E)
    dtu: Tensor  # (T, P, G, 1, E)  step size times input
    Bm: Tensor  # (T, P, G, N, 1)
    C: Tensor  # (T, P, G, N, 1)
    A: Tensor  # (G, N, E)
    count: int  # Q


def _chunk_length(length: int) -> int:
    return max(1, math.isqrt(max(length - 1, 0)) + 1)


def saved_shape(x: Tensor, orders: tuple[int, ...], groups: int, state: int) -> tuple[int, ...]:
    """Shape of the chunk start states that `forward` keeps for `backward`: (K, S, Q, G, N, E)."""
    sequences, length = sequences_and_length(x, orders)
    return (len(orders), sequences, -(-length // _chunk_length(length)), groups, state, x.shape[3] // groups)


def _cut(t: Tensor, count: int, steps: int) -> Tensor:
    """(S, L, ...) -> (T, S * Q, ...), the end padded with zeros: a zero step leaves the state as it is."""
    missing = count * steps - t.shape[1]
    if missing:
        t = torch.cat([t, t.new_zeros(t.shape[0], missing, *t.shape[2:])], dim=1)
    return t.reshape(t.shape[0] * count, steps, *t.shape[2:]).transpose(0, 1).contiguous()


def _join(t: Tensor, sequences: int, length: int) -> Tensor:
    """Inverse of `_cut`: (T, S * Q, ...) -> (S, L, ...)."""
    return t.transpose(0, 1).reshape(sequences, -1, *t.shape[2:])[:, :length]


def _make_chunks(u: Tensor, dt: Tensor, A: Tensor, Bm: Tensor, C: Tensor) -> _Chunks:
    length, groups = u.shape[1], Bm.shape[2]
    steps = _chunk_length(length)
    count = -(-length // steps)

    def by_group(t: Tensor) -> Tensor:
        return _cut(t, count, steps).unflatten(-1, (groups, -1)).unsqueeze(-2)

    return _Chunks(
        dt=by_group(dt),
        dtu=by_group(dt * u),
        Bm=_cut(Bm, count, steps).unsqueeze(-1),
        C=_cut(C, count, steps).unsqueeze(-1),
        A=A.unflatten(0, (groups, -1)).transpose(1, 2).contiguous(),
        count=count,
    )


def _step(h: Tensor, decay: Tensor, c: _Chunks, t: int) -> None:
    """h <- exp(dt_t A) h + dt_t B_t u_t, in place; `decay` is scratch and keeps the decay."""
    torch.mul(c.dt[t], c.A, out=decay)
    decay.exp_()
    h.mul_(decay).addcmul_(c.dtu[t], c.Bm[t])


def _chain(ends: Tensor, decays: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """Start state of every chunk and the final state, from zero-start ends and whole-chunk decays (S, Q, G, N, E)."""
    state = torch.zeros_like(ends[:, 0]) if start is None else start
    starts = []
    for q in range(ends.shape[1]):
        starts.append(state)
        state = torch.addcmul(ends[:, q], decays[:, q], state)
    return torch.stack(starts, dim=1), state


def _whole_decay(c: _Chunks) -> Tensor:
    return torch.exp(c.dt.sum(0) * c.A).unflatten(0, (-1, c.count))


def _start_states(c: _Chunks, start: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Start states (S, Q, G, N, E) of all chunks; the final state too where the outputs are not needed for it."""
    sequences = c.dt.shape[1] // c.count
    if c.count == 1:
        shape = (sequences, 1, *c.A.shape)
        return (c.dt.new_zeros(shape) if start is None else start.unsqueeze(1)), None
    h = c.dt.new_zeros(c.dt.shape[1], *c.A.shape)
    decay = torch.empty_like(h)
    for t in range(c.dt.shape[0]):
        _step(h, decay, c, t)
    return _chain(h.unflatten(0, (-1, c.count)), _whole_decay(c), start)


def _outputs(c: _Chunks, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs (T, P, G, 1, E) from the start states, and the end states (P, G, N, E) of all chunks."""
    h = starts.flatten(0, 1).clone()
    decay = torch.empty_like(h)
    y = torch.empty_like(c.dt)
    rows_of_c = c.C.transpose(-1, -2)
    for t in range(c.dt.shape[0]):
        _step(h, decay, c, t)
        torch.matmul(rows_of_c[t], h, out=y[t])
    return y, h


def _scan(
    u: Tensor, dt: Tensor, A: Tensor, Bm: Tensor, C: Tensor, start: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """A block of sequences: y (S, L, D), final state (S, G, N, E), chunk start states (S, Q, G, N, E)."""
    c = _make_chunks(u, dt, A, Bm, C)
    starts, final = _start_states(c, start)
    y, ends = _outputs(c, starts)
    if final is None:
        final = ends
    return _join(y.flatten(2), u.shape[0], u.shape[1]), final, starts


def _blocks(total: int, numbers_of_one: int, budget: int, device: torch.device) -> list[slice]:
    """Slices of `total` items such that a block holds at most `budget` numbers (on the CPU: caches and memory)."""
    size = total if device.type != "cpu" and budget == _FORWARD_BLOCK else max(1, budget // max(numbers_of_one, 1))
    return [slice(i, min(i + size, total)) for i in range(0, total, size)]


def _to_groups(state: Tensor, groups: int) -> Tensor:
    return state.unflatten(1, (groups, -1)).transpose(2, 3)  # (S, D, N) -> (S, G, N, E)


def _from_groups(state: Tensor) -> Tensor:
    return state.transpose(2, 3).flatten(1, 2)  # (S, G, N, E) -> (S, D, N)


class _Direction(NamedTuple):
    """The sequences of one direction, and its parameters, in the type of the sums."""

    u: Tensor  # (S, L, D)
    raw: Tensor  # (S, L, D) or (S, L, R): delta as given
    dt: Tensor  # (S, L, D)
    A: Tensor
    Bm: Tensor  # (S, L, G, N)
    C: Tensor
    D: Tensor | None
    start: Tensor | None  # (S, G, N, E)


def _direction(x, delta, A, Bm, C, D, delta_weight, delta_bias, initial_state, k, order, softplus) -> _Direction:
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    u, raw, b_k, c_k = (read_in_order(t, order).to(acc) for t in (x, delta[:, :, :, k], Bm[:, :, :, k], C[:, :, :, k]))
    weight = None if delta_weight is None else delta_weight[k]
    dt = step_sizes(raw, weight, None if delta_bias is None else delta_bias[k], softplus=softplus, dtype=acc)
    start = None if initial_state is None else _to_groups(state_of_sequences(initial_state, k, order), Bm.shape[4])
    return _Direction(u, raw, dt, A[k], b_k, c_k, None if D is None else D[k], start)


def forward(
    x: Tensor, delta: Tensor, A: Tensor, Bm: Tensor, C: Tensor, D: Tensor | None, delta_weight: Tensor | None,
    delta_bias: Tensor | None, z: Tensor | None, initial_state: Tensor | None, *,
    orders: tuple[int, ...], softplus: bool, merge: bool, need_backward: bool, want_final: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Outputs, final states if wanted, chunk start states if a backward pass will come; canonical form of op.py."""
    batch, height, width, _ = x.shape
    total: Tensor | None = None
    outputs: list[Tensor] = []
    finals: list[Tensor] = []
    saved: list[Tensor] = []
    for k, order in enumerate(orders):
        d = _direction(x, delta, A, Bm, C, D, delta_weight, delta_bias, initial_state, k, order, softplus)
        count = -(-d.u.shape[1] // _chunk_length(d.u.shape[1]))
        parts = [
            _scan(d.u[s], d.dt[s], d.A, d.Bm[s], d.C[s], None if d.start is None else d.start[s])
            for s in _blocks(d.u.shape[0], count * d.A.numel(), _FORWARD_BLOCK, x.device)
        ]
        y, final, starts = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
        if d.D is not None:
            y = torch.addcmul(y, d.u, d.D)
        y = write_in_order(y, order, batch, height, width)
        if merge:
            total = y.contiguous() if total is None else total.add_(y)
        else:
            outputs.append(y)
        finals.append(_from_groups(final))
        if need_backward:
            saved.append(starts)
    y = torch.stack(outputs, dim=3) if total is None else total
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    kept = torch.stack(saved) if need_backward else finals[0].new_empty(0)
    return y.to(x.dtype), stack_states(finals, orders, batch, width) if want_final else kept.new_empty(0), kept


class _BlockGradients(NamedTuple):
    u: Tensor  # (S, L, D)
    dt: Tensor  # (S, L, D)
    A: Tensor  # (G, N, E)
    Bm: Tensor  # (S, L, G, N)
    C: Tensor  # (S, L, G, N)
    start: Tensor  # (S, G, N, E)
    ungated: Tensor  # (S, L, D) outputs before the D skip, for the gate's gradient


def _recompute(c: _Chunks, starts: Tensor) -> tuple[Tensor, Tensor]:
    """All states (T + 1, P, G, N, E), the start first, and all decays (T, P, G, N, E)."""
    steps = c.dt.shape[0]
    decays = torch.exp(c.dt * c.A)
    states = decays.new_empty(steps + 1, *starts.shape)
    states[0] = starts
    for t in range(steps):
        torch.mul(states[t], decays[t], out=states[t + 1])
        states[t + 1].addcmul_(c.dtu[t], c.Bm[t])
    return states, decays


def _adjoint_ends(c: _Chunks, decays: Tensor, dy: Tensor, grad_final: Tensor | None) -> Tensor:
    """Gradient (P, G, N, E) with respect to the end state of every chunk, from all later positions."""
    g = torch.zeros_like(decays[0])
    if c.count > 1:
        for t in reversed(range(c.dt.shape[0])):
            g.addcmul_(c.C[t], dy[t]).mul_(decays[t])
    local, whole = g.unflatten(0, (-1, c.count)), _whole_decay(c)
    adjoint = torch.zeros_like(local[:, 0]) if grad_final is None else grad_final
    ends = []
    for q in reversed(range(c.count)):
        ends.append(adjoint)
        adjoint = torch.addcmul(local[:, q], whole[:, q], adjoint)
    return torch.stack(ends[::-1], dim=1).flatten(0, 1)


def _block_backward(d: _Direction, starts: Tensor, dy: Tensor, grad_final: Tensor | None) -> _BlockGradients:
    """Gradients of one block: `dy` (S, L, D) is the gradient of y before gate and skip."""
    c = _make_chunks(d.u, d.dt, d.A, d.Bm, d.C)
    sequences, length, _ = d.u.shape
    dy_c = _cut(dy, c.count, c.dt.shape[0]).unflatten(-1, (d.Bm.shape[2], -1)).unsqueeze(-2)
    states, decays = _recompute(c, starts.flatten(0, 1))
    g = _adjoint_ends(c, decays, dy_c, grad_final).clone()
    ungated = torch.matmul(c.C.transpose(-1, -2), states[1:])
    grad_c = torch.matmul(states[1:], dy_c.transpose(-1, -2))
    grad_b, grad_dtu, grad_dt = torch.empty_like(c.Bm), torch.empty_like(c.dt), torch.empty_like(c.dt)
    grad_a = torch.zeros_like(g)
    for t in reversed(range(c.dt.shape[0])):
        g.addcmul_(c.C[t], dy_c[t])
        torch.matmul(g, c.dtu[t].transpose(-1, -2), out=grad_b[t])
        torch.matmul(c.Bm[t].transpose(-1, -2), g, out=grad_dtu[t])
        g.mul_(decays[t])
        through_decay = g * states[t]
        torch.sum(through_decay * c.A, dim=-2, keepdim=True, out=grad_dt[t])
        grad_a.addcmul_(through_decay, c.dt[t])

    def joined(t: Tensor) -> Tensor:
        return _join(t, sequences, length)

    grad_dtu, grad_dt = joined(grad_dtu.flatten(2)), joined(grad_dt.flatten(2))
    return _BlockGradients(
        u=grad_dtu * d.dt, dt=grad_dt + grad_dtu * d.u, A=grad_a.sum(0), Bm=joined(grad_b.squeeze(-1)),
        C=joined(grad_c.squeeze(-1)), start=g.unflatten(0, (-1, c.count))[:, 0], ungated=joined(ungated.flatten(2)),
    )  # fmt: skip


def _take(d: _Direction, s: slice, e: slice, groups: int) -> _Direction:
    """A block of sequences `s` and of channels `e` inside every group."""

    def channels(t: Tensor) -> Tensor:
        return t[s].unflatten(-1, (groups, -1))[..., e].flatten(-2)

    return _Direction(
        u=channels(d.u), raw=d.raw, dt=channels(d.dt), A=d.A.unflatten(0, (groups, -1))[:, e].flatten(0, 1),
        Bm=d.Bm[s], C=d.C[s], D=None, start=None,
    )  # fmt: skip


def _direction_backward(d: _Direction, starts: Tensor, dy: Tensor, grad_final: Tensor | None) -> _BlockGradients:
    """Gradients of one direction, block by block."""
    sequences, length, channels = d.u.shape
    groups, state = d.Bm.shape[2:]
    per_group = channels // groups
    padded = starts.shape[1] * _chunk_length(length)
    rows = _blocks(sequences, padded * state * groups, _BACKWARD_BLOCK, dy.device)
    per_row = padded * state * groups * (rows[0].stop - rows[0].start)
    out = _BlockGradients(
        u=torch.empty_like(dy), dt=torch.empty_like(dy), A=dy.new_zeros(groups, state, per_group),
        Bm=torch.zeros_like(d.Bm), C=torch.zeros_like(d.C), start=torch.empty_like(starts[:, 0]),
        ungated=torch.empty_like(dy),
    )  # fmt: skip
    for s in rows:
        for e in _blocks(per_group, per_row, _BACKWARD_BLOCK, dy.device):
            block = _take(d, s, e, groups)
            dy_block = dy[s].unflatten(-1, (groups, -1))[..., e].flatten(-2)
            g = _block_backward(
                block, starts[s, ..., e], dy_block, None if grad_final is None else grad_final[s, ..., e]
            )
            for whole, part in ((out.u, g.u), (out.dt, g.dt), (out.ungated, g.ungated)):
                whole[s].unflatten(-1, (groups, -1))[..., e] = part.unflatten(-1, (groups, -1))
            out.A[..., e] += g.A
            out.Bm[s] += g.Bm
            out.C[s] += g.C
            out.start[s, ..., e] = g.start
    return out


def backward(
    grad_y: Tensor, grad_final: Tensor | None, x: Tensor, delta: Tensor, A: Tensor, Bm: Tensor, C: Tensor,
    D: Tensor | None, delta_weight: Tensor | None, delta_bias: Tensor | None, z: Tensor | None,
    initial_state: Tensor | None, saved: Tensor, *,
    orders: tuple[int, ...], softplus: bool, merge: bool, needs: tuple[bool, ...],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of the ten tensor inputs, in order; None where not needed. Deterministic."""
    batch, height, width, _ = x.shape
    groups = Bm.shape[4]
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    of_x, of_z = torch.zeros_like(x, dtype=acc, memory_format=torch.contiguous_format), None
    per_k: list[dict[str, Tensor]] = []
    starts_grad = []
    for k, order in enumerate(orders):
        d = _direction(x, delta, A, Bm, C, D, delta_weight, delta_bias, initial_state, k, order, softplus)
        dy_out = read_in_order((grad_y if merge else grad_y[:, :, :, k]).to(acc), order)
        gate = None if z is None else read_in_order(z.to(acc), order)
        dy = (dy_out if gate is None else dy_out * F.silu(gate)).contiguous()
        final_k = None if grad_final is None else _to_groups(state_of_sequences(grad_final.to(acc), k, order), groups)
        g = _direction_backward(d, saved[k], dy, final_k)
        if gate is not None:
            before = g.ungated if d.D is None else torch.addcmul(g.ungated, d.u, d.D)
            sigmoid = torch.sigmoid(gate)
            of_z = write_in_order(dy_out * before * sigmoid * (1 + gate * (1 - sigmoid)), order, batch, height, width)
        grad_u = g.u if d.D is None else torch.addcmul(g.u, dy, d.D)
        of_x += write_in_order(grad_u, order, batch, height, width)
        before_softplus = g.dt * -torch.expm1(-d.dt) if softplus else g.dt  # softplus' = 1 - exp(-softplus)
        of_delta = before_softplus if delta_weight is None else before_softplus @ delta_weight[k].to(acc)
        image = {"delta": of_delta, "B": g.Bm, "C": g.C}
        per_k.append(
            {name: write_in_order(t, order, batch, height, width) for name, t in image.items()}
            | {
                "A": g.A.transpose(1, 2).flatten(0, 1),
                "D": (dy * d.u).sum((0, 1)),
                "bias": before_softplus.sum((0, 1)),
                "weight": before_softplus.flatten(0, 1).T @ d.raw.flatten(0, 1),
            }
        )
        starts_grad.append(_from_groups(g.start))

    def stacked(name: str, dim: int) -> Tensor:
        return torch.stack([g[name] for g in per_k], dim=dim)

    found = [
        of_x, stacked("delta", 3), stacked("A", 0), stacked("B", 3), stacked("C", 3), stacked("D", 0),
        stacked("weight", 0), stacked("bias", 0), of_z, stack_states(starts_grad, orders, batch, width),
    ]  # fmt: skip
    inputs = (x, delta, A, Bm, C, D, delta_weight, delta_bias, z, initial_state)
    return [
        g.to(t.dtype) if need and g is not None and t is not None else None
        for g, t, need in zip(found, inputs, needs, strict=True)
    ]
