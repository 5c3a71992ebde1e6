"""A call that is like an earlier one repeats its compiled launches with its own tensors; any other is prepared anew."""

# The canonical inputs are a list, some of them None:
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from triton.compiler import CompiledKernel

from kernels.selective_scan import gpu
from tests.kernels.interpreted_scans import Case

CASE = Case((2, 6, 5, 8), 4, (0, 1, 2, 3), rank=2, packed=True)
OPTIONS = dict(orders=CASE.orders, softplus=True, merge=True)


class Launched(CompiledKernel):
    """Stands for what Triton compiled and keeps the arguments of its launches."""

    module = None

    def __init__(self, again: list[tuple]) -> None:
        self.again = again

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: self.again.append((grid, arguments))


class Kernel:
    """Stands for a kernel; keeps the arguments of its launches in the order of its signature."""

    def __init__(self, kernel, first: list[tuple], again: list[tuple]) -> None:
        self.arg_names, self.first, self.again = kernel.arg_names, first, again

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Launched]:
        def launch(*, num_warps: int, maxnreg: int = 0, **named: object) -> Launched:
            assert set(named) == set(self.arg_names)
            self.first.append((grid, tuple(named[n] for n in self.arg_names)))
            return Launched(self.again)

        return launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> tuple[list[tuple], list[tuple]]:
    """Grids and arguments of the launches that went through Triton, and of those that were repeated."""
    gluon_gradient = pytest.importorskip("kernels.selective_scan.gluon_gradient")
    first, again = [], []
    names = ("scan_chunk_kernel", "scan_output_kernel", "scan_gradient_kernel")
    twins = types.SimpleNamespace(**{n: Kernel(getattr(gluon_gradient, n), first, again) for n in names})
    monkeypatch.setattr(gpu, "_gluon", lambda: twins)
    monkeypatch.setattr(gpu, "_has_twin", lambda x, states: True)
    monkeypatch.setattr(gpu, "_chunking", lambda x, orders, states: (8, 4))
    monkeypatch.setattr(gpu, "scan_combine_kernel", Kernel(gpu.scan_combine_kernel, first, again))
    monkeypatch.setattr(gpu, "_plans", {})
    return first, again


def call(given: list[Tensor | None], *unneeded: int) -> None:
    """Forward and backward."""
    y, _, saved = gpu.forward(*given, **OPTIONS, need_backward=True)
    needs = tuple(t is not None and i not in unneeded for i, t in enumerate(given))
    gpu.backward(torch.zeros_like(y), None, *given, saved, **OPTIONS, needs=needs)


def test_a_like_call_repeats_the_launches_with_its_own_tensors(launches):
    first, again = launches
    call(CASE.inputs())
    assert (len(first), len(again)) == (8, 0)
    given = CASE.inputs()
    call(given)
    assert len(first) == len(again) == 8
    own = {t.data_ptr() for t in given if t is not None}
    for (grid, then), (same_grid, now) in zip(first, again, strict=True):
        assert grid == same_grid
        for a, b in zip(then, now, strict=True):
            assert type(a) is type(b)
            if isinstance(b, Tensor):
                assert b.data_ptr() in own or b.data_ptr() != a.data_ptr()
                assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
            else:
                assert a == b
    assert {t.data_ptr() for _, now in again for t in now if isinstance(t, Tensor)} >= own - {given[9].data_ptr()}


def shifted(t: Tensor) -> Tensor:
    """The same numbers four bytes further on than memory begins."""
    return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)


UNLIKE = {
    "strides": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "dtype": lambda t: t.bfloat16(),
    "alignment": shifted,
    "size": lambda t: torch.cat([t, t]),
}


def test_no_tensor_is_kept(launches):
    call(CASE.inputs())
    kept = [v for plan in gpu._plans.values() for name, known in plan.memo.items() if name != "gradient" for v in known]
    assert len(kept) == 8 * 4
    assert not any(isinstance(v, Tensor) for arguments in kept if isinstance(arguments, list) for v in arguments)


@pytest.mark.parametrize("how", UNLIKE)
def test_any_other_call_is_prepared_anew(launches, how: str):
    first, again = launches
    given = CASE.inputs()
    call(given)
    for place in (0, 1, 3, 4, 9) if how == "size" else (0,):
        given[place] = UNLIKE[how](given[place])
    call(given)
    assert (len(first), len(again)) == (16, 0)


def test_other_needs_are_prepared_anew(launches):
    first, again = launches
    call(CASE.inputs())
    call(CASE.inputs(), 2)
    assert len(first) == 8 + 4, "the forward pass is the same, the backward pass is not"
    assert len(again) == 4


def test_no_launch_that_wrote_a_final_state_is_repeated_without_one(launches, monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple] = []
    combine = Kernel(gpu.scan_combine_kernel, seen, seen)
    monkeypatch.setattr(gpu, "scan_combine_kernel", combine)
    for want in (True, False, True):
        gpu.forward(*CASE.inputs(), **OPTIONS, need_backward=False, want_final=want)
    last = combine.arg_names.index("last")
    assert [arguments[last] is None for _, arguments in seen] == [False, True, False]


def test_plans_are_forgotten_before_they_are_too_many(launches, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu, "MAX_PLANS", 3)
    for size in range(2, 8):
        call(Case((1, size, 5, 8), 4, (0, 1, 2, 3), rank=2).inputs())
        assert len(gpu._plans) <= 3
