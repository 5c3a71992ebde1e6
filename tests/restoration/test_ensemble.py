"""The average over flips and turns: what it is, with masks, scales, strips and scores."""

import json
from pathlib import Path

import pytest
import torch

from restoration.evaluate import run_eval
from restoration.restorer import PictureRestorer, Route
from tests.restoration.photographs import as_image, photograph, write_set
from tests.restoration.tiny_weights import save_tiny

IMAGE = as_image(photograph(side=24))[:, :18]


def restored(weights: Path, image: torch.Tensor, known: torch.Tensor | None = None, **route) -> torch.Tensor:
    return PictureRestorer.from_pretrained(weights, None, device="cpu", route=Route(**route)).restore(
        image, known=known
    )


@pytest.mark.parametrize(("task", "scale", "channels"), [("denoise", 1, 3), ("sr2", 2, 3), ("inpaint", 1, 4)])
def test_the_mean_of_eight_results(tmp_path, task, scale, channels):
    weights = save_tiny(tmp_path / "w", task, scale=scale, in_channels=channels)
    known = (torch.rand(1, 18, 24) > 0.2).float() if channels == 4 else None
    parts = []
    for flip in (False, True):
        for turn in range(4):

            def turned(t, turn=turn, flip=flip):
                return torch.rot90(t, turn, (1, 2)).flip(2) if flip else torch.rot90(t, turn, (1, 2))

            one = restored(weights, turned(IMAGE), None if known is None else turned(known))
            parts.append(torch.rot90(one.flip(2) if flip else one, -turn, (1, 2)))
    plain, mean = parts[0], torch.stack(parts).mean(0)
    got = restored(weights, IMAGE, known, ensemble=True)
    assert got.shape == (3, 18 * scale, 24 * scale)
    torch.testing.assert_close(got, mean, atol=1e-6, rtol=0)
    assert (got - plain).abs().max() > 1e-3
    again = restored(weights, IMAGE.flip(2), None if known is None else known.flip(2), ensemble=True)
    torch.testing.assert_close(again.flip(2), got, atol=1e-6, rtol=0)


def test_strips_ticks_and_the_estimate(tmp_path):
    weights = save_tiny(tmp_path / "w")
    whole = restored(weights, IMAGE, ensemble=True)
    restorer = PictureRestorer.from_pretrained(weights, None, device="cpu", route=Route(ensemble=True, strip=5))
    shares = []
    strips = restorer.restore(IMAGE, scratch=tmp_path / "scratch", tick=shares.append)
    torch.testing.assert_close(strips, whole, atol=1e-5, rtol=0)
    assert sum(shares) == pytest.approx(1)
    assert not (tmp_path / "scratch").exists()
    one = PictureRestorer.from_pretrained(weights, None, device="cpu", route=Route(strip=5))
    assert restorer.plan(18, 24).pixels == 8 * one.plan(18, 24).pixels


def test_scored_beside_the_plain_network(tmp_path):
    weights = save_tiny(tmp_path / "w")
    write_set(tmp_path / "clean", 20)
    options = {"degradation": {"sigma": 25}, "limit": 1, "ensemble": True, "output": tmp_path / "out"}
    assert run_eval(tmp_path / "clean", task="denoise", weights=[weights], **options) == 0
    rows = json.loads((tmp_path / "out" / "scores.json").read_text())["means"]
    assert {row["method"] for row in rows} == {"input", "w", "w+"}
    psnr = {row["method"]: row["psnr"] for row in rows}
    assert psnr["w"] != psnr["w+"]
