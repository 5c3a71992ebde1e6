"""`vssm probe VERB`: each function is a verb, its signature the flags, its docstring the help. Imports no torch.

A stack of mixers is written as a name (s6, ssd, nc_ssd, s4d, attention, gated_conv), which is taken for every layer,
or layer by layer, s6+attention. Each verb prints a table and writes OUT/VERB.json and OUT/VERB.png.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from vision_ssm.probe.stack import StackConfig

Task = Literal["linreg", "parity", "mqar", "retrieval"]
NO_POLAR = [0, 0]
"""Of every verb, never changed."""


def recency(
    stacks: list[str],
    *,
    layers: int = 2,
    dim: int = 32,
    state_size: int | None = None,
    polar: list[int] = NO_POLAR,
    smr: int = 0,
    causal: bool = True,
    pool: Literal["last", "mean"] = "last",
    length: int = 256,
    steps: int = 400,
    seed: int = 0,
    out: Path = Path("runs/probe"),
) -> int:
    """How far back a mixer hears: influence over distance, and what noise on the first or last tokens costs.

    Args:
        stacks: Mixers to measure, such as s6 ssd s6+attention.
        layers: Of a stack that is written as one name.
        dim: Width.
        state_size: States of a scan; 16 for s6 and s4d, 64 for ssd and nc_ssd if not given.
        polar: Channels of a scan's state that never forget, and that hold the present input alone, such as 1 1.
        smr: Taps of the memory that is replayed into a scan's input, 0 for none.
        causal: Tokens see those before them only; --no-causal scans both ways.
        pool: What the classifier reads: its last token, or the mean of all.
        length: Tokens of the sequences on which influence is measured.
        steps: Training steps of the digits classifier; 0 leaves out the corruption test.
        seed: Of weights and data.
        out: Folder for the results.
    """
    from vision_ssm.probe.recency import RecencyOptions, measure

    chosen = _stacks(stacks, layers, dim, state_size, causal, polar, smr)
    return _run(measure, RecencyOptions(stacks=chosen, pool=pool, length=length, steps=steps, seed=seed), out)


def smooth(
    stacks: list[str],
    *,
    layers: int = 8,
    dim: int = 32,
    state_size: int | None = None,
    polar: list[int] = NO_POLAR,
    smr: int = 0,
    causal: bool = False,
    steps: int = 0,
    seed: int = 0,
    out: Path = Path("runs/probe"),
) -> int:
    """How alike the tokens of a picture become, layer by layer.

    Args:
        stacks: Mixers to measure, such as s6 ssd s6+attention.
        layers: Of a stack that is written as one name.
        dim: Width.
        state_size: States of a scan; 16 for s6 and s4d, 64 for ssd and nc_ssd if not given.
        polar: Channels of a scan's state that never forget, and that hold the present input alone, such as 1 1.
        smr: Taps of the memory that is replayed into a scan's input, 0 for none.
        causal: Tokens see those before them only.
        steps: Training steps on digits before measuring; 0 for random weights.
        seed: Of weights and data.
        out: Folder for the results.
    """
    from vision_ssm.probe.smooth import SmoothOptions, measure

    chosen = _stacks(stacks, layers, dim, state_size, causal, polar, smr)
    return _run(measure, SmoothOptions(stacks=chosen, steps=steps, seed=seed), out)


def expressivity(
    stacks: list[str],
    *,
    layers: list[int] = [1, 2],  # noqa: B006 (a default for the command line, never changed)
    dim: int = 64,
    state_size: int | None = None,
    polar: list[int] = NO_POLAR,
    smr: int = 0,
    references: bool = True,
    paths: int = 8000,
    seed: int = 0,
    out: Path = Path("runs/probe"),
) -> int:
    """Which terms of a path's signature a linear read-out finds in untrained mixers.

    Args:
        stacks: Mixers to measure, such as s6 ssd s6+attention.
        layers: Depths of a stack that is written as one name, each a row.
        dim: Width.
        state_size: States of a scan; 16 for s6 and s4d, 64 for ssd and nc_ssd if not given.
        polar: Channels of a scan's state that never forget, and that hold the present input alone, such as 1 1.
        smr: Taps of the memory that is replayed into a scan's input, 0 for none.
        references: Begin with the random layers of the theory.
        paths: Random paths; the last quarter is scored.
        seed: Of weights and paths.
        out: Folder for the results.
    """
    from vision_ssm.probe.expressivity import ExpressivityOptions, measure

    chosen = dict.fromkeys(c for n in layers for c in _stacks(stacks, n, dim, state_size, True, polar, smr))
    return _run(measure, ExpressivityOptions(stacks=tuple(chosen), references=references, paths=paths, seed=seed), out)


def icl(
    stacks: list[str],
    *,
    task: Task,
    layers: int = 2,
    dim: int = 64,
    state_size: int | None = None,
    polar: list[int] = NO_POLAR,
    smr: int = 0,
    dims: int = 5,
    points: int = 16,
    vocabulary: int = 256,
    steps: int = 2000,
    batch_size: int = 32,
    lr: float = 2e-3,
    seed: int = 0,
    device: str = "auto",
    out: Path = Path("runs/probe"),
) -> int:
    """Train causal stacks to learn from examples in their input, and score them on new ones.

    Args:
        stacks: Mixers to measure, such as s6 ssd s6+attention.
        task: linreg (y = w x), parity (product of 2 hidden signs), mqar (recall of several keys' symbols) or retrieval
            (the vector that belongs to the nearest key).
        layers: Of a stack that is written as one name.
        dim: Width.
        state_size: States of a scan; 16 for s6 and s4d, 64 for ssd and nc_ssd if not given.
        polar: Channels of a scan's state that never forget, and that hold the present input alone, such as 1 1.
        smr: Taps of the memory that is replayed into a scan's input, 0 for none.
        dims: Numbers in an x, a key or a value; parity needs at least 3.
        points: Examples or pairs in a sequence.
        vocabulary: Symbols of mqar, half of them keys.
        steps: Training steps; every batch is new.
        batch_size: Sequences in a step.
        lr: Peak learning rate.
        seed: Of weights and data.
        device: auto, cpu or cuda.
        out: Folder for the results.
    """
    from vision_ssm.probe.icl import ICLOptions, measure

    chosen = _stacks(stacks, layers, dim, state_size, True, polar, smr)
    options = ICLOptions(
        stacks=chosen, task=task, dims=dims, points=points, vocabulary=vocabulary, steps=steps, batch_size=batch_size,
        lr=lr, seed=seed, device=device,
    )  # fmt: skip
    return _run(measure, options, out)


def sampling(
    stacks: list[str],
    *,
    layers: int = 2,
    dim: int = 32,
    state_size: int | None = None,
    polar: list[int] = NO_POLAR,
    smr: int = 0,
    causal: bool = True,
    steps: int = 400,
    seeds: int = 3,
    out: Path = Path("runs/probe"),
) -> int:
    """Train on signals sampled at one rate, test at others.

    Args:
        stacks: Mixers to measure, such as s6 ssd s6+attention.
        layers: Of a stack that is written as one name.
        dim: Width.
        state_size: States of a scan; 16 for s6 and s4d, 64 for ssd and nc_ssd if not given.
        polar: Channels of a scan's state that never forget, and that hold the present input alone, such as 1 1.
        smr: Taps of the memory that is replayed into a scan's input, 0 for none.
        causal: Tokens see those before them only.
        steps: Training steps.
        seeds: Trainings of each stack; the table has mean and spread.
        out: Folder for the results.
    """
    from vision_ssm.probe.sampling import SamplingOptions, measure

    chosen = _stacks(stacks, layers, dim, state_size, causal, polar, smr)
    return _run(measure, SamplingOptions(stacks=chosen, steps=steps, seeds=seeds), out)


def _stacks(
    names: list[str], layers: int, dim: int, state_size: int | None, causal: bool, polar: list[int], smr: int
) -> "tuple[StackConfig, ...]":
    from vision_ssm.mixer_config import ScanOptions
    from vision_ssm.probe.stack import StackConfig

    options = ScanOptions(polar, smr)
    return tuple(
        StackConfig.of(name, layers, dim=dim, state_size=state_size, causal=causal, options=options) for name in names
    )


def _run(measure, options, out: Path) -> int:
    from vision_ssm.files import check_writable

    check_writable(out)
    report = measure(options)
    print(report.table())
    report.write(out)
    print(f"wrote {out / report.name}.json and .png")
    return 0


COMMANDS: dict[str, Callable[..., int]] = {
    "recency": recency, "smooth": smooth, "expressivity": expressivity, "icl": icl, "sampling": sampling,
}  # fmt: skip
