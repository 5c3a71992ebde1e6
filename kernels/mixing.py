"""The matrix M that an operator multiplies its input with, y = M value, for every head and every reading direction.

A selective scan, SSD, a diagonal state space and attention are all such matrices (Ali et al., "The Hidden Attention of
Mamba Models", 2024; Dao and Gu, "Transformers are SSMs", 2024). The functions `*_matrix` are the formulas; `mixing_of`
makes a `Mixing` of a call that `kernels.observe` saw.

Shapes: S sequences (the batch and every other axis that is not read), L positions, Q positions whose rows are asked
for, D channels, E heads of P = D / E channels that share a matrix (E = D for scans that have one for every channel),
N states, G groups. Positions are those of the input whatever the reading order is: `rank` (L,) says when each is read.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .observe import Call
from .s4d.op import s4d
from .s4d.torch_path import convolution_kernel, discretise, powers
from .selective_scan.op import selective_scan
from .selective_scan.reference import LINES, read_in_order, step_sizes
from .ssd.op import ssd, ssd_noncausal
from .ssd.reference import REVERSED

BLOCK = 1 << 20
"""About so many numbers of matrices are made at a time."""


def s6_matrix(
    steps: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, *,
    rank: Tensor | None = None, at: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Rows of a selective scan's matrices: M_ij = sum_n C_in exp(A_n (c_i - c_j)) steps_j B_jn with c = cumsum(steps).

    Args:
        steps: (S, L, D) step sizes, after bias and softplus.
        A: (D, N), negative; 0 keeps a state for ever, -inf forgets it at once.
        B, C: (S, L, G, N); channel d reads group d // (D / G).
        D: (D,) skip, added on the diagonal, or None.
        rank: (L,) when each position is read; None for the order of the positions.
        at: (Q,) positions whose rows are made; None for all.

    Returns:
        (S, D, Q, L) in the dtype of `steps`.
    """
    rank, at = _defaults(steps, rank, at)
    channels, order = A.shape[0], rank[at][:, None] - rank
    passed = torch.where(order > 0, _passed(steps, rank, at), 0)  # (S, D, Q, L)
    A = A.clamp(min=torch.finfo(A.dtype).min)  # -inf times no time would be no number
    B, C = _of_heads(B, channels), _of_heads(C, channels)[:, at]
    total = torch.zeros_like(passed)
    for n in range(A.shape[1]):
        decay = (A[:, n, None, None] * passed).exp()
        total = torch.addcmul(total, _column(C[..., n]) * _row(B[..., n]), decay)
    return _with_skip(torch.where(order >= 0, total * _row(steps), 0), at, D)


def ssd_matrix(
    steps: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, *,
    rank: Tensor | None = None, at: Tensor | None = None, strict: bool = False,
) -> Tensor:  # fmt: skip
    """Rows of the matrices of SSD: M = (exp(segsum(steps A)) * (C B^T)) with the columns multiplied by the steps.

    Args:
        steps: (S, L, E) step sizes, after bias and softplus.
        A: (E,), negative.
        B, C: (S, L, G, N); head e reads group e // (E / G).
        D: (E,) skip, or None.
        rank, at: as in `s6_matrix`.
        strict: leave out the diagonal (but for the skip).

    Returns:
        (S, E, Q, L).
    """
    rank, at = _defaults(steps, rank, at)
    heads = A.shape[0]
    earlier = rank[at][:, None] > rank
    decay = torch.where(earlier, A[:, None, None] * _passed(steps, rank, at), 0).exp()
    products = torch.einsum("sqen,slen->seql", _of_heads(C, heads)[:, at], _of_heads(B, heads))
    seen = earlier if strict else rank[at][:, None] >= rank
    return _with_skip(torch.where(seen, decay * products * _row(steps), 0), at, D)


def noncausal_matrix(
    steps: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, *, at: Tensor | None = None
) -> Tensor:
    """Rows of SSD without an order, M = C B^T with the columns multiplied by steps |A|; arguments as `ssd_matrix`."""
    _, at = _defaults(steps, None, at)
    heads = A.shape[0]
    products = torch.einsum("sqen,slen->seql", _of_heads(C, heads)[:, at], _of_heads(B, heads))
    return _with_skip(products * _row(steps * A.abs()), at, D)


def s4d_matrix(taps: Tensor, D: Tensor | None = None, *, rank: Tensor, at: Tensor | None = None) -> Tensor:
    """Rows of the Toeplitz matrices of a convolution: M_ij = taps_(i - j).

    Args:
        taps: (D, L).
        D: (D,) skip, or None.
        rank: (L,) when each position is read.
        at: (Q,) positions whose rows are made; None for all.

    Returns:
        (1, D, Q, L).
    """
    at = torch.arange(len(rank), device=rank.device) if at is None else at
    lag = rank[at][:, None] - rank
    return _with_skip(torch.where(lag >= 0, taps[:, lag.clamp(min=0)], 0).unsqueeze(0), at, D)


def attention_matrix(
    q: Tensor, k: Tensor, mask: Tensor | None = None, *, scale: float, at: Tensor | None = None
) -> Tensor:
    """Rows of softmax attention.

    Args:
        q, k: (S, E, L, P).
        mask: what is added to the scores, or a bool of what is seen; broadcastable to (S, E, L, L).
        scale: of the scores.
        at: (Q,) positions whose rows are made; None for all.

    Returns:
        (S, E, Q, L).
    """
    at = torch.arange(q.shape[2], device=q.device) if at is None else at
    scores = q[:, :, at] @ k.transpose(-1, -2) * scale
    if mask is not None:
        rows = mask[..., at, :] if mask.shape[-2] > 1 else mask
        scores = scores.masked_fill(~rows, -math.inf) if rows.dtype == torch.bool else scores + rows
    return scores.softmax(-1)


def _defaults(steps: Tensor, rank: Tensor | None, at: Tensor | None) -> tuple[Tensor, Tensor]:
    everywhere = torch.arange(steps.shape[1], device=steps.device)
    return everywhere if rank is None else rank, everywhere if at is None else at


def _passed(steps: Tensor, rank: Tensor, at: Tensor) -> Tensor:
    """c_i - c_j, (S, E, Q, L): a difference of two large sums, so it is formed in float64 (which Apple's GPUs lack)."""
    exact = steps if steps.device.type == "mps" else steps.double()
    time = exact[:, rank.argsort()].cumsum(1)[:, rank]
    return (_column(time[:, at]) - _row(time)).to(steps.dtype)


def _of_heads(t: Tensor, heads: int) -> Tensor:
    """(S, L, G, N) -> (S, L, E, N), or (S, L, 1, N), which broadcasts."""
    return t if t.shape[2] == 1 else t.repeat_interleave(heads // t.shape[2], dim=2)


def _column(t: Tensor) -> Tensor:
    """(S, Q, E) -> (S, E, Q, 1)."""
    return t.transpose(1, 2).unsqueeze(-1)


def _row(t: Tensor) -> Tensor:
    """(S, L, E) -> (S, E, 1, L)."""
    return t.transpose(1, 2).unsqueeze(-2)


def _with_skip(matrix: Tensor, at: Tensor, D: Tensor | None) -> Tensor:
    if D is None:
        return matrix
    diagonal = at[:, None] == torch.arange(matrix.shape[-1], device=at.device)
    return matrix + torch.where(diagonal, D[:, None, None], 0)


@dataclass(frozen=True, kw_only=True)
class Direction(ABC):
    """One reading direction of a call: y = M value for every head.

    Attributes:
        value: (S, L, D) what is mixed.
        heads: E.
    """

    value: Tensor
    heads: int

    @abstractmethod
    def rows(self, at: Tensor | None = None, heads: slice = slice(None)) -> Tensor:
        """Rows of the matrices at some positions, of some heads: (S, E', Q, L)."""

    @abstractmethod
    def apply(self, value: Tensor) -> Tensor:
        """M times another value (S, L, D), by the operator itself and so in linear time for a scan."""

    def blocks(self, at: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        """All heads a few at a time: (which, their rows)."""
        sequences, length = self.value.shape[:2]
        queries = length if at is None else len(at)
        count = max(1, BLOCK // max(1, sequences * queries * length))
        for first in range(0, self.heads, count):
            chosen = slice(first, min(first + count, self.heads))
            yield chosen, self.rows(at, chosen)

    def transposed(self, weight: Tensor) -> Tensor:
        """M^T weight, (S, L, D) -> (S, L, D): the gradient of <weight, M value> by the value, in linear time."""
        with torch.enable_grad():
            value = torch.zeros_like(self.value, requires_grad=True)
            return torch.autograd.grad(self.apply(value), value, weight.to(value.dtype))[0]


@dataclass(frozen=True, kw_only=True)
class Scanned(Direction):
    """A scan in an order; `order` (L,) are the positions in the order in which they are read."""

    order: Tensor
    steps: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None

    @property
    def rank(self) -> Tensor:
        """(L,) when each position is read."""
        return self.order.argsort()

    def _of(self, heads: slice) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """steps, A, B, C, D of some heads."""
        group = torch.arange(self.heads, device=self.A.device)[heads] // (self.heads // self.B.shape[2])
        one = self.B.shape[2] == 1
        B, C = (t if one else t[:, :, group] for t in (self.B, self.C))
        return self.steps[..., heads], self.A[heads], B, C, None if self.D is None else self.D[heads]

    def _read(self) -> tuple[Tensor, Tensor, Tensor]:
        """steps, B and C in reading order, without their graph."""
        steps, B, C = (t.detach()[:, self.order].contiguous() for t in (self.steps, self.B, self.C))
        return steps, B, C

    def _constants(self) -> tuple[Tensor, Tensor | None]:
        """A and D without their graph."""
        return self.A.detach(), None if self.D is None else self.D.detach()


class S6(Scanned):
    """A selective scan; a matrix for every channel."""

    def rows(self, at: Tensor | None = None, heads: slice = slice(None)) -> Tensor:
        """See `Direction`."""
        return s6_matrix(*self._of(heads), rank=self.rank, at=at)

    def apply(self, value: Tensor) -> Tensor:
        """See `Direction`."""
        (steps, B, C), (A, D) = self._read(), self._constants()
        y = cast(Tensor, selective_scan(value[:, self.order], steps, A, B, C, D))
        return y[:, self.rank]


@dataclass(frozen=True, kw_only=True)
class SSD(Scanned):
    """State space duality; a matrix for every head. `strict` ones leave a position's own input out."""

    strict: bool

    def rows(self, at: Tensor | None = None, heads: slice = slice(None)) -> Tensor:
        """See `Direction`."""
        return ssd_matrix(*self._of(heads), rank=self.rank, at=at, strict=self.strict)

    def apply(self, value: Tensor) -> Tensor:
        """See `Direction`."""
        (steps, B, C), (A, D) = self._read(), self._constants()
        x = value[:, self.order].unflatten(-1, (self.heads, -1))
        y = cast(Tensor, ssd(x, steps, A, B, C, D))
        if self.strict:
            own = steps * _of_heads((B * C).sum(-1, keepdim=True), self.heads).squeeze(-1)
            y = y - own.unsqueeze(-1) * x
        return y.flatten(-2)[:, self.rank]


class Noncausal(Scanned):
    """SSD without an order."""

    def rows(self, at: Tensor | None = None, heads: slice = slice(None)) -> Tensor:
        """See `Direction`."""
        return noncausal_matrix(*self._of(heads), at=at)

    def apply(self, value: Tensor) -> Tensor:
        """See `Direction`."""
        (steps, B, C), (A, D) = self._read(), self._constants()
        return ssd_noncausal(value.unflatten(-1, (self.heads, -1)), steps, A, B, C, D).flatten(-2)


@dataclass(frozen=True, kw_only=True)
class S4D(Direction):
    """A diagonal state space with constant coefficients: a Toeplitz matrix for every channel, whatever the input is."""

    parameters: tuple[Tensor, Tensor, Tensor, Tensor]
    """log_dt, log_A_real, A_imag, C."""
    D: Tensor | None
    reverse: bool

    def rows(self, at: Tensor | None = None, heads: slice = slice(None)) -> Tensor:
        """See `Direction`."""
        length = self.value.shape[1]
        modes = discretise(*(t[heads] for t in self.parameters))
        rank = torch.arange(length, device=self.value.device)
        matrix = s4d_matrix(
            convolution_kernel(modes, powers(modes.z, length)),
            None if self.D is None else self.D[heads],
            rank=rank.flip(0) if self.reverse else rank,
            at=at,
        )
        return matrix.expand(self.value.shape[0], -1, -1, -1)

    def apply(self, value: Tensor) -> Tensor:
        """See `Direction`."""
        constants = (None if t is None else t.detach() for t in (*self.parameters, self.D))
        return cast(Tensor, s4d(value, *constants, reverse=self.reverse))  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, kw_only=True)
class Attention(Direction):
    """Attention: softmax of scaled products, or the bare products of queries and keys where `scale` is None."""

    q: Tensor
    k: Tensor
    """(S, E, L, P')."""
    mask: Tensor | None = None
    scale: float | None = None

    def rows(self, at: Tensor | None = None, heads: slice = slice(None)) -> Tensor:
        """See `Direction`."""
        q, k = self.q[:, heads], self.k[:, heads]
        if self.scale is None:
            return (q if at is None else q[:, :, at]) @ k.transpose(-1, -2)
        mask = self.mask if self.mask is None or self.mask.ndim < 3 or self.mask.shape[-3] == 1 else None
        if mask is None and self.mask is not None:
            mask = self.mask[..., heads, :, :]
        return attention_matrix(q, k, mask, scale=self.scale, at=at)

    def apply(self, value: Tensor) -> Tensor:
        """See `Direction`."""
        v = value.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, k = self.q.detach(), self.k.detach()
        if self.scale is None:
            y = q @ (k.transpose(-1, -2) @ v)
        else:
            mask = None if self.mask is None else self.mask.detach()
            y = attention_matrix(q, k, mask, scale=self.scale) @ v
        return y.transpose(1, 2).flatten(-2)


@dataclass(frozen=True)
class Mixing:
    """What a call did: its output is the sum over the directions of M value, times the gate.

    Attributes:
        directions: K, each with its matrices.
        output: as the operator gave it.
        positions: brings a tensor of the output's shape, or what one direction has of it, to (S, L, D).
        lead: the output's shape for one direction with 1 channel.
        gate: (S, L, D), or None.
        grid: height and width where the positions are those of a map.
        separate: whether `output` has an axis 3 for the directions instead of their sum.
        order: flat, where each position of the output stands in the tensor that was put into another order before the
            call; None if it was not.
    """

    directions: tuple[Direction, ...]
    output: Tensor
    positions: Callable[[Tensor], Tensor]
    lead: tuple[int, ...]
    gate: Tensor | None = None
    grid: tuple[int, int] | None = None
    separate: bool = False
    order: Tensor | None = None

    def output_of(self, k: int, t: Tensor) -> Tensor:
        """What a tensor shaped as `output` (a gradient, say) holds for direction k, (S, L, D)."""
        return self.positions(t[:, :, :, k] if self.separate else t)

    def index(self) -> Tensor:
        """(S, L): where each position of each sequence stands among all of the output (or `order`), row after row."""
        flat = torch.arange(math.prod(self.lead), device=self.output.device) if self.order is None else self.order
        return self.positions(flat.view(self.lead))[..., 0]


def mixing_of(call: Call) -> Mixing:
    """The matrices of a call that was observed.

    An initial state adds to the output what no matrix over the positions holds.
    """
    return _MAKERS[call.operator](call.output, *call.tensors, **call.options)


def _canonical(tensor: Tensor, order: int) -> Tensor:
    """(B, H, W, ...) of an operator's canonical form -> (S, L, ...)."""
    return tensor.transpose(1, 2).flatten(0, 1) if order >= LINES else tensor.flatten(1, 2)


def _reading_order(x: Tensor, order: int) -> Tensor:
    """(L,) positions in the order in which they are read."""
    height, width = x.shape[1:3]
    if order >= LINES:
        return read_in_order(torch.arange(height, device=x.device).view(1, -1, 1), order)[0]
    return read_in_order(torch.arange(height * width, device=x.device).view(1, height, width), order)[0]


def _accumulated(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _s6(output, x, delta, A, Bm, C, D, delta_weight, delta_bias, z, _, *, orders, softplus, merge, **__) -> Mixing:
    acc = _accumulated(x)

    def direction(k: int, order: int) -> S6:
        steps = step_sizes(
            delta[:, :, :, k],
            None if delta_weight is None else delta_weight[k],
            None if delta_bias is None else delta_bias[k],
            softplus=softplus,
            dtype=acc,
        )
        B_k, C_k = (_canonical(t[:, :, :, k], order).to(acc) for t in (Bm, C))
        return S6(
            value=_canonical(x, order).to(acc), heads=A.shape[1], order=_reading_order(x, order),
            steps=_canonical(steps, order), A=A[k], B=B_k, C=C_k, D=None if D is None else D[k],
        )  # fmt: skip

    return Mixing(
        tuple(direction(k, order) for k, order in enumerate(orders)),
        output,
        lambda t: _canonical(t, orders[0]),
        (*x.shape[:3], 1),
        gate=None if z is None else F.silu(_canonical(z, orders[0]).to(acc)),
        grid=None if orders[0] >= LINES else tuple(x.shape[1:3]),
        separate=not merge,
    )


def _ssd(output, x, dt, A, Bm, C, D, dt_bias, _, *, orders, softplus, merge=True, strict=False, **__) -> Mixing:
    acc = _accumulated(x)

    def direction(k: int, order: int) -> SSD:
        bias = None if dt_bias is None else dt_bias[k]
        steps = step_sizes(dt[:, :, :, k], None, bias, softplus=softplus, dtype=acc)
        B_k, C_k = (_canonical(t[:, :, :, k], order).to(acc) for t in (Bm, C))
        return SSD(
            value=_canonical(x, order).flatten(-2).to(acc), heads=A.shape[1], order=_reading_order(x, order),
            steps=_canonical(steps, order), A=A[k], B=B_k, C=C_k, D=None if D is None else D[k],
            strict=strict and order in REVERSED,
        )  # fmt: skip

    return Mixing(
        tuple(direction(k, order) for k, order in enumerate(orders)),
        output,
        lambda t: _canonical(t, orders[0]).flatten(-2),
        (*x.shape[:3], 1, 1),
        grid=None if orders[0] >= LINES else tuple(x.shape[1:3]),
        separate=not merge,
    )


def _ssd_noncausal(output, x, dt, A, B, C, D=None, *, dt_bias=None, softplus=False) -> Mixing:
    acc = _accumulated(x)
    value = x.flatten(1, -3).flatten(-2).to(acc)
    direction = Noncausal(
        value=value, heads=A.shape[0], order=torch.arange(value.shape[1], device=x.device),
        steps=step_sizes(dt, None, dt_bias, softplus=softplus, dtype=acc).flatten(1, -2), A=A,
        B=B.flatten(1, -3).to(acc), C=C.flatten(1, -3).to(acc), D=D,
    )  # fmt: skip
    grid = tuple(x.shape[1:3]) if x.ndim == 5 else None
    return Mixing((direction,), output, lambda t: t.flatten(1, -3).flatten(-2), (*x.shape[:-2], 1, 1), grid=grid)


def _s4d(output, u, log_dt, log_A_real, A_imag, C, D=None, *, reverse=False, dim=1, **_) -> Mixing:
    def positions(t: Tensor) -> Tensor:
        moved = t.movedim(dim, -2)
        return moved.reshape(-1, *moved.shape[-2:])

    direction = S4D(
        value=positions(u).to(log_dt.dtype), heads=u.shape[-1], parameters=(log_dt, log_A_real, A_imag, C), D=D,
        reverse=reverse,
    )  # fmt: skip
    return Mixing((direction,), output, positions, (*u.shape[:-1], 1))


def _attention(output, q, k, v, mask=None, *, scale=None) -> Mixing:
    """q, k, v (..., E, L, P); `scale` None for linear attention."""

    def sequences(t: Tensor) -> Tensor:
        return t.reshape(-1, *t.shape[-3:])

    def positions(t: Tensor) -> Tensor:
        return sequences(t).transpose(1, 2).flatten(-2)

    if mask is not None and mask.ndim > 3:
        mask = sequences(mask.expand(*q.shape[:-3], *mask.shape[-3:]))
    direction = Attention(value=positions(v), heads=v.shape[-3], q=sequences(q), k=sequences(k), mask=mask, scale=scale)
    return Mixing((direction,), output, positions, (*q.shape[:-3], 1, q.shape[-2], 1))


_MAKERS: dict[str, Callable[..., Mixing]] = {
    "s6": _s6,
    "ssd": _ssd,
    "ssd_noncausal": _ssd_noncausal,
    "s4d": _s4d,
    "attention": _attention,
}
