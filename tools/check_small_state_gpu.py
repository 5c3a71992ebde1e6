"""Checks the scan kernels for few states on a GPU, then times them: python tools/check_small_state_gpu.py.

Checks outputs and every gradient against the float64 reference, and the gradients' determinism bit for bit. Times the
one-dimensional workload and the four-direction one from the feature map (projection, low-rank steps, scan, sum), with
the general kernels beside them. Medians by CUDA events, L2 flushed. More shapes are checked by tests/kernels.
"""

import argparse
import itertools
import sys

import torch
from check_scan_gpu import IMAGES, LINES, check, image_problem, line_problem, milliseconds
from torch import Tensor

from kernels.selective_scan import gpu, gpu_small_state

CHECKS = [  # (B, H, W, D), N, orders, rank, groups, merge, z
    ((2, 13, 11, 96), 1, (0, 1, 2, 3), 12, 1, True, False),
    ((2, 150, 3, 96), 1, (4,), 0, 1, True, False),
]


class Scan(torch.autograd.Function):
    """The canonical scan by one of the two Triton back ends, so that both are timed under the same autograd."""

    @staticmethod
    def forward(ctx, path, orders, *tensors):
        ctx.path, ctx.options = path, dict(orders=orders, softplus=True, merge=True)
        need = any(ctx.needs_input_grad)
        y, _, saved = path.forward(*tensors, **ctx.options, need_backward=need)
        ctx.save_for_backward(*tensors, saved)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        *tensors, saved = ctx.saved_tensors
        found = ctx.path.backward(grad_y, None, *tensors, saved, **ctx.options, needs=tuple(ctx.needs_input_grad[2:]))
        return None, None, *found


def line_run(path):
    """One-dimensional scan of `line_problem`'s leaves."""

    def run(x, delta, a, b, c, skip, bias):
        u, step, b, c = x[:, :, None], delta[:, :, None, None], b[:, :, None, None, None], c[:, :, None, None, None]
        return Scan.apply(path, (4,), u, step, a[None], b, c, skip[None], None, bias[None], None, None)[:, :, 0]

    return run


def image_run(path, rank: int, state: int):
    """Four directions of `image_problem`'s leaves, from the feature map."""

    def run(x, projection, a, weight, bias, skip):
        low, b, c = (x @ projection.T).unflatten(-1, (4, -1)).split([rank, state, state], dim=-1)
        b, c = b.unsqueeze(4), c.unsqueeze(4)
        return Scan.apply(path, (0, 1, 2, 3), x, low, a, b, c, skip, weight, bias, None, None)

    return run


def measure(name: str, what: str, leaves: list[Tensor], run, repeats: int) -> None:
    """Prints forward and forward + backward time."""
    grad = torch.randn_like(leaves[0])
    with torch.no_grad():
        forward = milliseconds(lambda: run(*leaves), repeats)
    whole = milliseconds(lambda: torch.autograd.grad(run(*leaves), leaves, grad), repeats)
    print(f"{name:26} {what:16} fwd {forward:7.3f} ms  fwd+bwd {whole:7.3f} ms", flush=True)


def time_all(dtype: torch.dtype, repeats: int) -> None:
    """Times both workloads, with the general kernels beside."""
    line, image = "1D 8x768x4096 N1", "VMamba 56x56 B32 D192 N1"
    rank, state = IMAGES[image][3:]
    problems = [
        (line, line_problem(*LINES[line], dtype)[0], line_run),
        (image, image_problem(*IMAGES[image], dtype)[0], lambda path: image_run(path, rank, state)),
    ]
    for (name, leaves, run), path in itertools.product(problems, (gpu_small_state, gpu)):
        measure(name, path.__name__.rpartition(".")[2], [t.requires_grad_() for t in leaves], run(path), repeats)


def profile(dtype: torch.dtype) -> None:
    """Prints the time of each kernel of both workloads."""
    line, image = "1D 8x768x4096 N1", "VMamba 56x56 B32 D192 N1"
    for leaves, run in (
        (line_problem(*LINES[line], dtype)[0], line_run(gpu_small_state)),
        (image_problem(*IMAGES[image], dtype)[0], image_run(gpu_small_state, *IMAGES[image][3:])),
    ):
        leaves = [t.requires_grad_() for t in leaves]
        grad = torch.randn_like(run(*leaves))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
            for _ in range(3):
                torch.autograd.grad(run(*leaves), leaves, grad)
            torch.cuda.synchronize()
        print("three passes")
        print(prof.key_averages().table(sort_by="cuda_time_total", row_limit=14, max_name_column_width=60))


def main() -> int:
    """Command line; exit code 1 when a check fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--skip-check", action="store_true", help="only time")
    parser.add_argument("--skip-time", action="store_true", help="only check")
    parser.add_argument("--profile", action="store_true", help="print time by kernel")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="dtype of the timings")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    passed = args.skip_check or sum(not check(gpu_small_state, CHECKS, d) for d in (torch.float32, torch.bfloat16)) == 0
    if not args.skip_time:
        time_all(getattr(torch, args.dtype), args.repeats)
    if args.profile:
        profile(getattr(torch, args.dtype))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
