"""Runs the Triton SSD in Triton's interpreter on the CPU and prints its errors against the reference as JSON.

A program of its own, because TRITON_INTERPRET=1 must be set before triton is imported. Started by test_ssd_triton.py.
"""

import json
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.ssd import gpu, gpu_plan
from kernels.ssd.reference import ssd_reference
from kernels.testing import relative_rms

NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")


@dataclass(frozen=True)
class Case:
    """One canonical problem; chunks of 16 positions, blocks of 16 states and at most 16 of head_dim."""

    size: tuple[int, int, int]
    orders: tuple[int, ...] = (4,)
    heads: int = 2
    head_dim: int = 3
    groups: int = 1
    states: int = 3
    merge: bool = True
    strict: bool = False
    softplus: bool = True
    extras: bool = True
    dtype: torch.dtype = torch.float32

    def inputs(self) -> list[Tensor | None]:
        """The eight tensors; x, B and C are slices of one projection."""
        rng = torch.Generator().manual_seed(0)
        k, e, p, g, n = len(self.orders), self.heads, self.head_dim, self.groups, self.states

        def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(*shape, generator=rng).to(dtype)

        columns = [e * p, k * g * n, k * g * n]
        x, b, c = draw(*self.size, sum(columns), dtype=self.dtype).split(columns, dim=-1)
        dt = draw(*self.size, k, e, dtype=self.dtype)
        lines = self.size[2] if self.orders[0] >= 4 else 1
        return [
            x.unflatten(-1, (e, p)), dt if self.softplus else dt.abs(), -0.1 - draw(k, e).abs(),
            b.unflatten(-1, (k, g, n)), c.unflatten(-1, (k, g, n)), draw(k, e) if self.extras else None,
            draw(k, e) if self.extras else None, draw(self.size[0], lines, k, e, p, n) if self.extras else None,
        ]  # fmt: skip


CASES = {
    "one_position": Case((1, 1, 1), heads=1, head_dim=1, states=1),
    "chunks": Case((1, 37, 1)),
    "reversed_groups_lines": Case((1, 20, 2), (5,), heads=4, groups=2),
    "blocks_of_head_dim_and_state": Case((1, 18, 1), heads=1, head_dim=20, states=20),
    "both_ways_strict": Case((1, 20, 1), (4, 5), strict=True),
    "image": Case((1, 4, 5), (0, 1, 2, 3)),
    "image_kept_apart": Case((1, 3, 6), (3, 0), merge=False),
    "segments": Case((1, 16 * 8, 1), (5,), heads=1),
    "bare_bfloat16": Case((1, 18, 1), softplus=False, extras=False, dtype=torch.bfloat16),
    "float16": Case((1, 18, 1), (5,), dtype=torch.float16),
}


def tile() -> gpu_plan.Tile:
    """Small blocks for every kernel."""
    return gpu_plan.Tile(states=16, head_dim=16, heads=2)


def run(case: Case) -> dict[str, float]:
    """Relative RMS error of both outputs and of every gradient; checks dtypes and shapes."""
    given = case.inputs()
    wide = [None if t is None else t.double().requires_grad_() for t in given]
    options = dict(orders=case.orders, softplus=case.softplus, merge=case.merge, strict=case.strict)
    want_y, want_final = ssd_reference(*wide, **options)
    grad_y = torch.arange(want_y.numel()).cos().view(want_y.shape).to(case.dtype)
    grad_final = torch.arange(want_final.numel()).sin().view(want_final.shape).float()
    ((want_y * grad_y).sum() + (want_final * grad_final).sum()).backward()
    y, final, saved = gpu.forward(*given, **options, chunk=256, need_backward=True)
    assert y.dtype == case.dtype
    assert tuple(saved.shape) == gpu.saved(given[0], case.orders, case.groups, case.states, 256)[0]
    needs = tuple(t is not None for t in given)
    grads = gpu.backward(grad_y, grad_final, *given, saved, **options, chunk=256, needs=needs)
    errors = {"y": relative_rms(y, want_y), "final_state": relative_rms(final, want_final)}
    for name, tensor, wide_tensor, grad in zip(NAMES, given, wide, grads, strict=True):
        if tensor is not None:
            assert grad.dtype == tensor.dtype, name
            errors["grad_" + name] = relative_rms(grad, wide_tensor.grad)
    return errors


def only_needed() -> dict[str, float]:
    """Largest difference between gradients asked for one by one and all at once; only the final state has one."""
    case = Case((1, 18, 1))
    given = case.inputs()
    options = dict(orders=case.orders, softplus=True, merge=True, strict=False, chunk=256)
    y, final, saved = gpu.forward(*given, **options, need_backward=True)
    grad_y, grad_final = torch.zeros(()).expand(y.shape), torch.ones_like(final)
    everything = gpu.backward(grad_y, grad_final, *given, saved, **options, needs=(True,) * 8)
    difference = {}
    for number, name in enumerate(NAMES):
        needs = tuple(i == number for i in range(8))
        some = gpu.backward(grad_y, grad_final, *given, saved, **options, needs=needs)
        assert [g is not None for g in some] == list(needs), name
        difference[name] = float((some[number] - everything[number]).abs().max())
    return difference


def without_states(case: Case) -> dict[str, float]:
    """Largest differences that it makes to ask for no final state and no gradient of the initial one."""
    given = case.inputs()
    options = dict(orders=case.orders, softplus=True, merge=True, strict=False, chunk=256)
    want_y, final, want_saved = gpu.forward(*given, **options, need_backward=True)
    y, nothing, saved = gpu.forward(*given, **options, need_backward=True, want_final=False)
    assert nothing.numel() == 0
    grad_y, needs = torch.arange(y.numel()).cos().view(y.shape), tuple(t is not None for t in given[:7])
    want = gpu.backward(grad_y, torch.zeros_like(final), *given, want_saved, **options, needs=(*needs, True))
    got = gpu.backward(grad_y, None, *given, saved, **options, needs=(*needs, False))
    pairs = {"y": (y, want_y)} | {n: (g, w) for n, g, w in zip(NAMES[:7], got, want, strict=False) if g is not None}
    return {name: float((g - w).abs().max()) for name, (g, w) in pairs.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills every torch.empty with NaN: a cell never written shows
    gpu_plan.tiles = lambda *_: gpu_plan.Tiles(16, tile(), tile(), tile(), tile())
    results = {name: run(case) for name, case in CASES.items()}
    results["only_needed"] = only_needed()
    results["one_chunk_without_states"] = without_states(Case((2, 9, 2), extras=False))
    results["segments_without_states"] = without_states(CASES["segments"])
    json.dump(results, sys.stdout)
