"""The scan in standard operators: its values, that it traces with free sizes, and what of it ends up in ONNX."""

import pytest
import torch
from torch.fx.experimental import _config as shape_config

import kernels
from kernels.selective_scan.export_path import _NO_STEP, _connect, _softplus, _softplus_for_torch, active, export_mode
from kernels.testing import TOLERANCE, assert_close
from tests.kernels.scan_cases import CASES_1D, CASES_2D, Case1D, Case2D, widened

ALL = {**{f"1d_{k}": v for k, v in CASES_1D.items()}, **{f"2d_{k}": v for k, v in CASES_2D.items()}}


@torch.no_grad()
def compare(case, dtype, *, unrolled=False):
    inputs = case.inputs(dtype)
    with export_mode(unrolled=unrolled):
        got = case.function("auto")(*inputs)
    want = case.function("reference")(*widened(inputs))
    for name, g, w in zip(("y", "final_state"), got, want, strict=True):
        assert_close(name, g, w, TOLERANCE[dtype])
    assert got[0].dtype == dtype


@pytest.mark.parametrize("case", list(ALL.values()), ids=list(ALL))
def test_matches_reference(case):
    torch._dynamo.reset()
    compare(case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes(dtype):
    torch._dynamo.reset()
    compare(CASES_2D["odd"], dtype)


@pytest.mark.parametrize("case", list(ALL.values()), ids=list(ALL))
def test_unrolled_matches_reference(case):
    torch._dynamo.reset()
    compare(case, torch.float32, unrolled=True)


@pytest.mark.parametrize(("channels", "paired"), [(2, 5), (64, 2), (256, 0)])
def test_unrolled_takes_small_positions_in_pairs(channels, paired):
    """64 positions: an operator each where they are large enough, else each 2nd, 4th, ...; a halving takes three."""
    decays, states, start = (
        torch.rand(64, 1, 4, 1, 16, channels),
        torch.randn(64, 1, 4, 1, 16, channels),
        torch.ones(()),
    )
    want, h = [], start
    for decay, state in zip(decays, states, strict=True):
        h = state + decay * h
        want.append(h)
    with torch.profiler.profile() as profile:
        _connect(decays, states, start.expand(states.shape[1:]))
    (row,) = [row for row in profile.key_averages() if row.key == "aten::addcmul_"]
    assert row.count == 64 // 2**paired + 3 * paired
    assert_close("states", states, torch.stack(want), 1e-6)


@pytest.mark.parametrize("unrolled", [False, True])
def test_positions_that_fill_a_block_change_no_state(unrolled):
    """Step sizes are used as they are, with their bias, so that what is filled up must not get the bias."""
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(2)
    u, delta, B = (torch.rand(2, 37, 3, generator=generator) for _ in range(3))
    A, bias = -torch.rand(3, 3, generator=generator), torch.rand(3, generator=generator)
    with torch.no_grad(), export_mode(unrolled=unrolled):
        got = kernels.selective_scan(u, delta, A, B, B, delta_bias=bias, return_final_state=True)
    want = kernels.selective_scan(u, delta, A, B, B, delta_bias=bias, return_final_state=True, backend="reference")
    for name, g, w in zip(("y", "final_state"), got, want, strict=True):
        assert_close(name, g, w, 1e-5)


def test_mode_ends_even_after_an_error():
    def fail():
        with export_mode():
            assert active()
            raise KeyError

    assert not active()
    with pytest.raises(KeyError):
        fail()
    assert not active()


def test_softplus_keeps_small_step_sizes_exact():
    x = torch.linspace(-40, 40, 20001)
    want = torch.nn.functional.softplus(x.double(), threshold=100)
    for form in (_softplus, _softplus_for_torch):
        assert ((form(x) - want).abs() / want).max() < 2e-6
        assert form(torch.tensor([-200.0, 200.0, _NO_STEP])).tolist() == [0.0, 200.0, 0.0]


class Image(torch.nn.Module):
    """A four-direction scan whose map is the only input, as in a network."""

    def __init__(self, channels=6, state=5, rank=2):
        super().__init__()
        case = Case2D((1, 1, 1, channels), state=state, rank=rank)
        _, _, A, _, _, D, weight, bias, _ = case.inputs(torch.float32)
        self.parts = (rank, state, state)
        generator = torch.Generator().manual_seed(3)
        self.register_buffer("mix", torch.randn(channels, 4 * sum(self.parts), generator=generator) * 0.5)
        for name, value in zip(("A", "D", "weight", "bias"), (A, D, weight, bias), strict=True):
            self.register_parameter(name, torch.nn.Parameter(value.detach(), requires_grad=False))

    def forward(self, x):
        delta, B, C = (x @ self.mix).unflatten(-1, (4, sum(self.parts))).split(self.parts, dim=-1)
        return kernels.selective_scan_2d(
            x, delta, self.A, B, C, self.D, delta_weight=self.weight, delta_bias=self.bias, softplus=True
        )


def trace(module, example, sizes, *, unrolled=False):
    with torch.no_grad(), export_mode(unrolled=unrolled), shape_config.patch(backed_size_oblivious=True):
        return torch.export.export(
            module, (example,), dynamic_shapes=(sizes,), strict=False, prefer_deferred_runtime_asserts_over_guards=True
        )


IMAGE_SIZES = {i: torch.export.Dim(name, min=1, max=4096) for i, name in enumerate(("batch", "height", "width"))}


@pytest.fixture(scope="module")
def traced_image():
    module = Image()
    return module, trace(module, torch.zeros(2, 5, 7, 6), IMAGE_SIZES)


SHAPES = [(1, 1, 1), (1, 4, 4), (3, 1, 9), (1, 20, 13), (2, 16, 2)]


def test_traced_image_has_free_sizes(traced_image):
    module, program = traced_image
    for batch, height, width in SHAPES:
        x = torch.randn(batch, height, width, 6)
        assert_close(str(x.shape), program.module()(x), module(x), 1e-5)


def test_traced_graph_holds_standard_operators_only(traced_image):
    _, program = traced_image
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    assert len(graphs) == 3  # two loops
    targets = [node.target for graph in graphs for node in graph.nodes]
    assert {t.namespace for t in targets if isinstance(t, torch._ops.OpOverload)} == {"aten"}
    assert torch.ops.higher_order.scan in targets


def test_unrolled_trace_has_free_sizes_and_survives_a_file(tmp_path):
    module = Image()
    program = trace(module, torch.zeros(2, 5, 7, 6), IMAGE_SIZES, unrolled=True)
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    assert len(graphs) == 2  # one loop, over blocks
    targets = [node.target for graph in graphs for node in graph.nodes]
    assert {t.namespace for t in targets if isinstance(t, torch._ops.OpOverload)} == {"aten"}
    torch.export.save(program, tmp_path / "scan.pt2")
    loaded = torch.export.load(tmp_path / "scan.pt2").module()
    for batch, height, width in SHAPES:
        x = torch.randn(batch, height, width, 6)
        assert_close(str(x.shape), loaded(x), module(x), 1e-5)


def test_onnx_matches_torch_at_other_sizes(traced_image, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module, program = traced_image
    torch.onnx.export(program, input_names=["x"], dynamo=True, optimize=False, verbose=False).save(tmp_path / "s.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "s.onnx", providers=["CPUExecutionProvider"])
    for batch, height, width in SHAPES:
        x = torch.randn(batch, height, width, 6)
        got = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
        assert_close(str(x.shape), got, module(x), 1e-5)


class Sequence(torch.nn.Module):
    """A grouped, reversed, gated 1-D scan from a given state, with its final state."""

    def __init__(self):
        super().__init__()
        self.case = Case1D((2, 5, 6), state=4, groups=2, reverse=True)
        self.parameters_of = [None if t is None else t.detach() for t in self.case.inputs(torch.float32)]

    def forward(self, u):
        _, _, A, _, _, D, _, bias, _, state = self.parameters_of
        B = u[..., :4].unsqueeze(-2) * torch.tensor([[1.0], [-0.5]])
        return self.case.function("auto")(u, u.sin(), A, B, B.cos(), D, None, bias, u + 1, state)


def test_traced_sequence_has_free_length():
    module = Sequence()
    program = trace(module, torch.zeros(2, 5, 6), {1: torch.export.Dim("length", min=1, max=4096)})
    for length in (1, 5, 32, 77):
        u = torch.randn(2, length, 6)
        for name, got, want in zip(("y", "state"), program.module()(u), module(u), strict=True):
            assert_close(f"{name} of {length}", got, want, 1e-5)


@pytest.mark.parametrize("unrolled", [False, True])
def test_long_sequences_stay_finite(unrolled):
    """Strong decay over 2000 steps: products of decays underflow, which must not matter."""
    torch._dynamo.reset()
    u = torch.ones(1, 2000, 2)
    A = torch.tensor([[-1.0, -20.0], [-50.0, -0.01]])
    B = torch.ones(1, 2000, 2)
    with torch.no_grad(), export_mode(unrolled=unrolled):
        got = kernels.selective_scan(u, u, A, B, B)
    assert_close("y", got, kernels.selective_scan(u, u, A, B, B, backend="reference"), 1e-5)
