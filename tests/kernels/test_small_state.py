"""The scan kernels for one or two states: in the interpreter against the reference, larger ones on a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from kernels.selective_scan import gpu_small_state
from kernels.selective_scan.reference import selective_scan_reference
from kernels.testing import TOLERANCE, assert_close
from tests.kernels.interpreted_scans import NAMES, Case
from tests.kernels.interpreted_small_state import CASES

# The interpreter rounds to bfloat16 towards zero: twice the rounding of a GPU.
INTERPRETER_TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, float]]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.kernels.interpreted_small_state"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(errors, name):
    case = CASES[name]
    expected = {"y", "final_state"}
    expected |= {f"grad_{n}" for n, t in zip(NAMES, case.inputs(), strict=True) if t is not None}
    assert set(errors[name]) == expected
    assert not {n: e for n, e in errors[name].items() if not e <= INTERPRETER_TOLERANCE[case.dtype]}


def test_gradients_alone_are_the_same(errors):
    assert set(errors["only_needed"]) == set(NAMES) - {"z"}
    assert not any(errors["only_needed"].values())


SUITS = {
    "one image": ((1, 56, 56, 192), (0, 1, 2, 3), 1, False),
    "a batch of images": ((32, 56, 56, 192), (0, 1, 2, 3), 1, True),
    "sixteen states": ((32, 56, 56, 192), (0, 1, 2, 3), 16, False),
    "long lines": ((8, 4096, 1, 768), (4,), 1, True),
    "many short lines": ((1, 16, 4096, 128), (5,), 1, False),
}


@pytest.mark.parametrize("size, orders, state, wanted", SUITS.values(), ids=SUITS)
def test_says_what_it_suits(size, orders, state, wanted):
    x = torch.empty(size, device="meta")
    assert gpu_small_state.suits(x, orders, state) == wanted


def test_a_window_of_an_image_does_not_suit():
    image = torch.empty(32, 60, 60, 192, device="meta")
    assert gpu_small_state.suits(image[:, :56], (0,), 1)
    assert not gpu_small_state.suits(image[:, :, :56], (0,), 1)
    assert gpu_small_state.suits(torch.empty(32, 60, 60, 400, device="meta")[..., 192:384], (0, 1), 1)


GPU_CASES = {
    "image": Case((2, 20, 15, 100), 1, (0, 1, 2, 3), rank=12, packed=True),
    "image_two_states": Case((2, 16, 17, 72), 2, (3, 1), rank=5, groups=2, merge=False),
    "lines": Case((2, 300, 3, 130), 1, (4,), z=True),
    "lines_backwards": Case((3, 200, 1, 64), 2, (5,), rank=8, groups=4, z=True),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", GPU_CASES)
def test_on_the_gpu(name, dtype):
    case = GPU_CASES[name]
    given = [
        None if t is None else t.cuda().to(dtype if n in ("x", "delta", "B", "C", "delta_weight", "z") else t.dtype)
        for n, t in zip(NAMES, case.inputs(), strict=True)
    ]
    wide = [None if t is None else t.double().requires_grad_() for t in given]
    options = dict(orders=case.orders, softplus=case.softplus, merge=case.merge)
    want = selective_scan_reference(*wide, **options)
    weights = [torch.arange(t.numel(), device="cuda").cos().bfloat16().float().view(t.shape) for t in want]
    wanted = torch.autograd.grad(want, [t for t in wide if t is not None], [w.double() for w in weights])
    y, final, saved = gpu_small_state.forward(*given, **options, need_backward=True)
    needs = tuple(t is not None for t in given)
    grads, again = (
        gpu_small_state.backward(weights[0].to(dtype), weights[1], *given, saved, **options, needs=needs)
        for _ in range(2)
    )
    assert_close("y", y, want[0], TOLERANCE[dtype])
    assert_close("final_state", final, want[1], TOLERANCE[dtype])
    named = [(n, g, a) for n, g, a in zip(NAMES, grads, again, strict=True) if g is not None and a is not None]
    for (argument, got, second), wide_gradient in zip(named, wanted, strict=True):
        assert_close(argument, got, wide_gradient, TOLERANCE[dtype])
        assert torch.equal(got, second), f"{argument} differs between two runs"
