"""Time of the selective scan on this CPU, per back end: the core of Mamba-YOLO-T's P3 stage at 640 x 640.

    python tools/bench_scan_cpu.py --threads 2

One image, 128 channels, 80 x 80, four directions, 16 states, float32, softplus, skip and merge; the smallest of several
runs. CPU time is summed over threads, so it says something on a busy machine too.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

import kernels


def problem(size: int, channels: int, state: int, rank: int) -> dict[str, Tensor]:
    """Inputs of `selective_scan_2d`, one image of size x size; rank 0: delta with one value per channel."""
    torch.manual_seed(0)
    lead = (1, size, size, 4)
    inputs = {
        "x": torch.randn(1, size, size, channels), "delta": torch.randn(*lead, rank or channels),
        "A": -torch.rand(4, channels, state) * state - 0.1, "B": torch.randn(*lead, state),
        "C": torch.randn(*lead, state), "D": torch.randn(4, channels), "delta_bias": torch.randn(4, channels) - 3,
    }  # fmt: skip
    if rank:
        inputs["delta_weight"] = torch.randn(4, channels, rank) * rank**-0.5
    return inputs


def smallest(function: Callable[[], object], runs: int) -> tuple[float, float]:
    """Smallest CPU and wall milliseconds of several runs, after one that does not count."""
    function()
    cpu, wall = [], []
    for _ in range(runs):
        cpu_start, start = time.process_time(), time.perf_counter()
        function()
        cpu.append(time.process_time() - cpu_start)
        wall.append(time.perf_counter() - start)
    return min(cpu) * 1e3, min(wall) * 1e3


def main() -> None:
    """Print one line per back end and direction of differentiation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("size", 80), ("channels", 128), ("state", 16), ("rank", 0), ("threads", 2), ("runs", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    inputs = problem(options.size, options.channels, options.state, options.rank)
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    print(f"{options.size}x{options.size}, {options.channels} channels, 4 directions, {options.threads} threads")
    for backend in ("torch", "c"):
        problem_here = kernels.backends()[backend]
        if problem_here:
            print(f"{backend:>6}  {problem_here}")
            continue

        def forward(tensors: dict[str, Tensor], backend: str = backend) -> Tensor:
            return kernels.selective_scan_2d(**tensors, softplus=True, backend=backend)

        def both() -> tuple[Tensor, ...]:
            return torch.autograd.grad(forward(leaves).sum(), list(leaves.values()))

        for what, function in (("forward", lambda: forward(inputs)), ("forward + backward", both)):
            cpu, wall = smallest(function, options.runs)
            print(f"{backend:>6}  {what:<18}  {cpu:7.1f} CPU ms  {wall:7.1f} ms wall")


if __name__ == "__main__":
    main()
