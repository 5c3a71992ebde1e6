"""Compiles the Triton kernels ahead of time, without a GPU: python tools/compile_kernels.py [--capability 80 90].

The back ends run on CPU tensors that claim to be on a GPU of each compute capability. A launch compiles what it would
launch there, in that very specialisation, and does nothing else. Prints shared memory, registers and spilled bytes of
each kernel, with --json as one JSON document.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
"""Most shared memory of a block in bytes (CUDA C++ Programming Guide, technical specifications per capability)."""
MULTIPROCESSORS = 132


@dataclass(frozen=True)
class Compiled:
    """One kernel in one specialisation; registers and local memory are None where the disassembler is missing."""

    case: str
    module: str
    """Folder and file of the kernel, within the package `kernels`."""
    kernel: str
    capability: int
    warps: int
    shared: int
    registers: int | None
    local: int | None
    """Bytes of local memory a thread: spills, and arrays that are indexed at run time."""
    seconds: float


class ClaimsGpu(Tensor):
    """A CPU tensor that says it is on a GPU; so are the tensors made from it."""

    @property
    def is_cuda(self) -> bool:
        """As of a tensor on a GPU."""
        return True

    @property
    def device(self) -> torch.device:
        """As of a tensor on a GPU."""
        return torch.device("cuda", 0)


class _Driver:
    """What Triton asks of a driver in order to compile."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        """A number of its own for each capability, by which Triton keeps compiled kernels apart."""
        return 1000 + self.capability

    def get_current_stream(self, device: int) -> int:
        """Unused: nothing is launched."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """What is compiled for."""
        return GPUTarget("cuda", self.capability, 32)


def pretend(capability: int) -> None:
    """From now on this process has one GPU of this capability, for which kernels compile."""
    properties = SimpleNamespace(
        multi_processor_count=MULTIPROCESSORS, shared_memory_per_block_optin=SHARED_MEMORY[capability],
        major=capability // 10, minor=capability % 10, warp_size=32, L2_cache_size=50 << 20, total_memory=80 << 30,
        max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536, name=f"sm_{capability}",
    )  # fmt: skip
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda device=None: divmod(capability, 10)
    torch.cuda.get_device_properties = lambda device=None: properties
    torch.cuda.device = lambda device: contextlib.nullcontext()
    driver.set_active(_Driver(capability))


@contextlib.contextmanager
def recording(case: str, capability: int, found: dict[str, Compiled]) -> Iterator[None]:
    """Launches compile, and `found` gets what they compiled, by Triton's hash of it."""
    launch = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        start = time.perf_counter()
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in found:
            registers, local = resources(kernel.asm["cubin"])
            meta, module = kernel.metadata, self.fn.__module__.removeprefix("kernels.")
            seconds = round(time.perf_counter() - start, 2)
            found[kernel.hash] = Compiled(
                case, module, self.fn.__name__, capability, meta.num_warps, meta.shared, registers, local, seconds
            )
        return kernel

    with mock.patch.object(JITFunction, "run", compile_only):
        yield


def resources(cubin: bytes) -> tuple[int | None, int | None]:
    """Registers, and bytes of local memory a thread, by the disassembler that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return None, None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        told = subprocess.run([str(tool), "-res-usage", str(file)], capture_output=True, text=True)
    match = re.search(r"REG:(\d+) STACK:(\d+)", told.stdout + told.stderr)
    return (int(match[1]), int(match[2])) if match else (None, None)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor that claims to be on the GPU."""
    return torch.zeros(*shape, dtype=dtype).as_subclass(ClaimsGpu)


def image_scan(channels: int, states: int, rank: int, size: int = 40, batch: int = 8) -> None:
    """Four directions over bfloat16 images, delta, B and C slices of one bfloat16 projection; all gradients."""
    lead, half = (batch, size, size), torch.bfloat16
    delta, b, c = zeros(*lead, 4, rank + 2 * states, dtype=half).split([rank, states, states], dim=-1)
    given = (
        zeros(*lead, channels, dtype=half), delta, zeros(4, channels, states), b.unsqueeze(-2), c.unsqueeze(-2),
        zeros(4, channels), zeros(4, channels, rank), zeros(4, channels), None, None,
    )  # fmt: skip
    _scan(given, orders=(0, 1, 2, 3))


def line_scan(length: int, channels: int, states: int, rank: int, *, width: int = 1, gate: bool = False) -> None:
    """One direction along an axis, float32 where there is a gate, else bfloat16; with states; all gradients."""
    dtype = torch.float32 if gate else torch.bfloat16
    lead = (8, length, width)
    given = (
        zeros(*lead, channels, dtype=dtype), zeros(*lead, 1, rank or channels, dtype=dtype),
        zeros(1, channels, states), zeros(*lead, 1, 1, states, dtype=dtype), zeros(*lead, 1, 1, states, dtype=dtype),
        zeros(1, channels), zeros(1, channels, rank) if rank else None, zeros(1, channels),
        zeros(*lead, channels, dtype=dtype) if gate else None, zeros(8, width, 1, channels, states) if gate else None,
    )  # fmt: skip
    _scan(given, orders=(4,))


def _scan(given: tuple[Tensor | None, ...], orders: tuple[int, ...]) -> None:
    from kernels.selective_scan.op import _implementation

    x, a = given[0], given[2]
    assert x is not None
    assert a is not None
    options = dict(orders=orders, softplus=True, merge=True)
    gpu = _implementation("triton", x, orders, a.shape[2])
    y, _, saved = gpu.forward(*given, **options, need_backward=True)
    gpu.backward(y, None, *given, saved, **options, needs=tuple(t is not None for t in given))


def ssd(
    dtype: torch.dtype, *, batch: int, length: int, heads: int, head_dim: int, states: int, image: bool = False
) -> None:
    """The chunked scan along a sequence, or in four directions over an image; all gradients."""
    from kernels.ssd import gpu

    k = 4 if image else 1
    lead = (batch, length, length if image else 1)
    given = (
        zeros(*lead, heads, head_dim, dtype=dtype), zeros(*lead, k, heads, dtype=dtype), zeros(k, heads),
        zeros(*lead, k, 1, states, dtype=dtype), zeros(*lead, k, 1, states, dtype=dtype), zeros(k, heads),
        zeros(k, heads), None,
    )  # fmt: skip
    options = dict(orders=(0, 1, 2, 3) if image else (4,), chunk=256, softplus=True, merge=True, strict=False)
    y, _, saved = gpu.forward(*given, **options, need_backward=True)
    gpu.backward(y, None, *given, saved, **options, needs=tuple(t is not None for t in given))


def convolution(dtype: torch.dtype, *, state: bool) -> None:
    """The causal convolution with SiLU, with or without a state at both ends; all gradients."""
    from kernels.causal_conv1d import gpu

    x = zeros(8, 4096, 1, 768, dtype=dtype)
    start = zeros(8, 3, 1, 768, dtype=dtype) if state else None
    given = (x, zeros(768, 4, dtype=dtype), zeros(768, dtype=dtype), start)
    y, final = gpu.forward(*given, silu=True, reverse=False, want_final=state)
    needs = tuple(t is not None for t in given)
    gpu.backward(y, final if state else None, *given, silu=True, reverse=False, needs=needs)


CASES: dict[str, Callable[[], None]] = {
    "image": lambda: image_scan(64, 16, 2),
    "image, one state": lambda: image_scan(96, 1, 6, size=20, batch=100),
    "sequence": lambda: line_scan(4096, 768, 16, 0),
    "sequence, 64 states": lambda: line_scan(1000, 40, 64, 0),
    "sequence, gated, with states": lambda: line_scan(1000, 40, 16, 0, gate=True),
    "frames": lambda: line_scan(16, 128, 16, 8, width=256),
    "ssd": lambda: ssd(torch.bfloat16, batch=1, length=16384, heads=24, head_dim=64, states=128),
    "ssd, image, float32": lambda: ssd(torch.float32, batch=8, length=40, heads=4, head_dim=32, states=16, image=True),
    "convolution": lambda: convolution(torch.bfloat16, state=False),
    "convolution with states": lambda: convolution(torch.float32, state=True),
}


def compile_here(capability: int, names: list[str]) -> list[Compiled]:
    """Everything that the cases launch on a GPU of this capability; the process is good for nothing else then."""
    pretend(capability)
    found: dict[str, Compiled] = {}
    for name in names:
        with recording(name, capability, found):
            CASES[name]()
    return list(found.values())


def compile_apart(capability: int, names: list[str]) -> list[Compiled]:
    """`compile_here` in a process of its own, because back ends remember what they once found out about the GPU."""
    command = [sys.executable, __file__, "--json", "--capability", str(capability), "--case", *names]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if not done.stdout:
        raise SystemExit(f"compiling for sm_{capability} failed, see above")
    return [Compiled(**found) for found in json.loads(done.stdout)]


def table_line(k: Compiled) -> str:
    """One line of the table."""
    registers, local = ("?" if v is None else str(v) for v in (k.registers, k.local))
    place = f"sm_{k.capability:<7}{k.module + '.' + k.kernel:<62}"
    return f"{place}{k.warps:>6}{k.shared:>8}{registers:>10}{local:>7}{k.seconds:>6.1f}  {k.case}"


def main() -> int:
    """Command line; exit code 1 when a kernel needs more shared memory than a GPU has."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, nargs="+", choices=sorted(SHARED_MEMORY), default=[*SHARED_MEMORY])
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("unset TRITON_INTERPRET: the interpreter compiles nothing", file=sys.stderr)
        return 2
    if args.json and len(args.capability) == 1:
        found = compile_here(args.capability[0], args.case)
    else:
        found = [k for capability in args.capability for k in compile_apart(capability, args.case)]
    if args.json:
        print(json.dumps([asdict(k) for k in found]))
    else:
        print(f"{'kernel':<72}{'warps':>6}{'shared':>8}{'registers':>10}{'local':>7}{'s':>6}  case")
        print("\n".join(map(table_line, found)))
    return int(any(k.shared > SHARED_MEMORY[k.capability] for k in found))


if __name__ == "__main__":
    sys.exit(main())
