"""S4D: both forms against the complex recurrence, gradients, states handed on, types, compilation, messages."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels.s4d import op, torch_path
from kernels.s4d.op import SHORT, s4d
from kernels.s4d.reference import s4d_reference
from kernels.testing import TOLERANCE, assert_close, run_with_grads

NAMES = ("y", "final_state", "u", "log_dt", "log_A_real", "A_imag", "C", "D", "initial_state")
FORMS = {"convolve": torch_path.convolve, "recur": torch_path.recur}


@dataclass(frozen=True)
class Case:
    """One call in canonical form."""

    length: int = 9
    batch: int = 2
    lines: int = 3
    channels: int = 5
    modes: int = 4
    reverse: bool = False
    extras: bool = True

    def inputs(self, dtype: torch.dtype, device: str | torch.device = "cpu") -> list[Tensor | None]:
        """u, log_dt, log_A_real, A_imag, C, D, initial state: leaves that require gradients.

        Parameters and states are float32 for half-precision u, and start as a trained model's lie: log_dt around -2.5,
        imaginary parts a ladder of pi.
        """
        rng = torch.Generator().manual_seed(0)
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng, dtype=torch.float64)

        ladder = torch.pi * torch.arange(self.modes)
        shape = (self.channels, self.modes)
        u = draw(self.batch, self.length, self.lines, self.channels).to(device, dtype)
        values: list[Tensor | None] = [
            0.5 * draw(self.channels) - 2.5, 0.1 * draw(*shape) - 0.7, ladder + 0.05 * draw(*shape), draw(*shape, 2),
            draw(self.channels) if self.extras else None,
            draw(self.batch, self.lines, *shape, 2) if self.extras else None,
        ]  # fmt: skip
        rest = [None if v is None else v.to(device, wide).requires_grad_() for v in values]
        return [u.requires_grad_(), *rest]


CASES = {
    "usual": Case(),
    "one_step": Case(length=1, lines=1, channels=1, modes=1),
    "two_steps": Case(length=2, modes=3),
    "backwards": Case(length=11, reverse=True),
    "bare": Case(length=31, extras=False),
    "bare_backwards": Case(length=7, extras=False, reverse=True),
}


def outputs_and_gradients(function: Callable[..., tuple[Tensor, Tensor]], given) -> list[Tensor | None]:
    """y, final state and all gradients, for gradients of the outputs that every dtype represents exactly.

    The gradients of the parameters are sums with cancellation: rounding what enters would dominate the comparison.
    """
    leaves = [None if t is None else t.detach().requires_grad_() for t in given]
    outputs = function(*leaves)
    weights = [torch.arange(o.numel(), device=o.device).cos().bfloat16().view(o.shape).to(o.dtype) for o in outputs]
    found = iter(torch.autograd.grad(outputs, [t for t in leaves if t is not None], weights))
    return [*(o.detach() for o in outputs), *(None if t is None else next(found) for t in leaves)]


def compare(name: str, case: Case, dtype: torch.dtype, device: str | torch.device = "cpu") -> None:
    """Outputs and every gradient of one form against the float64 reference on the same values."""
    inputs = case.inputs(dtype, device)
    exact = [None if t is None else t.detach().double() for t in inputs]
    got = outputs_and_gradients(lambda *t: FORMS[name](*t, case.reverse, True), inputs)
    want = outputs_and_gradients(lambda *t: s4d_reference(*t, reverse=case.reverse), exact)
    for tensor, g, w in zip(NAMES, got, want, strict=True):
        assert (g is None) == (w is None), tensor
        if g is not None and w is not None:
            assert_close(f"{name} {tensor}", g, w, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("form", FORMS)
def test_form_matches_the_reference(form, case, dtype):
    compare(form, case, dtype)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_two_forms_agree_over_a_long_video_of_the_published_size(reverse):
    """400 frames and 256 modes, where phases reach hundreds of turns."""
    inputs = [t.detach() for t in Case(400, 1, 2, 3, 256).inputs(torch.float32) if t is not None]
    whole, final = torch_path.convolve(*inputs, reverse, True)
    stepped, last = torch_path.recur(*inputs, reverse, True)
    assert_close("y", whole, stepped, 1e-5)
    assert_close("final_state", final, last, 1e-5)


@pytest.mark.parametrize(
    ("shape", "dim"),
    [((7, 3), 0), ((2, 7, 3), 1), ((2, 3, 4, 7, 3), 3), ((2, 7, 2, 2, 3), 1), ((2, 7, 3), -2)],
    ids=str,
)
def test_any_axis_is_scanned_in_place(shape, dim):
    _, *parameters, _ = (t.detach() for t in Case(channels=3).inputs(torch.float64))
    u = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    axis = dim % u.ndim
    state = torch.randn(*shape[:axis], *shape[axis + 1 :], 4, 2, dtype=torch.float64)
    y, final = s4d(u, *parameters, dim=dim, initial_state=state, return_final_state=True)
    moved = u.movedim(axis, -2)
    want, last = s4d_reference(
        moved.reshape(-1, 7, 1, 3), *parameters, state.reshape(-1, 1, 3, 4, 2), reverse=False
    )  # fmt: skip
    assert_close("y", y.movedim(axis, -2), want.reshape(moved.shape), 1e-12)
    assert_close("final_state", final, last.reshape(state.shape), 1e-12)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [3, SHORT + 2], ids=["recurrence", "convolution"])
def test_gradcheck(length, reverse):
    u, *rest = Case(length, 1, 1, 2, 2).inputs(torch.float64)
    assert u is not None
    u, start = u.detach().squeeze(2).requires_grad_(), rest.pop().detach().squeeze(1).requires_grad_()

    def run(u: Tensor, start: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        return s4d(u, *parameters, reverse=reverse, initial_state=start, return_final_state=True)

    assert torch.autograd.gradcheck(run, (u, start, *rest))
    assert torch.autograd.gradgradcheck(lambda u: run(u, start, *rest)[0].square(), (u,))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("sizes", [(1,) * 13, (6, 7), (2, 10, 1)], ids=["frame_by_frame", "halves", "uneven"])
def test_pieces_with_a_handed_over_state_equal_the_whole(sizes, reverse):
    u, *parameters, start = (t.detach() for t in Case(13).inputs(torch.float32))
    whole, final = s4d(u, *parameters, reverse=reverse, initial_state=start, return_final_state=True)
    state, pieces = start, list(u.split(sizes, dim=1))
    for i in reversed(range(len(pieces))) if reverse else range(len(pieces)):
        pieces[i], state = s4d(pieces[i], *parameters, reverse=reverse, initial_state=state, return_final_state=True)
    assert_close("y", torch.cat(pieces, dim=1), whole, 1e-5)
    assert_close("final_state", state, final, 1e-5)


def test_reverse_is_the_flipped_scan():
    u, *parameters, start = (t.detach() for t in Case(12).inputs(torch.float64))
    y = s4d(u, *parameters, reverse=True, initial_state=start)
    want = s4d(u.flip(1), *parameters, initial_state=start)
    assert isinstance(y, Tensor)
    assert isinstance(want, Tensor)
    assert_close("y", y, want.flip(1), 1e-12)


@pytest.mark.parametrize("length", [3, 20])
def test_half_precision_is_float32_inside_even_under_autocast(length):
    u, *parameters, _ = (t.detach() for t in Case(length).inputs(torch.bfloat16))
    exact = s4d(u.float(), *parameters)
    with torch.autocast("cpu", torch.bfloat16):
        got = s4d(u, *parameters)
    assert isinstance(exact, Tensor)
    assert torch.equal(got, exact.bfloat16())


def test_the_backward_pass_keeps_no_spectra():
    u, *parameters, start = Case(64).inputs(torch.float32)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = s4d(u, *parameters, initial_state=start)
    assert isinstance(y, Tensor)
    assert sum(kept) <= sum(t.numel() for t in (u, *parameters, start))
    y.sum().backward()
    assert u.grad is not None


@pytest.mark.parametrize(("batch", "lines"), [(5, 1), (2, 7)], ids=["sequences", "places"])
def test_blocks_of_sequences_change_nothing(batch, lines, monkeypatch):
    inputs = Case(6, batch, lines).inputs(torch.float64)

    def run(u: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return s4d(u, *rest[:-1], initial_state=rest[-1], return_final_state=True)

    want = run_with_grads(run, *inputs)
    rows: list[int] = []
    convolve = op.convolve
    monkeypatch.setattr(op, "convolve", lambda u, *rest: rows.append(u.shape[0] * u.shape[2]) or convolve(u, *rest))
    monkeypatch.setattr(op, "BLOCK", 2 * 6 * 5 * (batch if lines > 1 else 1))
    got = run_with_grads(run, *inputs)
    assert len(rows) >= 3
    assert max(rows) * 6 * 5 <= op.BLOCK
    for name, g, w in zip(NAMES, got, want, strict=True):
        assert_close(name, g, w, 1e-12)


def test_compiles_into_one_graph():
    inputs = [t for t in Case(7, channels=2, modes=2).inputs(torch.float32) if t is not None]

    def run(u: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return s4d(u, *rest[:-1], initial_state=rest[-1], return_final_state=True)

    got = run_with_grads(torch.compile(run, backend="aot_eager", fullgraph=True), *inputs)
    for name, g, w in zip(NAMES, got, run_with_grads(run, *inputs), strict=True):
        assert_close(name, g, w, 1e-6)


@pytest.mark.parametrize(("length", "size"), [(1, 2), (2, 4), (12, 24), (13, 30), (400, 800), (331, 675 + 45)])
def test_fft_length_is_even_smooth_and_long_enough(length, size):
    found = torch_path.fft_length(length)
    assert found >= 2 * length - 1
    assert found % 2 == 0
    assert found <= size


def wrong(**changes: object) -> dict[str, object]:
    u, log_dt, log_A_real, A_imag, C, D, start = (t.detach() for t in Case().inputs(torch.float32))
    given = dict(u=u, log_dt=log_dt, log_A_real=log_A_real, A_imag=A_imag, C=C, D=D, initial_state=start)
    return given | changes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(5)}, "u: got shape"),
        ({"dim": 3}, "dim: got 3"),
        ({"log_dt": torch.zeros(4)}, "log_dt: got shape"),
        ({"log_A_real": torch.zeros(5)}, "log_A_real: got shape"),
        ({"A_imag": torch.zeros(5, 3)}, "A_imag: got shape"),
        ({"C": torch.zeros(5, 4)}, "C: got shape .* real and imaginary"),
        ({"C": torch.zeros(5, 4, 2, dtype=torch.bfloat16)}, "C: got dtype torch.bfloat16"),
        ({"D": torch.zeros(1)}, "D: got shape"),
        ({"initial_state": torch.zeros(2, 5, 4, 2)}, "initial_state: got shape"),
        ({"u": torch.zeros(2, 9, 3, 5, dtype=torch.int64)}, "u: got dtype"),
        ({"u": torch.zeros(2, 0, 3, 5)}, "u: got an empty tensor"),
        ({"u": torch.zeros(2, 9, 5, 3).transpose(2, 3)}, "last axis must be contiguous"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_messages(change, message):
    with pytest.raises(ValueError, match=message):
        s4d(**wrong(**change))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_on_the_gpu(form, dtype):
    for case in (Case(64, 2, 16, 32, 8), Case(33, 1, 4, 7, 16, reverse=True)):
        compare(form, case, dtype, "cuda")
