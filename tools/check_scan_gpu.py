"""Checks the Triton selective scan on a GPU, then times it: python tools/check_scan_gpu.py [--skip-check] [--torch].

Checks outputs and every gradient against the float64 reference at small odd shapes and the gradients' determinism bit
for bit. Times forward and forward + backward of the detector's shapes (medians by CUDA events, L2 flushed).
"""

import argparse
import sys
from collections.abc import Callable
from statistics import median
from types import ModuleType

import torch
from torch import Tensor

import kernels
from kernels.selective_scan import gpu
from kernels.selective_scan.reference import selective_scan_reference
from kernels.testing import relative_rms

DIRECTIONS = ("rows", "columns", "rows_reversed", "columns_reversed")
IMAGES = {  # name: batch, side, channels, rank, state
    "T 160x160 B16 D64": (16, 160, 64, 2, 16),
    "T 80x80 B16 D128": (16, 80, 128, 4, 16),
    "T 40x40 B16 D256": (16, 40, 256, 8, 16),
    "T 20x20 B16 D512": (16, 20, 512, 16, 16),
    "T 160x160 B1 D64": (1, 160, 64, 2, 16),
    "VMamba 56x56 B32 D192 N1": (32, 56, 192, 12, 1),
    "512x512 B1 D64": (1, 512, 64, 2, 16),
}
LINES = {  # name: batch, length, channels, state
    "1D 8x768x4096": (8, 4096, 768, 16),
    "1D 1x1536x16384": (1, 16384, 1536, 16),
    "1D 64x384x196": (64, 196, 384, 16),
    "1D 8x768x4096 N1": (8, 4096, 768, 1),
}
NAMES = ("x", "delta", "A", "B", "C", "D", "delta_weight", "delta_bias", "z", "initial_state")
BOUND = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
CHECKS = [  # (B, H, W, D), N, orders, rank, groups, merge, z
    ((1, 1, 1, 1), 1, (0,), 1, 1, True, False),
    ((2, 17, 23, 40), 16, (0, 1, 2, 3), 3, 1, True, False),
    ((2, 33, 9, 130), 16, (0, 1, 2, 3), 16, 1, True, False),
    ((1, 40, 40, 64), 10, (2, 1), 0, 1, False, False),
    ((2, 21, 13, 24), 18, (3, 0), 5, 3, True, False),
    ((1, 19, 29, 200), 1, (0, 1, 2, 3), 12, 1, True, False),
    ((2, 300, 5, 70), 16, (4,), 0, 1, True, True),
    ((3, 16, 100, 128), 16, (5,), 8, 2, True, True),
    ((1, 500, 1, 8), 64, (5,), 40, 1, True, True),
]


def check_inputs(size, states, orders, rank, groups, z, dtype) -> list[Tensor | None]:
    """Random canonical inputs on the GPU; delta, B and C are slices of one projection."""
    rng = torch.Generator("cuda").manual_seed(0)
    k, lead, channels = len(orders), size[:3], size[3]

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=rng, device="cuda").to(dtype)

    columns = [rank or channels, groups * states, groups * states]
    delta, b, c = draw(*lead, k, sum(columns), dtype=dtype).split(columns, dim=-1)
    state = (size[0], size[2], 1, channels, states) if orders[0] >= 4 else (size[0], k, channels, states)
    weight = draw(k, channels, rank, dtype=dtype) * rank**-0.5 if rank else None
    return [
        draw(*size, dtype=dtype), delta, -0.05 - draw(k, channels, states).abs(), b.unflatten(-1, (groups, states)),
        c.unflatten(-1, (groups, states)), draw(k, channels), weight, draw(k, channels) - 1,
        draw(*size, dtype=dtype) if z else None, draw(*state),
    ]  # fmt: skip


def check(path: ModuleType, cases: list[tuple], dtype: torch.dtype) -> bool:
    """Compares the cases of one of the Triton back ends with float64; prints one line each."""
    passed = True
    for size, states, orders, rank, groups, merge, z in cases:
        given = check_inputs(size, states, orders, rank, groups, z, dtype)
        wide = [None if t is None else t.double().requires_grad_() for t in given]
        options = dict(orders=orders, softplus=True, merge=merge)
        want = selective_scan_reference(*wide, **options)
        grad_y, grad_final = (torch.randn_like(t) for t in want)
        grad_y, grad_final = grad_y.to(dtype), grad_final.float()
        ((want[0] * grad_y).sum() + (want[1] * grad_final).sum()).backward()
        needs = tuple(t is not None for t in given)
        y, final, saved = path.forward(*given, **options, need_backward=True)
        grads = path.backward(grad_y, grad_final, *given, saved, **options, needs=needs)
        again = path.backward(grad_y, grad_final, *given, saved, **options, needs=needs)
        same = all(a is None or torch.equal(a, b) for a, b in zip(grads, again, strict=True))
        errors = {"y": relative_rms(y, want[0]), "final": relative_rms(final, want[1])}
        errors |= {n: relative_rms(g, w.grad) for n, g, w in zip(NAMES, grads, wide, strict=True) if w is not None}
        bad = {n: f"{e:.1e}" for n, e in errors.items() if not e <= BOUND[dtype]}
        passed &= same and not bad
        verdict = "ok " if same and not bad else "BAD"
        print(f"{verdict} {dtype} {size} N{states} {orders} worst {max(errors.values()):.1e} same bits {same} {bad}")
    return passed


def milliseconds(function: Callable[[], object], repeats: int) -> float:
    """Median time of one call with a cold L2; the GPU sleeps first, so that the host's launches are not timed."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    function()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(2_000_000)
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)


def peak_mib(function: Callable[[], object]) -> float:
    """Peak memory of one call above what was allocated before, MiB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def image_problem(batch, side, channels, rank, state, dtype) -> tuple[list[Tensor], Callable[..., Tensor]]:
    """Leaves and the function from the feature map to the sum of four directions (projection included)."""
    x = torch.randn(batch, side, side, channels, device="cuda", dtype=dtype)
    projection = (torch.randn(4 * (rank + 2 * state), channels, device="cuda") * channels**-0.5).to(dtype)
    a = -torch.arange(1.0, state + 1, device="cuda").repeat(4, channels, 1)
    weight = torch.randn(4, channels, rank, device="cuda") * rank**-0.5
    bias, skip = torch.full((4, channels), -4.0, device="cuda"), torch.ones(4, channels, device="cuda")

    def run(x, projection, a, weight, bias, skip, backend):
        low, b, c = (x @ projection.T).unflatten(-1, (4, -1)).split([rank, state, state], dim=-1)
        return kernels.selective_scan_2d(
            x, low, a, b, c, skip, delta_weight=weight, delta_bias=bias, softplus=True, backend=backend
        )

    return [x, projection, a, weight, bias, skip], run


def line_problem(batch, length, channels, state, dtype) -> tuple[list[Tensor], Callable[..., Tensor]]:
    """Leaves and the one-dimensional scan with delta given."""
    x = torch.randn(batch, length, channels, device="cuda", dtype=dtype)
    delta = torch.randn(batch, length, channels, device="cuda", dtype=dtype)
    a = -torch.arange(1.0, state + 1, device="cuda").repeat(channels, 1)
    b, c = (torch.randn(batch, length, state, device="cuda", dtype=dtype) for _ in range(2))
    skip, bias = torch.ones(channels, device="cuda"), torch.full((channels,), -4.0, device="cuda")

    def run(x, delta, a, b, c, skip, bias, backend):
        return kernels.selective_scan(x, delta, a, b, c, skip, delta_bias=bias, softplus=True, backend=backend)

    return [x, delta, a, b, c, skip, bias], run


def measure(name: str, leaves: list[Tensor], run: Callable[..., Tensor], backend: str, repeats: int) -> None:
    """Prints forward and forward + backward time, and peak extra memory of the latter."""
    leaves = [t.requires_grad_() for t in leaves]
    grad = torch.randn_like(run(*leaves, backend))

    def both() -> None:
        torch.autograd.grad(run(*leaves, backend), leaves, grad)

    with torch.no_grad():
        forward = milliseconds(lambda: run(*leaves, backend), repeats)
    whole = milliseconds(both, repeats)
    print(f"{name:28} {backend:7} fwd {forward:8.3f} ms  fwd+bwd {whole:8.3f} ms  extra {peak_mib(both):7.0f} MiB")


def time_all(dtype: torch.dtype, backends: list[str], repeats: int) -> None:
    """Times every workload with every back end; one that runs out of memory says so."""
    problems = [(n, image_problem, s) for n, s in IMAGES.items()] + [(n, line_problem, s) for n, s in LINES.items()]
    for name, problem, sizes in problems:
        for backend in backends:
            leaves, run = problem(*sizes, dtype)
            try:
                measure(name, leaves, run, backend, repeats if backend == "triton" else 3)
            except torch.OutOfMemoryError:
                print(f"{name:28} {backend:7} out of memory")
            del leaves, run
            torch.cuda.empty_cache()


def profile(dtype: torch.dtype) -> None:
    """Prints the time of each kernel for the largest and the smallest detector shape."""
    for name in ("T 160x160 B16 D64", "T 20x20 B16 D512"):
        leaves, run = image_problem(*IMAGES[name], dtype)
        leaves = [t.requires_grad_() for t in leaves]
        grad = torch.randn_like(run(*leaves, "triton"))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
            for _ in range(3):
                torch.autograd.grad(run(*leaves, "triton"), leaves, grad)
            torch.cuda.synchronize()
        print(name, "(three passes)")
        print(prof.key_averages().table(sort_by="cuda_time_total", row_limit=12, max_name_column_width=50))


def main() -> int:
    """Command line; exit code 1 when a check fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--skip-check", action="store_true", help="only time")
    parser.add_argument("--skip-time", action="store_true", help="only check")
    parser.add_argument("--torch", action="store_true", help="time the torch back end too")
    parser.add_argument("--profile", action="store_true", help="print time by kernel")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="dtype of the timings")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    dtype = getattr(torch, args.dtype)
    passed = args.skip_check or sum(not check(gpu, CHECKS, d) for d in BOUND) == 0
    if not args.skip_time:
        time_all(dtype, ["triton", "torch"] if args.torch else ["triton"], args.repeats)
    if args.profile:
        profile(dtype)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
