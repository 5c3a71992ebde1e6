"""tools/photo_crops.py: squares with detail, at half the size or less; what cannot be done is one line."""

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image


def _run(*arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/photo_crops.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_squares_with_detail_are_kept(tmp_path):
    photos, crops = tmp_path / "photos", tmp_path / "crops"
    photos.mkdir()
    rng = np.random.default_rng(0)
    pixels = np.full((400, 600, 3), 128, np.uint8)
    blocks = rng.integers(0, 256, (50, 25, 3), dtype=np.uint8)
    pixels[:, :200] = blocks.repeat(8, axis=0).repeat(8, axis=1)  # stays sharp at half the size; the rest is flat
    Image.fromarray(pixels).save(photos / "a.png")
    done = _run(photos, crops, "--side", "100")
    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in crops.iterdir()) == ["photos_a_0_0.png", "photos_a_100_0.png"]
    crop = np.asarray(Image.open(crops / "photos_a_0_0.png")).astype(int)
    assert crop.shape == (100, 100, 3)
    middles = crop[1::4, 1::4]  # a block is 4 x 4 now; its inside keeps its colour
    assert np.abs(middles - pixels[2:200:8, 2:200:8].astype(int)).mean() < 20
    again = _run(photos, crops, "--side", "100")
    assert (again.returncode, "is not empty" in again.stderr) == (2, True)


def test_what_cannot_be_cut_is_one_line(tmp_path):
    done = _run(tmp_path / "none", tmp_path / "crops")
    assert done.returncode == 2
    assert done.stderr.startswith("error:")
    assert len(done.stderr.splitlines()) == 1
