"""The classic methods, on four photographs, beside values measured once with the libraries alone."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from restoration import classic
from restoration.classic import METHODS, check_method, estimate_sigma, restore_classic
from restoration.degrade import degradation_for, seed_of
from restoration.metrics import Measure
from restoration.tasks import TASKS
from tests.restoration.photographs import NAMES, as_image, photograph
from vision_ssm.errors import UserError

PSNR = Measure()


def mean_psnr(method, images, degraded, **options) -> float:
    found = [
        PSNR(restore_classic(d, method, **options), image)["psnr"] for image, d in zip(images, degraded, strict=True)
    ]
    return sum(found) / len(found)


@pytest.fixture(scope="module")
def images():
    return [as_image(photograph(name)) for name in NAMES]


@pytest.mark.parametrize(("method", "sigma", "want"), [("nlm", 25, 29.96), ("tv", 15, 31.68), ("tv", 50, 26.30)])
def test_denoising(images, method, sigma, want):
    """Noise of numpy's default_rng(i) for image i; non-local means at 25 was measured at 29.96 dB beforehand."""
    degraded = [
        image
        + torch.from_numpy(np.random.default_rng(i).normal(0, sigma / 255, (256, 256, 3))).permute(2, 0, 1).float()
        for i, image in enumerate(images)
    ]
    found = mean_psnr(method, images, degraded, degradation=degradation_for("denoise", {"sigma": sigma}))
    assert found == pytest.approx(want, abs=0.1)


@pytest.mark.parametrize(
    ("method", "scale", "want"), [("lanczos", 4, 26.90), ("lanczos", 8, 24.02), ("bicubic", 4, 26.69)]
)
def test_enlarging(images, method, scale, want):
    """Pillow's Lanczos and bicubic were measured at these values beforehand, from images shrunk by Pillow."""
    size = (256 // scale, 256 // scale)
    small = [
        as_image(np.asarray(Image.fromarray(photograph(name)).resize(size, Image.Resampling.BICUBIC))) for name in NAMES
    ]
    assert mean_psnr(method, images, small, scale=scale) == pytest.approx(want, abs=0.05)


@pytest.mark.parametrize(
    ("method", "noise", "least"), [("wiener", 0.0, 27.5), ("wiener", 0.05, 25.3), ("richardson-lucy", 0.05, 25.2)]
)
def test_deblurring(images, method, noise, least):
    """At least what the methods reached without reflected borders."""
    operator = degradation_for("deblur", {"noise": noise})
    degraded = [operator.apply(image, seed=seed_of(name)) for name, image in zip(NAMES, images, strict=True)]
    assert mean_psnr(method, images, degraded, degradation=operator) > least
    assert mean_psnr(method, images, degraded, degradation=operator) < least + 4


def test_motion_is_undone_with_the_kernel_of_the_seed(images):
    operator = degradation_for("motion", {"noise": 0.0, "kernel": 21})
    degraded = operator.apply(images[0], seed=5)
    right = restore_classic(degraded, "wiener", operator, seed=5)
    wrong = restore_classic(degraded, "wiener", operator, seed=6)
    assert PSNR(right, images[0])["psnr"] > PSNR(degraded, images[0])["psnr"] + 6
    assert PSNR(wrong, images[0])["psnr"] < PSNR(right, images[0])["psnr"] - 4


def test_black_areas_do_not_explode(images):
    dark = torch.where(images[0] < 0.5, 0.0, images[0])
    operator = degradation_for("motion")
    for seed in range(3):
        degraded = operator.apply(dark, seed=seed)
        result = restore_classic(degraded, "richardson-lucy", operator, seed=seed)
        assert PSNR(result, dark)["psnr"] > PSNR(degraded, dark)["psnr"]


def test_inpainting_keeps_what_is_known(images):
    operator = degradation_for("inpaint", {"mask": "free-form"})
    degraded = operator.apply(images[0], seed=5)
    known = degraded[3] > 0
    result = restore_classic(degraded, "telea", operator)
    assert torch.equal(result[:, known], images[0][:, known])
    error, untouched = ((x - images[0])[:, ~known].abs().mean() for x in (result, degraded[:3]))
    assert error < 0.5 * untouched


@pytest.mark.parametrize("sigma", [5, 25, 50])
def test_noise_is_estimated(images, sigma):
    noisy = degradation_for("denoise", {"sigma": sigma}).apply(images[3], seed=1)
    assert estimate_sigma(noisy.permute(1, 2, 0).numpy()) * 255 == pytest.approx(sigma, rel=0.1)
    known = restore_classic(noisy, "tv", degradation_for("denoise", {"sigma": sigma}))
    guessed = restore_classic(noisy, "tv")
    assert PSNR(guessed, images[3])["psnr"] == pytest.approx(PSNR(known, images[3])["psnr"], abs=0.3)


def test_without_noise_denoising_does_nothing(images):
    flat = torch.full((3, 8, 8), 0.25)
    assert torch.equal(restore_classic(flat, "nlm"), flat)


def test_methods_are_for_their_tasks():
    assert {task for tasks in METHODS.values() for task in tasks} <= set(TASKS)
    with pytest.raises(UserError, match="wiener is for deblur, motion; for denoise there are nlm, tv, bm3d"):
        check_method("wiener", "denoise")
    with pytest.raises(UserError, match="no method 'wine'; for the task sr4 there are bicubic, lanczos"):
        check_method("wine", "sr4")
    check_method("tv", "denoise")


def test_a_missing_package_is_named(monkeypatch):
    def missing(name: str):
        raise ImportError(name)

    monkeypatch.setattr(classic.importlib, "import_module", missing)
    with pytest.raises(UserError, match="pip install bm3d"):
        check_method("bm3d", "denoise")
    with pytest.raises(UserError, match="pip install scikit-image"):
        check_method("nlm", "denoise")
    check_method("lanczos", "sr2")


def test_deconvolution_of_given_pairs_is_refused(images):
    with pytest.raises(UserError, match="needs to know the kernel"):
        restore_classic(images[0], "wiener")
    assert math.isfinite(PSNR(restore_classic(images[0], "bicubic", scale=1), images[0])["psnr"])
