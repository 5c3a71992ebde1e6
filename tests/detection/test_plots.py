"""Every plot is written, is a real picture, and shows what it was given."""

import csv
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from detection.evaluate import score
from detection.formats import DetectionSet, ImageRecord
from detection.metrics import Detections
from detection.plots import (
    _panels,
    _read_columns,
    plot_confusion,
    plot_history,
    plot_labels,
    plot_precision_recall,
    save_samples,
)
from vision_ssm.data.images import read_image
from vision_ssm.errors import UserError
from vision_ssm.viz import class_color, save_picture

BOX = [10.0, 10.0, 50.0, 40.0]


@pytest.fixture
def dataset(tmp_path: Path) -> DetectionSet:
    """Three grey pictures with one box each, the last one to be ignored."""
    records = []
    for k in range(3):
        path = tmp_path / f"{k}.png"
        save_picture(path, np.full((60, 80, 3), 120, dtype=np.uint8))
        box, label = np.array([BOX], dtype=np.float32), np.array([k % 2])
        records.append(ImageRecord(path, 80, 60, box, label, np.array([k == 2]), np.array([1200.0]), k + 1))
    return DetectionSet(tmp_path, "val", "coco", ("cat", "dog"), (1, 2), tuple(records), ())


@pytest.fixture
def found() -> Detections:
    boxes = np.array([BOX, BOX, [60.0, 40.0, 78.0, 58.0]], dtype=np.float32)
    return Detections(np.array([1, 2, 2]), boxes, np.array([0.9, 0.8, 0.1]), np.array([0, 1, 0]))


def ink(path: Path) -> float:
    """Share of pixels that are not white."""
    image = read_image(path)
    assert min(image.shape[:2]) > 150
    return float((image.min(axis=2) < 250).mean())


def test_history(tmp_path: Path) -> None:
    table = tmp_path / "metrics.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "lr", "train/box", "val/AP", "val/AP50", "val/odd", "images_per_s"])
        writer.writerows(
            [[1, 0.1, 3.0, "", "", "", 10], [2, 0.05, 2.0, 0.2, 0.4, "nan", 10], [3, 0.0, 1.5, 0.3, 0.5, "", 9]]
        )
    columns = _read_columns(table)
    assert "val/odd" not in columns
    assert math.isnan(columns["val/AP"][0])
    assert columns["val/AP"][1:].tolist() == [0.2, 0.3]
    assert _panels(["lr", "train/box", "val/AP", "val/AP50"]) == [["train/box"], ["val/AP", "val/AP50"], ["lr"]]
    plot_history(table, tmp_path / "new" / "history.png")
    assert ink(tmp_path / "new" / "history.png") > 0.01


def test_history_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.csv"):
        plot_history(tmp_path / "none.csv", tmp_path / "a.png")
    (tmp_path / "empty.csv").write_text("epoch,lr\n")
    with pytest.raises(UserError, match="no epoch"):
        plot_history(tmp_path / "empty.csv", tmp_path / "a.png")


@pytest.mark.parametrize("classes", [2, 20])
def test_curves_confusion_and_labels(tmp_path: Path, dataset: DetectionSet, found: Detections, classes: int) -> None:
    names = tuple(f"class {k}" for k in range(classes))
    metrics = score(dataclasses.replace(dataset, names=names), found)
    plot_precision_recall(metrics, tmp_path / "pr.png")
    plot_confusion(metrics, tmp_path / "confusion.png")
    plot_labels(dataclasses.replace(dataset, names=names), tmp_path / "labels.png")
    for name in ("pr", "confusion", "labels"):
        assert ink(tmp_path / f"{name}.png") > 0.01


def test_a_set_without_boxes_can_be_plotted(tmp_path: Path, dataset: DetectionSet) -> None:
    none = dataclasses.replace(dataset.records[0], boxes=np.zeros((0, 4), np.float32), labels=np.zeros(0, np.int64))
    none = dataclasses.replace(none, ignore=np.zeros(0, bool), areas=np.zeros(0, np.float32))
    empty = dataclasses.replace(dataset, records=(none,))
    plot_labels(empty, tmp_path / "labels.png")
    nothing = Detections(np.zeros(0, np.int64), np.zeros((0, 4), np.float32), np.zeros(0), np.zeros(0, np.int64))
    metrics = score(empty, nothing)
    plot_precision_recall(metrics, tmp_path / "pr.png")
    plot_confusion(metrics, tmp_path / "confusion.png")
    save_samples(empty, nothing, tmp_path / "samples.png")
    assert all(ink(tmp_path / f"{name}.png") > 0.005 for name in ("labels", "pr", "confusion", "samples"))


def test_samples_show_truth_beside_confident_detections(
    tmp_path: Path, dataset: DetectionSet, found: Detections
) -> None:
    save_samples(dataset, found, tmp_path / "samples.png", count=2)
    image = read_image(tmp_path / "samples.png")
    counts = [int((image == class_color(k)).all(axis=2).sum()) for k in (0, 1)]
    # the first and the last picture: class 0 drawn as truth and as detection; the ignored box and score 0.1 are not
    assert counts[0] > 500
    assert counts[1] == 0
    half = image.shape[1] // 2
    first = (image[:, : half - 8] == class_color(0)).all(axis=2)
    assert first[:, : half // 2].sum() > 200
    assert first[:, half // 2 :].sum() > 200
