"""Runs the Triton convolution in Triton's interpreter on the CPU and prints its errors against the reference as JSON.

A program of its own, because TRITON_INTERPRET=1 must be set before triton is imported. Started by
test_causal_conv1d.py.
"""

import json
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.causal_conv1d import gpu
from kernels.causal_conv1d.reference import causal_conv1d_reference
from kernels.testing import relative_rms

NAMES = ("x", "weight", "bias", "initial_state")


@dataclass(frozen=True)
class Case:
    """One canonical problem (B, L, W, D); the CPU counts as one multiprocessor, so programs take several tasks."""

    size: tuple[int, int, int, int]
    width: int = 4
    silu: bool = True
    reverse: bool = False
    extras: bool = True
    sliced: bool = False
    dtype: torch.dtype = torch.float32

    def inputs(self) -> list[Tensor | None]:
        """x, weight, bias, initial state; with ``sliced`` x is a part of a wider projection."""
        rng = torch.Generator().manual_seed(0)
        batch, length, lines, channels = self.size
        x = torch.randn(batch, length, lines, 3 * channels if self.sliced else channels, generator=rng).to(self.dtype)
        return [
            x[..., channels : 2 * channels] if self.sliced else x,
            torch.randn(channels, self.width, generator=rng),
            torch.randn(channels, generator=rng).to(self.dtype) if self.extras else None,
            torch.randn(batch, self.width - 1, lines, channels, generator=rng).to(self.dtype) if self.extras else None,
        ]


CASES = {
    "one_step_one_tap": Case((1, 1, 1, 1), width=1),
    "shorter_than_the_taps": Case((2, 2, 1, 3), width=4),
    "odd_chunks": Case((1, 37, 1, 5), width=4),
    "backwards": Case((1, 21, 2, 3), width=3, reverse=True),
    "in_place_over_frames": Case((2, 9, 3, 4), width=2, sliced=True),
    "more_sequences_than_programs": Case((5, 3, 5, 2), width=2),
    "bare": Case((1, 19, 1, 2), width=8, silu=False, extras=False),
    "several_channel_blocks": Case((1, 5, 1, 140), width=2),
    "bfloat16_backwards": Case((1, 18, 1, 3), width=5, reverse=True, sliced=True, dtype=torch.bfloat16),
    "float16": Case((1, 9, 1, 3), dtype=torch.float16),
}


def run(case: Case) -> dict[str, float]:
    """Relative RMS error of both outputs and of every gradient against float64."""
    given = case.inputs()
    wide = [None if t is None else t.double().requires_grad_() for t in given]
    want_y, want_final = causal_conv1d_reference(*wide, silu=case.silu, reverse=case.reverse)
    grad_y = torch.arange(want_y.numel()).cos().view(want_y.shape).to(case.dtype)
    grad_final = torch.arange(want_final.numel()).sin().view(want_final.shape).to(case.dtype)
    ((want_y * grad_y).sum() + (want_final * grad_final).sum()).backward()
    y, final = gpu.forward(*given, silu=case.silu, reverse=case.reverse, want_final=True)
    assert y.dtype == final.dtype == case.dtype
    needs = tuple(t is not None for t in given)
    grads = gpu.backward(grad_y, grad_final, *given, silu=case.silu, reverse=case.reverse, needs=needs)
    errors = {"y": relative_rms(y, want_y), "final_state": relative_rms(final, want_final)}
    for name, tensor, wide_tensor, grad in zip(NAMES, given, wide, grads, strict=True):
        if tensor is not None:
            assert grad.dtype == tensor.dtype, name
            want = torch.zeros_like(wide_tensor) if wide_tensor.grad is None else wide_tensor.grad  # a state of no rows
            errors["grad_" + name] = relative_rms(grad, want)
    return errors


def only_needed() -> dict[str, float]:
    """Difference between each gradient asked for alone and all at once."""
    given = CASES["backwards"].inputs()
    grad_y = torch.ones(given[0].shape)
    everything = gpu.backward(grad_y, None, *given, silu=True, reverse=True, needs=(True,) * 4)
    difference = {}
    for i, name in enumerate(NAMES):
        needs = tuple(j == i for j in range(4))
        some = gpu.backward(grad_y, None, *given, silu=True, reverse=True, needs=needs)
        assert [g is not None for g in some] == list(needs)
        difference[name] = float((some[i] - everything[i]).abs().max())
    return difference


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills every torch.empty with NaN: a cell never written shows
    results = {name: run(case) for name, case in CASES.items()}
    results["only_needed"] = only_needed()
    json.dump(results, sys.stdout)
