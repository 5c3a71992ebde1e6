"""The Gluon twins and the plain Triton kernels give the same results, and which of the two is taken."""

import pytest
import torch

pytest.importorskip("triton")
from kernels.selective_scan import gpu
from kernels.selective_scan.reference import selective_scan_reference
from kernels.testing import TOLERANCE, assert_close
from tests.kernels.emulated_gluon import Combination, emulated_twins
from tests.kernels.interpreted_scans import NAMES, Case, only_needed, run, without_states

CASES = {
    "image": Case((2, 13, 17, 70), 16, (0, 1, 2, 3), rank=5, packed=True),
    "grouped_frames": Case((2, 150, 3, 40), 7, (5,), groups=2, z=True),
    "few_states": Case((1, 20, 9, 100), 3, (3, 0), rank=2, merge=False),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("twin", [True, False], ids=["twin", "plain"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_both_agree_with_float64(case: Case, twin: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    if twin and gpu._gluon() is None:
        pytest.skip("no Gluon here")
    if not twin:
        monkeypatch.setattr(gpu, "_gluon", lambda: None)
    options = dict(orders=case.orders, softplus=case.softplus, merge=case.merge)
    activations = ("x", "delta", "B", "C", "delta_weight", "z")
    given = [
        t if t is None else (t.to(dtype) if name in activations else t).cuda()
        for name, t in zip(NAMES, case.inputs(), strict=True)
    ]
    wide = [None if t is None else t.double().requires_grad_() for t in given]
    want_y, want_final = selective_scan_reference(*wide, **options)
    grad_y, grad_final = torch.randn_like(want_y).to(dtype), torch.randn_like(want_final).float()
    ((want_y * grad_y).sum() + (want_final * grad_final).sum()).backward()
    y, final, saved = gpu.forward(*given, **options, need_backward=True)
    needs = tuple(t is not None for t in given)
    found = gpu.backward(grad_y, grad_final, *given, saved, **options, needs=needs)
    assert_close("y", y, want_y, TOLERANCE[dtype])
    assert_close("final", final, want_final, TOLERANCE[dtype])
    for name, got, want in zip(NAMES, found, wide, strict=True):
        if want is not None:
            assert_close(f"d{name}", got, want.grad, TOLERANCE[dtype])


EMULATED = {
    "one_pixel": Case((1, 1, 1, 1), 1, (0,), rank=1, chunk=16),
    "four_directions": Case((1, 5, 4, 4), 3, (0, 1, 2, 3), rank=2, chunk=8),
    "two_images_ragged_chunks": Case((2, 3, 17, 3), 3, (2,), chunk=20),
    "groups_kept_apart": Case((1, 3, 11, 6), 7, (3, 0), rank=6, groups=2, merge=False, chunk=12),
    "lines_one_chunk_gated": Case((1, 21, 2, 3), 16, (4,), z=True, chunk=24),
    "lines_backwards_gated": Case((1, 70, 2, 3), 16, (5,), rank=2, z=True, chunk=32),
    "bare": Case((1, 3, 7, 4), 16, (1,), chunk=64, extras=False, softplus=False),
    "bfloat16_slices": Case((1, 3, 4, 4), 3, (1, 3), rank=2, packed=True, dtype=torch.bfloat16, chunk=8),
    "channel_blocks": Case((1, 4, 5, 70), 8, (0, 2), rank=2, chunk=12),
}


@pytest.fixture
def emulation(monkeypatch: pytest.MonkeyPatch):
    """The host code launches the twins' own source, run as plain Python; memory that is not written is NaN."""
    twins = emulated_twins()
    monkeypatch.setattr(gpu, "_has_twin", lambda x, states: states <= gpu.TWIN_STATES)
    monkeypatch.setattr(gpu, "_gluon", lambda: twins)
    monkeypatch.setattr(gpu, "scan_combine_kernel", Combination())
    monkeypatch.setattr(gpu, "_chunking", gpu._chunking)  # `run` replaces it
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", EMULATED)
def test_emulated_twins_agree_with_the_reference(emulation, name: str):
    case = EMULATED[name]
    bound = {torch.float32: 5e-6, torch.bfloat16: 4e-3}[case.dtype]
    assert not {key: error for key, error in run(case).items() if not error <= bound}


def test_emulated_twins_compute_the_needed_gradients_alone(emulation):
    assert not any(only_needed().values())


@pytest.mark.parametrize("name", ["lines_one_chunk_gated", "four_directions"])
def test_emulated_twins_leave_out_a_final_state_that_nobody_asks_for(emulation, name: str):
    assert not any(without_states(EMULATED[name]).values())


def test_plain_kernels_are_taken_without_gluon(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu, "_gluon", lambda: None)
    x = torch.empty(2, 8, 8, 64)
    inputs = gpu._Inputs(x, x[..., None, :], torch.empty(1, 64, 16), *[torch.empty(2, 8, 8, 1, 1, 16)] * 2, *[None] * 5)
    assert not gpu._Plan.of(inputs, (0,), True).twin


def test_pixels_have_one_stride_in_images_and_in_slices_of_channels_only():
    image = torch.empty(2, 6, 5, 32)
    assert gpu._pixel_stride(image) == 32
    assert gpu._pixel_stride(image[..., 8:24]) == 32
    assert gpu._pixel_stride(image[:, :, :1]) == 5 * 32
    assert gpu._pixel_stride(image[:, :, 1:4]) is None
    assert gpu._pixel_stride(image[:, 1:2, 1:4]) == 32
    assert gpu._pixel_stride(image.transpose(1, 2)) is None
    assert gpu._pixel_stride(image[:1, :1, :1].expand(2, 6, 5, 32)) == 0
