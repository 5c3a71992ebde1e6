"""Distances against closed forms and direct sums; intervals that cover; a reference that is read back."""

import numpy as np
import pytest
import torch

from generation.distances import (
    bootstrap,
    conditional_accuracy,
    frechet_distance,
    frechet_interval,
    frechet_of_moments,
    kernel_distance,
    kernel_interval,
    moments,
    precision_recall,
)
from generation.reference import Reference
from vision_ssm.errors import UserError


def normal(count: int, width: int = 6, *, shift: float = 0.0, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return shift + scale * torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_frechet_distance_of_known_gaussians():
    mean, eye = torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    assert frechet_of_moments(mean, eye, mean + 2, eye) == pytest.approx(16)
    # tr(S1 + S2 - 2 sqrt(S1 S2)) of diagonal ones: the squared differences of the standard deviations
    spread = torch.diag(torch.tensor([1.0, 4.0, 9.0, 0.0], dtype=torch.float64))
    assert frechet_of_moments(mean, eye, mean, spread) == pytest.approx(0 + 1 + 4 + 1)


def test_frechet_distance_is_that_of_the_matrix_square_root():
    a, b = normal(200) @ normal(6, seed=1), normal(150, seed=2) @ normal(6, seed=3) + 0.3
    (m1, s1), (m2, s2) = moments(a), moments(b)
    product = np.linalg.eigvals((s1 @ s2).numpy())
    want = float((m1 - m2).square().sum() + s1.trace() + s2.trace()) - 2 * np.sqrt(product.real.clip(0)).sum()
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)


def test_kernel_distance_is_the_unbiased_sum():
    a, b = normal(30), normal(20, shift=0.5, seed=1)

    def kernel(x, y):
        return ((x.double() @ y.double()) / 6 + 1) ** 3

    within_a = np.mean([kernel(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j])
    within_b = np.mean([kernel(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j])
    across = np.mean([kernel(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(within_a + within_b - 2 * across, rel=1e-9)
    assert kernel_interval(a, b, rounds=3).value == pytest.approx(kernel_distance(a, b), rel=1e-9)


def test_precision_and_recall_of_sets_that_are_known():
    real = normal(200)
    same = precision_recall(normal(200, seed=1), real)
    assert min(same["precision"], same["recall"], same["coverage"]) > 0.75
    assert same["density"] == pytest.approx(1, abs=0.25)
    collapsed = precision_recall(real[:1] + normal(200, scale=1e-3, seed=2), real)
    assert collapsed["precision"] == 1.0
    assert collapsed["recall"] < 0.05
    far = precision_recall(normal(200, shift=50, seed=3), real)
    assert (far["precision"], far["recall"], far["density"], far["coverage"]) == (0, 0, 0, 0)
    with pytest.raises(UserError, match="more than 5 samples"):
        precision_recall(real[:5], real)


def test_intervals_hold_the_distance_of_the_distributions():
    truth = 6 * 0.5**2  # of the Gaussians themselves; sets of this size are near it
    reference = normal(4_000)
    held = [frechet_interval(normal(600, shift=0.5, seed=seed), *moments(reference), rounds=40) for seed in range(1, 9)]
    assert sum(one.low <= truth + 0.05 and one.high >= truth - 0.05 for one in held) >= 7
    one = held[0]
    assert one.low < one.value < one.high
    share = bootstrap(lambda places: (places < 30).double().mean().item(), 100, rounds=200)
    assert share.value == pytest.approx(0.3)
    assert 0.15 < share.low < 0.27
    assert 0.33 < share.high < 0.45


def test_conditional_accuracy():
    probabilities = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]])
    assert conditional_accuracy(probabilities, torch.tensor([0, 1, 1, 1])) == 0.75


def test_a_reference_is_read_back_without_losing_its_moments(tmp_path):
    features = normal(50)
    whole = Reference({"data": "x", "floor": None}, *moments(features), features=features)
    whole.save(tmp_path / "r.npz", keep=20)
    read = Reference.load(tmp_path / "r.npz")
    assert read.about == whole.about
    torch.testing.assert_close(read.covariance, whole.covariance, rtol=0, atol=0)
    assert read.features is not None
    assert len(read.features) == 20
    (tmp_path / "bad.npz").write_bytes(b"x")
    with pytest.raises(UserError, match="is no reference"):
        Reference.load(tmp_path / "bad.npz")
