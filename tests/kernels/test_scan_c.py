"""The C back end of the selective scan beyond the tests of all back ends: lanes, chunks, threads, values, building."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kernels
from kernels.selective_scan import c_path
from kernels.testing import assert_close, run_with_grads
from tests.kernels.scan_cases import NAMES_1D, NAMES_2D, Case1D, Case2D, widened

USABLE, REASON = c_path.available()
needs_c = pytest.mark.skipif(not USABLE, reason=f"no C back end: {REASON}")
ROOT = Path(__file__).parents[2]

CASES = {
    "two_blocks_and_a_rest": Case2D((2, 5, 13, 37), state=4, rank=5),
    "chunk_less_one": Case2D((1, 9, 7, 16), state=16, rank=0, directions=("columns",)),
    "one_chunk": Case2D((1, 8, 8, 17), state=5, rank=4, directions=("columns_reversed", "rows_reversed")),
    "chunk_and_one": Case2D((1, 13, 5, 16), state=8, merge="none"),
    "blocks_of_groups": Case1D((2, 70, 3, 54), dim=1, state=6, groups=3, rank=3, reverse=True),
    "largest_state": Case1D((1, 66, 3), state=256),
    "many_sequences": Case1D((5, 14, 3, 6), dim=1, state=3),
}


@needs_c
@pytest.mark.parametrize("isa", [1, 2, 3], ids=["plain", "avx2", "avx512"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_instruction_set_matches_reference(case, isa, monkeypatch):
    monkeypatch.setattr(c_path, "_BEST", isa)
    inputs = case.inputs(torch.float32)
    got = run_with_grads(case.function("c"), *inputs)
    want = run_with_grads(case.function("reference"), *widened(inputs))
    names = NAMES_1D if isinstance(case, Case1D) else NAMES_2D
    for name, g, w in zip(("y", "final_state", *names), got, want, strict=True):
        if w is not None:
            assert g is not None
            assert_close(name, g, w, 3e-6)


@needs_c
@pytest.mark.parametrize("case", [CASES["two_blocks_and_a_rest"], CASES["many_sequences"]], ids=["2d", "1d"])
def test_threads_do_not_change_a_bit(case):
    case = replace(case, shape=(2, 40, 30, 64))  # large enough for several threads
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(run_with_grads(case.function("c"), *case.inputs(torch.float32)))
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*results, strict=True):
        assert (one is None and three is None) or torch.equal(one, three)


@needs_c
def test_slices_of_wider_tensors_and_expanded_gradient():
    generator = torch.Generator().manual_seed(1)
    projection = torch.randn(2, 6, 5, 4, 3 + 2 * 7, generator=generator)
    wide = torch.randn(2, 5, 6, 50, generator=generator).transpose(1, 2)
    case = Case2D((2, 6, 5, 20), state=7, rank=3)
    _, _, A, _, _, D, weight, bias, state = case.inputs(torch.float32)
    results = []
    for backend in ("c", "reference"):
        leaves = [t.detach().requires_grad_() for t in (projection, wide)]
        delta, b, c = leaves[0].split((3, 7, 7), dim=-1)
        y, _ = case.function(backend)(leaves[1][..., 17:37], delta, A, b, c, D, weight, bias, state)
        results.append([y.detach(), *torch.autograd.grad(y.sum(), leaves)])
    for name, got, want in zip(("y", "projection", "wide"), *results, strict=True):
        assert_close(name, got, want, 1e-5)


@needs_c
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_in_another_layout_is_copied_once_for_all_directions(dtype, monkeypatch):
    bytes_given = []
    give = c_path._Call.give

    def spying(call, name, tensor):
        give(call, name, tensor)
        if name == "grad_y":
            bytes_given.append(call.kept[-1].untyped_storage().nbytes())

    monkeypatch.setattr(c_path._Call, "give", spying)
    case = Case2D((1, 5, 6, 7))
    y, _ = case.function("c")(*case.inputs(dtype))
    y.backward(torch.ones(1, 7, 5, 6, dtype=dtype).permute(0, 2, 3, 1))
    assert bytes_given == [4 * y.numel()]


@needs_c
def test_only_needed_gradients_are_formed():
    case = Case2D((1, 4, 4, 6), state=4)
    x, delta, A, b, c, D, weight, bias, state = (None if t is None else t.detach() for t in case.inputs(torch.float32))
    orders, needs = (0, 1, 2, 3), (False, False, True, *(False,) * 7)
    inputs = (x, delta, A, b[:, :, :, :, None], c[:, :, :, :, None], D, weight, bias, None, state)
    y, final, saved = c_path.forward(*inputs, orders=orders, softplus=True, merge=True, need_backward=True)
    assert saved.shape == c_path.saved_shape(x, orders, 1, 4)
    found = c_path.backward(
        torch.ones_like(y), None, *inputs, saved, orders=orders, softplus=True, merge=True, needs=needs
    )
    assert [g is not None for g in found] == list(needs)
    assert c_path.forward(*inputs, orders=orders, softplus=True, merge=True, need_backward=False)[2].numel() == 0
    assert final.shape == (1, 4, 6, 4)


def _bare(u: torch.Tensor, delta: torch.Tensor, a: float, softplus: bool = True) -> torch.Tensor:
    """One scan of u and delta (1, L, D) with one state, B = C = 1."""
    ones = torch.ones(1, u.shape[1], 1)
    A = torch.full((u.shape[2], 1), a)
    return kernels.selective_scan(u, delta, A, ones, ones, softplus=softplus, backend="c")


@needs_c
def test_softplus_of_any_size():
    raw = torch.cat([torch.linspace(-80, 30, 2001), torch.tensor([-1e30, -200.0, 0.0, 20.0, 20.001, 1e30])])
    got = _bare(torch.ones(1, 1, raw.numel()), raw[None, None], -1.0)[0, 0]
    want = torch.where(raw > 20, raw.double(), raw.double().exp().log1p())
    assert (got - want).abs().le(3e-7 * want + 1e-37).all()


@needs_c
def test_decay_of_any_size():
    exponents = torch.cat([torch.linspace(-87, 0, 1001), torch.tensor([-1e30, -200.0, -90.0, -1e-8])])
    u = torch.zeros(1, 2, exponents.numel())
    u[:, 0] = -1 / exponents  # the first step leaves a state of one
    got = _bare(u.nan_to_num(0, 0, 0), exponents.expand(1, 2, -1), 1.0, softplus=False)[0, 1]
    decayed = (exponents.double() * u[0, 0].nan_to_num(0, 0, 0).double()) * exponents.double().exp()
    assert (got - decayed).abs().le(1e-5 * decayed.abs() + 1e-37).all()


@needs_c
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", range(5), ids=NAMES_2D[:5])
def test_non_finite_input_reaches_the_output_and_no_other_image(bad, where):
    case = Case2D((2, 9, 9, 18), state=5, rank=0, directions=("rows",))
    inputs = [None if t is None else t.detach().clone() for t in case.inputs(torch.float32)]
    clean = case.function("reference")(*inputs)[0]
    inputs[where].view(-1)[0] = abs(bad) if where in (1, 2) else bad  # an infinitely small step changes nothing
    y = case.function("c")(*inputs)[0]
    assert not y[0].isfinite().all()
    if where != 2:
        assert_close("the other image", y[1], clean[1], 1e-5)


@needs_c
def test_denormals_are_flushed_inside_and_kept_outside():
    u = torch.zeros(1, 400, 16)
    u[:, 0] = 1.0
    y = _bare(u, torch.ones(1, 400, 16), -0.5, softplus=False)
    tiny = torch.finfo(torch.float32).tiny
    assert ((y == 0) | (y >= tiny)).all()
    assert y[0, 100, 0] > 0
    assert y[0, -1, 0] == 0
    assert torch.tensor(tiny) / 4 * 4 == tiny


@needs_c
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_works_in_a_forked_process():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        u = torch.ones(1, 3000, 128)
        want = _bare(u, u, -1.0)
        child = os.fork()
        if child == 0:
            same = (_bare(u, u, -1.0).numpy() == want.numpy()).all()  # torch's own threads do not survive a fork
            os._exit(0 if same else 3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(before)


@needs_c
def test_float64_is_refused():
    case = Case1D()
    with pytest.raises(RuntimeError, match="float32"):
        case.function("c")(*case.inputs(torch.float64))


def test_missing_and_foreign_libraries_are_named(tmp_path, monkeypatch):
    def reason_for(file: Path | None) -> str:
        monkeypatch.setattr(c_path, "library_file", lambda: file)
        usable, reason = c_path._load.__wrapped__()
        assert usable is None
        return reason

    assert "compiler" in reason_for(None)
    broken = tmp_path / "_scan.so"
    broken.write_bytes(b"not a library")
    assert "cannot be loaded" in reason_for(broken)


@needs_c
def test_library_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(c_path, "_CHUNK", 32)
    usable, reason = c_path._load.__wrapped__()
    assert usable is None
    assert "another version" in reason


@pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="installed without its source")
def test_installation_goes_on_without_a_compiler(tmp_path):
    environment = {**os.environ, "CC": "no-such-compiler"}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "torch is used instead" in done.stdout + done.stderr
    assert not list(tmp_path.rglob("_scan*"))
