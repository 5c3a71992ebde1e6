"""The causal convolution: every back end against the reference and torch's own; the operator's contract."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.causal_conv1d.op import causal_conv1d
from kernels.testing import TOLERANCE, assert_close, run_with_grads
from tests.kernels import interpreted_conv1d as interpreted

NAMES = ("y", "final_state", "x", "weight", "bias", "initial_state")


@dataclass(frozen=True)
class Case:
    """One call of `causal_conv1d`."""

    shape: tuple[int, ...] = (2, 9, 5)
    width: int = 4
    dim: int = 1
    silu: bool = True
    reverse: bool = False
    extras: bool = True

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor | None, ...]:
        """x, weight, bias, initial state: leaves that require gradients."""
        rng = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng, dtype=torch.float64).to(device, dtype).requires_grad_()

        axis = self.dim % len(self.shape)
        state = (*self.shape[:axis], self.width - 1, *self.shape[axis + 1 :])
        return (
            draw(*self.shape), draw(self.shape[-1], self.width), draw(self.shape[-1]) if self.extras else None,
            draw(*state) if self.extras else None,
        )  # fmt: skip

    def function(self, backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
        """`causal_conv1d` of the four inputs as (y, final state)."""

        def run(x, weight, bias, state):
            return causal_conv1d(
                x, weight, bias, activation="silu" if self.silu else None, reverse=self.reverse, dim=self.dim,
                initial_state=state, return_final_state=True, backend=backend,
            )  # fmt: skip

        return run


CASES = {
    "usual": Case(),
    "one_step": Case((1, 1, 1), width=2),
    "shorter_than_the_taps": Case((2, 2, 3), width=5),
    "backwards": Case((1, 11, 3), width=3, reverse=True),
    "frames_in_place": Case((2, 6, 3, 2, 4), width=4),
    "second_axis_backwards": Case((2, 3, 7, 2), width=8, dim=2, reverse=True),
    "first_axis": Case((13, 4), width=2, dim=0),
    "counted_from_the_end": Case((2, 5, 4), dim=-2, silu=False),
    "bare": Case((2, 19, 3), width=6, silu=False, extras=False),
}


def outputs_and_gradients(function: Callable[..., tuple[Tensor, Tensor]], given) -> list[Tensor | None]:
    """y, final state and all gradients, for gradients of the outputs that every dtype represents exactly.

    The gradient of the bias is a sum with cancellation: rounding what enters it would dominate the comparison.
    """
    leaves = [None if t is None else t.detach().requires_grad_() for t in given]
    outputs = function(*leaves)
    weights = [torch.arange(o.numel(), device=o.device).cos().bfloat16().view(o.shape).to(o.dtype) for o in outputs]
    found = iter(torch.autograd.grad(outputs, [t for t in leaves if t is not None], weights))
    return [*(o.detach() for o in outputs), *(None if t is None else next(found) for t in leaves)]


def compare(case: Case, backend: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Outputs and every gradient of `backend` against the float64 reference on the same values."""
    given = case.inputs(dtype, device)
    wide = tuple(None if t is None else t.detach().double().requires_grad_() for t in given)
    got = outputs_and_gradients(case.function(backend), given)
    want = outputs_and_gradients(case.function("reference"), wide)
    for name, g, w in zip(NAMES, got, want, strict=True):
        assert (g is None) == (w is None), name
        if w is not None and g is not None:
            assert_close(f"{backend} {name}", g, w, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_torch_path_matches_the_reference(case, dtype):
    compare(case, "torch", dtype)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_is_torchs_padded_depthwise_convolution(backend):
    x, weight, bias, _ = Case((2, 9, 5)).inputs(torch.float64)
    want = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=3, groups=5)[..., :9].transpose(1, 2)
    assert_close("y", causal_conv1d(x, weight, bias, backend=backend), want, 1e-12)
    assert_close(
        "silu", causal_conv1d(x, weight, bias, activation="silu", backend=backend), want * want.sigmoid(), 1e-12
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    before=st.integers(1, 3), length=st.integers(1, 20), after=st.integers(1, 3), channels=st.integers(1, 5),
    width=st.integers(2, 9), reverse=st.booleans(), silu=st.booleans(),
)  # fmt: skip
def test_any_size(before, length, after, channels, width, reverse, silu):
    compare(Case((before, length, after, channels), width, 1, silu, reverse), "torch", torch.float32)


def test_one_tap_needs_no_state():
    case = Case((2, 5, 3), width=1)
    x, weight, bias, state = case.inputs(torch.float32)
    y, final = case.function("torch")(x, weight, bias, state)
    assert_close("y", y, F.silu(x * weight[:, 0] + bias), 1e-6)
    assert final.shape == (2, 0, 3)


@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(reverse):
    case = Case((1, 4, 2), width=3, reverse=reverse)
    assert torch.autograd.gradcheck(case.function("torch"), case.inputs(torch.float64))


@pytest.mark.parametrize("reverse", [False, True])
def test_halves_with_a_handed_over_state_equal_the_whole(reverse):
    case = Case((2, 13, 3), reverse=reverse)
    x, weight, bias, start = (t.detach() for t in case.inputs(torch.float32))
    whole, final = case.function("torch")(x, weight, bias, start)
    parts, state = [None, None], start
    for i in (1, 0) if reverse else (0, 1):
        half = x[:, :6] if i == 0 else x[:, 6:]
        parts[i], state = case.function("torch")(half, weight, bias, state)
    assert_close("y", torch.cat(parts, dim=1), whole, 1e-6)
    assert torch.equal(state, final)


def test_only_the_needed_gradients():
    for wanted in range(4):
        given = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(Case().inputs(torch.float32))]
        y, _ = Case().function("torch")(*given)
        y.sum().backward()
        assert [t.grad is not None for t in given] == [i == wanted for i in range(4)]


def test_gradients_with_only_the_final_state_in_the_loss():
    x, weight, bias, start = Case((1, 2, 3), width=4).inputs(torch.float64)
    _, final = Case((1, 2, 3), width=4).function("torch")(x, weight, bias, start)
    final.square().sum().backward()
    assert_close("x", x.grad, 2 * x, 1e-12)
    assert_close("initial_state", start.grad, torch.cat([torch.zeros(1, 2, 3), 2 * start[:, 2:].detach()], 1), 1e-12)
    assert not weight.grad.any()
    assert not bias.grad.any()


def test_slices_enter_as_they_are_and_autocast_changes_nothing():
    x, weight, bias, start = (t.detach() for t in Case((2, 9, 15)).inputs(torch.float32))
    part = x[..., 5:10]
    arguments = (weight[5:10], bias[5:10], start[..., 5:10])
    want = Case().function("torch")(part.contiguous(), *arguments)
    with torch.autocast("cpu", torch.bfloat16):
        got = Case().function("torch")(part, *arguments)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("case", [CASES["usual"], CASES["frames_in_place"]], ids=["usual", "frames"])
def test_opcheck(case):
    x, weight, bias, state = case.inputs(torch.float32)
    lines = x.shape[2:-1].numel()
    canonical = [t.detach().reshape(x.shape[0], -1, lines, x.shape[-1]).requires_grad_() for t in (x, state)]
    arguments = (canonical[0], weight, bias, canonical[1], True, False, True, "torch")
    torch.library.opcheck(torch.ops.vision_ssm.causal_conv1d.default, arguments)
    torch.library.opcheck(torch.ops.vision_ssm.causal_conv1d.default, (*arguments[:2], None, None, *arguments[4:]))


def test_compiles_into_one_graph_with_gradients():
    given = Case().inputs(torch.float32)
    compiled = torch.compile(Case().function("auto"), fullgraph=True, backend="aot_eager")
    got, want = run_with_grads(compiled, *given), run_with_grads(Case().function("auto"), *given)
    for name, g, w in zip(NAMES, got, want, strict=True):
        assert_close(name, g, w, 1e-6)


def test_exports_with_a_dynamic_length():
    class Conv(torch.nn.Module):
        def forward(self, x, weight, bias, state):
            return Case().function("auto")(x, weight, bias, state)

    given = tuple(t.detach() for t in Case().inputs(torch.float32))
    program = torch.export.export(Conv(), given, dynamic_shapes=({1: torch.export.Dim("t", min=2)}, None, None, None))
    other = tuple(t.detach() for t in replace(Case(), shape=(2, 14, 5)).inputs(torch.float32))
    for got, want in zip(program.module()(*other), Conv()(*other), strict=True):
        assert torch.equal(got, want)


def test_second_derivatives_are_refused_clearly():
    x, *rest = Case().inputs(torch.float32)
    y, _ = Case().function("torch")(x, *rest)
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives exist only in the reference"):
        g.sum().backward()


ZEROS = torch.zeros
BAD_CALLS = {
    "axes": (dict(x=ZEROS(5)), r"x: got shape \(5,\)"),
    "dim": (dict(dim=2), "any axis but the last"),
    "channels": (dict(weight=ZEROS(4, 3)), r"weight: got shape \(4, 3\), expected .* = \(5, 1 to 16\)"),
    "torch weight": (dict(weight=ZEROS(5, 1, 4)), "squeeze the middle axis"),
    "width": (dict(weight=ZEROS(5, 17)), "1 to 16"),
    "bias": (dict(bias=ZEROS(4)), "bias: got shape"),
    "state": (dict(initial_state=ZEROS(2, 4, 5)), r"initial_state: got shape \(2, 4, 5\).*= \(2, 3, 5\)"),
    "activation": (dict(activation="relu"), "activation: got 'relu', expected None or 'silu'"),
    "dtype": (dict(x=ZEROS(2, 9, 5, dtype=torch.int32)), "x: got dtype torch.int32"),
    "weight dtype": (dict(weight=ZEROS(5, 4, dtype=torch.float16)), "weight: got dtype torch.float16"),
    "layout": (dict(x=ZEROS(2, 5, 9).transpose(1, 2)), "last axis must be contiguous"),
    "empty": (dict(x=ZEROS(2, 0, 5)), "empty"),
    "backend": (dict(backend="cuda"), "choose one of auto"),
}  # fmt: skip


@pytest.mark.parametrize("changes, message", BAD_CALLS.values(), ids=BAD_CALLS)
def test_errors_name_the_argument(changes, message):
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**(dict(x=torch.zeros(2, 9, 5), weight=torch.zeros(5, 4)) | changes))


def test_a_back_end_that_cannot_run_says_why():
    with pytest.raises(RuntimeError, match="it runs on a GPU"):
        causal_conv1d(torch.zeros(1, 3, 2), torch.zeros(2, 2), backend="triton")
    with pytest.raises(ValueError, match="no backend='c'"):
        causal_conv1d(torch.zeros(1, 3, 2), torch.zeros(2, 2), backend="c")


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, float]]:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.kernels.interpreted_conv1d"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


# The interpreter rounds to bfloat16 towards zero: twice the rounding of a GPU.
INTERPRETER_TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("name", interpreted.CASES)
def test_kernels_in_the_interpreter(errors, name):
    case = interpreted.CASES[name]
    expected = {"y", "final_state"}
    expected |= {f"grad_{n}" for n, t in zip(interpreted.NAMES, case.inputs(), strict=True) if t is not None}
    assert set(errors[name]) == expected
    assert not {n: e for n, e in errors[name].items() if not e <= INTERPRETER_TOLERANCE[case.dtype]}


def test_kernels_give_the_same_gradients_alone(errors):
    assert set(errors["only_needed"]) == set(interpreted.NAMES)
    assert not any(errors["only_needed"].values())


GPU_CASES = {
    **{name: CASES[name] for name in ("usual", "shorter_than_the_taps", "frames_in_place", "bare")},
    "many_chunks": Case((2, 2049, 200)),
    "many_chunks_backwards": Case((1, 5000, 70), reverse=True),
    "temporal": Case((3, 16, 20, 20, 64)),
    "many_short_sequences": Case((3000, 5, 40), width=3),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", GPU_CASES.values(), ids=GPU_CASES)
def test_on_the_gpu(case, dtype):
    given = case.inputs(dtype, "cuda")
    wide = tuple(None if t is None else t.detach().double().requires_grad_() for t in given)
    got = outputs_and_gradients(case.function("triton"), given)
    again = outputs_and_gradients(case.function("triton"), given)
    want = outputs_and_gradients(case.function("torch"), wide)
    for name, g, a, w in zip(NAMES, got, again, want, strict=True):
        if w is not None and g is not None and a is not None:
            assert_close(name, g, w, TOLERANCE[dtype])
            assert torch.equal(g, a), f"{name} differs between two runs"


@pytest.mark.gpu
def test_a_slice_is_not_copied_on_the_gpu():
    wide = torch.randn(4, 4096, 2 * 512, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(512, 4, device="cuda")
    want = causal_conv1d(wide[..., 512:].contiguous(), weight)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got = causal_conv1d(wide[..., 512:], weight)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 1.1 * got.nbytes
    assert torch.equal(got, want)


@pytest.mark.gpu
def test_a_cuda_graph_replays_forward_and_backward():
    x, weight, bias, start = (t.detach().requires_grad_() for t in Case((2, 300, 64)).inputs(torch.float32, "cuda"))

    def step():
        y, final = Case().function("triton")(x, weight, bias, start)
        return (y, final, *torch.autograd.grad(y.square().sum() + final.sum(), (x, weight, bias, start)))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    for name, g, w in zip(NAMES, captured, step(), strict=True):
        assert torch.equal(g, w), name


@pytest.mark.gpu
def test_more_than_two_billion_elements_on_the_gpu():
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    length = (1 << 31) // 128 + 1000
    x = torch.zeros(1, length, 128, device="cuda", dtype=torch.bfloat16)
    x[:, -2000:] = torch.randn(1, 2000, 128, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(128, 4, device="cuda")
    y = causal_conv1d(x, weight, backend="triton")
    assert_close("tail", y[:, -1900:], causal_conv1d(x[:, -2000:], weight, backend="torch")[:, 100:], 5e-3)
    assert not y[:, :-2000].any()
