"""Triton SSD: interpreter against the reference, and every kernel compiled ahead of time. Neither needs a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from kernels.ssd import gpu, gpu_plan
from tests.kernels.ahead_of_time import SHARED_MEMORY, Launch, compile_launch, record_launches
from tests.kernels.interpreted_ssd import CASES, NAMES

# float16: the outputs' rounding, 2^-11, and a margin. bfloat16: the interpreter truncates, an error of up to 2^-7.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.kernels.interpreted_ssd"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(interpreted, name):
    errors = interpreted[name]
    expected = {"y", "final_state"}
    expected |= {f"grad_{n}" for n, t in zip(NAMES, CASES[name].inputs(), strict=True) if t is not None}
    assert set(errors) == expected
    assert not {n: e for n, e in errors.items() if not e <= TOLERANCE[CASES[name].dtype]}


def test_gradients_alone_are_the_same(interpreted):
    assert set(interpreted["only_needed"]) == set(NAMES)
    assert not any(interpreted["only_needed"].values())


@pytest.mark.parametrize("name", ["one_chunk", "segments"])
def test_states_that_nobody_asks_for_change_nothing(interpreted, name):
    assert {"y", "x", "A", "B", "C"} <= set(interpreted[f"{name}_without_states"])
    assert not any(interpreted[f"{name}_without_states"].values())


def _launches(monkeypatch, dtype: torch.dtype, head_dim: int, state: int, orders=(4,)) -> list[Launch]:
    """Every launch of one forward and one backward pass over six chunks, cut into segments."""
    heads, k = 2, len(orders)
    lead = (2, 384, 1) if orders[0] >= 4 else (2, 16, 24)
    x, dt = torch.zeros(*lead, heads, head_dim, dtype=dtype), torch.zeros(*lead, k, heads, dtype=dtype)
    b = torch.zeros(*lead, k, 1, state, dtype=dtype)
    per_head = torch.zeros(k, heads)
    given = (x, dt, per_head, b, b, per_head, per_head, None)
    options = dict(orders=orders, softplus=True, merge=True, strict=False, chunk=256)

    def run() -> None:
        y, _, saved = gpu.forward(*given, **options, need_backward=True)
        gpu.backward(y, None, *given, saved, **options, needs=tuple(t is not None for t in given))

    monkeypatch.setattr(gpu_plan, "_processors", lambda index: 132)
    return record_launches(monkeypatch, gpu, run)


no_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)


@no_interpreter
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_compiles_ahead_of_time(monkeypatch, capability):
    launches = _launches(monkeypatch, torch.bfloat16, 16, 16)
    assert len({launch.name for launch in launches}) == 7
    for launch in launches:
        assert compile_launch(launch, capability).asm["cubin"]


@no_interpreter
def test_both_ways_of_an_axis_compile(monkeypatch):
    launches = _launches(monkeypatch, torch.bfloat16, 16, 16, (0, 2))
    for launch in launches:
        if launch.arguments.get("DIRS") == 2:
            assert compile_launch(launch, 90).asm["cubin"]
    assert {launch.name for launch in launches if launch.arguments.get("DIRS") == 2} == {
        "ssd_output_kernel", "ssd_input_gradient_kernel"
    }  # fmt: skip


@no_interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_shared_memory_fits_the_smallest_gpu(monkeypatch, dtype):
    """The tiles of every dtype fit compute capability 8.9, so no GPU needs others."""
    for launch in _launches(monkeypatch, dtype, 64, 128):
        assert compile_launch(launch, 89).metadata.shared <= SHARED_MEMORY[89], launch.name
