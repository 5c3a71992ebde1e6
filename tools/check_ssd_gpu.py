"""Checks the Triton SSD on a GPU, then times it: python tools/check_ssd_gpu.py [--quick] [--skip-check].

Checks outputs and every gradient against float64 at odd shapes, and the gradients' determinism bit for bit. Times
forward and forward + backward of batch 8, length 4096, 24 heads of 64 in bfloat16 (medians by CUDA events, L2 flushed),
with every tile that is worth trying unless --quick.
"""

import argparse
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from kernels.ssd import gpu, gpu_plan, op, torch_path
from kernels.testing import relative_rms

NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")
BOUND = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}


@dataclass(frozen=True)
class Case:
    """One canonical problem: (B, H, W), heads, head_dim, groups, states."""

    size: tuple[int, int, int]
    heads: int = 4
    head_dim: int = 64
    groups: int = 1
    states: int = 64
    orders: tuple[int, ...] = (4,)
    merge: bool = True
    strict: bool = False

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        """Random canonical tensors on the GPU; x, B and C are slices of one projection for a single direction."""
        rng = torch.Generator("cuda").manual_seed(0)
        k, (e, p, g, n) = len(self.orders), (self.heads, self.head_dim, self.groups, self.states)

        def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(*shape, generator=rng, device="cuda").to(dtype)

        x, b, c = draw(*self.size, e * p + 2 * k * g * n, dtype=dtype).split([e * p, k * g * n, k * g * n], dim=-1)
        lines = self.size[2] if self.orders[0] >= 4 else 1
        return [
            x.unflatten(-1, (e, p)), draw(*self.size, k, e, dtype=dtype), -0.05 - draw(k, e).abs(),
            b.unflatten(-1, (k, g, n)), c.unflatten(-1, (k, g, n)), draw(k, e), draw(k, e) - 1,
            draw(self.size[0], lines, k, e, p, n),
        ]  # fmt: skip


CHECKS = {
    "one position": Case((64, 1, 1), heads=1, head_dim=1, states=1),
    "table shape, short": Case((2, 500, 1), states=64),
    "state 128": Case((1, 333, 1), states=128, orders=(5,)),
    "odd": Case((2, 130, 3), heads=6, head_dim=40, groups=3, states=20),
    "wide": Case((1, 200, 1), heads=2, head_dim=130, states=256),
    "both ways": Case((2, 300, 1), orders=(4, 5), strict=True),
    "image": Case((2, 17, 23), orders=(0, 1, 2, 3), states=32),
    "image kept apart": Case((1, 20, 30), orders=(3, 0), merge=False),
    "temporal": Case((2, 16, 300), states=16, head_dim=32),
    "long": Case((1, 65536, 1), heads=2),
}
CASES_OF = {
    torch.bfloat16: list(CHECKS),
    torch.float32: ["one position", "table shape, short", "odd", "wide", "image", "long"],
    torch.float16: ["table shape, short", "odd"],
}


def check(name: str, case: Case, dtype: torch.dtype) -> bool:
    """Compares one case with float64; prints one line."""
    given = case.inputs(dtype)
    wide = [t.double() for t in given]
    options = dict(orders=case.orders, chunk=256, softplus=True, merge=case.merge, strict=case.strict)
    needs = (True,) * len(given)
    want_y, want_final, want_saved = torch_path.forward(*wide, **options, need_backward=True)
    grad_y, grad_final = torch.randn_like(want_y).to(dtype), torch.randn_like(want_final).float()
    want = torch_path.backward(grad_y.double(), grad_final.double(), *wide, want_saved, **options, needs=needs)
    y, final, saved = gpu.forward(*given, **options, need_backward=True)
    grads = gpu.backward(grad_y, grad_final, *given, saved, **options, needs=needs)
    again = gpu.backward(grad_y, grad_final, *given, saved, **options, needs=needs)
    same = all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))
    errors = {"y": relative_rms(y, want_y), "final": relative_rms(final, want_final)}
    errors |= {n: relative_rms(g, w) for n, g, w in zip(NAMES, grads, want, strict=True)}
    bad = {n: f"{e:.1e}" for n, e in errors.items() if not e <= BOUND[dtype]}
    verdict = "ok " if same and not bad else "BAD"
    print(f"{verdict} {str(dtype)[6:]:8} {name:20} worst {max(errors.values()):.1e} same bits {same} {bad}", flush=True)
    return same and not bad


def check_from(dtype: torch.dtype, first: int) -> int:
    """Checks in this process from one case on; the exit code is 0, 1 for a wrong result, or 100 + a crashed case."""
    passed = True
    for number, name in list(enumerate(CASES_OF[dtype]))[first:]:
        try:
            passed &= check(name, CHECKS[name], dtype)
        except Exception as error:  # the process is of no use after an illegal access: the parent starts another
            traceback.print_exc()
            print(f"BAD {str(dtype)[6:]:8} {name:20} {type(error).__name__}: {str(error)[:200]}", flush=True)
            return 100 + number
    return 0 if passed else 1


def check_dtype(dtype: torch.dtype) -> bool:
    """Checks every case of one dtype in processes of their own: a crash ends only its process."""
    first, passed = 0, True
    while first < len(CASES_OF[dtype]):
        command = [sys.executable, __file__, "--check-from", str(dtype)[6:], str(first)]
        code = subprocess.run(command, env={**os.environ, "CUDA_LAUNCH_BLOCKING": "1"}, check=False).returncode
        passed &= code == 0
        if code < 100:
            break
        first = code - 99
    return passed


def milliseconds(function: Callable[[], object], repeats: int = 20) -> float:
    """Median time of one call with a cold L2; a short sleep lets the CPU run ahead of the GPU."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    function()
    times = []
    for _ in range(repeats):
        flush.zero_()
        torch.cuda._sleep(10_000_000)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)


def problem(states: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """The table's workload: the seven leaves of `ssd` and a gradient of y."""
    batch, length, heads, head_dim = 8, 4096, 24, 64
    x = torch.randn(batch, length, heads, head_dim, device="cuda", dtype=dtype)
    dt = torch.randn(batch, length, heads, device="cuda", dtype=dtype)
    b, c = (torch.randn(batch, length, 1, states, device="cuda", dtype=dtype) for _ in range(2))
    a = -torch.rand(heads, device="cuda") * 15 - 1
    skip, bias = torch.ones(heads, device="cuda"), torch.full((heads,), -4.0, device="cuda")
    return [t.requires_grad_() for t in (x, dt, a, b, c, skip, bias)], torch.randn_like(x)


def measure(states: int, dtype: torch.dtype) -> tuple[float, float]:
    """Times of the public function, forward and forward + backward."""
    leaves, grad = problem(states, dtype)

    def run() -> Tensor:
        x, dt, a, b, c, skip, bias = leaves
        return op.ssd(x, dt, a, b, c, skip, dt_bias=bias, softplus=True, backend="triton")

    with torch.no_grad():
        forward = milliseconds(run)
    return forward, milliseconds(lambda: torch.autograd.grad(run(), leaves, grad))


def canonical_passes(states: int, dtype: torch.dtype) -> tuple[Callable[[], object], Callable[[], object]]:
    """Forward and backward pass of the workload without autograd, for the choice of tiles."""
    (x, dt, a, b, c, skip, bias), grad = problem(states, dtype)
    given = [
        x.unsqueeze(2), dt[:, :, None, None], a.unsqueeze(0), b[:, :, None, None], c[:, :, None, None],
        skip.unsqueeze(0), bias.unsqueeze(0), None,
    ]  # fmt: skip
    given = [None if t is None else t.detach() for t in given]
    options = dict(orders=(4,), chunk=256, softplus=True, merge=True, strict=False)
    needs = (True,) * 7 + (False,)

    def forward() -> tuple[Tensor, Tensor, Tensor]:
        return gpu.forward(*given, **options, need_backward=True)

    def backward() -> list[Tensor | None]:
        key = gpu_plan.tiles(2).chunk
        if key not in kept:
            kept[key] = forward()[2]
        return gpu.backward(grad.unsqueeze(2), None, *given, kept[key], **options, needs=needs)

    kept: dict[int, Tensor] = {}
    return forward, backward


CANDIDATES = {
    "state": [gpu_plan.Tile(n, 64, stages=s) for n in (32, 64) for s in (2, 3, 4)],
    "output": [gpu_plan.Tile(128, 64), gpu_plan.Tile(128, 64, 8)],
    "input_gradient": [gpu_plan.Tile(128, 64), gpu_plan.Tile(128, 64, registers=168), gpu_plan.Tile(128, 64, 8)],
    "projection_gradient": [
        gpu_plan.Tile(n, p, w, s, h)
        for n, p, w, s, h in (
            (32, 64, 4, 2, 8), (32, 32, 4, 2, 8), (64, 64, 4, 1, 8), (64, 64, 4, 2, 8), (64, 64, 4, 2, 24),
            (64, 32, 4, 2, 8), (64, 64, 8, 2, 8),
        )
    ],
}  # fmt: skip
"""Eight warps only with chunks of 128: they would repeat the rows of shorter ones."""


def tune(states: int, dtype: torch.dtype) -> None:
    """Times every candidate tile of every kernel with the others as they are; prints the best of each chunk length."""
    default = gpu_plan.tiles
    forward, backward = canonical_passes(states, dtype)
    for chunk in (64, 128):
        best = default(2)._replace(chunk=chunk)
        gpu_plan.tiles = lambda *_, best=best: best
        for kernel, candidates in CANDIDATES.items():
            timed = backward if "gradient" in kernel else forward
            results = []
            for tile in [t for t in candidates if t.warps == 4 or chunk == 128]:
                trial = best._replace(**{kernel: tile})
                gpu_plan.tiles = lambda *_, trial=trial: trial
                try:
                    results.append((milliseconds(timed, 8), tile))
                except Exception as error:  # a tile that does not fit is a result, not a failure
                    print(f"  {kernel} {tuple(tile)}: {type(error).__name__}")
            results.sort()
            best = best._replace(**{kernel: results[0][1]})
            print(
                f"  N{states} chunk {chunk} {kernel}: " + ", ".join(f"{tuple(t)} {ms:.3f}" for ms, t in results),
                flush=True,
            )
        gpu_plan.tiles = lambda *_, best=best: best
        print(
            f"N{states} chunk {chunk}: fwd {milliseconds(forward):.3f} bwd {milliseconds(backward):.3f} ms, {best}",
            flush=True,
        )
    gpu_plan.tiles = default


def profile(states: int, dtype: torch.dtype) -> None:
    """Prints the time of each kernel."""
    forward, backward = canonical_passes(states, dtype)
    forward(), backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
        for _ in range(10):
            forward(), backward()
        torch.cuda.synchronize()
    for event in sorted(prof.key_averages(), key=lambda event: -event.device_time_total)[:14]:
        print(f"  N{states} {event.device_time_total / 1e4:8.4f} ms  {event.count / 10:4.0f} x  {event.key[:60]}")


def main() -> int:
    """Command line; exit code 1 when a check fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="time only the tiles that the back end takes")
    parser.add_argument("--skip-check", action="store_true", help="only time")
    parser.add_argument("--check-from", nargs=2, metavar=("DTYPE", "CASE"), help="only check one dtype from a case on")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16", help="of the timings"
    )
    args = parser.parse_args()
    if args.check_from:
        return check_from(getattr(torch, args.check_from[0]), int(args.check_from[1]))
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    passed = True
    if not args.skip_check:
        with ThreadPoolExecutor() as pool:  # compiling takes most of the time, so the dtypes run side by side
            passed = all(list(pool.map(check_dtype, BOUND)))
    dtype = getattr(torch, args.dtype)
    for states in (64, 128):
        forward, both = measure(states, dtype)
        print(
            f"SSD 8 x 4096 x 24 x 64, state {states:3}, {args.dtype}: fwd {forward:.3f} ms  fwd+bwd {both:.3f} ms",
            flush=True,
        )
        profile(states, dtype)
    for states in () if args.quick else (64, 128):
        tune(states, dtype)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
