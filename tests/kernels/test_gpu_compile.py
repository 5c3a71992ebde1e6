"""Every Triton kernel compiles ahead of time, without a GPU, for four generations of GPUs, and fits into each.

tools/compile_kernels.py runs the back ends on tensors that claim to be on such a GPU and compiles what they would
launch, so that specialisations, tiles and fall-backs by shared memory are those of a real run.
"""

import ast
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import kernels

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

ROOT = Path(kernels.__file__).parents[1]
SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
"""Most shared memory of a block in bytes."""
EACH_KERNEL_ONCE = ("image", "image, one state", "sequence, 64 states", "ssd", "convolution")
"""Cases of the tool that launch every kernel."""
ALSO_ON_90 = ("sequence, gated, with states", "frames")
"""Further specialisations; all of the tool's cases on all GPUs would take minutes."""
LOCAL_MEMORY = {
    "selective_scan.gpu_gradient": 4096, "selective_scan.gluon_gradient": 1024, "selective_scan.gluon_kernels": 256,
    "selective_scan.gpu_small_gradient": 512, "ssd": 2048,
}  # fmt: skip
"""Bytes a thread may spill, by folder or module, where it is more than 128. Gradient kernels hold whole tiles of states
and of sums; spills stay in the first-level cache."""


@pytest.fixture(scope="module")
def compiled() -> dict[int, list[dict]]:
    """What the tool found, by compute capability; two compilations at a time."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(SHARED_MEMORY, pool.map(compile_for, SHARED_MEMORY), strict=True))


def compile_for(capability: int) -> list[dict]:
    """Runs the tool."""
    command = [sys.executable, "tools/compile_kernels.py", "--json", "--capability", str(capability)]
    command += ["--case", *EACH_KERNEL_ONCE, *(ALSO_ON_90 if capability == 90 else ())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout)


def defined_kernels() -> set[str]:
    """Module and name of every jitted function of the package whose name ends in _kernel."""
    found = set()
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                module = ".".join(path.relative_to(ROOT / "kernels").with_suffix("").parts)
                found |= {f"{module}.{node.name}" for d in node.decorator_list if "jit" in ast.unparse(d)}
    return found


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_every_kernel_compiles(compiled, capability):
    defined = defined_kernels()
    assert len(defined) >= 12
    assert {f"{k['module']}.{k['kernel']}" for k in compiled[capability]} == defined


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_shared_memory_fits(compiled, capability):
    too_large = {k["kernel"]: k["shared"] for k in compiled[capability] if k["shared"] > SHARED_MEMORY[capability]}
    assert not too_large


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_few_registers_are_spilled(compiled, capability):
    if any(k["local"] is None for k in compiled[capability]):
        pytest.skip("this Triton has no cuobjdump to ask")
    spilled = {
        f"{k['module']}.{k['kernel']} ({k['case']})": k["local"]
        for k in compiled[capability]
        if k["local"] > LOCAL_MEMORY.get(k["module"], LOCAL_MEMORY.get(k["module"].partition(".")[0], 128))
    }
    assert not spilled


def test_ssd_falls_back_to_smaller_tiles_where_shared_memory_is_small(compiled):
    largest = {c: max(k["shared"] for k in compiled[c] if k["module"].startswith("ssd")) for c in SHARED_MEMORY}
    assert largest[89] <= largest[90]
    assert largest[89] <= SHARED_MEMORY[89]
