"""Inputs for scans, shared by the tests of all back ends."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import kernels

ALL_DIRECTIONS = ("rows", "columns", "rows_reversed", "columns_reversed")
NAMES_1D = ("u", "delta", "A", "B", "C", "D", "delta_weight", "delta_bias", "z", "initial_state")
NAMES_2D = ("x", "delta", "A", "B", "C", "D", "delta_weight", "delta_bias", "initial_state")


@dataclass(frozen=True)
class Case1D:
    """One problem for `selective_scan`."""

    shape: tuple[int, ...] = (2, 7, 4)
    state: int = 3
    dim: int = 1
    groups: int = 0
    rank: int = 0
    reverse: bool = False
    softplus: bool = True
    extras: bool = True

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor | None, ...]:
        """The ten tensor inputs, float64 values rounded to `dtype` (A, D, bias, state to float32 at least)."""
        make = _maker(dtype, seed)
        channels, lead = self.shape[-1], self.shape[:-1]
        batch = [s for i, s in enumerate(lead) if i != self.dim % len(self.shape)]
        state = (*batch, channels, self.state)
        bc = (*lead, self.groups, self.state) if self.groups else (*lead, self.state)
        return (
            make(*self.shape), self._steps(make(*lead, self.rank or channels)), make.decay(channels, self.state),
            make(*bc), make(*bc), make.wide(channels) if self.extras else None,
            make(channels, self.rank) if self.rank else None, make.wide(channels) if self.extras else None,
            make(*self.shape) if self.extras else None, make.wide(*state) if self.extras else None,
        )  # fmt: skip

    def _steps(self, delta: Tensor) -> Tensor:
        """Without a softplus the steps themselves are positive, else the states would grow without bound."""
        return delta if self.softplus else delta.detach().abs().requires_grad_()

    def function(self, backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
        """`selective_scan` of the ten inputs as (y, final state)."""

        def run(u, delta, A, B, C, D, weight, bias, z, state):
            return kernels.selective_scan(
                u, delta, A, B, C, D, delta_weight=weight, delta_bias=bias, softplus=self.softplus, z=z,
                reverse=self.reverse, dim=self.dim, initial_state=state, return_final_state=True, backend=backend,
            )  # fmt: skip

        return run


@dataclass(frozen=True)
class Case2D:
    """One problem for `selective_scan_2d`."""

    shape: tuple[int, int, int, int] = (2, 3, 5, 4)
    state: int = 3
    directions: tuple[str, ...] = ALL_DIRECTIONS
    rank: int = 2
    softplus: bool = True
    merge: str = "sum"
    extras: bool = True

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor | None, ...]:
        """The nine tensor inputs."""
        make = _maker(dtype, seed)
        (batch, height, width, channels), k = self.shape, len(self.directions)
        lead = (batch, height, width, k)
        return (
            make(*self.shape), self._steps(make(*lead, self.rank or channels)), make.decay(k, channels, self.state),
            make(*lead, self.state), make(*lead, self.state), make.wide(k, channels) if self.extras else None,
            make(k, channels, self.rank) if self.rank else None, make.wide(k, channels) if self.extras else None,
            make.wide(batch, k, channels, self.state) if self.extras else None,
        )  # fmt: skip

    def _steps(self, delta: Tensor) -> Tensor:
        """Without a softplus the steps themselves are positive, else the states would grow without bound."""
        return delta if self.softplus else delta.detach().abs().requires_grad_()

    def function(self, backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
        """`selective_scan_2d` of the nine inputs as (y, final states)."""

        def run(x, delta, A, B, C, D, weight, bias, state):
            return kernels.selective_scan_2d(
                x, delta, A, B, C, D, directions=self.directions, delta_weight=weight, delta_bias=bias,
                softplus=self.softplus, merge=self.merge, initial_state=state, return_final_state=True,
                backend=backend,
            )  # fmt: skip

        return run


class _maker:  # noqa: N801
    """Random leaves of one dtype that require gradients."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.dtype = dtype
        self.wide_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.rng = torch.Generator().manual_seed(seed)

    def _leaf(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        return values.to(dtype).requires_grad_()

    def __call__(self, *shape: int) -> Tensor:
        return self._leaf(torch.randn(*shape, dtype=torch.float64, generator=self.rng) * 0.7, self.dtype)

    def wide(self, *shape: int) -> Tensor:
        return self._leaf(torch.randn(*shape, dtype=torch.float64, generator=self.rng), self.wide_dtype)

    def decay(self, *shape: int) -> Tensor:
        values = -0.1 - torch.rand(*shape, dtype=torch.float64, generator=self.rng) * 2
        return self._leaf(values, self.wide_dtype)


def widened(inputs: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The same values in float64, for the reference."""
    return tuple(None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in inputs)


CASES_1D = {
    "one_step": Case1D((1, 1, 1), state=1),
    "odd": Case1D((2, 7, 4), state=3),
    "reversed_grouped": Case1D((2, 9, 6), state=10, groups=3, reverse=True),
    "low_rank": Case1D((1, 21, 5), state=16, rank=2),
    "time_in_place": Case1D((2, 6, 3, 2, 4), state=18, rank=3, groups=2, reverse=True),
    "second_axis": Case1D((2, 3, 17, 3), dim=2, state=3),
    "first_axis": Case1D((19, 4), dim=0, state=2),
    "bare": Case1D((2, 33, 4), state=16, softplus=False, extras=False),
    "wide_state": Case1D((1, 5, 2), state=64),
}
CASES_2D = {
    "one_pixel": Case2D((1, 1, 1, 1), state=1, rank=1),
    "odd": Case2D((2, 3, 5, 4), state=3),
    "full_delta": Case2D((1, 5, 4, 3), state=16, rank=0),
    "two_directions_kept_apart": Case2D((2, 4, 3, 5), directions=("columns_reversed", "rows"), merge="none"),
    "strip": Case2D((1, 1, 13, 4), state=10),
    "bare": Case2D((1, 6, 7, 2), state=18, extras=False, softplus=False, rank=0),
}
