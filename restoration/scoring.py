"""Scoring restorers on the same pixels: every method sees the same inputs, made from the picture's name."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from restoration.classic import MethodName, restore_classic
from restoration.data import read_example
from restoration.degrade import Degradation, enlarge, seed_of
from restoration.folders import Example
from restoration.forward import restore
from restoration.metrics import Lpips, Measure
from restoration.networks import Restorer
from restoration.reading import Reader
from restoration.restorer import PictureRestorer

GIVEN = "given"
"""Level of pairs, whose inputs are given."""


@dataclass(frozen=True)
class Case:
    """One degraded picture and what it should become."""

    name: str
    level: str
    degradation: Degradation | None
    """At one level; not known of pairs."""
    scale: int
    seed: int
    input: Tensor
    """(C, h, w) float32 on the CPU."""
    clean: Tensor
    """(3, H, W) float32 on the CPU."""


@dataclass(frozen=True)
class Score:
    """How well one method did on one picture."""

    name: str
    level: str
    method: str
    psnr: float
    ssim: float | None
    lpips: float | None
    seconds: float


Method = Callable[[Case], Tensor]
"""Gives the restored (3, H, W) image."""


def cases_of(example: Example, read: Reader, degradation: Degradation, *, side: int | None = None) -> Iterable[Case]:
    """The inputs of one picture: at every level of the degradation, or the given one.

    Args:
        example: clean picture or pair.
        read: gives its pixels.
        degradation: of the task.
        side: largest side of the middle part that is taken; None for the whole picture.

    Raises:
        UserError: A file that cannot be read, or is too small.
    """
    scale, seed = degradation.scale, seed_of(example.name)
    clean, given = read_example(example, read, scale)
    clean, given = _middle(clean, given, side, scale)
    if given is not None:
        yield Case(example.name, GIVEN, None, scale, seed, given, clean)
        return
    for level, operator in degradation.levels().items():
        yield Case(example.name, level, operator, scale, seed, operator.apply(clean, seed=seed), clean)


def _middle(clean: Tensor, given: Tensor | None, side: int | None, scale: int) -> tuple[Tensor, Tensor | None]:
    if side is None:
        return clean, given
    small = max(1, side // scale)
    top, left = (max(0, (length // scale - small) // 2) for length in clean.shape[1:])
    cut = clean[:, top * scale : (top + small) * scale, left * scale : (left + small) * scale]
    return cut, None if given is None else given[:, top : top + small, left : left + small]


def untouched(case: Case) -> Tensor:
    """The input itself, at the clean picture's size."""
    return enlarge(case.input[None, :3], case.scale)[0]


def by_network(model: Restorer, device: torch.device) -> Method:
    """A network on a device, in eval mode there: whole pictures, in its own precision."""

    def method(case: Case) -> Tensor:
        return restore(model, case.input[None].to(device), case.scale)[0].cpu()

    return method


def by_restorer(restorer: PictureRestorer) -> Method:
    """Weights as `vssm restore run` uses them."""

    def method(case: Case) -> Tensor:
        known = case.input[3:] if restorer.needs_mask else None
        return restorer.restore(case.input[:3], known=known)

    return method


def by_classic(name: MethodName) -> Method:
    """A method of `restoration.classic`."""

    def method(case: Case) -> Tensor:
        return restore_classic(case.input, name, case.degradation, scale=case.scale, seed=case.seed)

    return method


def score(case: Case, name: str, method: Method, measure: Measure, lpips: Lpips | None = None) -> tuple[Score, Tensor]:
    """Run a method on a case; returns its score and the restored image."""
    start = time.perf_counter()
    restored = method(case)
    seconds = time.perf_counter() - start
    found = measure(restored, case.clean)
    distance = None if lpips is None else lpips(restored, case.clean)
    return Score(case.name, case.level, name, found["psnr"], found.get("ssim"), distance, seconds), restored


@dataclass(frozen=True)
class Mean:
    """Mean over pictures of one method at one level."""

    level: str
    method: str
    psnr: float
    ssim: float | None
    lpips: float | None
    seconds: float
    pictures: int


def means(scores: Sequence[Score]) -> list[Mean]:
    """Means by level and method, in the order in which they first occur."""
    groups: dict[tuple[str, str], list[Score]] = {}
    for one in scores:
        groups.setdefault((one.level, one.method), []).append(one)
    return [
        Mean(
            level,
            method,
            fmean(one.psnr for one in group),
            _mean([one.ssim for one in group]),
            _mean([one.lpips for one in group]),
            fmean(one.seconds for one in group),
            len(group),
        )
        for (level, method), group in groups.items()
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
