"""SSD in plain torch operators: runs on every device and in every dtype.

Inside a chunk the scan is a product with a triangular matrix; between chunks a short loop carries the state. The
backward pass works the same way from the saved chunk start states, block by block of chunks, so that neither pass holds
more [T, T] matrices than a block has.

Shapes: S sequences, Q chunks, M = S * Q, T positions of a chunk, G groups, R = E / G heads of a group, P head_dim, N
states. Chunks are (M, G, R, T, ...), what the heads of a group share (M, G, 1, T, N).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..selective_scan.reference import read_in_order, step_sizes, write_in_order
from .reference import REVERSED, length_of, lines_of

_CPU_CHUNK = 64
"""Longest chunk on the CPU, where the work of the [T, T] matrices outweighs that of the states from here on."""
_BLOCK = 1 << 22
"""Numbers in one buffer of a block of chunks."""


def _chunks(x: Tensor, orders: tuple[int, ...], longest: int) -> tuple[int, int]:
    """Number of chunks and their length: as even as can be, so that little is padded."""
    length = length_of(x, orders)
    count = -(-length // (min(longest, _CPU_CHUNK) if x.device.type == "cpu" else longest))
    return count, -(-length // count)


def saved(
    x: Tensor, orders: tuple[int, ...], groups: int, states: int, chunk: int, *, started: bool = True
) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape (K, M, G, R, P, N) and dtype of the chunk start states that `forward` keeps: none where all are zero."""
    count, _ = _chunks(x, orders, chunk)
    sequences, (heads, head_dim) = x.shape[0] * lines_of(x, orders), x.shape[3:]
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    if count == 1 and not started:
        return (0,), acc
    return (len(orders), sequences * count, groups, heads // groups, head_dim, states), acc


class _Direction(NamedTuple):
    """One direction, cut into chunks, in the type of the sums."""

    u: Tensor  # (M, G, R, T, P)
    dt: Tensor  # (M, G, R, T)
    logs: Tensor  # (M, G, R, T) log decays summed up to each position, float64: small differences of large sums count
    A: Tensor  # (G, R)
    Bm: Tensor  # (M, G, 1, T, N)
    C: Tensor  # (M, G, 1, T, N)
    start: Tensor | None  # (S, G, R, P, N)
    diagonal: int  # 0; -1 leaves a position's own input out of its output

    @property
    def from_start(self) -> Tensor:
        """(M, G, R, T, 1) decay of the chunk's start state up to each position."""
        return self.logs.to(self.dt.dtype).exp().unsqueeze(-1)

    @property
    def to_end(self) -> Tensor:
        """(M, G, R, T, 1) decay from each position to the chunk's end."""
        return (self.logs[..., -1:] - self.logs).to(self.dt.dtype).exp().unsqueeze(-1)

    def block(self, s: slice) -> "_Direction":
        """Some of the chunks."""
        return self._replace(u=self.u[s], dt=self.dt[s], logs=self.logs[s], Bm=self.Bm[s], C=self.C[s])

    def decay(self) -> Tensor:
        """(M, G, R, T, T) decay from input j to output i, 0 where j is not read."""
        mask = torch.ones(self.dt.shape[-1], self.dt.shape[-1], dtype=torch.bool, device=self.dt.device)
        difference = (self.logs.unsqueeze(-1) - self.logs.unsqueeze(-2)).to(self.dt.dtype)
        return difference.masked_fill_(~mask.tril(self.diagonal), float("-inf")).exp_()


def _cut(t: Tensor, steps: int, count: int, groups: int) -> Tensor:
    """(S, L, E or G, ...) -> (M, G, R or 1, T, ...), the end padded with zeros: a zero step changes no state."""
    missing = steps * count - t.shape[1]
    if missing:
        t = torch.cat([t, t.new_zeros(t.shape[0], missing, *t.shape[2:])], dim=1)
    return t.unflatten(1, (count, steps)).flatten(0, 1).unflatten(2, (groups, -1)).movedim(1, 3).contiguous()


def _join(t: Tensor, count: int, length: int) -> Tensor:
    """Inverse of `_cut`: (M, G, R, T, ...) -> (S, L, E, ...)."""
    return t.movedim(3, 1).flatten(2, 3).unflatten(0, (-1, count)).flatten(1, 2)[:, :length]


def _direction(x, dt, A, Bm, C, dt_bias, initial_state, k, order, chunk, softplus, strict) -> _Direction:
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    groups = Bm.shape[4]
    u, dt_k, b, c = (read_in_order(t, order).to(acc) for t in (x, dt[:, :, :, k], Bm[:, :, :, k], C[:, :, :, k]))
    steps = step_sizes(dt_k, None, None if dt_bias is None else dt_bias[k], softplus=softplus, dtype=acc)
    count = -(-u.shape[1] // chunk)
    a = A[k].unflatten(0, (groups, -1))
    cut = [_cut(t, chunk, count, groups) for t in (u, steps, b, c)]
    start = None if initial_state is None else initial_state[:, :, k].flatten(0, 1).unflatten(1, (groups, -1))
    return _Direction(
        cut[0], cut[1], (cut[1] * a.unsqueeze(-1)).cumsum(-1, dtype=torch.float64), a, cut[2], cut[3], start,
        -1 if strict and order in REVERSED else 0,
    )  # fmt: skip


def _blocks(d: _Direction) -> list[slice]:
    chunks, *rest = d.dt.shape
    size = max(1, _BLOCK // (rest[0] * rest[1] * rest[2] * max(rest[2], d.u.shape[-1], d.Bm.shape[-1])))
    return [slice(i, i + size) for i in range(0, chunks, size)]


def _chain(local: Tensor, decays: Tensor, start: Tensor | None, *, backwards: bool) -> tuple[Tensor, Tensor]:
    """State before every chunk, in the order of the walk, and the last one.

    Args:
        local: (S, Q, G, R, P, N) what every chunk adds from zero.
        decays: (S, Q, G, R) of whole chunks.
        start: (S, G, R, P, N), or None for zero.
        backwards: walk from the last chunk to the first.
    """
    state = torch.zeros_like(local[:, 0]) if start is None else start
    states = torch.empty_like(local)
    for q in reversed(range(local.shape[1])) if backwards else range(local.shape[1]):
        states[:, q] = state
        state = torch.addcmul(local[:, q], decays[:, q, :, :, None, None], state)
    return states.flatten(0, 1), state


def _sequences(t: Tensor, count: int) -> Tensor:
    return t.unflatten(0, (-1, count))


def _states(d: _Direction, count: int, *, want_final: bool) -> tuple[Tensor | None, Tensor | None]:
    """States before every chunk (M, G, R, P, N), None where all are zero, and the last one, None where it may be.

    Of short sequences the states are most of the numbers there are.
    """
    if count == 1 and not want_final:
        return d.start, None
    local = (d.u * d.to_end * d.dt.unsqueeze(-1)).transpose(-1, -2) @ d.Bm
    whole = d.logs[..., -1].exp().to(d.dt.dtype)
    starts, final = _chain(_sequences(local, count), _sequences(whole, count), d.start, backwards=False)
    return None if count == 1 and d.start is None else starts, final


def forward(
    x: Tensor, dt: Tensor, A: Tensor, Bm: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, *,
    orders: tuple[int, ...], chunk: int, softplus: bool, merge: bool, strict: bool, need_backward: bool,
    want_final: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Outputs, final states if wanted, chunk start states if a backward pass will come; canonical form of op.py."""
    batch, height, width = x.shape[:3]
    length, (count, steps) = length_of(x, orders), _chunks(x, orders, chunk)
    outputs, finals, kept = [], [], []
    for k, order in enumerate(orders):
        d = _direction(x, dt, A, Bm, C, dt_bias, initial_state, k, order, steps, softplus, strict)
        starts, final = _states(d, count, want_final=want_final)
        y = torch.empty_like(d.u)
        for s in _blocks(d):
            b = d.block(s)
            mixing = b.decay().mul_(b.C @ b.Bm.transpose(-1, -2)).mul_(b.dt.unsqueeze(-2))
            torch.matmul(mixing, b.u, out=y[s])
            if starts is not None:
                y[s] += (b.C @ starts[s].transpose(-1, -2)) * b.from_start
        if D is not None:
            y = torch.addcmul(y, d.u, D[k].view(*d.A.shape, 1, 1))
        y = write_in_order(_join(y, count, length), order, batch, height, width)
        if merge and outputs:
            outputs[0] += y
        else:
            outputs.append(y.contiguous())
        if final is not None:
            finals.append(final.flatten(1, 2).unflatten(0, (batch, -1)))
        if starts is not None and need_backward:
            kept.append(starts)
    y = outputs[0] if merge else torch.stack(outputs, dim=3)
    final = torch.stack(finals, dim=2) if finals else y.new_empty(0)
    return y.to(x.dtype), final, torch.stack(kept) if kept else y.new_empty(0)


class _Gradients(NamedTuple):
    """Gradients of one direction's chunks, shaped as its tensors (B and C summed over the heads of a group)."""

    u: Tensor
    dt: Tensor
    A: Tensor
    Bm: Tensor
    C: Tensor


def _block_backward(d: _Direction, before: Tensor | None, behind: Tensor | None, dy: Tensor) -> _Gradients:
    """One block: states `before` and adjoint states `behind` its chunks (m, G, R, P, N), dy (m, G, R, T, P)."""
    dt, decay = d.dt.unsqueeze(-1), d.decay()
    pairs = (dy @ d.u.transpose(-1, -2)).mul_(decay).mul_(d.dt.unsqueeze(-2))  # (m, G, R, i, j)
    products = d.C @ d.Bm.transpose(-1, -2)
    of_u = decay.mul_(products).transpose(-1, -2) @ dy  # by dt u
    of_group = pairs.sum(2, keepdim=True)
    of_b, of_c = of_group.transpose(-1, -2) @ d.C, of_group @ d.Bm
    crossing = pairs.mul_(products).tril_(-1)  # a log decay at t lies in all pairs j < t <= i
    # These sums over positions cancel: in float64.
    wide = torch.float64
    later = crossing.sum(-1, dtype=wide) - crossing.sum(-2, dtype=wide)
    if before is not None:
        from_before = (dy * d.from_start) @ before
        of_c = of_c + from_before.sum(2, keepdim=True)
        later = later + (from_before * d.C).sum(-1)
    of_log = later.flip(-1).cumsum(-1).flip(-1)
    if behind is not None:
        through = (d.Bm @ behind.transpose(-1, -2)) * d.to_end
        of_u = of_u + through
        of_b = of_b + ((d.u * dt * d.to_end) @ behind).sum(2, keepdim=True)
        earlier = (d.u * dt * through).sum(-1, dtype=wide)
        of_log = of_log + earlier.cumsum(-1) - earlier
        if before is not None:
            of_log = of_log + ((before * behind).sum((-1, -2)) * d.logs[..., -1].exp()).unsqueeze(-1)
    of_log = of_log.to(d.dt.dtype)
    return _Gradients(
        u=of_u * dt, dt=(of_u * d.u).sum(-1) + of_log * d.A.unsqueeze(-1), A=(of_log * d.dt).sum((0, -1)), Bm=of_b,
        C=of_c,
    )  # fmt: skip


def _direction_backward(
    d: _Direction, starts: Tensor | None, dy: Tensor, grad_final: Tensor | None, count: int
) -> tuple[_Gradients, Tensor | None]:
    """Gradients of one direction and of its initial state (S, G, R, P, N), if it has one; dy (M, G, R, T, P)."""
    behind = of_start = None
    if starts is not None or grad_final is not None:
        local = (dy * d.from_start).transpose(-1, -2) @ d.C
        whole = _sequences(d.logs[..., -1].exp().to(d.dt.dtype), count)
        behind, of_start = _chain(_sequences(local, count), whole, grad_final, backwards=True)
    blocks = _blocks(d)
    befores, behinds = ([None if t is None else t[s] for s in blocks] for t in (starts, behind))
    parts = [_block_backward(d.block(s), b, e, dy[s]) for s, b, e in zip(blocks, befores, behinds, strict=True)]
    u, dt, a, b, c = zip(*parts, strict=True)
    return _Gradients(torch.cat(u), torch.cat(dt), torch.stack(a).sum(0), torch.cat(b), torch.cat(c)), of_start


def backward(
    grad_y: Tensor, grad_final: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, Bm: Tensor, C: Tensor,
    D: Tensor | None, dt_bias: Tensor | None, initial_state: Tensor | None, saved: Tensor, *,
    orders: tuple[int, ...], chunk: int, softplus: bool, merge: bool, strict: bool, needs: tuple[bool, ...],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of the eight tensor inputs, in order; None where not needed. Deterministic."""
    batch, height, width = x.shape[:3]
    length, (count, steps), groups = length_of(x, orders), _chunks(x, orders, chunk), Bm.shape[4]
    acc = saved.dtype
    of_x = torch.zeros_like(x, dtype=acc, memory_format=torch.contiguous_format)
    per_k: list[list[Tensor]] = []
    of_starts: list[Tensor] = []
    for k, order in enumerate(orders):
        d = _direction(x, dt, A, Bm, C, dt_bias, initial_state, k, order, steps, softplus, strict)
        dy = read_in_order((grad_y if merge else grad_y[:, :, :, k]).to(acc), order)
        dy = _cut(dy, steps, count, groups)
        final_k = None if grad_final is None else grad_final[:, :, k].flatten(0, 1).unflatten(1, (groups, -1))
        g, of_start = _direction_backward(d, saved[k] if len(saved) else None, dy, final_k, count)
        of_u = g.u if D is None else torch.addcmul(g.u, dy, D[k].view(*d.A.shape, 1, 1))
        before_softplus = g.dt * -torch.expm1(-d.dt) if softplus else g.dt  # softplus' = 1 - exp(-softplus)
        before_softplus, of_b, of_c, of_u = (_join(t, count, length) for t in (before_softplus, g.Bm, g.C, of_u))
        of_x += write_in_order(of_u, order, batch, height, width)
        image = (write_in_order(t, order, batch, height, width) for t in (before_softplus, of_b, of_c))
        of_skip = (dy * d.u).sum((0, 3, 4)).flatten()
        per_k.append([*image, g.A.flatten(), of_skip, before_softplus.sum((0, 1))])
        if needs[7] and of_start is not None:
            of_starts.append(of_start.flatten(1, 2).unflatten(0, (batch, -1)))
    of_dt, of_b, of_c, of_a, of_skip, of_bias = (
        torch.stack(t, dim) for t, dim in zip(zip(*per_k, strict=True), (3, 3, 3, 0, 0, 0), strict=True)
    )
    of_start = torch.stack(of_starts, dim=2) if of_starts else None
    found = (of_x, of_dt, of_a, of_b, of_c, of_skip, of_bias, of_start)
    return [g.to(t.dtype) if need and g is not None and t is not None else None
            for g, t, need in zip(found, (x, dt, A, Bm, C, D, dt_bias, initial_state), needs, strict=True)]  # fmt: skip
