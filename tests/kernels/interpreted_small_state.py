"""Runs the scan kernels for few states in Triton's interpreter and prints their errors against the reference as JSON.

A program of its own, because TRITON_INTERPRET=1 must be set before triton is imported. Started by test_small_state.py.
"""

import json
import sys

import torch

from kernels.selective_scan import gpu_small_state
from kernels.selective_scan.gpu_small_state import Tile
from kernels.selective_scan.reference import selective_scan_reference
from kernels.testing import relative_rms
from tests.kernels.interpreted_scans import NAMES, Case

CASES = {
    "one_pixel": Case((1, 1, 1, 1), 1, (0,), rank=1),
    "four_directions_low_rank": Case((2, 3, 5, 17), 1, (0, 1, 2, 3), rank=3),
    "two_states_full_delta": Case((1, 5, 4, 3), 2, (1, 2)),
    "groups_kept_apart": Case((1, 3, 7, 6), 1, (3, 0), rank=2, groups=2, merge=False),
    "lines_backwards_gated": Case((1, 19, 2, 3), 2, (5,), rank=2, z=True),
    "lines_gated": Case((2, 17, 1, 20), 1, (4,), z=True),
    "bare": Case((1, 4, 5, 2), 1, (3,), extras=False, softplus=False),
    "bfloat16_slices": Case((1, 3, 6, 4), 1, (0, 1, 2, 3), rank=2, packed=True, dtype=torch.bfloat16),
    "float16": Case((1, 4, 3, 2), 1, (2, 3), dtype=torch.float16),
    "rank_beyond_the_kernel": Case((1, 2, 3, 3), 1, (2,), rank=33),
}


def run(case: Case) -> dict[str, float]:
    """Relative RMS error of both outputs and of every gradient; checks dtypes and shapes of the gradients."""
    given = case.inputs()
    wide = [None if t is None else t.double().requires_grad_() for t in given]
    options = dict(orders=case.orders, softplus=case.softplus, merge=case.merge)
    want_y, want_final = selective_scan_reference(*wide, **options)
    grad_y = torch.arange(want_y.numel()).cos().view(want_y.shape).to(case.dtype)
    grad_final = torch.arange(want_final.numel()).sin().view(want_final.shape).float()
    ((want_y * grad_y).sum() + (want_final * grad_final).sum()).backward()
    y, final, saved = gpu_small_state.forward(*given, **options, need_backward=True)
    assert y.dtype == case.dtype
    assert tuple(saved.shape) == gpu_small_state.saved_shape(given[0], case.orders, case.groups, case.states)
    needs = tuple(t is not None for t in given)
    grads = gpu_small_state.backward(grad_y, grad_final, *given, saved, **options, needs=needs)
    errors = {"y": relative_rms(y, want_y), "final_state": relative_rms(final, want_final)}
    for name, tensor, wide_tensor, grad in zip(NAMES, given, wide, grads, strict=True):
        if tensor is not None:
            assert grad.dtype == tensor.dtype, name
            errors["grad_" + name] = relative_rms(grad, wide_tensor.grad)
    return errors


def only_needed() -> dict[str, float]:
    """Difference between gradients asked for in small groups and all at once; only the final state has a gradient."""
    given = Case((1, 3, 4, 2), 1, (0, 3), rank=2).inputs()
    options = dict(orders=(0, 3), softplus=True, merge=True)
    y, final, saved = gpu_small_state.forward(*given, **options, need_backward=True)
    grad_y, grad_final = torch.zeros(()).expand(y.shape), torch.ones_like(final)
    needs = tuple(t is not None for t in given)
    everything = gpu_small_state.backward(grad_y, grad_final, *given, saved, **options, needs=needs)
    difference = {}
    for group in (("x", "A"), ("delta", "C", "D"), ("B", "delta_weight"), ("delta_bias", "initial_state")):
        wanted = tuple(name in group for name in NAMES)
        some = gpu_small_state.backward(grad_y, grad_final, *given, saved, **options, needs=wanted)
        assert [g is not None for g in some] == list(wanted)
        difference |= {
            name: float((got - want).abs().max())
            for name, got, want in zip(NAMES, some, everything, strict=True)
            if got is not None
        }
    return difference


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills every torch.empty with NaN: a cell never written shows
    gpu_small_state.STEPS = 8  # so that tiny problems have several tiles
    gpu_small_state.MAX_PROGRAMS = 3  # so that a pass takes several launches
    gpu_small_state.SLIM = Tile(channels=16, segments=4, warps=1, registers=168)
    gpu_small_state.ROOMY = Tile(channels=16, segments=2, warps=1, registers=255)
    gpu_small_state.LOW_RANK = Tile(channels=32, segments=8, warps=1, registers=255)
    results = {name: run(case) for name, case in CASES.items()}
    results["only_needed"] = only_needed()
    json.dump(results, sys.stdout)
