"""Checks the causal convolution on a GPU, then times it: python tools/check_conv1d_gpu.py [--skip-check] [--tiles].

Checks outputs and every gradient against the float64 reference, and the gradients' determinism bit for bit. Times
forward and forward + backward beside torch's own depthwise convolution (medians by CUDA events, L2 flushed), with the
rate at which the bytes move that must move: x and y forward, x and both gradients backward.
"""

import argparse
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from check_scan_gpu import BOUND, milliseconds, peak_mib
from torch import Tensor

from kernels.causal_conv1d import gpu
from kernels.causal_conv1d.op import causal_conv1d
from kernels.testing import relative_rms

NAMES = ("y", "final_state", "x", "weight", "bias", "initial_state")
CHECKS = [  # shape, dim, width, activation, reverse, state and bias given
    ((2, 1, 8), 1, 4, "silu", False, True),
    ((1, 2, 5), 1, 4, None, True, True),
    ((3, 129, 200), 1, 4, "silu", False, True),
    ((2, 1000, 96), 1, 3, "silu", True, True),
    ((1, 4099, 768), 1, 4, "silu", False, False),
    ((2, 17, 6, 5, 64), 1, 4, "silu", True, True),
    ((2, 5, 33, 130), 2, 8, None, False, True),
    ((500, 16, 32), 1, 2, "silu", False, True),
    ((1, 70, 40), 1, 1, "silu", False, False),
]
TIMES = {  # name: shape, dim
    "8 x 4096 x 768": ((8, 4096, 768), 1),
    "1 x 16384 x 1536": ((1, 16384, 1536), 1),
    "64 x 196 x 384": ((64, 196, 384), 1),
    "frames 4 x 16 x 64 x 64 x 128": ((4, 16, 64, 64, 128), 1),
}


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random leaf on the GPU that requires a gradient."""
    return torch.randn(*shape, device="cuda").to(dtype).requires_grad_()


def problem(shape, dim, width, extras, dtype) -> list[Tensor | None]:
    """x, weight, bias, initial state."""
    channels = shape[-1]
    state = (*shape[:dim], width - 1, *shape[dim + 1 :])
    return [
        draw(*shape, dtype=dtype),
        draw(channels, width),
        draw(channels, dtype=dtype) if extras else None,
        draw(*state, dtype=dtype) if extras and width > 1 else None,
    ]


def outputs_and_gradients(function: Callable[..., object], given: list[Tensor | None]) -> list[Tensor | None]:
    """Outputs and all gradients, for gradients of the outputs that every dtype represents exactly."""
    outputs = function(*given)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    weights = [torch.arange(o.numel(), device=o.device).cos().bfloat16().view(o.shape).to(o.dtype) for o in outputs]
    found = iter(torch.autograd.grad(outputs, [t for t in given if t is not None], weights))
    return [*(o.detach() for o in outputs), *(None if t is None else next(found) for t in given)]


def check(dtype: torch.dtype) -> bool:
    """Compares all CHECKS with float64; prints one line each."""
    passed = True
    for shape, dim, width, activation, reverse, extras in CHECKS:
        torch.manual_seed(0)
        given = problem(shape, dim, width, extras, dtype)

        def run(x, weight, bias, state, backend):
            return causal_conv1d(
                x, weight, bias, activation=activation, reverse=reverse, dim=dim, initial_state=state,  # noqa: B023
                return_final_state=width > 1, backend=backend,  # noqa: B023
            )  # fmt: skip

        wide = [None if t is None else t.detach().double().requires_grad_() for t in given]
        want = outputs_and_gradients(lambda *t: run(*t, "torch"), wide)  # compared with the reference by the CPU tests
        got = outputs_and_gradients(lambda *t: run(*t, "triton"), given)
        again = outputs_and_gradients(lambda *t: run(*t, "triton"), given)
        same = all(a is None or torch.equal(a, b) for a, b in zip(got, again, strict=True))
        names = NAMES if width > 1 else (NAMES[0], *NAMES[2:])
        errors = {n: relative_rms(g, w) for n, g, w in zip(names, got, want, strict=True) if w is not None}
        bad = {n: f"{e:.1e}" for n, e in errors.items() if not e <= BOUND[dtype]}
        passed &= same and not bad
        verdict = "ok " if same and not bad else "BAD"
        print(f"{verdict} {dtype} {shape} dim {dim} width {width} worst {max(errors.values()):.1e} same {same} {bad}")
    return passed


def torch_conv(x: Tensor, weight: Tensor, bias: Tensor, dim: int) -> Tensor:
    """The same by torch: channels to the front, padded depthwise convolution, SiLU, channels back."""
    length, width = x.shape[dim], weight.shape[1]
    moved = x.movedim(dim, -1)
    flat = moved.reshape(-1, *moved.shape[-2:])
    y = F.conv1d(flat, weight.to(x.dtype)[:, None], bias.to(x.dtype), padding=width - 1, groups=x.shape[-1])
    return F.silu(y[..., :length]).reshape(moved.shape).movedim(-1, dim)


def measure(name: str, what: str, leaves: list[Tensor], run: Callable[..., Tensor], repeats: int) -> None:
    """Prints times, bytes per second and peak extra memory."""
    grad = torch.randn_like(leaves[0])
    size = leaves[0].nbytes

    def both() -> None:
        torch.autograd.grad(run(*leaves), leaves, grad)

    with torch.no_grad():
        forward = milliseconds(lambda: run(*leaves), repeats)
    whole = milliseconds(both, repeats)
    print(
        f"{name:30} {what:16} fwd {forward:7.3f} ms {2 * size / forward / 1e6:6.0f} GB/s   "
        f"fwd+bwd {whole:7.3f} ms {5 * size / whole / 1e6:6.0f} GB/s  extra {peak_mib(both):6.0f} MiB",
        flush=True,
    )


def time_all(dtype: torch.dtype, repeats: int, tiles: bool) -> None:
    """Times every workload with our kernels and torch's; ``tiles`` also with other tile sizes."""
    kept = gpu.CHANNELS, gpu.ROWS
    candidates = [kept, *((c, r) for c in (64, 128, 256) for r in (4, 8, 16) if (c, r) != kept)] if tiles else [kept]
    for name, (shape, dim) in TIMES.items():
        leaves = [draw(*shape, dtype=dtype), draw(shape[-1], 4), draw(shape[-1])]
        for gpu.CHANNELS, gpu.ROWS in candidates:

            def ours(x, weight, bias):
                return causal_conv1d(x, weight, bias, activation="silu", dim=dim, backend="triton")  # noqa: B023

            measure(name, f"triton {gpu.CHANNELS}x{gpu.ROWS}", leaves, ours, repeats)
        gpu.CHANNELS, gpu.ROWS = kept
        measure(name, "torch conv1d", leaves, lambda *t: torch_conv(*t, dim), repeats)  # noqa: B023
        copy = milliseconds(lambda: leaves[0].clone(), repeats)  # noqa: B023
        print(f"{name:30} copy of x        {copy:7.3f} ms {2 * leaves[0].nbytes / copy / 1e6:6.0f} GB/s")


def main() -> int:
    """Command line; exit code 1 when a check fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--skip-check", action="store_true", help="only time")
    parser.add_argument("--skip-time", action="store_true", help="only check")
    parser.add_argument("--tiles", action="store_true", help="time other tile sizes too")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="dtype of the timings")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    passed = args.skip_check or sum(not check(d) for d in BOUND) == 0
    if not args.skip_time:
        time_all(getattr(torch, args.dtype), args.repeats, args.tiles)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
