"""`vssm bench VERB`: each function is a verb, its signature the flags, its docstring the help. Imports no torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

BackendName = Literal["auto", "triton", "torch", "c"]
DtypeName = Literal["auto", "bf16", "fp32", "fp16"]


def bench_kernels(
    *,
    workloads: list[str] | None = None,
    shape: list[str] | None = None,
    dtype: DtypeName = "auto",
    backends: list[BackendName] = ["auto"],  # noqa: B006 (a default for the command line, never changed)
    device: str = "auto",
    repeats: int = 20,
    check: bool = True,
    quick: bool = False,
    output: Path = Path("runs/bench_kernels"),
) -> int:
    """Check the kernels against float64, time them, and compare with this machine's limits and with attention.

    Writes results.json, results.md, time_over_length.png and roofline.png.

    Args:
        workloads: Which of the built-in workloads (all, unless given here or by --shape); an unknown name lists them.
        shape: Problems of your own, such as 1d:B8,L4096,D768,N16 or 2d:B16,H160,W160,D64,N16,R4; the kinds are 1d, 2d
            (from the feature map), 2d-core (delta given), temporal, ssd and conv.
        dtype: Type of the activations; by default bf16 on a GPU and fp32 on the CPU.
        backends: Back ends to measure one after the other.
        device: auto, cpu or cuda; the CPU gets smaller built-in workloads.
        repeats: Runs of each measurement, of which the median and the quartiles are told.
        check: Compare values and gradients with float64 before anything is timed.
        quick: A quarter of the repeats, every second length in the first plot, and at length 65,536 no comparison
            with the sequential reference.
        output: Folder for the results.

    Returns:
        Exit code: 0, or 1 when a result is wrong or a workload could not be run.
    """
    from vision_ssm.bench.session import Options, run_session

    return run_session(
        Options(
            workloads=None if workloads is None else tuple(workloads), shapes=tuple(shape or ()), dtype=dtype,
            backends=tuple(backends), device=device, repeats=repeats, check=check, quick=quick, output=output,
        )
    )  # fmt: skip


COMMANDS: dict[str, Callable[..., int]] = {"kernels": bench_kernels}
