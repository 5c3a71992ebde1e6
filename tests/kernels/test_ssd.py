"""SSD: every back end of this machine against the reference; the operator's contract."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.ssd import op, torch_path
from kernels.testing import TOLERANCE, assert_close, run_with_grads
from tests.kernels.ssd_cases import ALL_DIRECTIONS, CASES, NAMES, Case, bidirectional_inputs, widened


def compare(case: Case, backend: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Outputs and every gradient of `backend` against the float64 reference on the same values.

    On a GPU half-precision operands are rounded inside, so the few sums over all positions, which may cancel, get twice
    the tolerance.
    """
    inputs = case.inputs(dtype)
    on_device = tuple(None if t is None else t.detach().to(device).requires_grad_() for t in inputs)
    got = run_with_grads(case.function(backend), *on_device)
    want = run_with_grads(case.function("reference"), *widened(inputs))
    for name, g, w in zip(("y", "final_state", *NAMES), got, want, strict=True):
        assert (g is None) == (w is None), name
        if g is not None:
            twice = device == "cuda" and dtype.itemsize == 2 and name in ("A", "dt_bias")
            assert_close(f"{backend} {name}", g, w, TOLERANCE[dtype] * (2 if twice else 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_reference(case, dtype):
    compare(case, "torch", dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    compare(CASES["odd"], "torch", dtype)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    lead=st.tuples(*[st.integers(1, 3), st.integers(1, 40), st.integers(1, 3)]), groups=st.integers(1, 3),
    state=st.integers(1, 18), head_dim=st.integers(1, 9), chunk=st.integers(1, 50), reverse=st.booleans(),
)  # fmt: skip
def test_any_sequence(lead, groups, state, head_dim, chunk, reverse):
    compare(Case(lead, 2 * groups, head_dim, groups, state, chunk, reverse=reverse), "torch", torch.float32)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    lead=st.tuples(*[st.integers(1, 2), st.integers(1, 7), st.integers(1, 7)]), merge=st.sampled_from(["sum", "none"]),
    directions=st.sets(st.sampled_from(ALL_DIRECTIONS), min_size=1), chunk=st.integers(1, 20),
)  # fmt: skip
def test_any_image(lead, merge, directions, chunk):
    case = Case(lead, heads=2, groups=1, chunk=chunk, directions=tuple(sorted(directions)), merge=merge)
    compare(case, "torch", torch.float32)


def test_reference_of_one_step_by_hand():
    """h = exp(dt A) h0 + dt x B^T, y = h C + D x."""
    x, dt, A, B, C, D, _, start = dataclasses.replace(CASES["one_position"], softplus=False).inputs(torch.float64)
    y, final = op.ssd(x, dt, A, B, C, D, initial_state=start, return_final_state=True, backend="reference")
    h = (dt * A).exp() * start.flatten() + dt * x.flatten() * B.flatten()
    assert_close("state", final.flatten(), h.flatten(), 1e-15)
    assert_close("y", y.flatten(), (h * C.flatten() + D * x.flatten()).flatten(), 1e-15)


def test_gradcheck():
    case = Case((1, 5), heads=2, head_dim=2, groups=1, state=2, chunk=2)
    assert torch.autograd.gradcheck(case.function("torch"), case.inputs(torch.float64))


@pytest.mark.parametrize("reverse", [False, True])
def test_halves_with_a_handed_over_state_equal_the_whole(reverse):
    case = Case((2, 37), reverse=reverse, chunk=8)
    x, dt, A, B, C, D, bias, start = (t.detach() for t in case.inputs(torch.float64))
    run = case.function("torch")
    whole, final = run(x, dt, A, B, C, D, bias, start)
    halves, state, parts = (slice(0, 20), slice(20, 37)), start, {}
    for i in (1, 0) if reverse else (0, 1):
        s = halves[i]
        parts[i], state = run(x[:, s], dt[:, s], A, B[:, s], C[:, s], D, bias, state)
    assert_close("y", torch.cat([parts[0], parts[1]], dim=1), whole, 1e-12)
    assert_close("state", state, final, 1e-12)


@pytest.mark.parametrize("directions", [("rows", "rows_reversed"), ("columns", "columns_reversed")], ids="-".join)
def test_strips_of_an_image_continue_exactly(directions):
    case = Case((1, 6, 4), heads=2, groups=1, directions=directions, merge="none")
    x, dt, A, B, C, D, bias, start = (t.detach() for t in case.inputs(torch.float64))
    whole, final = case.function("torch")(x, dt, A, B, C, D, bias, start)
    axis = 1 if directions[0] == "rows" else 2
    for k, order in enumerate([(0, 1), (1, 0)]):
        one, state, got = dataclasses.replace(case, directions=(directions[k],)), start[:, k : k + 1], [None, None]
        for i in order:
            xs, *of_k = (t.chunk(2, dim=axis)[i] for t in (x, dt, B, C))
            dts, bs, cs = (t[:, :, :, k : k + 1] for t in of_k)
            a, d, biases = (t[k : k + 1] for t in (A, D, bias))
            got[i], state = one.function("torch")(xs, dts, a, bs, cs, d, biases, state)
        assert_close(f"y {directions[k]}", torch.cat(got, dim=axis)[:, :, :, 0], whole[:, :, :, k], 1e-12)
        assert_close(f"state {directions[k]}", state[:, 0], final[:, k], 1e-12)


def test_equals_the_selective_scan_of_equal_decays():
    """A head whose channels share A and dt is a selective scan (S6) with that A in every state."""
    from kernels import selective_scan

    x, dt, A, B, C, D, bias, _ = Case((2, 21), groups=1).inputs(torch.float64)
    y = op.ssd(x, dt, A, B, C, D, dt_bias=bias, softplus=True, backend="torch")
    u = x.flatten(2)
    wide = [t.repeat_interleave(x.shape[-1], dim=-1) for t in (dt, A, D, bias)]
    s6 = selective_scan(
        u, wide[0], wide[1][:, None].expand(-1, B.shape[-1]), B, C, wide[2], delta_bias=wide[3], softplus=True,
        backend="torch",
    )  # fmt: skip
    assert_close("y", y.flatten(2), s6, 1e-12)


def test_bidirectional_counts_every_pair_once():
    x, dt, A, B, C, D, bias = bidirectional_inputs(9, torch.float64)
    y = op.ssd_bidirectional(x, dt, A, B, C, D, dt_bias=bias, softplus=True, chunk=4, backend="torch")
    both = [
        op.ssd(x, dt[:, :, k], A[k], B[:, :, k], C[:, :, k], dt_bias=bias[k], softplus=True, reverse=k == 1,
               backend="reference")
        for k in (0, 1)
    ]  # fmt: skip
    steps = torch.nn.functional.softplus(dt[:, :, 1] + bias[1])
    products = (C[:, :, 1] * B[:, :, 1]).sum(-1)  # (batch, length, 1 group)
    diagonal = (steps * products)[..., None] * x
    assert_close("y", y, both[0] + both[1] - diagonal + D[:, None] * x, 1e-12)


def test_bidirectional_gradients():
    inputs = bidirectional_inputs(9, torch.float64)

    def run(backend):
        return lambda x, dt, A, B, C, D, bias: op.ssd_bidirectional(
            x, dt, A, B, C, D, dt_bias=bias, softplus=True, chunk=4, backend=backend
        )

    got, want = run_with_grads(run("torch"), *inputs), run_with_grads(run("reference"), *inputs)
    for name, g, w in zip(("y", *NAMES), got, want, strict=False):
        assert_close(name, g, w, 1e-12)


@pytest.mark.parametrize("lead", [(2, 11), (2, 3, 4)], ids=["sequence", "image"])
def test_noncausal_is_one_weighted_sum(lead):
    x, dt, A, B, C, D, bias, _ = Case(lead).inputs(torch.float64)
    y = op.ssd_noncausal(x, dt, A, B, C, D, dt_bias=bias, softplus=True)
    m = torch.nn.functional.softplus(dt + bias) * A.abs()
    b, c = (t.repeat_interleave(2, dim=-2).flatten(1, -3) for t in (B, C))
    u = x.flatten(1, -3)
    h = torch.einsum("ble,blen,blep->benp", m.flatten(1, -2), b, u)
    want = torch.einsum("blen,benp->blep", c, h) + D[:, None] * u
    assert_close("y", y, want.reshape(x.shape), 1e-13)
    if len(lead) == 2:
        order = torch.randperm(lead[1], generator=torch.Generator().manual_seed(1))
        turned = op.ssd_noncausal(
            x[:, order], dt[:, order], A, B[:, order], C[:, order], D, dt_bias=bias, softplus=True
        )  # fmt: skip
        assert_close("permuted", turned, y[:, order], 1e-13)


def test_noncausal_gradients_in_half_precision_come_in_the_inputs_dtype():
    inputs = Case((2, 11)).inputs(torch.bfloat16)[:6]
    y = op.ssd_noncausal(*inputs)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.float().sum(), inputs)
    assert [g.dtype for g in grads] == [t.dtype for t in inputs]


@pytest.mark.parametrize(("length", "chunks"), [(1, (1, 1)), (12, (1, 12)), (65, (2, 33)), (4096, (64, 64))])
def test_chunks_on_the_cpu_are_even(length, chunks):
    assert torch_path._chunks(torch.empty(1, length, 1, 2, 3), (4,), 256) == chunks


@pytest.mark.parametrize("length", [1, 7, 64])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_short_sequence_has_no_states(length, reverse):
    """One chunk that starts from zero and hands nothing on: no state is made or kept for the backward pass."""
    inputs = Case((2, length, 3), heads=4, groups=2, dim=1).inputs(torch.float64)[:6]
    kept = []

    def function(backend):
        return lambda *t: op.ssd(*t, softplus=True, reverse=reverse, backend=backend)

    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        got = run_with_grads(function("torch"), *inputs)
    assert max(kept) == max(t.numel() for t in inputs)
    want = run_with_grads(function("reference"), *widened(inputs))
    for name, g, w in zip(("y", *NAMES[:6]), got, want, strict=True):
        assert_close(name, g, w, 1e-12)


def test_only_the_needed_gradients():
    inputs = CASES["odd"].inputs(torch.float32)
    for wanted in range(len(inputs)):
        mixed = tuple(t.detach().requires_grad_(i == wanted) for i, t in enumerate(inputs))
        y, _ = CASES["odd"].function("torch")(*mixed)
        y.sum().backward()
        assert [t.grad is not None for t in mixed] == [i == wanted for i in range(len(mixed))]


def test_gradients_with_only_the_final_state_in_the_loss():
    case, results = CASES["time_in_place"], []
    for name, inputs in (("torch", case.inputs(torch.float32)), ("reference", widened(case.inputs(torch.float32)))):
        _, final = case.function(name)(*inputs)
        final.square().sum().backward()
        results.append([t.grad for t in inputs])
    for name, got, want in zip(NAMES, *results, strict=True):
        if want is None or not want.any():  # C and D do not reach the state
            assert name in ("C", "D")
            assert got is None or not got.any()
        else:
            assert_close(name, got, want, 1e-5)


def test_bit_for_bit_deterministic():
    first, second = (
        run_with_grads(CASES["image"].function("torch"), *CASES["image"].inputs(torch.float32)) for _ in "ab"
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_changes_nothing():
    case = CASES["odd"]
    want = run_with_grads(case.function("torch"), *case.inputs(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        got = run_with_grads(case.function("torch"), *case.inputs(torch.float32))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_large_steps_stay_finite():
    inputs = [t.detach() for t in Case((1, 70), softplus=False).inputs(torch.float32)]
    inputs[1] = torch.full_like(inputs[1], 50.0)
    y, final = Case((1, 70), softplus=False, chunk=64).function("torch")(*(t.requires_grad_() for t in inputs))
    assert y.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum() + final.sum(), inputs))


class _Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps the arguments with which the canonical operator is called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.vision_ssm.ssd.default:
            self.seen.append(
                tuple(a.detach().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in args)
            )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["reversed", "image"])
def test_opcheck(name):
    with _Recorder() as mode:
        CASES[name].function("torch")(*CASES[name].inputs(torch.float32))
    torch.library.opcheck(torch.ops.vision_ssm.ssd.default, mode.seen[0])


@pytest.mark.parametrize("name", ["time_in_place", "image"])
def test_compiles_into_one_graph_with_gradients(name):
    case = CASES[name]
    compiled = torch.compile(case.function("auto"), fullgraph=True, backend="aot_eager")
    inputs = case.inputs(torch.float32)
    got, want = run_with_grads(compiled, *inputs), run_with_grads(case.function("auto"), *inputs)
    for label, g, w in zip(("y", "final_state", *NAMES), got, want, strict=True):
        assert_close(label, g, w, 1e-6)


def test_exports():
    class Layer(torch.nn.Module):
        def forward(self, x, dt, A, B, C):
            return op.ssd(x, dt, A, B, C, backend="torch")

    inputs = tuple(t.detach() for t in CASES["odd"].inputs(torch.float32)[:5])
    program = torch.export.export(Layer(), inputs)
    assert_close("y", program.module()(*inputs), Layer()(*inputs), 1e-7)


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
def test_shapes_on_the_meta_device(backend):
    x, dt, A, B, C, D, bias, start = (t.detach().to("meta") for t in CASES["time_in_place"].inputs(torch.float32))
    y, final = CASES["time_in_place"].function(backend)(x, dt, A, B, C, D, bias, start)
    assert (y.shape, final.shape) == (x.shape, start.shape)


def test_second_derivatives_are_refused_clearly():
    x, *rest = CASES["odd"].inputs(torch.float32)
    y, _ = CASES["odd"].function("torch")(x, *rest)
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives exist only in the reference"):
        g.sum().backward()


ZEROS = torch.zeros
BAD_CALLS = {
    "axes": (dict(x=ZEROS(4, 3)), r"x: got shape \(4, 3\), expected at least \(length, heads, head_dim\)"),
    "dt": (dict(dt=ZEROS(2, 7, 3)), r"dt: got shape \(2, 7, 3\), expected x.s leading axes and \(heads\) = "),
    "A": (dict(A=ZEROS(4, 5)), r"A: got shape \(4, 5\), expected \(heads\)"),
    "no groups": (dict(B=ZEROS(2, 7, 5)), r"B: got shape \(2, 7, 5\).*then \(groups, state\)"),
    "groups": (dict(B=ZEROS(2, 7, 3, 5), C=ZEROS(2, 7, 3, 5)), "3 groups for 4 heads, the groups must divide"),
    "state": (dict(B=ZEROS(2, 7, 1, 257), C=ZEROS(2, 7, 1, 257)), "state size of 257"),
    "C": (dict(C=ZEROS(2, 7, 2, 4)), "C: got shape"),
    "D": (dict(D=ZEROS(3)), "D: got shape"),
    "initial_state": (dict(initial_state=ZEROS(2, 4, 5, 3)), "initial_state: got shape"),
    "dtype": (dict(x=ZEROS(2, 7, 4, 3, dtype=torch.int32)), "x: got dtype torch.int32"),
    "A dtype": (dict(A=ZEROS(4, dtype=torch.bfloat16)), "A: got dtype torch.bfloat16, expected torch.float32"),
    "layout": (dict(x=ZEROS(2, 7, 3, 4).transpose(2, 3)), "last axis must be contiguous"),
    "dim": (dict(dim=2), "any axis but the last two"),
    "chunk": (dict(chunk=0), "chunk: got 0"),
    "empty": (dict(x=ZEROS(0, 7, 4, 3), dt=ZEROS(0, 7, 4), B=ZEROS(0, 7, 2, 5), C=ZEROS(0, 7, 2, 5)), "empty"),
    "backend": (dict(backend="cuda"), "choose one of auto"),
    "C back end": (dict(backend="c"), "ssd has no backend=.c."),
}  # fmt: skip


@pytest.mark.parametrize("changes, message", BAD_CALLS.values(), ids=BAD_CALLS)
def test_errors_name_the_argument(changes, message):
    good = dict(x=ZEROS(2, 7, 4, 3), dt=ZEROS(2, 7, 4), A=ZEROS(4), B=ZEROS(2, 7, 2, 5), C=ZEROS(2, 7, 2, 5))
    with pytest.raises(ValueError, match=message):
        op.ssd(**(good | changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(directions="rows"), "directions: got 'rows'"),
        (dict(directions=("rows", "rows")), "expected different ones"),
        (dict(merge="mean"), "merge: got 'mean'"),
        (dict(dt=ZEROS(1, 2, 2, 3, 4)), r"dt: got shape.*directions and \(heads\)"),
    ],
    ids=["one name", "twice", "merge", "directions"],
)
def test_errors_of_an_image(changes, message):
    group = ZEROS(1, 2, 2, 2, 1, 5)
    good = dict(x=ZEROS(1, 2, 2, 4, 3), dt=ZEROS(1, 2, 2, 2, 4), A=ZEROS(2, 4), B=group, C=group)
    with pytest.raises(ValueError, match=message):
        op.ssd_2d(**(good | dict(directions=("rows", "columns")) | changes))


GPU_CASES = {
    "several_chunks": Case((2, 300), heads=4, head_dim=64, groups=1, state=64, chunk=256),
    "odd_everything": Case((2, 130, 3), heads=6, head_dim=40, groups=3, state=20, chunk=256, reverse=True),
    "large_state": Case((1, 150), heads=2, head_dim=70, groups=1, state=200, chunk=256),
    "four_directions": Case((2, 17, 23), heads=4, head_dim=32, groups=1, state=16, chunk=64, directions=ALL_DIRECTIONS),
}
ON_GPU = [(name, torch.bfloat16) for name in GPU_CASES] + [
    ("odd_everything", torch.float32),
    ("odd_everything", torch.float16),
]


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.gpu)])
def test_small_steps_beside_large_ones_keep_their_digits(backend):
    """Sums of decays reach 1e4 within a chunk, where float32 has a spacing of 1e-3; differences of them must not."""
    case = Case((1, 512), heads=2, groups=1, chunk=256, softplus=False)
    given = list(case.inputs(torch.float32))
    given[1] = torch.rand(1, 512, 2, generator=torch.Generator().manual_seed(1)).mul_(50).requires_grad_()
    given[2], given[6] = torch.tensor([-1.0, -16.0], requires_grad=True), None
    device = "cuda" if backend == "triton" else "cpu"
    on_device = [None if t is None else t.detach().to(device).requires_grad_() for t in given]
    got = run_with_grads(case.function(backend), *on_device)
    want = run_with_grads(case.function("reference"), *widened(given))
    for name, g, w in zip(("y", "final_state", *NAMES), got, want, strict=True):
        if g is not None:
            assert_close(f"{backend} {name}", g, w, 2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("name, dtype", ON_GPU, ids=str)
def test_on_the_gpu(name, dtype):
    compare(GPU_CASES[name], "triton", dtype, "cuda")


@pytest.mark.gpu
def test_gradients_on_the_gpu_are_the_same_bit_for_bit():
    case = GPU_CASES["four_directions"]
    inputs = tuple(t.detach().cuda().requires_grad_() for t in case.inputs(torch.bfloat16))
    first, second = (run_with_grads(case.function("triton"), *inputs) for _ in "ab")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_cuda_graph_with_states():
    case = GPU_CASES["several_chunks"]
    inputs = [t.detach().cuda() for t in case.inputs(torch.bfloat16)]
    run = case.function("triton")
    run(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, final = run(*inputs)
    inputs[0].mul_(2)
    graph.replay()
    want_y, want_final = run(*inputs)
    torch.cuda.synchronize()
    assert torch.equal(y, want_y)
    assert torch.equal(final, want_final)


@pytest.mark.gpu
def test_peak_memory_on_the_gpu_holds_no_direction_copies():
    """Four directions keep chunk states (1/4 of x each), steps (1/2), a float32 sum (2); a copy of x would show."""
    case = dataclasses.replace(GPU_CASES["four_directions"], lead=(1, 256, 256))
    inputs = [t.detach().cuda() for t in case.inputs(torch.bfloat16)]
    case.function("triton")(*inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y, _ = case.function("triton")(*inputs)
    extra = torch.cuda.max_memory_allocated() - before - y.nbytes
    assert extra < 4.2 * inputs[0].nbytes, f"{extra / inputs[0].nbytes:.2f} times x beyond the result"


@pytest.mark.gpu
def test_more_elements_than_32_bits_count():
    x = torch.randn(130, 65536, 4, 64, device="cuda", dtype=torch.bfloat16)  # 2.2e9
    rng = torch.Generator("cuda").manual_seed(0)
    dt = torch.rand(1, 65536, 4, device="cuda", generator=rng).expand(130, -1, -1)
    b = torch.randn(1, 65536, 1, 64, device="cuda", generator=rng).bfloat16().expand(130, -1, -1, -1)
    a = torch.full((4,), -0.1, device="cuda")
    y = op.ssd(x, dt, a, b, b, backend="triton")
    assert_close("last sequence", y[-1:], op.ssd(x[-1:], dt[:1], a, b[:1], b[:1], backend="triton"), 5e-3)


@pytest.mark.gpu
def test_blocks_larger_than_the_problem_on_the_gpu():
    compare(CASES["odd"], "triton", torch.float32, "cuda")
