"""Values and gradients against float64.

A workload runs at its full size, so that every code path is the one that is timed. float64 follows it by the torch back
end, which is blocked and compared with the position-by-position reference first. Where all of the workload would take
too long in float64, it follows some sequences and channels, spread from the first to the last; the gradient of the
output is zero elsewhere, so that sums over channels and sequences stay comparable, and gradients elsewhere must be
zero.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.testing import TOLERANCE, relative_rms
from vision_ssm.bench.workloads import SSD, Convolution, Core2D, Scan1D, Scan2D, Temporal, Tensors, Workload

_BUDGET = {"cuda": 100_000_000, "cpu": 4_000_000}
"""State-steps that float64 follows in one check."""
_CHEAPER = 100
"""So many times more state-steps of SSD, which are products of matrices, take the same time. It needs them: A has one
gradient a head, a sum of random signs, and in some heads that happens to be small beside its rounding."""
_MOST = 20.0
"""So many times may a bound grow where sequences cancel: a sum that is nothing beside its parts tells nothing."""
_FORMS = 1e-10
"""Largest difference between the two float64 forms (relative RMS)."""
_SMALL: tuple[Workload, ...] = (
    Scan1D(batch=2, length=37, channels=6, states=3), Scan2D(batch=2, height=5, width=7, channels=6, states=3, rank=2),
    Core2D(batch=1, height=5, width=4, channels=3, states=2),
    Temporal(batch=2, frames=5, height=2, width=3, channels=4, states=3, rank=2),
    SSD(batch=2, length=37, heads=3, head_dim=4, states=5, chunk=16), Convolution(batch=2, length=9, channels=5),
)  # fmt: skip


@dataclass(frozen=True)
class Check:
    """Relative RMS error of the output and of every gradient, by name; `bound` is what they may be (see `_float64`)."""

    errors: dict[str, float]
    bound: dict[str, float]
    sequences: tuple[int, int]
    channels: tuple[int, int]
    """How many float64 followed, of how many."""

    @property
    def passed(self) -> bool:
        """Whether every error is within its bound."""
        return all(error <= self.bound[name] for name, error in self.errors.items())

    def __str__(self) -> str:
        name = max(self.errors, key=lambda n: self.errors[n] / self.bound[n])
        extent = ""
        if self.sequences[0] < self.sequences[1] or self.channels[0] < self.channels[1]:
            extent = f"; float64 of {self.sequences[0]}/{self.sequences[1]} x {self.channels[0]}/{self.channels[1]}"
        verdict = "ok" if self.passed else "WRONG"
        return f"{verdict} {self.errors[name]:.1e} of {self.bound[name]:.0e} ({name}{extent})"


@dataclass(frozen=True)
class _Followed:
    """The sequences and channels that float64 follows."""

    batch: Tensor
    channels: Tensor
    of: tuple[int, int]

    def pick(self, t: Tensor, axes: tuple[int | None, int | None]) -> Tensor:
        for axis, index in zip(axes, (self.batch, self.channels), strict=True):
            t = t if axis is None else t.index_select(axis, index)
        return t

    def mask(self, t: Tensor, axes: tuple[int | None, int | None]) -> Tensor:
        """`t` with zeros where float64 does not follow."""
        for axis, index in zip(axes, (self.batch, self.channels), strict=True):
            if axis is not None:
                keep = torch.zeros(t.shape[axis], dtype=t.dtype, device=t.device).index_fill_(0, index, 1)
                t = t * keep.view(-1, *(1,) * (t.ndim - axis - 1))
        return t


def _follow(workload: Workload, x: Tensor) -> _Followed:
    batch_axis, channel_axis = workload.axes["x"]
    assert batch_axis is not None
    assert channel_axis is not None
    of = (x.shape[batch_axis], x.shape[channel_axis])
    budget = _BUDGET[x.device.type] * (_CHEAPER if isinstance(workload, SSD) else 1)
    allowed = max(2, int(budget * of[0] * of[1] / workload.state_steps))
    sequences = min(of[0], max(2, allowed // of[1]))
    channels = min(of[1], max(2, allowed // sequences))

    def spread(count: int, total: int) -> Tensor:
        return torch.linspace(0, total - 1, count, device=x.device).round().long()

    return _Followed(spread(sequences, of[0]), spread(channels, of[1]), of)


def _leaves(t: Tensors, convert: Callable[[Tensor], Tensor]) -> Tensors:
    return {name: convert(v).detach().requires_grad_() for name, v in t.items()}


def _with_gradients(workload: Workload, t: Tensors, backend: str, grad: Callable[[Tensor], Tensor]) -> Tensors:
    """Output and gradients by name."""
    y = workload.run(t, backend)
    found = torch.autograd.grad(y, list(t.values()), grad(y))
    return {"y": y.detach()} | {f"d{name}": g for name, g in zip(t, found, strict=True)}


def compare(workload: Workload, t: Tensors, backend: str, bound: dict[str, float] | None = None) -> Check:
    """One workload with given leaves (see `Workload.checked`) against float64.

    Args:
        workload: what to run.
        t: its leaves; they are not changed.
        backend: the back end to check.
        bound: largest error by name ("y", "dx", ...) where it is not the one of the dtype.
    """
    followed = _follow(workload, t["x"])
    seen = workload.axes["x"]
    torch.manual_seed(1)
    grads: list[Tensor] = []

    def draw(y: Tensor) -> Tensor:
        grads.append(followed.mask(torch.randn_like(y), seen))
        return grads[0]

    got = _with_gradients(workload, _leaves(t, torch.clone), backend, draw)
    want, cancels = _float64(workload, t, followed, grads[0])
    errors = {}
    for name, tensor in got.items():
        part = followed.pick(tensor, _axes(workload, name))
        errors[name] = relative_rms(part, want[name])
        astray = name != "y" and bool(tensor.count_nonzero() != part.count_nonzero())
        if astray or not torch.isfinite(tensor).all():
            errors[name] = float("inf")
    usual = TOLERANCE[t["x"].dtype]
    return Check(
        errors, {n: (bound or {}).get(n, usual) * cancels[n] for n in errors},
        (len(followed.batch), followed.of[0]), (len(followed.channels), followed.of[1]),
    )  # fmt: skip


def _axes(workload: Workload, name: str) -> tuple[int | None, int | None]:
    """Of the output or of a gradient."""
    return workload.axes["x" if name == "y" else name[1:]]


def _float64(workload: Workload, t: Tensors, followed: _Followed, grad: Tensor) -> tuple[Tensors, dict[str, float]]:
    """Output and gradients in float64, sequence by sequence, and how far the sequences cancel in each.

    A gradient without an axis for the batch is a sum over sequences. Its rounding is that of what is added, so where
    the sum is the smaller one its bound grows by the ratio: root of the sum of squares over the norm of the sum.
    """
    singles = []
    for one in followed.batch.split(1):
        alone = _Followed(one, followed.channels, followed.of)
        wide = _leaves({n: alone.pick(v, workload.axes[n]) for n, v in t.items()}, Tensor.double)
        given = alone.pick(grad, workload.axes["x"]).double()
        singles.append(_with_gradients(workload, wide, "torch", lambda _, given=given: given))
    want, cancels = {}, {}
    for name in singles[0]:
        parts, (batch, _) = [single[name] for single in singles], _axes(workload, name)
        want[name] = torch.cat(parts, batch) if batch is not None else torch.stack(parts).sum(0)
        apart = torch.stack([part.norm() for part in parts]).norm()
        cancels[name] = 1.0 if batch is not None else min(max(1.0, (apart / want[name].norm()).item()), _MOST)
    return want, cancels


def check_workload(workload: Workload, dtype: torch.dtype, device: torch.device, backend: str) -> Check:
    """A workload with its own inputs against float64."""
    return compare(workload, workload.checked(workload.tensors(dtype, device)), backend)


def check_float64_forms(workloads: list[Workload]) -> dict[str, float]:
    """Worst difference of the blocked float64 form from the reference, by kind of workload, on small odd sizes."""
    worst = {}
    for small in _SMALL:
        if any(isinstance(w, type(small)) for w in workloads):
            t = small.checked(small.tensors(torch.float64, torch.device("cpu")))
            t = {name: v.double() for name, v in t.items()}
            want, got = (
                _with_gradients(small, _leaves(t, torch.clone), backend, lambda y: y.detach().cos())
                for backend in ("reference", "torch")
            )
            worst[small.kind] = max(relative_rms(got[name], want[name]) for name in want)
    return worst


def forms_agree(differences: dict[str, float]) -> bool:
    """Whether the float64 form may be trusted."""
    return all(d <= _FORMS for d in differences.values())
