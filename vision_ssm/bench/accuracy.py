"""Accuracy over 65,536 positions, where rounding errors of the decays have room to grow.

Three ranges of the decay: `usual` steps (delta |A| of 1e-3 and more), `slow` ones (about 1e-5, the state nearly sums
its inputs) and `large` ones (delta up to 50, where a careless product overflows). In float32 a slow scan may err up to
twice as much as the sequential float32 reference does on the same inputs.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch

from kernels.testing import TOLERANCE, relative_rms
from vision_ssm.bench.check import Check, compare
from vision_ssm.bench.workloads import SSD, Scan1D, Scan2D, Tensors, Workload

LENGTH = 65_536
_SLOW = 1e-4
"""Factor on A that takes delta |A| from about 1e-2 .. 0.3 to 1e-6 .. 3e-5."""


@dataclass(frozen=True)
class LongCase:
    """One comparison over a long sequence."""

    workload: Workload
    dtype: torch.dtype
    steps: str

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.workload.kind}, length {self.workload.tokens}, {self.steps} steps, {dtype}"

    def check(self, device: torch.device, backend: str) -> Check:
        """Values and gradients against float64."""
        t = _with_steps(self.workload, self.dtype, device, self.steps)
        bound = _twice_the_sequential(self.workload, t) if self.steps == "slow" else None
        return compare(self.workload, t, backend, bound)


def long_cases(kinds: Collection[str], device: torch.device, *, quick: bool) -> list[LongCase]:
    """Comparisons at length 65,536, on the CPU 4,096, for these kinds of workload.

    `quick` leaves out the one that needs the slow reference.
    """
    length = LENGTH if device.type == "cuda" else 4_096
    side = round(length**0.5)
    longest: tuple[Workload, ...] = (
        Scan1D(batch=1, length=length, channels=16), Scan2D(batch=1, height=side, width=side, channels=16),
        SSD(batch=1, length=length, heads=12, head_dim=32, states=32),
    )  # fmt: skip
    cases = [
        LongCase(workload, dtype, steps)
        for workload in longest
        if workload.kind in kinds
        for dtype in (torch.float32, torch.bfloat16)
        for steps in ("usual", "large")
    ]
    if not quick and longest[0].kind in kinds:
        cases.append(LongCase(longest[0], torch.float32, "slow"))
    return cases


def _with_steps(workload: Workload, dtype: torch.dtype, device: torch.device, steps: str) -> Tensors:
    """A workload's inputs with step sizes or decays in one of the ranges."""
    t = workload.checked(workload.tensors(dtype, device))
    if steps == "slow":
        t["A"] = t["A"] * _SLOW
    elif steps == "large":
        name = next(n for n in ("delta", "dt", "bias") if n in t)
        t[name] = (50 * torch.rand_like(t[name], dtype=torch.float32)).to(t[name].dtype)
    return t


def _twice_the_sequential(workload: Workload, t: Tensors) -> dict[str, float]:
    """Twice the error of the float32 reference, position after position; at least the usual tolerance.

    On the CPU, where starting many small operators costs least.
    """
    here = {name: v.detach().cpu() for name, v in t.items()}
    grad = torch.randn(here["x"].shape, generator=torch.Generator().manual_seed(1))

    def run(dtype: torch.dtype, backend: str) -> Tensors:
        leaves = {name: v.to(dtype).requires_grad_() for name, v in here.items()}
        y = workload.run(leaves, backend)
        found = torch.autograd.grad(y, list(leaves.values()), grad.to(dtype))
        return {"y": y.detach()} | {f"d{name}": g for name, g in zip(leaves, found, strict=True)}

    want, sequential = run(torch.float64, "torch"), run(torch.float32, "reference")
    usual = TOLERANCE[torch.float32]
    return {name: max(usual, 2 * relative_rms(sequential[name], want[name])) for name in want}
