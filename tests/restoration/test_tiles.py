"""Independent tiles: they cover the picture, blend without a seam, and carry a scale."""

from itertools import pairwise

import pytest
import torch

from restoration.tiles import origins, restore_tiled


@pytest.mark.parametrize(("length", "tile", "overlap"), [(5, 32, 8), (33, 32, 8), (100, 32, 0), (101, 40, 20)])
def test_tiles_cover_a_side_with_enough_overlap(length, tile, overlap):
    starts = origins(length, tile, overlap)
    assert starts[0] == 0
    assert starts[-1] + tile >= length
    assert starts[-1] == max(length - tile, 0)
    assert all(0 < b - a <= tile - overlap for a, b in pairwise(starts))


@pytest.mark.parametrize("overlap", [0, 8, 16])
def test_a_local_function_is_not_changed_by_tiling(overlap):
    image = torch.rand(3, 70, 45)
    found = restore_tiled(lambda x: 1 - 2 * x[:, :2], image, tile=32, overlap=overlap)
    torch.testing.assert_close(found, 1 - 2 * image[:2])


def test_results_may_be_larger():
    image = torch.rand(3, 50, 33)

    def double(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    found = restore_tiled(double, image, tile=32, overlap=8, scale=2)
    torch.testing.assert_close(found, double(image[None])[0])


def test_tiles_that_disagree_are_blended():
    """Each tile returns its number: without blending the result would jump by one."""
    count = iter(range(10))

    def numbered(x: torch.Tensor) -> torch.Tensor:
        return torch.full_like(x, next(count))

    found = restore_tiled(numbered, torch.rand(1, 1, 100), tile=40, overlap=20)[0, 0]
    steps = found.diff()
    assert float(found[0]) == 0
    assert float(found[-1]) == 3
    assert float(steps.min()) >= 0
    assert float(steps.max()) < 0.1


def test_progress_adds_up_to_one():
    shares = []
    restore_tiled(lambda x: x, torch.rand(3, 70, 70), tile=32, overlap=8, tick=shares.append)
    assert sum(shares) == pytest.approx(1)
    assert len(shares) == 9
