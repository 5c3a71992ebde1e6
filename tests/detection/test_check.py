"""The data check: what it reports, how severe it is, and exactly what it finds on real sets."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from detection.check import check, check_all, run_check
from tests.detection.drawn_sets import draw, voc_tree, voc_xml, yolo_tree
from vision_ssm.errors import UserError

_BOX = ("dog", 1, 1, 9, 9)


def _places(report, severity: str) -> list[str]:
    return [f"{f.file} {f.where}".strip() for f in report.of(severity)]


def test_counts_and_histogram(tmp_path: Path) -> None:
    objects = {"a": [_BOX, _BOX, ("cat", 1, 1, 5, 5, 1)], "b": []}
    report = check(voc_tree(tmp_path, {"train": objects, "val": {"c": [("cat", 2, 2, 9, 9)]}}))
    train, val = report.splits
    assert (train.pictures, train.boxes, train.ignored, train.empty) == (2, 2, 1, 1)
    assert report.names == ("cat", "dog")
    assert (train.histogram.tolist(), val.histogram.tolist()) == ([0, 2], [1, 0])
    page = str(report)
    for line in ("train         2      2        1              1", "dog        2    0", "0 errors", "1 note"):
        assert line in page, page


def test_severities_and_exit_codes(tmp_path: Path) -> None:
    root = voc_tree(tmp_path, {"train": {name: [_BOX] for name in "abc"}, "val": {"d": [_BOX]}})
    assert check(root).exit_code(strict=True) == 0
    voc_xml(root / "Annotations/a.xml", [_BOX, ("dog", 5, 5, 5, 9)])
    cv2.imwrite(str(root / "JPEGImages/b.jpg"), np.zeros((48, 64), np.uint8))
    warned = check(root)
    assert _places(warned, "warning") == ["Annotations/a.xml object 2 (dog)"]
    assert _places(warned, "note") == ["JPEGImages/b.jpg"]
    assert (warned.exit_code(), warned.exit_code(strict=True), run_check(root)) == (0, 1, 0)
    whole = (root / "JPEGImages/c.jpg").read_bytes()
    (root / "JPEGImages/c.jpg").write_bytes(whole[: len(whole) // 2])
    broken = check(root)
    assert _places(broken, "error") == ["JPEGImages/c.jpg"]
    assert "cut off" in broken.of("error")[0].rule
    assert (broken.exit_code(), run_check(root)) == (1, 1)


def test_every_finding_names_its_cure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = yolo_tree(tmp_path, {"train": {"a": "5 .5 .5 .1 .1", "b": "0 .9 .5 .5 .1"}, "val": {"c": "0 .5 .5 .1 .1"}})
    draw(root / "images/train/large.jpg", 64, 48)
    (root / "images/train/large.jpg").write_bytes(b"nothing")
    report = check(root)
    assert _places(report, "error") == ["labels/train/a.txt line 1", "images/train/large.jpg"]
    assert _places(report, "warning") == ["labels/train/b.txt line 1"]
    assert all(finding.rule and finding.fix for finding in report.findings)
    assert run_check(root) == 1
    printed = capsys.readouterr().out
    assert [f for f in report.findings if f"{f.rule}; {f.fix}" not in printed] == []


def test_size_mismatch_shared_pictures_and_broken_split(tmp_path: Path) -> None:
    root = voc_tree(tmp_path, {"train": {"a": [_BOX], "b": [_BOX]}, "val": {"a": [_BOX]}})
    voc_xml(root / "Annotations/b.xml", [_BOX], size=(640, 480))
    report = check(root)
    assert "annotation says 640x480" in report.of("error")[0].rule
    assert "training split too" in report.of("warning")[0].rule
    assert len(report.findings) == 2


def test_a_folder_of_sets_and_none(tmp_path: Path) -> None:
    voc_tree(tmp_path / "one", {"train": {"a": [_BOX]}})
    yolo_tree(tmp_path / "two", {"train": {"a": ""}})
    assert [(report.root.name, report.format) for report in check_all(tmp_path)] == [("one", "voc"), ("two", "yolo")]
    with pytest.raises(UserError, match="no annotations found"):
        check_all(tmp_path / "one/JPEGImages")


def test_real_sets_have_exactly_the_known_defects(shared_root: Path) -> None:
    bccd, cards, coco = check_all(shared_root / "data/detection")
    assert sorted(_places(bccd, "warning")) == [
        "Annotations/BloodImage_00338.xml object 13 (RBC)",
        "Annotations/BloodImage_00343.xml object 4 (RBC)",
    ]
    assert sorted(_places(coco, "note")) == ["train2017/000000000086.jpg", "train2017/000000000508.jpg"]
    assert {f.file: f.rule for f in coco.findings} == {
        "train2017/000000000086.jpg": "grey picture, used as RGB",
        "train2017/000000000508.jpg": "picture without boxes",
    }
    assert (len(bccd.findings), len(cards.findings), len(coco.findings)) == (2, 0, 2)
    assert [report.exit_code() for report in (bccd, cards, coco)] == [0, 0, 0]
    assert [report.exit_code(strict=True) for report in (bccd, cards, coco)] == [1, 0, 0]
    assert [split.boxes for split in bccd.splits] == [2804, 1137, 945]
