"""Sample sets from wheels: tree tiles (of a small stand-in wheel, and the real one when cached) and digit scenes."""

import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detection.check import check
from detection.formats import load_detection_set
from detection.samples import make_sample, make_scenes, make_trees, trees
from vision_ssm.errors import UserError


def _photograph(width: int, height: int, boxes: list[tuple[int, int, int, int]]) -> tuple[bytes, bytes]:
    """(png, xml) of a picture with a white rectangle in each (1-based, inclusive) box."""
    image = np.zeros((height, width, 3), np.uint8)
    objects = ""
    for x1, y1, x2, y2 in boxes:
        image[y1 - 1 : y2, x1 - 1 : x2] = 255
        corners = f"<xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
        objects += f"<object><name>Tree</name><bndbox>{corners}</bndbox></object>"
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "png")
    return stream.getvalue(), f"<annotation>{objects}</annotation>".encode()


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel of drawn photographs in the place of the real one, in a cache of its own."""
    path = tmp_path / "cache" / trees.WHEEL
    path.parent.mkdir()
    boxes = [(1, 1, 30, 20), (391, 101, 430, 140), (581, 301, 620, 340)]
    with zipfile.ZipFile(path, "w") as archive:
        for name, size in (
            ("2019_YELL_2_528000_4978000_image_crop2", (650, 420)),
            ("2019_YELL_2_541000_4977000_image_crop", (650, 400)),
            ("OSBS_029", (400, 400)),
        ):
            png, xml = _photograph(*size, [box for box in boxes if box[2] <= size[0]])
            archive.writestr(f"deepforest/data/{name}.png", png)
            archive.writestr(f"deepforest/data/{name}.xml", xml)
        archive.writestr("deepforest-2.1.0.dist-info/licenses/LICENSE", "MIT License")
    monkeypatch.setenv("VISION_SSM_CACHE", str(path.parent))
    monkeypatch.setattr(trees, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_tiles_cover_the_photograph() -> None:
    assert trees.tile_corners(400, 400) == [(0, 0)]
    assert trees.tile_corners(650, 420) == [(x, y) for y in (0, 20) for x in (0, 200, 250)]
    corners = trees.tile_corners(2299, 2472)
    assert len(corners) == len(set(corners)) == 11 * 12
    assert corners[-1] == (1899, 2072)


def test_boxes_belong_to_tiles_that_show_half_of_them() -> None:
    boxes = np.array([[190, 10, 210, 30], [189, 10, 209, 30], [500, 500, 520, 520], [590, 10, 650, 30]], float)
    np.testing.assert_array_equal(trees.tile_boxes(boxes, 200, 0), [[0, 10, 10, 30]])
    np.testing.assert_array_equal(trees.tile_boxes(boxes, 250, 0), [[340, 10, 400, 30]])


@pytest.mark.usefixtures("wheel")
def test_tree_tiles(tmp_path: Path) -> None:
    folder = tmp_path / "trees"
    assert make_trees(folder)
    sets = {split: load_detection_set(folder, split) for split in ("train", "val", "test")}
    assert [len(one.records) for one in sets.values()] == [6, 3, 1]
    assert all(one.names == ("tree",) for one in sets.values())
    boxes = 0
    for record in (record for one in sets.values() for record in one.records):
        image = record.read()
        assert image.shape == (400, 400, 3)
        for x1, y1, x2, y2 in record.boxes.astype(int):
            assert (image[y1:y2, x1:x2] == 255).all(), record.path
            boxes += 1
    assert boxes > 12
    assert check(folder).exit_code(strict=True) == 0
    assert (folder / "LICENSE").read_text() == "MIT License"
    assert "MIT licence" in (folder / "CREDIT.txt").read_text()
    assert Image.open(folder / "photos/val.png").size == (650, 400)
    assert not make_trees(folder), "made before"


def test_what_cannot_be_downloaded_is_said(tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel.unlink()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(UserError, match=r"needs the wheel deepforest-2\.1\.0[\s\S]*VISION|cache") as caught:
        make_trees(tmp_path / "trees")
    assert str(wheel.parent) in str(caught.value)
    assert not (tmp_path / "trees").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["cache"], "nothing half-made is left"


def test_a_wrong_wheel_is_refused(tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = wheel.read_bytes()
    wheel.write_bytes(content + b"x")

    def download(folder: Path) -> Path:
        (folder / wheel.name).write_bytes(content + b"y")
        return folder / wheel.name

    monkeypatch.setattr(trees, "_download", download)
    with pytest.raises(UserError, match="SHA-256 differs"):
        make_trees(tmp_path / "trees")


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    for make in (make_trees, make_scenes):
        with pytest.raises(UserError, match="holds other files"):
            make(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_scenes(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    assert make_scenes(tmp_path / "one", train=12, val=6, size=128)
    make_scenes(tmp_path / "same", train=12, val=6, size=128)
    make_scenes(tmp_path / "other", train=12, val=6, size=128, seed=1)
    files = {name: sorted((tmp_path / name).rglob("*0.*")) for name in ("one", "same", "other")}
    contents = {name: [path.read_bytes() for path in paths] for name, paths in files.items()}
    assert contents["one"] == contents["same"]
    assert contents["one"] != contents["other"]
    report = check(tmp_path / "one")
    assert report.findings == ()
    assert set(report.names) <= {"zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"}
    assert [split.pictures for split in report.splits] == [12, 6]
    for record in load_detection_set(tmp_path / "one", "val").records:
        sides = record.boxes[:, 2:] - record.boxes[:, :2]
        assert sides.max(1).min() > 16
        image = record.read().astype(int)
        for x1, y1, x2, y2 in record.boxes.astype(int):
            ink = np.ptp(image[y1:y2, x1:x2], axis=2)
            assert ink.max() > 50, "a coloured digit in every box"
    with pytest.raises(UserError, match="at least"):
        make_scenes(tmp_path / "none", train=0)


def test_scenes_without_their_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match="pip install scikit-learn scikit-image"):
        make_scenes(tmp_path / "scenes")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(
    not (trees.cache_folder() / trees.WHEEL).is_file(), reason="the wheel is not cached: `vssm detect data trees DIR`"
)
def test_the_real_tree_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_sample("trees", tmp_path / "trees")
    assert (
        "train 132 pictures, 2208 boxes; val 30 pictures, 978 boxes; test 1 pictures, 61 boxes"
        in capsys.readouterr().out
    )
    assert Image.open(tmp_path / "trees/photos/val.png").size == (1249, 1035)
