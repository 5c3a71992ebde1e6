"""Triton scan: interpreter against the reference, and every kernel compiled ahead of time. Neither needs a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.selective_scan import gpu
from tests.kernels.interpreted_scans import CASES, NAMES

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
# bfloat16 and float16: the outputs' own rounding, 2^-9 and 2^-11, and a margin of 2.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.kernels.interpreted_scans"]
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
    wrong = {n: e for n, e in errors.items() if not e <= TOLERANCE[CASES[name].dtype]}
    assert not wrong


@pytest.mark.parametrize("name", ["one_chunk", "chunks"])
def test_a_final_state_that_nobody_asks_for_changes_nothing(interpreted, name):
    assert {"y", "x", "A", "B", "C"} <= set(interpreted[f"{name}_without_states"])
    assert not any(interpreted[f"{name}_without_states"].values())


def test_gradients_alone_are_the_same(interpreted):
    assert set(interpreted["only_needed"]) == set(NAMES) - {"z"}
    assert not any(interpreted["only_needed"].values())


class _Recorder:
    """Stands for a kernel and keeps what it is launched with."""

    def __init__(self, kernel, launches: list) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def record(*args, num_warps: int, **kwargs) -> None:
            named = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
            self.launches.append((self.kernel, named, num_warps))

        return record


def _launches(monkeypatch, *, batch=2, size=20, channels=64, states=16, rank=4, dtype=torch.bfloat16) -> list:
    """Kernel, arguments and warps of every different launch of one forward and one backward pass."""
    launches: list = []
    for name in ("scan_chunk_kernel", "scan_combine_kernel", "scan_output_kernel", "scan_gradient_kernel"):
        monkeypatch.setattr(gpu, name, _Recorder(getattr(gpu, name), launches))
    lead = (batch, size, size)
    x = torch.zeros(*lead, channels, dtype=dtype)
    delta, b, c = torch.zeros(*lead, 4, rank + 2 * states).split([rank, states, states], dim=-1)
    given = (x, delta, torch.zeros(4, channels, states), b.unsqueeze(-2), c.unsqueeze(-2), torch.zeros(4, channels),
             torch.zeros(4, channels, rank), torch.zeros(4, channels), None, None)  # fmt: skip
    options = dict(orders=(0, 1, 2, 3), softplus=True, merge=True)
    y, _, saved = gpu.forward(*given, **options, need_backward=True)
    gpu.backward(y, None, *given, saved, **options, needs=tuple(t is not None for t in given))
    assert saved.numel()
    return launches[:3] + launches[4:7]


def _specialise(value, constant_one: bool) -> tuple[str, object, bool]:
    """Type, constant (or ...) and whether a multiple of 16, as Triton sees an argument."""
    if value is None or isinstance(value, bool):
        return "constexpr", value, False
    if isinstance(value, Tensor):
        return TYPES[value.dtype], ..., value.data_ptr() % 16 == 0
    if value == 1 and constant_one:
        return "constexpr", 1, False
    return "i32", ..., constant_one and value % 16 == 0


def _compile(kernel, named: dict, warps: int, capability: int):
    """The kernel compiled to a cubin as a launch with these arguments would compile it."""
    signature, constants, hints = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = named[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(i,)] = "constexpr", value
            continue
        parts = value if isinstance(value, tuple) else (value,)
        seen = [_specialise(part, not parameter.do_not_specialize) for part in parts]
        for j, (_, constant, aligned) in enumerate(seen):
            place = (i, j) if isinstance(value, tuple) else (i,)
            if constant is not ...:
                constants[place] = constant
            elif aligned:
                hints[place] = [["tt.divisibility", 16]]
        signature[parameter.name] = tuple(s[0] for s in seen) if isinstance(value, tuple) else seen[0][0]
    source = ASTSource(kernel, signature, constants, hints)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 89, 90, 100])
def test_compiles_ahead_of_time(monkeypatch, capability):
    for kernel, named, warps in _launches(monkeypatch, channels=32, states=2):
        assert _compile(kernel, named, warps, capability).asm["cubin"]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
def test_states_of_a_channel_stay_in_one_thread(monkeypatch):
    """What the speed rests on: no tile is laid out with states across lanes."""
    for kernel, named, warps in _launches(monkeypatch)[:3]:
        text = _compile(kernel, named, warps, 90).asm["ttgir"]
        tiles = [line for line in text.splitlines() if "ttg.blocked<" in line and "threadsPerWarp = [1, 32]" in line]
        other = [line for line in text.splitlines() if "threadsPerWarp = [" in line and "[1, 32]" not in line]
        assert tiles
        assert all("threadsPerWarp = [32]" in line for line in other), kernel.__name__
