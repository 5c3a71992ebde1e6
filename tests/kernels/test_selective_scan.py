"""The selective scan: every back end of this machine against the reference; the operator's contract."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels.testing import TOLERANCE, assert_close, run_with_grads
from tests.kernels.scan_cases import (
    ALL_DIRECTIONS,
    CASES_1D,
    CASES_2D,
    NAMES_1D,
    NAMES_2D,
    Case1D,
    Case2D,
    widened,
)  # fmt: skip

FAST = [name for name in ("torch", "c") if not kernels.backends()[name]]
Case = Case1D | Case2D


def names_of(case: Case) -> tuple[str, ...]:
    return NAMES_1D if isinstance(case, Case1D) else NAMES_2D


def compare(case: Case, backend: str, dtype: torch.dtype, device: str = "cpu", tolerance: float | None = None) -> None:
    """Outputs and every gradient of `backend` against the float64 reference on the same values."""
    inputs = case.inputs(dtype)
    on_device = tuple(None if t is None else t.detach().to(device).requires_grad_() for t in inputs)
    got = run_with_grads(case.function(backend), *on_device)
    want = run_with_grads(case.function("reference"), *widened(inputs))
    for name, g, w in zip(("y", "final_state", *names_of(case)), got, want, strict=True):
        assert (g is None) == (w is None), name
        if g is not None:
            assert_close(f"{backend} {name}", g, w, tolerance or TOLERANCE[dtype])


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("case", [*CASES_1D.values(), *CASES_2D.values()], ids=[*CASES_1D, *CASES_2D])
def test_matches_reference_in_float32(case, backend):
    compare(case, backend, torch.float32)


@pytest.mark.parametrize("backend", FAST)
def test_output_does_not_depend_on_whether_the_final_state_is_asked_for(backend):
    u, _, A, B, C = (t.detach() for t in CASES_1D["low_rank"].inputs(torch.float32)[:5])
    given = (u, torch.randn_like(u), A, B, C)
    y, _ = kernels.selective_scan(*given, softplus=True, return_final_state=True, backend=backend)
    assert torch.equal(kernels.selective_scan(*given, softplus=True, backend=backend), y)


@pytest.mark.parametrize("case", [*CASES_1D.values(), *CASES_2D.values()], ids=[*CASES_1D, *CASES_2D])
def test_torch_path_matches_reference_in_float64(case):
    compare(case, "torch", torch.float64)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [CASES_1D["low_rank"], CASES_2D["odd"]], ids=["1d", "2d"])
def test_half_precision(case, dtype, backend):
    compare(case, backend, dtype)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("case", [CASES_1D["low_rank"], CASES_2D["odd"]], ids=["1d", "2d"])
def test_autocast_changes_nothing(case, backend):
    inputs = case.inputs(torch.float32)
    want = run_with_grads(case.function(backend), *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = run_with_grads(case.function(backend), *inputs)
    for name, g, w in zip(("y", "final_state", *names_of(case)), got, want, strict=True):
        assert (g is None and w is None) or torch.equal(g, w), name


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_autocast_does_not_change_a_summary(backend):
    u, delta, A, B, _, _, weight, bias, _, _ = CASES_1D["low_rank"].inputs(torch.float32)

    def summary():
        return kernels.selective_scan_summary(
            u, delta, A, B, delta_weight=weight, delta_bias=bias, softplus=True, backend=backend
        )

    want = summary()
    with torch.autocast("cpu", torch.bfloat16):
        got = summary()
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    height=st.integers(1, 9), width=st.integers(1, 9), channels=st.integers(1, 9), state=st.integers(1, 18),
    rank=st.integers(0, 3), directions=st.sets(st.sampled_from(ALL_DIRECTIONS), min_size=1),
    merge=st.sampled_from(["sum", "none"]),
)  # fmt: skip
def test_any_image_size(height, width, channels, state, rank, directions, merge):
    case = Case2D((1, height, width, channels), state, tuple(sorted(directions)), rank, merge=merge)
    for backend in FAST:
        compare(case, backend, torch.float32)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    before=st.integers(1, 3), length=st.integers(1, 40), after=st.integers(1, 3), groups=st.integers(1, 3),
    state=st.integers(1, 18), reverse=st.booleans(),
)  # fmt: skip
def test_any_sequence(before, length, after, groups, state, reverse):
    case = Case1D((before, length, after, 2 * groups), state, groups=groups, reverse=reverse)
    for backend in FAST:
        compare(case, backend, torch.float32)


@pytest.mark.parametrize("case", [CASES_1D["reversed_grouped"], CASES_2D["odd"]], ids=["1d", "2d"])
def test_gradcheck(case):
    small = dataclasses.replace(case, shape=(1, 3, 3) if isinstance(case, Case1D) else (1, 2, 2, 2), state=2)
    assert torch.autograd.gradcheck(small.function("torch"), small.inputs(torch.float64))


@pytest.mark.parametrize("backend", FAST)
def test_only_the_needed_gradients(backend):
    inputs = CASES_2D["odd"].inputs(torch.float32)
    for wanted in (0, 2, 6, 8):
        mixed = tuple(t.detach().requires_grad_(i == wanted) for i, t in enumerate(inputs))
        y, _ = CASES_2D["odd"].function(backend)(*mixed)
        y.sum().backward()
        assert [t.grad is not None for t in mixed] == [i == wanted for i in range(len(mixed))]


@pytest.mark.parametrize("backend", FAST)
def test_gradients_with_only_the_final_state_in_the_loss(backend):
    case = CASES_1D["time_in_place"]
    results = []
    for name, inputs in ((backend, case.inputs(torch.float32)), ("reference", widened(case.inputs(torch.float32)))):
        _, final = case.function(name)(*inputs)
        final.square().sum().backward()
        results.append([None if t is None else t.grad for t in inputs])
    for name, got, want in zip(NAMES_1D, *results, strict=True):
        if want is None or not want.any():
            assert got is None or not got.any(), name
        else:
            assert_close(name, got, want, 1e-5)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("case", [CASES_1D["low_rank"], CASES_2D["odd"]], ids=["1d", "2d"])
def test_bit_for_bit_deterministic(case, backend):
    first, second = (run_with_grads(case.function(backend), *case.inputs(torch.float32)) for _ in range(2))
    assert all(a is None or torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("reverse", [False, True])
def test_halves_with_a_handed_over_state_equal_the_whole(backend, reverse):
    case = Case1D((2, 37, 6), state=16, reverse=reverse)
    u, delta, A, B, C, D, weight, bias, z, start = (
        None if t is None else t.detach() for t in case.inputs(torch.float32)
    )
    whole, final = case.function(backend)(u, delta, A, B, C, D, weight, bias, z, start)
    cut = [slice(0, 20), slice(20, 37)]
    state, parts = start, {}
    for i in (1, 0) if reverse else (0, 1):
        s = cut[i]
        parts[i], state = case.function(backend)(
            u[:, s], delta[:, s], A, B[:, s], C[:, s], D, weight, bias, z[:, s], state
        )
    assert_close("y", torch.cat([parts[0], parts[1]], dim=1), whole, 1e-6)
    assert_close("state", state, final, 1e-6)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("directions", [("rows", "rows_reversed"), ("columns", "columns_reversed")], ids="-".join)
def test_strips_of_an_image_continue_exactly(backend, directions):
    case = Case2D((1, 8, 6, 4), state=16, directions=directions, merge="none")
    x, delta, A, B, C, D, weight, bias, start = (t.detach() for t in case.inputs(torch.float32))
    whole, final = case.function(backend)(x, delta, A, B, C, D, weight, bias, start)
    axis = 1 if directions[0] == "rows" else 2
    halves = [[t.narrow(axis, i * t.shape[axis] // 2, t.shape[axis] // 2) for t in (x, delta, B, C)] for i in (0, 1)]
    for k, order in enumerate([(0, 1), (1, 0)]):
        one = dataclasses.replace(case, directions=(directions[k],))
        state, got = start[:, k : k + 1], [None, None]
        for i in order:
            xs, ds, bs, cs = halves[i]
            kth = [t[:, :, :, k : k + 1] for t in (ds, bs, cs)]
            pick = [t[k : k + 1] for t in (A, D, weight, bias)]
            got[i], state = one.function(backend)(xs, kth[0], pick[0], kth[1], kth[2], *pick[1:], state)
        assert_close(f"y {directions[k]}", torch.cat(got, dim=axis)[:, :, :, 0], whole[:, :, :, k], 1e-6)
        assert_close(f"state {directions[k]}", state[:, 0], final[:, k], 1e-6)


@pytest.mark.parametrize("backend", FAST)
def test_two_segments_combined_by_their_summaries_equal_the_whole(backend):
    case = Case1D((2, 31, 4), state=5, rank=2)
    u, delta, A, B, _, _, weight, bias, _, _ = (None if t is None else t.detach() for t in case.inputs(torch.float32))

    def summary(s: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return kernels.selective_scan_summary(
            u[:, s], delta[:, s], A, B[:, s], delta_weight=weight, delta_bias=bias, softplus=True, backend=backend
        )

    (h1, t1), (h2, t2), (h, t) = summary(slice(0, 13)), summary(slice(13, 31)), summary(slice(0, 31))
    assert_close("state", h2 + torch.exp(t2[..., None] * A) * h1, h, 1e-6)
    assert_close("total", t1 + t2, t, 1e-6)


@pytest.mark.parametrize("backend", FAST)
def test_slices_of_one_projection_need_no_copy_and_empty_memory_is_written(backend, monkeypatch):
    """Inputs are views of one wide tensor; `torch.empty` gives NaN, so an unwritten cell shows."""
    case = Case2D((2, 5, 6, 4), state=3, rank=2)
    inputs = case.inputs(torch.float32)
    packed = torch.cat(
        [inputs[0].flatten(3), inputs[1].flatten(3), inputs[3].flatten(3), inputs[4].flatten(3)], -1
    ).detach()
    x, delta, b, c = packed.split([4, 8, 12, 12], dim=-1)
    views = [x, delta.unflatten(-1, (4, 2)), inputs[2], b.unflatten(-1, (4, 3)), c.unflatten(-1, (4, 3)), *inputs[5:]]
    assert not views[0].is_contiguous()
    real = torch.empty

    def poisoned(*args, **kwargs):
        made = real(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    want = case.function("reference")(*widened(inputs))
    monkeypatch.setattr(torch, "empty", poisoned)
    got = case.function(backend)(*views)
    assert_close("y", got[0], want[0], 1e-5)
    assert_close("final_state", got[1], want[1], 1e-5)


def test_opcheck():
    for case in (CASES_1D["reversed_grouped"], CASES_2D["odd"]):
        seen = []
        original = torch.ops.vision_ssm.selective_scan.default
        with torch.utils._python_dispatch.TorchDispatchMode.__new__(_Recorder) as mode:
            mode.seen = seen
            case.function("torch")(*case.inputs(torch.float32))
        assert seen
        torch.library.opcheck(original, seen[0])


class _Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps the arguments with which the canonical operator is called."""

    seen: list

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.vision_ssm.selective_scan.default:
            self.seen.append(
                tuple(a.detach().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in args)
            )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", [CASES_1D["low_rank"], CASES_2D["odd"]], ids=["1d", "2d"])
def test_compiles_into_one_graph_with_gradients(case):
    inputs = case.inputs(torch.float32)
    compiled = torch.compile(case.function("auto"), fullgraph=True, backend="aot_eager")
    got, want = run_with_grads(compiled, *inputs), run_with_grads(case.function("auto"), *inputs)
    for name, g, w in zip(("y", "final_state", *names_of(case)), got, want, strict=True):
        if w is not None:
            assert_close(name, g, w, 1e-6)


def test_exports_with_dynamic_sizes():
    class Scan(torch.nn.Module):
        def forward(self, *inputs):
            return CASES_2D["odd"].function("auto")(*inputs)

    inputs = tuple(t.detach() for t in CASES_2D["odd"].inputs(torch.float32))
    h, w = torch.export.Dim("h", min=2, max=64), torch.export.Dim("w", min=2, max=64)
    shapes = tuple({1: h, 2: w} if i in (0, 1, 3, 4) else None for i in range(len(inputs)))
    program = torch.export.export(Scan(), inputs, dynamic_shapes=(shapes,))
    other = tuple(t.detach() for t in dataclasses.replace(CASES_2D["odd"], shape=(2, 7, 4, 4)).inputs(torch.float32))
    for got, want in zip(program.module()(*other), Scan()(*other), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
def test_shapes_on_the_meta_device(backend):
    u, delta, A, B, *_ = (t.detach().to("meta") for t in Case1D((2, 7, 4), extras=False).inputs(torch.float32)[:5])
    y = kernels.selective_scan(u, delta, A, B, B, backend=backend)
    final, total = kernels.selective_scan_summary(u, delta, A, B, softplus=True, backend=backend)
    assert (y.shape, final.shape, total.shape) == ((2, 7, 4), (2, 4, 3), (2, 4))


def test_second_derivatives_are_refused_clearly():
    u, *rest = Case1D().inputs(torch.float32)
    y, _ = Case1D().function("torch")(u, *rest)
    (g,) = torch.autograd.grad(y.sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives exist only in the reference"):
        g.sum().backward()


ZEROS = torch.zeros
BAD_CALLS = {
    "channels": (dict(A=ZEROS(5, 3)), r"A: got shape \(5, 3\), expected \(channels, state\) = \(4, 3\)"),
    "state size": (dict(A=ZEROS(4, 300), B=ZEROS(2, 7, 300), C=ZEROS(2, 7, 300)), "expected 1 to 256"),
    "delta": (dict(delta=ZEROS(2, 6, 4)), "delta: got shape"),
    "rank": (dict(delta=ZEROS(2, 7, 0), delta_weight=ZEROS(4, 0)), r"delta_weight: got shape \(4, 0\).*at least 1"),
    "B and C": (dict(C=ZEROS(2, 7, 2)), "C: got shape"),
    "dtype": (dict(u=ZEROS(2, 7, 4, dtype=torch.int32)), "u: got dtype torch.int32"),
    "A dtype": (dict(A=ZEROS(4, 3, dtype=torch.bfloat16)), "A: got dtype torch.bfloat16, expected torch.float32"),
    "layout": (dict(u=ZEROS(2, 4, 7).transpose(1, 2)), "last axis must be contiguous"),
    "dim": (dict(dim=2), "any axis but the last"),
    "groups": (dict(B=ZEROS(2, 7, 3, 3), C=ZEROS(2, 7, 3, 3)), "groups must divide"),
    "empty": (dict(u=ZEROS(2, 0, 4), delta=ZEROS(2, 0, 4), B=ZEROS(2, 0, 3), C=ZEROS(2, 0, 3)), "empty"),
    "backend": (dict(backend="cuda"), "choose one of auto"),
}  # fmt: skip


@pytest.mark.parametrize("changes, message", BAD_CALLS.values(), ids=BAD_CALLS)
def test_errors_name_the_argument(changes, message):
    good = dict(
        u=torch.zeros(2, 7, 4),
        delta=torch.zeros(2, 7, 4),
        A=torch.zeros(4, 3),
        B=torch.zeros(2, 7, 3),
        C=torch.zeros(2, 7, 3),
    )
    with pytest.raises(ValueError, match=message):
        kernels.selective_scan(**(good | changes))


def test_a_back_end_that_cannot_run_says_why():
    inputs = Case1D().inputs(torch.float64)
    with pytest.raises(RuntimeError, match="backend='triton' cannot run here: it runs on a GPU"):
        Case1D().function("triton")(*inputs)


def test_extreme_steps_stay_finite():
    u, _, A, B, C, *_ = Case1D((1, 300, 4), state=16).inputs(torch.float32)
    for backend in FAST:
        y = kernels.selective_scan(u, torch.full((1, 300, 4), 50.0), A * 1e3, B, C, backend=backend)
        assert y.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*CASES_1D.values(), *CASES_2D.values()], ids=[*CASES_1D, *CASES_2D])
def test_on_the_gpu(case, dtype, backend):
    compare(case, backend, dtype, "cuda", max(TOLERANCE[dtype], 1e-5))


@pytest.mark.gpu
def test_peak_memory_on_the_gpu_holds_no_copy_of_x():
    case = Case2D((1, 256, 256, 64), state=16, rank=2)
    inputs = [t.detach().cuda() for t in case.inputs(torch.bfloat16)]
    case.function("triton")(*inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y, _ = case.function("triton")(*inputs)
    extra = torch.cuda.max_memory_allocated() - before - y.nbytes
    # The directions add up in float32; besides, there is one state for each chunk of at least 32 steps.
    sums, states = 4 * y.numel(), 4 * 4 * 16 * y.numel() // 32
    assert extra < sums + states + y.nbytes, f"{extra / 2**20:.1f} MiB beyond the result"
