"""Runs the Triton scan in Triton's interpreter on the CPU and prints its errors against the reference as JSON.

A program of its own, because TRITON_INTERPRET=1 must be set before triton is imported. Started by test_scan_triton.py.
"""

import json
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.selective_scan import gpu
from kernels.selective_scan.reference import selective_scan_reference
from kernels.testing import relative_rms

NAMES = ("x", "delta", "A", "B", "C", "D", "delta_weight", "delta_bias", "z", "initial_state")


@dataclass(frozen=True)
class Case:
    """One canonical problem; ``chunk`` overrides the chunk length so that tiny problems have several chunks."""

    size: tuple[int, int, int, int]
    states: int
    orders: tuple[int, ...]
    rank: int = 0
    groups: int = 1
    chunk: int = 4
    merge: bool = True
    softplus: bool = True
    extras: bool = True
    z: bool = False
    packed: bool = False
    dtype: torch.dtype = torch.float32

    def inputs(self) -> list[Tensor | None]:
        """The ten tensors; with ``packed`` delta, B and C are slices of one projection."""
        rng = torch.Generator().manual_seed(0)
        batch, _, width, channels = self.size
        k, n, lead = len(self.orders), self.states, self.size[:3]

        def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(*shape, generator=rng).to(dtype)

        columns = [self.rank or channels, self.groups * n, self.groups * n]
        if self.packed:
            delta, b, c = draw(*lead, k, sum(columns), dtype=self.dtype).split(columns, dim=-1)
        else:
            delta, b, c = (draw(*lead, k, size, dtype=self.dtype) for size in columns)
        state = (batch, width, 1, channels, n) if self.orders[0] >= 4 else (batch, k, channels, n)
        return [
            draw(*self.size, dtype=self.dtype), delta, -0.3 - draw(k, channels, n).abs(),
            b.unflatten(-1, (self.groups, n)), c.unflatten(-1, (self.groups, n)),
            draw(k, channels) if self.extras else None,
            draw(k, channels, self.rank, dtype=self.dtype) if self.rank else None,
            draw(k, channels) if self.extras else None, draw(*self.size, dtype=self.dtype) if self.z else None,
            draw(*state) if self.extras else None,
        ]  # fmt: skip


CASES = {
    "one_pixel": Case((1, 1, 1, 1), 1, (0,), rank=1),
    "four_directions": Case((1, 3, 4, 4), 3, (0, 1, 2, 3), rank=2),
    "two_images_ragged_chunks": Case((2, 2, 5, 3), 3, (2,), chunk=8),
    "groups_kept_apart": Case((1, 3, 3, 6), 3, (3, 0), rank=2, groups=2, merge=False),
    "lines_backwards_wide_state_gated": Case((1, 5, 2, 3), 18, (5,), rank=2, z=True),
    "lines_one_chunk_gated": Case((1, 7, 2, 3), 16, (4,), z=True, chunk=8),
    "bare_one_chunk": Case((1, 2, 3, 4), 16, (1,), chunk=8, extras=False, softplus=False),
    "bfloat16_slices": Case((1, 3, 4, 4), 3, (1, 3), rank=2, packed=True, dtype=torch.bfloat16),
    "float16": Case((1, 2, 3, 2), 3, (2, 3), dtype=torch.float16),
    "rank_beyond_the_kernel": Case((1, 2, 3, 3), 2, (2,), rank=33),
    "many_channel_blocks": Case((1, 2, 2, 70), 8, (0, 2), rank=2),
}


def run(case: Case) -> dict[str, float]:
    """Relative RMS error of both outputs and of every gradient; checks dtypes and shapes of the gradients."""
    gpu._chunking = lambda x, orders, states: (case.chunk, -(-_length(x, orders) // case.chunk))
    given = case.inputs()
    wide = [None if t is None else t.double().requires_grad_() for t in given]
    options = dict(orders=case.orders, softplus=case.softplus, merge=case.merge)
    want_y, want_final = selective_scan_reference(*wide, **options)
    grad_y = torch.arange(want_y.numel()).cos().view(want_y.shape).to(case.dtype)
    grad_final = torch.arange(want_final.numel()).sin().view(want_final.shape).float()
    ((want_y * grad_y).sum() + (want_final * grad_final).sum()).backward()
    y, final, saved = gpu.forward(*given, **options, need_backward=True)
    assert y.dtype == case.dtype
    assert tuple(saved.shape) == tuple(gpu.saved_shape(given[0], case.orders, case.groups, case.states))
    needs = tuple(t is not None for t in given)
    grads = gpu.backward(grad_y, grad_final, *given, saved, **options, needs=needs)
    errors = {"y": relative_rms(y, want_y), "final_state": relative_rms(final, want_final)}
    for name, tensor, wide_tensor, grad in zip(NAMES, given, wide, grads, strict=True):
        if tensor is not None:
            assert grad.dtype == tensor.dtype, name
            errors["grad_" + name] = relative_rms(grad, wide_tensor.grad)
    return errors


def _length(x: Tensor, orders: tuple[int, ...]) -> int:
    return x.shape[1] if orders[0] >= 4 else x.shape[1] * x.shape[2]


def only_needed() -> dict[str, float]:
    """Difference between gradients asked for in small groups and all at once; only the final state has a gradient."""
    case = Case((1, 1, 4, 2), 2, (0, 3), rank=2, chunk=4)
    given = case.inputs()
    options = dict(orders=case.orders, softplus=True, merge=True)
    gpu._chunking = lambda x, orders, states: (4, 1)
    y, final, saved = gpu.forward(*given, **options, need_backward=True)
    grad_y, grad_final = torch.zeros(()).expand(y.shape), torch.ones_like(final)
    needs = tuple(t is not None for t in given)
    everything = gpu.backward(grad_y, grad_final, *given, saved, **options, needs=needs)
    difference = {}
    for group in (("x", "A"), ("delta", "C", "D"), ("B", "delta_weight"), ("delta_bias", "initial_state")):
        some = gpu.backward(
            grad_y, grad_final, *given, saved, **options, needs=tuple(name in group for name in NAMES)
        )  # fmt: skip
        assert [g is not None for g in some] == [name in group for name in NAMES]
        difference |= {
            name: float((got - want).abs().max())
            for name, got, want in zip(NAMES, some, everything, strict=True)
            if got is not None
        }
    return difference


def without_states(case: Case) -> dict[str, float]:
    """Largest differences that it makes to ask for no final state."""
    gpu._chunking = lambda x, orders, states: (case.chunk, -(-_length(x, orders) // case.chunk))
    given, needs = case.inputs(), tuple(t is not None for t in case.inputs())
    options = dict(orders=case.orders, softplus=case.softplus, merge=case.merge)
    want_y, _, want_saved = gpu.forward(*given, **options, need_backward=True)
    y, final, saved = gpu.forward(*given, **options, need_backward=True, want_final=False)
    assert final.numel() == 0
    grad_y = torch.arange(y.numel()).cos().view(y.shape)
    want = gpu.backward(grad_y, None, *given, want_saved, **options, needs=needs)
    got = gpu.backward(grad_y, None, *given, saved, **options, needs=needs)
    pairs = zip(("y", *NAMES), (y, *got), (want_y, *want), strict=True)
    return {name: float((g - w).abs().max()) for name, g, w in pairs if g is not None}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills every torch.empty with NaN: a cell never written shows
    results = {name: run(case) for name, case in CASES.items()}
    results["only_needed"] = only_needed()
    results["one_chunk_without_states"] = without_states(Case((1, 5, 2, 3), 3, (5,), z=True, chunk=8))
    results["chunks_without_states"] = without_states(Case((1, 3, 4, 2), 2, (0, 3), rank=2, chunk=4))
    json.dump(results, sys.stdout)
