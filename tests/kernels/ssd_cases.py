"""Inputs for SSD, shared by the tests of all back ends."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.ssd import op

NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")
ALL_DIRECTIONS = ("rows", "columns", "rows_reversed", "columns_reversed")


@dataclass(frozen=True)
class Case:
    """One problem: `ssd` over axis `dim` of `lead`, or with `directions` `ssd_2d` over `lead` = (B, H, W)."""

    lead: tuple[int, ...] = (2, 7)
    heads: int = 4
    head_dim: int = 3
    groups: int = 2
    state: int = 5
    chunk: int = 4
    dim: int = 1
    reverse: bool = False
    directions: tuple[str, ...] = ()
    merge: str = "sum"
    softplus: bool = True
    extras: bool = True

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor | None, ...]:
        """The eight tensors as leaves: float64 values rounded to `dtype`, A, D, bias and state to float32 at least."""
        rng = torch.Generator().manual_seed(seed)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        k = (len(self.directions),) if self.directions else ()
        batch = self.lead[:1] if k else tuple(n for i, n in enumerate(self.lead) if i != self.dim)

        def make(*shape: int, like: torch.dtype = dtype) -> Tensor:
            return (torch.randn(*shape, dtype=torch.float64, generator=rng) * 0.7).to(like)

        dt, a = make(*self.lead, *k, self.heads), -0.1 - make(*k, self.heads, like=wide).abs()
        of_group = (*self.lead, *k, self.groups, self.state)
        per_head = (*k, self.heads)
        tensors = (
            make(*self.lead, self.heads, self.head_dim), dt if self.softplus else dt.abs(), a, make(*of_group),
            make(*of_group), make(*per_head, like=wide) if self.extras else None,
            make(*per_head, like=wide) if self.extras else None,
            make(*batch, *per_head, self.head_dim, self.state, like=wide) if self.extras else None,
        )  # fmt: skip
        return tuple(None if t is None else t.requires_grad_() for t in tensors)

    def function(self, backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
        """The public function of the eight tensors as (y, final state)."""

        def run(x, dt, A, B, C, D, dt_bias, state):
            options = dict(
                chunk=self.chunk, dt_bias=dt_bias, softplus=self.softplus, initial_state=state,
                return_final_state=True, backend=backend,
            )  # fmt: skip
            if self.directions:
                return op.ssd_2d(x, dt, A, B, C, D, directions=self.directions, merge=self.merge, **options)
            return op.ssd(x, dt, A, B, C, D, reverse=self.reverse, dim=self.dim, **options)

        return run


CASES = {
    "one_position": Case((1, 1), heads=1, head_dim=1, groups=1, state=1),
    "odd": Case(),
    "reversed": Case((2, 19), reverse=True, chunk=8),
    "time_in_place": Case((2, 6, 3), heads=2, groups=1, state=3, reverse=True),
    "second_axis": Case((2, 3, 17), heads=2, dim=2),
    "bare": Case((2, 33), groups=4, softplus=False, extras=False),
    "one_chunk": Case((1, 9), chunk=256),
    "image": Case((2, 3, 5), heads=2, groups=1, directions=ALL_DIRECTIONS),
    "kept_apart": Case((1, 4, 3), directions=("columns_reversed", "rows"), merge="none"),
    "strip": Case((1, 1, 13), heads=2, groups=1, directions=("rows_reversed",)),
}


def bidirectional_inputs(length: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Seven leaves for `ssd_bidirectional`: x, dt, A, B, C, D, dt_bias."""
    case = Case((2, 1, length), heads=2, groups=1, directions=("rows", "rows_reversed"))
    x, dt, a, b, c, d, bias, _ = (t.detach() for t in case.inputs(dtype) if t is not None)
    return tuple(t.requires_grad_() for t in (x[:, 0], dt[:, 0], a, b[:, 0], c[:, 0], d[0].clone(), bias))


def widened(inputs: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The same values in float64, for the reference."""
    return tuple(None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in inputs)
