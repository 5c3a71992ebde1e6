"""The operators against independent formulas, and their seeds."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, signal

from restoration.degrade import (
    KINDS,
    Degradation,
    Downscale,
    GaussianBlur,
    Jpeg,
    Mask,
    MotionBlur,
    Noise,
    Real,
    crop_to_multiple,
    degradation_for,
    enlarge,
    seed_of,
)  # fmt: skip
from restoration.kernels2d import oriented_kernel, sinc_kernel
from restoration.tasks import TASKS
from tests.restoration.photographs import as_image, photograph
from vision_ssm.errors import UserError

ALL = (
    Noise(), GaussianBlur(), MotionBlur(), Downscale(2), Jpeg(), Mask("box", size=16), Mask("random"),
    Mask("free-form"), Mask("mixed", size=16), Real(2), Real(1),
)  # fmt: skip


def levels(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


def test_the_seed_is_that_of_the_name():
    assert seed_of("kodim01.png") == seed_of("a/b/kodim01.tif") == 226155380417259
    assert len({seed_of(name) for name in ("a", "b", "c")} | {seed_of("a", seed=1)}) == 4


@pytest.mark.parametrize("operator", ALL, ids=str)
def test_pixels_depend_on_the_seed_alone(operator):
    image = as_image(photograph(side=64))
    first, second = operator.apply(image, seed=1), operator.apply(image, seed=2)
    torch.manual_seed(5)
    np.random.seed(5)
    assert torch.equal(operator.apply(image, seed=2), second)
    assert torch.equal(operator.apply(image, seed=1), first)
    if not isinstance(operator, Downscale):
        assert not torch.equal(first, second)


@pytest.mark.parametrize("operator", ALL, ids=str)
@pytest.mark.parametrize("shape", [(3, 2, 2), (3, 2, 34), (3, 38, 6)], ids=str)
def test_any_size(operator, shape):
    result = operator.apply(torch.rand(shape, generator=torch.Generator().manual_seed(0)), seed=3)
    extra = 1 if isinstance(operator, Mask) else 0
    assert result.shape == (3 + extra, shape[1] // operator.scale, shape[2] // operator.scale)
    assert result.dtype == torch.float32
    assert torch.isfinite(result).all()


def test_noise_is_gaussian_and_not_clipped():
    image = torch.zeros(3, 256, 256)
    noise = Noise(25.0).apply(image, seed=1)
    assert noise.std().item() == pytest.approx(25 / 255, rel=0.01)
    assert noise.mean().item() == pytest.approx(0, abs=5e-4)
    assert noise.min() < -0.3
    assert abs(np.corrcoef(noise.flatten(1).numpy()) - np.eye(3)).max() < 0.02
    drawn = [Noise((0.0, 50.0)).apply(image, seed=seed).std().item() * 255 for seed in range(40)]
    assert min(drawn) < 8
    assert max(drawn) > 42
    assert max(drawn) < 51


def test_gaussian_blur_is_scipys():
    image = as_image(photograph(side=96))
    line = np.exp(-0.5 * (np.arange(-30, 31) / 3.0) ** 2)
    want = levels(image).astype(np.float64)
    for axis in (0, 1):
        want = ndimage.correlate1d(want, line / line.sum(), axis=axis, mode="mirror")
    got = GaussianBlur(sigma=3.0, kernel=61, noise=0.0).apply(image, seed=0)
    assert np.abs(levels(got) - want).max() < 1e-5
    noisy = GaussianBlur(sigma=3.0, kernel=61, noise=0.05).apply(image, seed=0)
    assert (noisy - got).std().item() == pytest.approx(0.05, rel=0.02)


def test_motion_blur_is_a_convolution_with_the_drawn_kernel():
    image = as_image(photograph(side=96))
    operator = MotionBlur(intensity=0.7, kernel=21, noise=0.0)
    kernel = operator.drawn_kernel(seed=4)
    assert kernel.shape == (21, 21)
    assert kernel.min() >= 0
    assert kernel.sum() == pytest.approx(1, abs=1e-6)
    got = operator.apply(image, seed=4)[0].numpy()
    want = signal.convolve2d(image[0].numpy(), kernel, mode="valid")
    assert np.abs(got[10:-10, 10:-10] - want).max() < 1e-5


def test_motion_without_intensity_is_a_line():
    def spread(intensity: float, seed: int) -> float:
        """Least over greatest extent of the path."""
        kernel = MotionBlur(intensity=intensity, kernel=61).drawn_kernel(seed)
        places = np.argwhere(kernel > 1e-4)
        weights = kernel[tuple(places.T)]
        return float(np.divide(*np.linalg.eigvalsh(np.cov(places.T, aweights=weights))))

    assert max(spread(0.0, seed) for seed in range(5)) < 0.01
    assert np.median([spread(1.0, seed) for seed in range(5)]) > 0.05


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_downscaling_is_pillows(scale):
    pixels = photograph(side=128)
    size = (128 // scale, 128 // scale)
    # in floats, because of 8 bits Pillow rounds between its two passes
    planes = [
        Image.fromarray(pixels[..., i].astype(np.float32)).resize(size, Image.Resampling.BICUBIC) for i in range(3)
    ]
    want = np.stack([np.asarray(plane) for plane in planes], axis=2).clip(0, 255)
    got = levels(Downscale(scale).apply(as_image(pixels), seed=0)) * 255
    assert np.abs(got - np.rint(got)).max() < 1e-4, "not rounded to 8 bits"
    assert np.abs(got - want).max() < 0.501


def test_enlarging_is_keys_cubic():
    """R. Keys, 1981, a = -0.5, inside of a line of pixels."""
    line = torch.rand(1, 1, 1, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = enlarge(line.expand(1, 1, 24, 24), 2)[0, 0, 20]

    def cubic(x: float) -> float:
        x = abs(x)
        return 1.5 * x**3 - 2.5 * x**2 + 1 if x <= 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0

    for out in range(8, 40):
        place = (out + 0.5) / 2 - 0.5
        want = sum(cubic(place - i) * line[0, 0, 0, i].item() for i in range(24))
        assert got[out].item() == pytest.approx(want, abs=1e-6)


def test_jpeg_is_pillows():
    pixels = photograph(side=128)
    for quality in (10, 40):
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "JPEG", quality=quality, subsampling="4:2:0")
        want = np.asarray(Image.open(data)).astype(float)
        got = levels(Jpeg(float(quality)).apply(as_image(pixels), seed=0)) * 255
        assert np.abs(got - want).mean() < 0.5


def test_masks_hide_what_they_say():
    image = as_image(photograph(side=64)).clamp_min(0.1)
    for operator, missing in ((Mask("box", size=20), (400, 400)), (Mask("box", size=99), (32 * 32,) * 2),
                              (Mask("random", drop=0.92), (3650, 3890)), (Mask("free-form"), (10, 3000))):  # fmt: skip
        result = operator.apply(image, seed=7)
        known = result[3]
        assert set(known.unique().tolist()) == {0.0, 1.0}
        assert missing[0] <= (known == 0).sum().item() <= missing[1], operator
        assert torch.equal(result[:3], image * known)


def test_the_real_chain_gives_a_worse_picture_of_8_bits():
    image = as_image(photograph(side=64))
    for seed in range(12):
        result = Real(1).apply(image, seed=seed)
        assert result.min() >= 0
        assert result.max() <= 1
        assert (result * 255 - (result * 255).round()).abs().max() < 1e-4
        assert 0.001 < (result - image).abs().mean() < 0.3


def test_kernels_of_the_chain():
    line = np.exp(-0.5 * (np.arange(-10, 11) / 2.0) ** 2)
    want = np.outer(line, line) / line.sum() ** 2
    assert np.abs(oriented_kernel(21, (2.0, 2.0), 0.7) - want).max() < 1e-6
    flat = oriented_kernel(21, (4.0, 1.0), 0.0)
    assert flat[10, 14] > flat[14, 10], "the first width is along the first axis, turned by 0 from x"
    ringing = sinc_kernel(21, np.pi / 2)
    assert ringing.min() < 0
    response = np.abs(np.fft.fft2(ringing, (64, 64)))
    assert response[0, 0] == pytest.approx(1)
    assert response[0, 28] < 0.15, "far above the cutoff"


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_its_operator_and_it_can_be_stored(task):
    operator = degradation_for(task)
    assert operator.scale == TASKS[task].scale
    assert degradation_for(task, operator.parameters()) == operator
    for name, point in operator.levels().items():
        assert name
        assert list(point.levels().values()) == [point], "a point is a single one"


def test_parameters_are_laid_over_those_of_the_task():
    assert degradation_for("denoise", {"sigma": 25}) == Noise(25.0)
    assert degradation_for("denoise", {"sigma": [5, 30]}) == Noise((5.0, 30.0))
    assert list(degradation_for("denoise", {"sigma": [5, 30]}).levels()) == ["sigma 15", "sigma 25"]
    assert list(degradation_for("denoise", {"sigma": [1, 5]}).levels()) == ["sigma 3"]
    assert degradation_for("deblur", {"sigma": 2.0}) == GaussianBlur(sigma=2.0)
    assert degradation_for("sr4", {"kind": "real"}) == Real(4)


@pytest.mark.parametrize(
    ("task", "parameters", "words"),
    [
        ("denoise", {"sigm": 3}, "did you mean 'sigma'"),
        ("denoise", {"sigma": -1}, "between 0 and 255"),
        ("denoise", {"sigma": [30, 5]}, "smaller bound first"),
        ("denoise", {"kind": "nois"}, "did you mean 'noise'"),
        ("denoise", {"kind": "mask"}, "does not give such an input"),
        ("sr4", {"scale": 2}, "does not give such an input"),
        ("deblur", {"kernel": 60}, "odd"),
        ("denose", {}, "did you mean 'denoise'"),
    ],
)
def test_wrong_parameters(task, parameters, words):
    with pytest.raises(UserError, match=words):
        degradation_for(task, parameters)


def test_sizes_that_do_not_fit():
    with pytest.raises(UserError, match="multiples of 4, got 10x8"):
        Downscale(4).apply(torch.zeros(3, 10, 8), seed=0)
    assert crop_to_multiple(torch.zeros(3, 10, 8), 4).shape == (3, 8, 8)
    with pytest.raises(UserError, match="cannot be shrunk 4 times"):
        crop_to_multiple(torch.zeros(3, 3, 8), 4)
    with pytest.raises(UserError, match="floats"):
        Noise().apply(torch.zeros(3, 8, 8, dtype=torch.uint8), seed=0)


def test_kinds_are_named_as_their_operators():
    assert all(issubclass(operator, Degradation) and operator.kind == kind for kind, operator in KINDS.items())
