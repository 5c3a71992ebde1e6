"""From a set on disk to batches: reproducible training samples, validation batches that map back exactly."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.io import decode_image, read_file

from detection.data import TrainDataset, collate, loader_speed, save_batch_picture, val_loader
from detection.data_config import AugmentConfig
from detection.formats import DetectionSet, load_detection_set
from detection.letterbox import letterbox, rectangular_batches
from tests.detection.drawn_sets import draw, voc_tree, voc_xml, yolo_tree
from vision_ssm.errors import UserError
from vision_ssm.training.batches import SampleKey


@pytest.fixture
def small_set(tmp_path: Path) -> DetectionSet:
    """Five 64x48 pictures; the last has one `difficult` box."""
    boxes = {name: [("dog", 5, 5, 30, 40), ("cat", 20, 10, 60, 44)] for name in "abcd"}
    return load_detection_set(voc_tree(tmp_path, {"train": boxes | {"e": [("cat", 1, 1, 64, 48, 1)]}}), "train")


def _train(dataset: DetectionSet, **changes) -> TrainDataset:
    settings = {"image_size": 64, "config": AugmentConfig(close_mosaic=2), "epochs": 5} | changes
    return TrainDataset(dataset, **settings)


def test_a_sample_is_a_function_of_its_key(small_set: DetectionSet) -> None:
    data, cached = _train(small_set), _train(small_set, cache="ram")
    for key in (SampleKey(0, 0, 1), SampleKey(0, 4, 1), SampleKey(3, 2, 4)):
        first, again, from_memory = data[key], data[key], cached[key]
        for name in ("image", "labels", "boxes"):
            assert torch.equal(first[name], again[name])
            assert torch.equal(first[name], from_memory[name])
        assert first["image"].shape == (3, 64, 64)
        assert first["image"].dtype == torch.uint8
        assert (first["labels"].dtype, first["boxes"].dtype) == (torch.int64, torch.float32)
    images = [data[key]["image"] for key in (SampleKey(0, 0, 1), SampleKey(1, 0, 1), SampleKey(0, 1, 1))]
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def test_mosaic_stops_for_the_last_epochs(small_set: DetectionSet) -> None:
    still = AugmentConfig(mosaic=1, mixup=1, close_mosaic=2, translate=0, scale=0, hsv_h=0, hsv_s=0, hsv_v=0, flip_lr=0)
    data = _train(small_set, config=still)
    plain = [data[SampleKey(0, epoch, 0)]["image"] for epoch in (3, 4)]
    assert torch.equal(plain[0], plain[1])
    want = torch.from_numpy(letterbox(small_set.records[0].read(), 64, (64, 64))[0]).permute(2, 0, 1)
    assert torch.equal(plain[0], want)
    assert not torch.equal(data[SampleKey(0, 2, 0)]["image"], want)
    np.testing.assert_allclose(
        data[SampleKey(0, 4, 0)]["boxes"],
        [[17 / 64, 30 / 64, 26 / 64, 36 / 64], [39.5 / 64, 34.5 / 64, 41 / 64, 35 / 64]],
    )


def test_ignored_boxes_are_not_trained_on(small_set: DetectionSet) -> None:
    data = _train(small_set, config=AugmentConfig(mosaic=0))
    assert len(data[SampleKey(0, 0, 4)]["labels"]) == 0
    labels = torch.cat([data[SampleKey(0, 0, index)]["labels"] for index in range(5)])
    assert len(labels) == 8


def test_collate_numbers_the_pictures(small_set: DetectionSet) -> None:
    data = _train(small_set, config=AugmentConfig(mosaic=0, translate=0, scale=0))
    batch = collate([data[SampleKey(0, 0, index)] for index in (4, 0, 1)])
    assert batch["images"].shape == (3, 3, 64, 64)
    assert batch["batch_index"].tolist() == [1, 1, 2, 2]
    assert batch["labels"].tolist() == [1, 0, 1, 0]
    assert batch["boxes"].shape == (4, 4)
    assert ((batch["boxes"] > 0) & (batch["boxes"] < 1)).all()


def test_refusals(tmp_path: Path, small_set: DetectionSet, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = load_detection_set(yolo_tree(tmp_path / "y", {"train": {"a": "9 .5 .5 .1 .1"}}), "train")
    for make in (lambda: _train(broken), lambda: val_loader(broken, image_size=64)):
        with pytest.raises(UserError, match="unknown class 9"):
            make()
    (tmp_path / "e/images/train").mkdir(parents=True)
    empty = load_detection_set(yolo_tree(tmp_path / "e", {"train": {}}), "train")
    with pytest.raises(UserError, match="no pictures in its split 'train'"):
        _train(empty)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    with pytest.raises(UserError, match=r"cache: ram needs .* use cache: none"):
        _train(small_set, cache="ram")


def test_rectangular_shapes() -> None:
    sizes = [(640, 480), (480, 640), (640, 640), (1000, 250), (640, 482)]
    batches = rectangular_batches(sizes, 2, 640)
    assert [members for members, _ in batches] == [[3, 0], [4, 2], [1]]
    # ceil(side * 20 + 0.5) * 32 for sides 0.75 -> 16 and 1 -> 21
    assert [shape for _, shape in batches] == [(512, 672), (672, 672), (672, 512)]


def test_validation_boxes_map_back(tmp_path: Path) -> None:
    objects = [("dog", 11, 6, 40, 30), ("cat", 1, 1, 9, 9, 1)]
    root = voc_tree(tmp_path, {"val": dict.fromkeys("abc", objects)})
    draw(root / "JPEGImages/b.jpg", 48, 100)
    voc_xml(root / "Annotations/b.xml", objects, size=(48, 100))
    dataset = load_detection_set(root, "val")
    for rectangular in (True, False):
        loader = val_loader(dataset, image_size=96, batch_size=2, rectangular=rectangular)
        batches = list(loader)
        assert len(batches) == len(loader) == 2
        assert sorted(record.path.stem for batch in batches for record in batch["records"]) == ["a", "b", "c"]
        for batch in batches:
            height, width = batch["images"].shape[2:]
            assert height % 32 == width % 32 == 0
            assert batch["labels"].tolist() == [1] * len(batch["records"]), "difficult boxes are left out"
            for position, (record, geometry) in enumerate(zip(batch["records"], batch["geometry"], strict=True)):
                center, side = (batch["boxes"][position].view(2, 2) * torch.tensor([width, height])).unbind()
                corners = torch.cat((center - side / 2, center + side / 2))
                native = (corners - geometry[1:].repeat(2)) / geometry[0]
                np.testing.assert_allclose(native, record.boxes[0], atol=1e-3)
    assert batches[0]["images"].shape == (2, 3, 96, 96)


def test_letterboxed_pixels_are_where_geometry_says() -> None:
    image = np.zeros((50, 100, 3), np.uint8)
    image[20:30, 40:60] = 255
    padded, (ratio, left, top) = letterbox(image, 64)
    assert padded.shape == (32, 64, 3)
    rows, columns = (np.flatnonzero((padded[..., 0] > 127).any(axis)) for axis in (1, 0))
    assert (ratio, left, top) == (0.64, 0, 0)
    np.testing.assert_allclose((columns[0], columns[-1] + 1), (40 * 0.64, 60 * 0.64), atol=1)
    np.testing.assert_allclose((rows[0], rows[-1] + 1), (20 * 0.64, 30 * 0.64), atol=1)
    padded, (_, left, top) = letterbox(image, 64, (96, 96))
    assert (left, top) == (16, 32)
    assert (padded[:32] == 114).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_picture_is_one_message(small_set: DetectionSet, workers: int) -> None:
    small_set.records[2].path.write_bytes(b"gone")
    loader = val_loader(small_set, image_size=64, workers=workers)
    with pytest.raises(UserError, match=r"c\.jpg") as caught:
        list(loader)
    assert "Traceback" not in str(caught.value)


def test_speed_and_picture(small_set: DetectionSet, tmp_path: Path) -> None:
    data = _train(small_set)
    assert loader_speed(data, batch_size=2, workers=1, batches=2) > 1
    batch = collate([data[SampleKey(0, 0, index)] for index in range(4)])
    save_batch_picture(batch, tmp_path / "first.png", small_set.names)
    picture = decode_image(read_file(str(tmp_path / "first.png")))
    assert min(picture.shape[1:]) >= 128
    bare = dict(batch, boxes=batch["boxes"][:0], labels=batch["labels"][:0], batch_index=batch["batch_index"][:0])
    save_batch_picture(bare, tmp_path / "bare.png", small_set.names)
    assert not torch.equal(picture, decode_image(read_file(str(tmp_path / "bare.png")))), "boxes are drawn"


def test_real_sets_load(shared_root: Path) -> None:
    for name in ("bccd", "cards", "coco_subset"):
        dataset = load_detection_set(shared_root / "data/detection" / name, "train")
        data = TrainDataset(dataset, image_size=160, config=AugmentConfig(mixup=0.5), epochs=20)
        batch = collate([data[SampleKey(0, 0, index)] for index in range(4)])
        assert batch["images"].shape == (4, 3, 160, 160)
        assert len(batch["labels"]) > 3
        assert int(batch["labels"].max()) < len(dataset.names)
