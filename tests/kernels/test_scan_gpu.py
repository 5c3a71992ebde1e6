"""The selective scan on a GPU: graphs, compilation, addresses beyond 32 bits, memory, determinism, long sequences.

Small odd sizes of every feature are in test_selective_scan.py; here are the properties that only a GPU has or that need
large tensors. Truth is the torch back end in float64.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kernels
from kernels.testing import TOLERANCE, assert_close, relative_rms

pytestmark = pytest.mark.gpu

ALL = ("rows", "columns", "rows_reversed", "columns_reversed")
Problem = dict[str, Tensor]


def line_problem(
    shape: tuple[int, ...], *, states: int = 16, rank: int = 0, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Problem:
    """Arguments of `selective_scan` for u of `shape` (..., channels); rank 0: a delta for every channel."""
    draw = _drawer(seed)
    lead, channels = shape[:-1], shape[-1]
    found = {
        "u": draw(*shape, dtype=dtype), "delta": draw(*lead, rank or channels, dtype=dtype),
        "A": -0.5 - draw(channels, states).abs(), "B": draw(*lead, states, dtype=dtype),
        "C": draw(*lead, states, dtype=dtype), "D": draw(channels), "delta_bias": draw(channels) - 4,
    }  # fmt: skip
    return found | ({"delta_weight": draw(channels, rank) * rank**-0.5} if rank else {})


def image_problem(
    shape: tuple[int, int, int, int], *, states: int = 16, rank: int = 2, directions: int = 4,
    dtype: torch.dtype = torch.float32, seed: int = 0,
) -> Problem:  # fmt: skip
    """Arguments of `selective_scan_2d` for x of `shape`; delta, B and C are slices of one projection."""
    draw = _drawer(seed)
    lead, channels = (*shape[:3], directions), shape[3]
    columns = [rank, states, states]
    delta, b, c = draw(*lead, sum(columns), dtype=dtype).split(columns, dim=-1)
    return {
        "x": draw(*shape, dtype=dtype), "delta": delta, "A": -0.5 - draw(directions, channels, states).abs(), "B": b,
        "C": c, "D": draw(directions, channels), "delta_weight": draw(directions, channels, rank) * rank**-0.5,
        "delta_bias": draw(directions, channels) - 4,
    }  # fmt: skip


def _drawer(seed: int) -> Callable[..., Tensor]:
    rng = torch.Generator("cuda").manual_seed(seed)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=rng, device="cuda", dtype=dtype)

    return draw


def scan(problem: Problem, **options) -> Tensor:
    """`selective_scan` or `selective_scan_2d`, by what the problem holds."""
    options = {"softplus": True, "backend": "triton"} | options
    return (kernels.selective_scan if "u" in problem else kernels.selective_scan_2d)(**problem, **options)


def leaves(problem: Problem, dtype: torch.dtype | None = None) -> Problem:
    """Copies that require gradients, in another dtype if one is given; slices stay slices."""
    return {name: (t if dtype is None else t.to(dtype)).detach().requires_grad_() for name, t in problem.items()}


def gradients(problem: Problem, loss: Callable[[Problem], Tensor]) -> dict[str, Tensor]:
    """Gradient of a loss for every tensor of the problem, by name."""
    return dict(zip(problem, torch.autograd.grad(loss(problem), list(problem.values())), strict=True))


def weighted(y: Tensor) -> Tensor:
    """A loss whose gradient is no constant."""
    return (y.double() * torch.arange(y.numel(), device=y.device, dtype=torch.float64).cos().view(y.shape)).sum()


def extra_memory(function: Callable[[], object]) -> int:
    """Peak bytes of one call above what is allocated before it; the kernels have been compiled by a call before."""
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


PROBLEMS = {
    "sequence": lambda seed=0: line_problem((2, 517, 70), seed=seed),
    "frames_in_place": lambda seed=0: line_problem((2, 16, 9, 11, 40), rank=2, seed=seed),
    "image": lambda seed=0: image_problem((2, 33, 41, 70), seed=seed),
}


@pytest.mark.parametrize("make", PROBLEMS.values(), ids=PROBLEMS)
def test_cuda_graph_of_forward_and_backward(make):
    given = leaves(make())
    grad = torch.randn_like(next(iter(given.values())))

    def step() -> list[Tensor]:
        y = scan(given)
        return [y.detach(), *torch.autograd.grad(y, list(given.values()), grad)]

    graph, got = capture(step)
    with torch.no_grad():
        for mine, other in zip(given.values(), make(seed=1).values(), strict=True):
            mine.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    for name, g, w in zip(("y", *given), got, step(), strict=True):
        assert torch.equal(g, w), name


def test_cuda_graph_with_states():
    """Frame after frame through one captured graph equals the sequence at once."""
    whole = line_problem((2, 60, 40))
    piece = {n: t[:, :20].clone() if n in ("u", "delta", "B", "C") else t for n, t in whole.items()}
    state = torch.zeros(2, 40, 16, device="cuda")
    graph, (y, final) = capture(lambda: scan(piece, initial_state=state, return_final_state=True))
    found = []
    for start in range(0, 60, 20):
        for name in ("u", "delta", "B", "C"):
            piece[name].copy_(whole[name][:, start : start + 20])
        graph.replay()
        found.append(y.clone())
        state.copy_(final)
    want_y, want_state = scan(whole, return_final_state=True)
    assert_close("y", torch.cat(found, dim=1), want_y, 1e-5)
    assert_close("state", state, want_state, 1e-5)


def capture(step: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, object]:
    """A CUDA graph of `step` and the tensors that its replay fills; compiled and warmed on a side stream first."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


@pytest.mark.parametrize("name", ["sequence", "image"])
def test_torch_compile_in_one_graph(name):
    problem = PROBLEMS[name]()
    first = next(iter(problem))

    def block(given: Problem) -> Tensor:
        return scan(given | {first: given[first] * 2}).tanh()

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True)
    got, want = (gradients(leaves(problem), lambda p, f=f: weighted(f(p))) for f in (compiled, block))
    assert_close("y", compiled(problem), block(problem), 1e-5)
    for tensor in want:
        assert_close(f"d{tensor}", got[tensor], want[tensor], 1e-5)


needs_room = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 60 << 30,
    reason="needs a GPU with 60 GB",
)


few_states = pytest.mark.parametrize("states", [1, 4])  # a kernel of its own takes one state, another one more


@few_states
@needs_room
def test_addresses_beyond_32_bits_in_lines(states):
    """u has more than 2^31 elements; the last sequences, by themselves, give the same result and gradients."""
    frames, sequences, channels = 5, 6_720_000, 64
    assert frames * sequences * channels > 2**31
    problem = line_problem((1, frames, sequences, channels), states=states, rank=1, dtype=torch.bfloat16)
    tail = {n: t[:, :, -9:].clone() if n in ("u", "delta", "B", "C") else t for n, t in problem.items()}
    y, final = scan(problem, return_final_state=True)
    want_y, want_final = scan(tail, return_final_state=True)
    assert_close("y", y[:, :, -9:], want_y, TOLERANCE[torch.bfloat16])
    assert_close("final", final[:, -9:], want_final, 1e-5)
    del y, final, want_y, want_final
    wanted = {n: problem[n].requires_grad_() for n in ("u", "delta", "B")}
    got = gradients(wanted, lambda p: scan(problem | p)[:, :, -9:].float().sum())
    want = gradients(leaves(tail), lambda p: scan(p).float().sum())
    for name, tensor in got.items():
        assert_close(f"d{name}", tensor[:, :, -9:], want[name], TOLERANCE[torch.bfloat16])


@few_states
@needs_room
def test_addresses_beyond_32_bits_in_an_image(states):
    """The last rows of an image of more than 2^31 elements, whose states have forgotten everything above them."""
    height, width, channels = 8200, 4096, 64
    assert height * width * channels > 2**31
    directions = ("rows", "columns", "rows_reversed")
    problem = image_problem((1, height, width, channels), states=states, rank=1, directions=3, dtype=torch.bfloat16)
    problem["delta_bias"] = torch.full_like(problem["delta_bias"], 2.0)  # steps of about 2: exp(-1) per pixel at most
    bottom = {n: t[:, -200:].clone() if n in ("x", "delta", "B", "C") else t for n, t in problem.items()}
    y = scan(problem, directions=directions)[:, -8:].clone()
    assert_close("y", y, scan(bottom, directions=directions)[:, -8:], TOLERANCE[torch.bfloat16])
    wanted = {"x": problem["x"].requires_grad_()}
    got = gradients(wanted, lambda p: scan(problem | p, directions=directions)[:, -8:].float().sum())["x"]
    want = gradients(leaves(bottom), lambda p: scan(p, directions=directions)[:, -8:].float().sum())["x"]
    assert_close("dx", got[:, -8:], want[:, -8:], TOLERANCE[torch.bfloat16])


@few_states
def test_forward_of_one_direction_holds_no_copy_of_x(states):
    for problem in (
        image_problem((1, 256, 512, 256), states=states, directions=1, dtype=torch.bfloat16),
        line_problem((2, 16384, 512), states=states, rank=2, dtype=torch.bfloat16),
        line_problem((1, 64, 64, 32, 512), states=states, rank=2, dtype=torch.bfloat16),
    ):
        options = {"directions": ("columns",)} if "x" in problem else {}
        size = problem["x" if "x" in problem else "u"].nbytes
        with torch.no_grad():
            extra = extra_memory(lambda p=problem, o=options: scan(p, **o)) / size
        assert extra < 1.6, f"{extra:.2f} times x, of which 1 is the result"


@few_states
def test_backward_of_one_direction_holds_no_copy_of_x(states):
    problem = leaves(line_problem((2, 16384, 512), states=states, rank=2, dtype=torch.bfloat16))
    grad = torch.randn_like(problem["u"])
    wanted = list(problem.values())
    extra = extra_memory(lambda: torch.autograd.grad(scan(problem), wanted, grad)) / grad.nbytes
    assert extra < 2.9, f"{extra:.2f} times x, of which 2 are the result and the gradient of x"


@few_states
def test_four_directions_store_no_delta(states):
    """A full delta of four directions is four times x, as are the directions' own results.

    Needed are (in x) 1 the result, 1 the gradient of x, 2 its float32 sum and, with 4 states, 0.5 each the chunk states
    and the adjoint ones, the channel blocks' gradients of B and of C, 0.6 those of the parameters and of delta.
    """
    problem = image_problem((1, 256, 512, 256), states=states, dtype=torch.bfloat16)
    size, grad = problem["x"].nbytes, torch.randn_like(problem["x"])
    with torch.no_grad():
        forward = extra_memory(lambda: scan(problem)) / size
    assert forward < 4, f"forward: {forward:.2f} times x"
    given = leaves(problem)
    both = extra_memory(lambda: torch.autograd.grad(scan(given), list(given.values()), grad)) / size
    assert both < (6 if states == 1 else 7), f"forward + backward: {both:.2f} times x"


def test_memory_of_the_detectors_largest_map():
    """16 maps of 160 x 160 x 64: at most a third of what copies of the four directions take (1213 and 2013 MiB)."""
    problem = image_problem((16, 160, 160, 64), dtype=torch.bfloat16)
    with torch.no_grad():
        forward = extra_memory(lambda: scan(problem)) / 2**20
    given, grad = leaves(problem), torch.randn_like(problem["x"])
    both = extra_memory(lambda: torch.autograd.grad(scan(given), list(given.values()), grad)) / 2**20
    assert forward < 1213 / 3, f"forward {forward:.0f} MiB"
    assert both < 2013 / 3, f"forward + backward {both:.0f} MiB"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", PROBLEMS.values(), ids=PROBLEMS)
def test_the_same_bits_every_time(make, dtype):
    problem = {n: t.to(dtype) if n in ("x", "u", "delta", "B", "C") else t for n, t in make().items()}
    first, *others = (gradients(leaves(problem), lambda p: weighted(scan(p))) for _ in range(4))
    for other in others:
        for name, tensor in first.items():
            assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("make", PROBLEMS.values(), ids=PROBLEMS)
def test_gradients_with_only_the_final_state_in_the_loss(make):
    problem = {n: t for n, t in make().items() if n != "D"}

    def loss(p: Problem, backend: str) -> Tensor:
        return weighted(scan(p | {"C": p["B"].detach()}, return_final_state=True, backend=backend)[1])

    del problem["C"]  # the outputs, and with them C, have no part in the loss
    got = gradients(leaves(problem), lambda p: loss(p, "triton"))
    want = gradients(leaves(problem, torch.float64), lambda p: loss(p, "torch"))
    for name in problem:
        assert_close(f"d{name}", got[name], want[name], 1e-5)


@pytest.mark.parametrize("make", PROBLEMS.values(), ids=PROBLEMS)
def test_gradients_alone_equal_gradients_together(make):
    problem = make()
    together = gradients(leaves(problem), lambda p: weighted(scan(p)))
    for wanted in (("A",), ("D",), ("C",), ("delta", "B"), tuple(problem)[:1]):
        some = {n: t for n, t in leaves(problem).items() if n in wanted}
        alone = gradients(some, lambda p: weighted(scan(problem | p)))
        for name in wanted:
            assert_close(f"d{name} alone", alone[name], together[name], 1e-6)


def test_a_gradient_that_nobody_wants_takes_no_memory():
    problem = line_problem((2, 16384, 512), states=1, rank=2, dtype=torch.bfloat16)
    wanted = problem["D"].requires_grad_()
    grad = torch.randn_like(problem["u"])
    extra = extra_memory(lambda: torch.autograd.grad(scan(problem), wanted, grad)) / grad.nbytes
    assert extra < 1.75, f"{extra:.2f} times u, of which 1 is the result"


def test_opcheck():
    """Schema, fake kernel and autograd of the operator with tensors on a GPU; none of the shapes fits a tile."""
    given = leaves(image_problem((1, 5, 7, 6), states=3))
    tensors = (
        given["x"], given["delta"], given["A"], given["B"].unsqueeze(4), given["C"].unsqueeze(4), given["D"],
        given["delta_weight"], given["delta_bias"], None, None,
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.vision_ssm.selective_scan.default, (*tensors, [0, 1, 2, 3], True, True, True, True, "triton")
    )


LONG = {
    "sequence": lambda dtype: line_problem((1, 65536, 40), dtype=dtype),
    "image": lambda dtype: image_problem((1, 256, 256, 40), dtype=dtype),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", LONG.values(), ids=LONG)
def test_accuracy_over_65536_positions(make, dtype):
    problem = make(dtype)
    compare_with_float64(problem, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slow_decays_over_65536_positions(dtype):
    """The state nearly sums its inputs, delta |A| about 1e-5: here 65,536 rounding errors add up."""
    problem = line_problem((1, 65536, 40), dtype=dtype)
    problem["A"] *= 1e-3
    compare_with_float64(problem, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", LONG.values(), ids=LONG)
def test_steps_of_fifty_stay_finite_and_right(make, dtype):
    problem = make(dtype)
    if "delta_weight" in problem:
        problem["delta_bias"] = torch.linspace(0, 50, problem["delta_bias"].numel(), device="cuda").view(4, -1)
    else:
        problem["delta"] = torch.linspace(0, 50, problem["delta"].numel(), device="cuda").view_as(problem["delta"])
        problem["delta"] = problem["delta"].to(dtype)
        problem["delta_bias"] = torch.zeros_like(problem["delta_bias"])
    compare_with_float64(problem, TOLERANCE[dtype])


def compare_with_float64(problem: Problem, bound: float) -> None:
    """Output and every gradient within `bound` (relative RMS), and finite."""

    def run(p: Problem, backend: str) -> dict[str, Tensor]:
        y = scan(p, backend=backend)
        grad = torch.arange(y.numel(), device="cuda").cos().view(y.shape).to(first.dtype).to(y.dtype)
        return {"y": y.detach()} | dict(zip(p, torch.autograd.grad(y, list(p.values()), grad), strict=True))

    first = next(iter(problem.values()))
    got, want = run(leaves(problem), "triton"), run(leaves(problem, torch.float64), "torch")
    assert all(t.isfinite().all() for t in got.values())
    wrong = {name: e for name in want if not (e := relative_rms(got[name], want[name])) <= bound}
    assert not wrong
