"""Scores against numbers worked out by hand and against pycocotools used the ordinary way, from files."""

import contextlib
import dataclasses
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from detection.confusion import confusion_matrix
from detection.data import val_loader
from detection.evaluate import collect_detections, evaluate, score
from detection.formats import DetectionSet, ImageRecord
from detection.metrics import Detections
from detection.model import MambaYOLO
from detection.voc_ap import area_ap, eleven_point_ap
from vision_ssm.viz import save_picture


def record(
    image_id: int, boxes: list, labels: list, ignore: list | None = None, size: tuple = (100, 120)
) -> ImageRecord:
    corners = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    return ImageRecord(
        path=Path(f"{image_id}.jpg"),
        width=120,
        height=100,
        boxes=corners,
        labels=np.array(labels, dtype=np.int64),
        ignore=np.array(ignore or [False] * len(labels), dtype=bool),
        areas=np.prod(corners[:, 2:] - corners[:, :2], axis=1),
        image_id=image_id,
    )


def dataset(records: list[ImageRecord], form: str = "coco", names: tuple = ("cat", "dog")) -> DetectionSet:
    ids = tuple(range(1, len(names) + 1))
    return DetectionSet(Path("set"), "val", form, names, ids, tuple(records), ())


def detections(rows: list[tuple]) -> Detections:
    """Rows of (image id, label, score, x1, y1, x2, y2)."""
    table = np.array(rows, dtype=np.float64).reshape(-1, 7)
    return Detections(
        table[:, 0].astype(np.int64), table[:, 3:].astype(np.float32), table[:, 2], table[:, 1].astype(np.int64)
    )


A, B, FAR = [10, 10, 50, 50], [60, 60, 90, 90], [80, 0, 100, 20]


def test_perfect_and_silent(capsys: pytest.CaptureFixture) -> None:
    truth = dataset([record(0, [A, B], [0, 1]), record(7, [B], [0]), record(8, [], [])])
    metrics = score(truth, detections([(0, 0, 0.9, *A), (0, 1, 0.8, *B), (7, 0, 0.7, *B)]))
    assert [metrics.ap, metrics.ap50, metrics.voc_ap50, metrics.fitness] == pytest.approx([1.0] * 4)
    assert (metrics.images, metrics.boxes) == (3, 3)
    assert [(c.name, c.images, c.boxes) for c in metrics.per_class] == [("cat", 2, 2), ("dog", 1, 1)]
    assert math.isnan(metrics.ap_large)
    assert capsys.readouterr().out == ""


def test_average_precision_by_hand() -> None:
    """One class: right, wrong, right of three boxes. Envelope 1 to recall 1/3, then 2/3 to recall 2/3, then 0."""
    truth = dataset([record(1, [A], [0]), record(2, [A], [0]), record(3, [A], [0])], names=("cat",))
    metrics = score(truth, detections([(1, 0, 0.9, *A), (2, 0, 0.8, *FAR), (2, 0, 0.7, *A)]))
    assert metrics.voc_ap50 == pytest.approx(1 / 3 + 2 / 3 * 1 / 3)
    assert metrics.voc_ap50_11 == pytest.approx((4 * 1 + 3 * 2 / 3) / 11)
    assert metrics.ap50 == pytest.approx((34 * 1 + 33 * 2 / 3) / 101)
    assert metrics.precision.shape == (1, 101)
    assert metrics.precision[0, [0, 40, 80]] == pytest.approx([1, 2 / 3, 0])


def test_voc_curves_by_hand() -> None:
    precision, recall = np.array([1, 1 / 2, 2 / 3]), np.array([0.5, 0.5, 1.0])
    assert area_ap(precision, recall) == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert eleven_point_ap(precision, recall) == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    assert area_ap(np.zeros(0), np.zeros(0)) == eleven_point_ap(np.zeros(0), np.zeros(0)) == 0


@pytest.mark.parametrize("form", ["coco", "voc"])
def test_detections_on_ignored_boxes_count_as_nothing(form: str) -> None:
    truth = dataset([record(1, [A, B], [0, 0], [False, True])], form, names=("cat",))
    found = detections([(1, 0, 0.9, *B), (1, 0, 0.8, *B), (1, 0, 0.7, *A)])
    metrics = score(truth, found)
    assert (metrics.ap, metrics.voc_ap50) == pytest.approx((1.0, 1.0))
    assert metrics.boxes == 1
    assert metrics.confusion.tolist() == [[1, 0], [0, 0]]


def test_crowd_covers_a_part_but_difficult_needs_iou() -> None:
    """A quarter inside an ignored box: inside a COCO crowd it is forgiven, on a VOC difficult box it is wrong."""
    inside = (1, 0, 0.9, 60, 60, 75, 75)
    records = [record(1, [A, B], [0, 0], [False, True])]
    found = detections([inside, (1, 0, 0.8, *A)])
    assert score(dataset(records, "coco"), found).voc_ap50 == pytest.approx(1.0)
    assert score(dataset(records, "voc"), found).voc_ap50 == pytest.approx(0.5)


def test_nothing_found_and_nothing_to_find() -> None:
    nothing = detections([])
    assert score(dataset([record(1, [A], [0])]), nothing).ap == 0
    empty = score(dataset([record(1, [], [])]), nothing)
    assert math.isnan(empty.ap)
    assert empty.fitness == 0
    assert json.loads(json.dumps(empty.to_dict(), allow_nan=False))["AP"] is None
    assert "    -" in empty.table()


def test_table_names_every_class() -> None:
    table = score(dataset([record(1, [A, B], [0, 1])]), detections([(1, 0, 0.9, *A)])).table().splitlines()
    assert [line.split()[0] for line in table] == ["class", "all", "cat", "dog", "AP"]
    assert table[1].split()[1:5] == ["1", "2", "50.0", "50.0"]
    assert len({len(line) for line in table[1:4]}) == 1


def test_confusion_pairs_by_overlap() -> None:
    near = [12, 10, 52, 50]
    truth = dataset([record(5, [A, B], [0, 1])])
    found = detections([(5, 1, 0.9, *A), (5, 0, 0.95, *near), (5, 0, 0.5, *FAR), (5, 1, 0.2, *B)])
    # A is taken by the detection of class dog that fits exactly; near and FAR stay over; B was found too weakly
    assert confusion_matrix(truth, found).tolist() == [[0, 0, 2], [1, 0, 0], [0, 1, 0]]


def test_strangers_are_refused() -> None:
    truth = dataset([record(1, [A], [0])])
    with pytest.raises(ValueError, match="picture 9"):
        score(truth, detections([(9, 0, 0.5, *A)]))
    with pytest.raises(ValueError, match="class 2"):
        score(truth, detections([(1, 2, 0.5, *A)]))


def noisy(records: list[ImageRecord], classes: int) -> Detections:
    """Boxes of the truth moved a little, some with a wrong class, and some from nowhere."""
    generator = np.random.default_rng(0)
    rows = []
    for one in records:
        for box, label in zip(one.boxes, one.labels, strict=True):
            moved = box + generator.normal(0, 0.08, 4) * (box[2:] - box[:2]).repeat(2)
            wrong = generator.random() < 0.2
            rows.append((one.image_id, generator.integers(classes) if wrong else label, generator.random(), *moved))
        corner = generator.random(2) * 60
        rows.append((one.image_id, generator.integers(classes), generator.random(), *corner, *(corner + 30)))
    return detections(rows)


def test_equals_pycocotools_from_files(shared_root: Path, tmp_path: Path) -> None:
    """Sparse category ids, crowds and areas of the annotation, through files and loadRes."""
    source = shared_root / "data/detection/coco_subset/annotations/instances_val2017.json"
    content = json.loads(source.read_text())
    ids = tuple(sorted(category["id"] for category in content["categories"]))
    records = []
    for image in content["images"]:
        mine = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        boxes = np.array([a["bbox"] for a in mine], dtype=np.float32).reshape(-1, 4)
        records.append(
            ImageRecord(
                path=Path(image["file_name"]),
                width=image["width"],
                height=image["height"],
                boxes=np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), axis=1),
                labels=np.array([ids.index(a["category_id"]) for a in mine], dtype=np.int64),
                ignore=np.array([bool(a["iscrowd"]) for a in mine], dtype=bool),
                areas=np.array([a["area"] for a in mine], dtype=np.float32),
                image_id=image["id"],
            )
        )
    names = tuple(next(c["name"] for c in content["categories"] if c["id"] == i) for i in ids)
    found = noisy(records, len(ids))
    metrics = score(DetectionSet(Path("set"), "val", "coco", names, ids, tuple(records), ()), found)

    results = tmp_path / "results.json"
    results.write_text(json.dumps(found.to_coco_results(ids)))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(source))
        reference = COCOeval(truth, truth.loadRes(str(results)), "bbox")
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
    got = list(metrics.scalars().values())[:12]
    assert 0.1 < metrics.ap < 0.9
    assert got == pytest.approx(reference.stats.tolist(), abs=1e-4)


class Fixed(nn.Module):
    """Sees one 32x32 object of class 0 around (28, 36) in every picture, with score 0.9, and a hint of class 1."""

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        assert images.dtype == torch.float32
        assert float(images.max()) <= 1
        batch, _, height, width = images.shape
        raw = [torch.full((batch, 66, height // s, width // s), -20.0) for s in (8, 16, 32)]
        raw[0][:, 2:64:16, 4, 3] = 20  # bin 2 on each side of the cell centre: 16 px
        raw[0][:, 64:, 4, 3] = torch.logit(torch.tensor([0.9, 0.002]))
        return raw


def test_boxes_come_back_in_native_pixels() -> None:
    """The letterboxed picture is 0.8 times the size, with 4 px of padding at the left and 12 above."""
    truth = dataset([record(1, [A], [0]), record(4, [A], [0])])
    images = torch.full((2, 3, 96, 128), 255, dtype=torch.uint8)
    batch = {"images": images, "records": truth.records, "geometry": torch.tensor([[0.8, 4.0, 12.0]] * 2)}
    found = collect_detections(Fixed(), [batch], device="cpu")
    assert found.image_ids.tolist() == [1, 1, 4, 4]
    assert found.labels.tolist() == [0, 1, 0, 1]
    np.testing.assert_allclose(found.scores, [0.9, 0.002] * 2, rtol=1e-4)
    np.testing.assert_allclose(found.boxes, [A] * 4, atol=1e-3)
    metrics = evaluate(Fixed(), [batch], truth, device="cpu", amp=True, progress=True)
    assert metrics.per_class[0].ap == pytest.approx(1.0)
    assert len(collect_detections(Fixed(), [], device="cpu").scores) == 0


class BlueSpots(nn.Module):
    """A 32x32 box around each stride-8 cell whose centre is blue."""

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        batch, _, height, width = images.shape
        raw = [torch.full((batch, 65, height // s, width // s), -20.0) for s in (8, 16, 32)]
        raw[0][:, 2:64:16] = 20
        raw[0][:, 64] = torch.where(images[:, 2, 4::8, 4::8] - images[:, 0, 4::8, 4::8] > 0.6, 4.0, -20.0)
        return raw


def test_through_the_real_loader(tmp_path: Path) -> None:
    """Pictures of three shapes; every blue spot is a box of the truth, so that AP is 1 if boxes are mapped right."""
    generator = np.random.default_rng(0)
    records = []
    for k, (height, width) in enumerate([(96, 128), (128, 96), (256, 192), (64, 128)], start=1):
        scale = max(height, width) // 128
        x, y = 8 * scale * generator.integers(3, np.array([width, height]) // (8 * scale) - 3)
        image = np.full((height, width, 3), 120, dtype=np.uint8)
        image[y : y + 8 * scale, x : x + 8 * scale] = (0, 0, 255)
        centre, half = np.array([x, y]) + 4 * scale, 16 * scale
        one = record(k, [[*(centre - half), *(centre + half)]], [0])
        path = tmp_path / f"{k}.png"
        save_picture(path, image)
        records.append(dataclasses.replace(one, path=path, width=width, height=height))
    truth = dataset(records, names=("spot",))
    loader = val_loader(truth, image_size=128, batch_size=2)
    metrics = evaluate(BlueSpots(), loader, truth, device="cpu")
    assert metrics.ap == pytest.approx(1.0)
    assert metrics.boxes == 4


def test_real_network_gives_valid_detections(device: torch.device) -> None:
    truth = dataset([record(1, [A], [0]), record(2, [], [])])
    images = torch.randint(0, 255, (2, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = {"images": images, "records": truth.records, "geometry": torch.tensor([[0.6, 12.0, 2.0]] * 2)}
    torch.manual_seed(0)
    model = MambaYOLO("t", 2, stage_repeats=(1, 1, 1, 1)).eval().to(device)
    found = collect_detections(model, [batch], device=device, conf=0.0, max_det=10)
    assert found.image_ids.tolist() == [1] * 10 + [2] * 10
    assert (found.boxes[:, 2:] >= found.boxes[:, :2]).all()
    assert (found.boxes.min(axis=0) >= 0).all()
    assert (found.boxes.max(axis=0) <= (120, 100, 120, 100)).all()
    assert 0 <= score(truth, found).ap <= 1
