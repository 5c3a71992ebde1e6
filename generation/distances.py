"""How far generated samples are from real ones, in the features of any network; with bootstrap intervals."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vision_ssm.errors import UserError

# Shapes: n samples, m references, D features. All are computed in float64 on the CPU.

NEIGHBOURS = 5
"""Of precision and recall; 5 as in Naeem et al. 2020."""
_CHUNK = 2048


@dataclass(frozen=True)
class Interval:
    """A score with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def frechet_distance(samples: Tensor, reference: Tensor) -> float:
    """Distance of two Gaussians with the means and covariances of the features (Heusel et al. 2017, equation 6).

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). It falls with the number of samples: compare equal numbers only.

    Args:
        samples: (n, D).
        reference: (m, D).
    """
    return frechet_of_moments(*moments(samples), *moments(reference))


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of features (n, D), float64.

    Raises:
        UserError: fewer than two samples.
    """
    if len(features) < 2:
        raise UserError(f"a distance needs two samples at least, got {len(features)}")
    return features.double().mean(0), features.double().T.cov()


def frechet_of_moments(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> float:
    """`frechet_distance` from what `moments` gives; eigenvalues, so that singular covariances are no trouble."""
    return _frechet(mean, covariance, _root(covariance), other_mean, other_covariance)


def kernel_distance(samples: Tensor, reference: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x y / D + 1)^3 (Binkowski et al. 2018).

    It does not depend on the number of samples but for its noise, and can be a little below 0.

    Args:
        samples: (n, D).
        reference: (m, D).
    """
    within = [_mean_kernel(one, one, without_diagonal=True) for one in (samples, reference)]
    return sum(within) - 2 * _mean_kernel(samples, reference)


def precision_recall(samples: Tensor, reference: Tensor, neighbours: int = NEIGHBOURS) -> dict[str, float]:
    """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).

    Args:
        samples: (n, D).
        reference: (m, D); the manifold of the real ones.
        neighbours: k; the radius about a sample reaches to its k-th neighbour of the same set.

    Raises:
        UserError: not more samples than neighbours.
    """
    if min(len(samples), len(reference)) <= neighbours:
        raise UserError(f"precision and recall need more than {neighbours} samples, got {len(samples)}")
    fake_radii, real_radii = _radii(samples, neighbours), _radii(reference, neighbours)
    inside_real = torch.zeros(len(samples), dtype=torch.int64)
    recalled, covered = torch.zeros(len(reference), dtype=torch.bool), torch.zeros(len(reference), dtype=torch.bool)
    for start in range(0, len(reference), _CHUNK):
        part = slice(start, start + _CHUNK)
        distances = torch.cdist(reference[part].double(), samples.double())  # (chunk, n)
        inside = distances <= real_radii[part, None]
        inside_real += inside.sum(0)
        recalled[part] = (distances <= fake_radii[None]).any(1)
        covered[part] = inside.any(1)
    return {
        "precision": (inside_real > 0).double().mean().item(),
        "recall": recalled.double().mean().item(),
        "density": inside_real.double().mean().item() / neighbours,
        "coverage": covered.double().mean().item(),
    }


def conditional_accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """Share of samples that a classifier sees as the class that was asked for.

    Args:
        probabilities: (n, classes).
        labels: (n,) classes asked for.
    """
    return (probabilities.argmax(1) == labels).double().mean().item()


def bootstrap(
    score: Callable[[Tensor], float], count: int, *, rounds: int = 200, seed: int = 0, value: float | None = None
) -> Interval:
    """A score of `count` samples and its 95 % basic bootstrap interval.

    The interval is [2 v - q97.5, 2 v - q2.5] of the resampled scores: resampling repeats samples, which raises a
    Frechet distance, and the basic form takes that bias out.

    Args:
        score: of the samples at the places it is given, (k,) with repetitions.
        count: number of samples.
        rounds: resamplings.
        seed: of the resamplings.
        value: the score of all samples, where it is known already.
    """
    generator = torch.Generator().manual_seed(seed)
    whole = score(torch.arange(count)) if value is None else value
    drawn = [score(torch.randint(count, (count,), generator=generator)) for _ in range(rounds)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(whole, float(2 * whole - high), float(2 * whole - low))


def kernel_interval(samples: Tensor, reference: Tensor, *, rounds: int = 200, seed: int = 0) -> Interval:
    """`kernel_distance` with its interval, from one table of kernel values instead of one per resampling."""
    own, across = _kernel(samples, samples), _kernel(samples, reference).mean(1)
    own.fill_diagonal_(0)
    within_reference = _mean_kernel(reference, reference, without_diagonal=True)
    size = len(samples)
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(rounds):
        weights = torch.bincount(torch.randint(size, (size,), generator=generator), minlength=size).double()
        pairs = weights.sum() ** 2 - weights.square().sum()  # a sample and its own repetition are no pair
        inner = (weights @ own @ weights) / pairs
        drawn.append(float(inner + within_reference - 2 * (weights @ across) / size))
    value = float(own.sum() / (size * (size - 1)) + within_reference - 2 * across.mean())
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(value, float(2 * value - high), float(2 * value - low))


def frechet_interval(
    samples: Tensor, mean: Tensor, covariance: Tensor, *, rounds: int = 200, seed: int = 0
) -> Interval:
    """`frechet_distance` from a reference's `moments`, with its interval; the reference is taken as it is."""
    root = _root(covariance)

    def score(places: Tensor) -> float:
        return _frechet(mean, covariance, root, *moments(samples[places]))

    return bootstrap(score, len(samples), rounds=rounds, seed=seed)


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def _frechet(mean: Tensor, covariance: Tensor, root: Tensor, other_mean: Tensor, other_covariance: Tensor) -> float:
    cross = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp_min(0).sqrt().sum()
    distance = (mean - other_mean).square().sum() + covariance.trace() + other_covariance.trace() - 2 * cross
    return float(distance.clamp_min(0))


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() @ b.double().T / a.shape[1] + 1) ** 3


def _mean_kernel(a: Tensor, b: Tensor, *, without_diagonal: bool = False) -> float:
    total = sum(float(_kernel(part, b).sum()) for part in a.split(_CHUNK))
    if not without_diagonal:
        return total / (len(a) * len(b))
    diagonal = float(((a.double().square().sum(1) / a.shape[1] + 1) ** 3).sum())
    return (total - diagonal) / (len(a) * (len(a) - 1))


def _radii(features: Tensor, neighbours: int) -> Tensor:
    """Distance of each sample (n, D) to its k-th neighbour; itself is the first of k + 1."""
    parts = [torch.cdist(part.double(), features.double()) for part in features.split(_CHUNK)]
    return torch.cat([part.kthvalue(neighbours + 1, dim=1).values for part in parts])
