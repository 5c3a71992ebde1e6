"""Readers of COCO, VOC and YOLO, each against boxes worked out by hand, and the oddities people's data has."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detection.formats import available_splits, coco, detect_format, find_sets, load_detection_set
from detection.formats.voc import VOC_CLASSES
from tests.detection.drawn_sets import coco_json, draw, voc_tree, voc_xml, yolo_tree
from vision_ssm.errors import UserError


def _errors(dataset) -> list[str]:
    return [f"{f.file} {f.where}: {f.rule}" for f in dataset.findings if f.severity == "error"]


def _coco(root: Path, annotations: list[dict], *, folder: str = "train2017", **image) -> Path:
    draw(root / folder / "a.jpg")
    draw(root / folder / "b.jpg")
    images = [{"id": 7, "file_name": "a.jpg", "width": 64, "height": 48, **image}]
    images.append({"id": 3, "file_name": "b.jpg", "width": 64, "height": 48})
    coco_json(root / "annotations/instances_train2017.json", images, annotations, {5: "cat", 90: "dog"})
    return root


def test_coco_boxes_sparse_ids_crowd_and_areas(tmp_path: Path) -> None:
    annotations = [
        {"image_id": 3, "category_id": 90, "bbox": [1, 2, 10, 20], "area": 55.5, "iscrowd": 0},
        {"image_id": 7, "category_id": 5, "bbox": [0, 0, 64, 48], "iscrowd": 1},
        {"image_id": 3, "category_id": 5, "bbox": [4.5, 4, 3, 3], "area": 9},
    ]
    dataset = load_detection_set(_coco(tmp_path, annotations), "train")
    assert (dataset.format, dataset.names, dataset.category_ids) == ("coco", ("cat", "dog"), (5, 90))
    first, second = dataset.records
    assert (first.image_id, second.image_id) == (7, 3)
    np.testing.assert_array_equal(first.boxes, np.array([[0, 0, 64, 48]], np.float32))
    np.testing.assert_array_equal(second.boxes, np.array([[1, 2, 11, 22], [4.5, 4, 7.5, 7]], np.float32))
    assert second.labels.tolist() == [1, 0]
    assert first.ignore.tolist() == [True]
    assert second.ignore.tolist() == [False, False]
    np.testing.assert_array_equal(second.areas, np.array([55.5, 9], np.float32))
    assert first.areas.tolist() == [64 * 48]
    assert dataset.findings == ()


@pytest.mark.parametrize("folder", ["train2017", "images/train2017", "train", "images/train", "images", "."])
def test_coco_finds_its_pictures(tmp_path: Path, folder: str) -> None:
    dataset = load_detection_set(_coco(tmp_path, [], folder=folder), "train")
    assert [record.read().shape for record in dataset.records] == [(48, 64, 3)] * 2


def test_coco_export_beside_the_pictures(tmp_path: Path) -> None:
    for split, categories in (("train", {1: "cat"}), ("valid", {1: "cat", 2: "dog"})):
        draw(tmp_path / split / "a.jpg")
        image = {"id": 0, "file_name": "a.jpg", "width": 64, "height": 48}
        box = {"image_id": 0, "category_id": 1, "bbox": [0, 0, 9, 9]}
        coco_json(tmp_path / split / "_annotations.coco.json", [image], [box], categories)
    assert available_splits(tmp_path) == ("train", "val")
    assert load_detection_set(tmp_path, "train").names == ("cat", "dog"), "classes are the union of the splits"
    assert len(load_detection_set(tmp_path, "val").records[0].boxes) == 1


def test_coco_missing_sizes_come_from_the_picture(tmp_path: Path) -> None:
    box = {"image_id": 7, "category_id": 5, "bbox": [0, 0, 64, 48]}
    record = load_detection_set(_coco(tmp_path, [box], width=None, height=0), "train").records[0]
    assert (record.width, record.height) == (64, 48)


def test_coco_defects(tmp_path: Path) -> None:
    annotations = [
        {"image_id": 7, "category_id": 6, "bbox": [0, 0, 5, 5]},
        {"image_id": 8, "category_id": 5, "bbox": [0, 0, 5, 5]},
        {"image_id": 7, "category_id": 5, "bbox": [0, 0, 5]},
        {"image_id": 7, "category_id": 5, "bbox": [3, 3, 0, 5]},
        {"image_id": 7, "category_id": 5, "bbox": [70, 3, 5, 5]},
        {"image_id": 7, "category_id": 5, "bbox": [60, 40, 10, 5]},
        {"image_id": 7, "category_id": 5, "bbox": [60, 40, 5, 5]},
        {"image_id": 7, "category_id": 5, "bbox": [float("nan"), 40, 5, 5]},
    ]
    dataset = load_detection_set(_coco(tmp_path, annotations), "train")
    text = "\n".join(_errors(dataset))
    for wanted in ("annotation 1: unknown class 6", "annotation 2: refers to picture id 8", "a bbox of four numbers"):
        assert wanted in text
    warnings = [(f.where.split()[1], f.rule) for f in dataset.findings if f.severity == "warning"]
    assert [number for number, _ in warnings] == ["4", "5", "6", "8"], "5 pixels wide, 1 outside: rounding, no warning"
    for (_, rule), wanted in zip(warnings, ("no area", "outside the picture", "clipped", "not a number"), strict=True):
        assert wanted in rule
    np.testing.assert_array_equal(dataset.records[0].boxes, np.array([[60, 40, 64, 45]] * 2, np.float32))
    with pytest.raises(UserError, match=r"3 errors[\s\S]*vssm detect check"):
        dataset.refuse_errors()


def test_coco_broken_files(tmp_path: Path) -> None:
    path = _coco(tmp_path, []) / "annotations/instances_train2017.json"
    whole = path.read_text()
    path.write_text(whole[:-1])
    with pytest.raises(UserError, match="no readable json"):
        load_detection_set(tmp_path, "train")
    path.write_text(json.dumps({"categories": [{"id": 1, "name": "a"}], "images": []}))
    with pytest.raises(UserError, match="no list 'annotations'"):
        load_detection_set(tmp_path, "train")
    path.write_text(json.dumps([1]))
    with pytest.raises(UserError, match="no list 'images'"):
        load_detection_set(tmp_path, "train")
    path.write_text(whole)
    coco_json(tmp_path / "annotations/instances_val2017.json", [], [], {5: "bird"})
    with pytest.raises(UserError, match="category 5"):
        load_detection_set(tmp_path, "train")
    with pytest.raises(UserError, match="no split 'test'"):
        load_detection_set(tmp_path, "test")


def test_missing_pictures_are_errors(tmp_path: Path) -> None:
    _coco(tmp_path, [{"image_id": 3, "category_id": 5, "bbox": [0, 0, 5, 5]}])
    (tmp_path / "train2017/b.jpg").unlink()
    dataset = load_detection_set(tmp_path, "train")
    assert len(dataset.records) == 1
    (error,) = _errors(dataset)
    assert "train2017/b.jpg" in error
    assert "No such file" in error


def test_voc_corners_difficult_and_class_union(tmp_path: Path) -> None:
    root = voc_tree(
        tmp_path,
        {
            "train": {"a": [("dog", 1, 1, 64, 48), ("cat", 11, 6, 20, 10, 1)], "empty": []},
            "val": {"b": [("bird", 5, 5, 5, 9), ("cat", 5, 5, 6, 9)]},
        },
    )
    train, val = load_detection_set(root, "train"), load_detection_set(root, "val")
    assert train.names == val.names == ("bird", "cat", "dog")
    assert (train.format, train.category_ids) == ("voc", (1, 2, 3))
    np.testing.assert_array_equal(train.records[0].boxes, np.array([[0, 0, 64, 48], [10, 5, 20, 10]], np.float32))
    assert train.records[0].labels.tolist() == [2, 1]
    assert train.records[0].ignore.tolist() == [False, True]
    assert len(train.records[1].boxes) == 0
    assert [f.where for f in val.findings] == ["object 1 (bird)"]
    assert "has no area" in val.findings[0].rule
    np.testing.assert_array_equal(val.records[0].boxes, np.array([[4, 4, 6, 9]], np.float32))


def test_voc_given_names_and_defects(tmp_path: Path) -> None:
    root = voc_tree(
        tmp_path, {"train": {"a": [("dog", 1, 1, 9, 9), ("cow", 1, 1, 9, 9), ("dog", "x", 1, 9, 9)], "b": []}}
    )
    (root / "Annotations/b.xml").write_text("<annotation><object>")
    with (root / "ImageSets/Main/train.txt").open("a") as listing:
        listing.write("c  1\n\n")
    dataset = load_detection_set(root, "train", names=["cat", "dog"])
    assert dataset.names == ("cat", "dog")
    assert dataset.records[0].labels.tolist() == [1]
    text = "\n".join(_errors(dataset))
    for wanted in ("b.xml : broken xml", "c.xml : annotation file not found", "object 2 (cow): unknown class 'cow'"):
        assert wanted in text
    assert "object 3 (dog): object without a bndbox" in text


def test_voc_without_size_and_other_endings(tmp_path: Path) -> None:
    root = voc_tree(tmp_path, {"train": {"a": []}})
    voc_xml(root / "Annotations/a.xml", [("dog", 1, 1, 70, 90)], size=None)
    (root / "JPEGImages/a.jpg").unlink()
    draw(root / "JPEGImages/a.png", width=80, height=90)
    record = load_detection_set(root, "train").records[0]
    assert (record.width, record.height, record.path.name) == (80, 90, "a.png")
    np.testing.assert_array_equal(record.boxes, np.array([[0, 0, 70, 90]], np.float32))


def test_voc_devkit_union(tmp_path: Path) -> None:
    kit = tmp_path / "VOCdevkit"
    box = [("dog", 1, 1, 9, 9)]
    voc_tree(kit / "VOC2007", {"trainval": {"07a": box, "07b": box}, "test": {"07t": box}, "train": {"07a": box}})
    voc_tree(kit / "VOC2012", {"trainval": {"12a": box}, "train": {"12a": box}})
    for root in (tmp_path, kit):
        train, val = load_detection_set(root, "train"), load_detection_set(root, "val")
        assert [record.path.stem for record in train.records] == ["07a", "07b", "12a"]
        assert [record.path.stem for record in val.records] == ["07t"]
        assert train.names == VOC_CLASSES
        assert train.records[0].labels.tolist() == [VOC_CLASSES.index("dog")]
    assert [record.path.stem for record in load_detection_set(kit / "VOC2007", "train").records] == ["07a"]
    voc_tree(kit / "VOC2012", {"trainval": {"12a": [("gnu", 1, 1, 9, 9)]}})
    assert load_detection_set(kit, "train").names == ("dog", "gnu"), "own classes in VOC's folders"


def test_voc_side_by_side(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        draw(tmp_path / split / "a.jpg")
        voc_xml(tmp_path / split / "a.xml", [("dog", 1, 1, 9, 9)])
    assert available_splits(tmp_path) == ("train", "val")
    assert load_detection_set(tmp_path, "val").records[0].read().shape == (48, 64, 3)


def test_yolo_boxes_polygons_and_empty(tmp_path: Path) -> None:
    text = "0 0.5 0.5 0.5 0.25\n\n1 0.25 0.5 0.75 0.5 0.5 0.75\n"
    root = yolo_tree(tmp_path, {"train": {"a": text, "b": "", "c": ""}, "val": {"d": "1 .1 .1 .1 .1"}})
    (root / "labels/train/c.txt").unlink()
    dataset = load_detection_set(root, "train")
    assert (dataset.format, dataset.names, dataset.category_ids) == ("yolo", ("cat", "dog"), (0, 1))
    np.testing.assert_allclose(dataset.records[0].boxes, [[16, 18, 48, 30], [16, 24, 48, 36]])
    assert dataset.records[0].labels.tolist() == [0, 1]
    assert [len(record.boxes) for record in dataset.records[1:]] == [0, 0]
    assert dataset.findings == ()


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("2 .5 .5 .1 .1", "unknown class 2, allowed are 0 to 1"),
        ("0.5 .5 .5 .1 .1", "unknown class 0.5"),
        ("0 .5 .5 .1", "4 columns"),
        ("0 32 24 10 10", "pixels instead of fractions"),
        ("cat .5 .5 .1 .1", "not a line of numbers"),
        ("nan .5 .5 .1 .1", "unknown class nan"),
    ],
)
def test_yolo_bad_lines_are_errors(tmp_path: Path, line: str, rule: str) -> None:
    root = yolo_tree(tmp_path, {"train": {"a": f"0 .5 .5 .1 .1\n{line}"}})
    (error,) = _errors(load_detection_set(root, "train"))
    assert error.startswith("labels/train/a.txt line 2: ")
    assert rule in error


def test_yolo_yaml_forms(tmp_path: Path) -> None:
    root = yolo_tree(tmp_path / "set", {"train": {"a": "", "b": ""}}, names={0: "cat"})
    (root / "data.yaml").write_text("path: .\ntrain: [images/train]\nval: val.txt\nnames: {0: cat}\nnc: 1\n")
    (root / "val.txt").write_text("./images/train/b.jpg\n")
    assert [r.path.name for r in load_detection_set(root, "val").records] == ["b.jpg"]
    assert load_detection_set(root / "data.yaml", "train").names == ("cat",)
    (root / "data.yaml").write_text("train: ../images/train\nval: nowhere\nnames: [cat]\n")
    with pytest.raises(UserError, match="'nowhere', which is not there"):
        load_detection_set(root, "train")
    (root / "data.yaml").write_text("train: ../images/train\nnames: cat\n")
    with pytest.raises(UserError, match="must be a list"):
        load_detection_set(root, "train")
    (root / "data.yaml").write_text("train: [unclosed\n")
    with pytest.raises(UserError, match="no readable yaml"):
        load_detection_set(root, "train")


@pytest.mark.parametrize("annotated", ["stored", "shown", "unsaid"])
def test_annotation_size_decides_the_frame_of_exif_rotated_pictures(tmp_path: Path, annotated: str) -> None:
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:8, :8] = 255  # a mark in the first corner as stored
    exif = Image.Exif()
    exif[0x0112] = 6  # turned clockwise the mark is in the upper right corner
    size = {"stored": (64, 48), "shown": (48, 64), "unsaid": None}[annotated]
    mark = (1, 1, 8, 8) if annotated == "stored" else (41, 1, 48, 8)
    root = voc_tree(tmp_path, {"train": {"a": []}})
    Image.fromarray(pixels).save(root / "JPEGImages/a.jpg", exif=exif, quality=100)
    voc_xml(root / "Annotations/a.xml", [("mark", *mark)], size=size)
    record = load_detection_set(root, "train").records[0]
    x1, y1, x2, y2 = record.boxes[0].astype(int)
    image = record.read()
    assert image.shape[:2] == (record.height, record.width)
    assert image[y1:y2, x1:x2].min() > 200
    assert image.astype(int).sum() < 8 * 8 * 3 * 255 * 1.2


def test_size_mismatch_is_refused(tmp_path: Path) -> None:
    root = voc_tree(tmp_path, {"train": {"a": []}})
    voc_xml(root / "Annotations/a.xml", [], size=(640, 480))
    with pytest.raises(UserError, match=r"a\.jpg is 64x48 pixels, its annotation says 640x480"):
        load_detection_set(root, "train").records[0].read()


def test_unknown_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        detect_format(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no annotations found[\s\S]*COCO:[\s\S]*VOC:[\s\S]*YOLO:"):
        detect_format(tmp_path)
    voc_tree(tmp_path / "one", {"train": {"a": []}})
    yolo_tree(tmp_path / "two", {"train": {"a": ""}})
    assert [folder.name for folder in find_sets(tmp_path)] == ["one", "two"]


@pytest.mark.parametrize(("name", "splits"), [("bccd", ("train", "val", "test")), ("cards", ("train", "val"))])
def test_real_xml_and_json_agree(shared_root: Path, name: str, splits: tuple[str, ...]) -> None:
    root = shared_root / "data/detection" / name
    for split in splits:
        xml = load_detection_set(root, split)
        other = coco.load(root, split, names=xml.names)
        assert xml.format == "voc"
        by_name = {record.path.name: record for record in other.records}
        assert len(by_name) == len(xml.records)
        for record in xml.records:
            np.testing.assert_array_equal(record.boxes, by_name[record.path.name].boxes, err_msg=record.path.name)
            np.testing.assert_array_equal(record.labels, by_name[record.path.name].labels)


def test_real_coco(shared_root: Path) -> None:
    root = shared_root / "data/detection/coco_subset"
    train, val = load_detection_set(root, "train"), load_detection_set(root, "val")
    assert (len(train.names), train.category_ids[-1]) == (80, 90)
    assert [sum(len(r.boxes) for r in s.records) for s in (train, val)] == [181, 174]
    assert sum(int(r.ignore.sum()) for s in (train, val) for r in s.records) == 3
    assert train.findings == val.findings == ()


def test_oddities_of_hand_made_coco_files_are_findings(tmp_path: Path) -> None:
    box = {"image_id": 7, "category_id": 5, "bbox": [0, 0, 5, 5]}
    odd = [{**box, "category_id": [5]}, {**box, "image_id": {}}, {**box, "area": "large"}]
    dataset = load_detection_set(_coco(tmp_path / "boxes", [box, *odd]), "train")
    assert len(dataset.records[0].boxes) == 1
    assert len(_errors(dataset)) == 3
    dataset = load_detection_set(_coco(tmp_path / "sizes", [], width=float("inf")), "train")
    assert ["whole numbers for width and height" in error for error in _errors(dataset)] == [True]
    dataset = load_detection_set(_coco(tmp_path / "names", [], file_name="a\0.jpg"), "train")
    assert ["cannot read the picture" in error for error in _errors(dataset)] == [True]


@pytest.mark.parametrize("width", ["nan", "inf", "-3", "wide"])
def test_voc_size_that_is_no_size_is_read_from_the_picture(tmp_path: Path, width: str) -> None:
    root = voc_tree(tmp_path, {"train": {"a": [("cat", 1, 1, 9, 9)]}})
    xml = root / "Annotations/a.xml"
    xml.write_text(xml.read_text().replace("<width>64<", f"<width>{width}<"))
    (record,) = load_detection_set(root, "train").records
    assert (record.width, record.height) == (64, 48)


def test_lists_that_are_no_text_are_refused(tmp_path: Path) -> None:
    voc = voc_tree(tmp_path / "voc", {"train": {"a": [("cat", 1, 1, 9, 9)]}})
    (voc / "ImageSets/Main/train.txt").write_bytes("\u00fc".encode("latin-1"))
    yolo = yolo_tree(tmp_path / "yolo", {"train": {"a": ""}})
    (yolo / "data.yaml").write_text("train: list.txt\nnames: [cat]\n")
    (yolo / "list.txt").write_bytes(b"\xff\xfe")
    for root in (voc, yolo):
        with pytest.raises(UserError, match="UTF-8"):
            load_detection_set(root, "train")


@pytest.mark.parametrize(("names", "rule"), [("{0: a, b: c}", "must be a list"), ("[a, b, a]", "called a")])
def test_yolo_names_that_are_no_list_of_classes(tmp_path: Path, names: str, rule: str) -> None:
    root = yolo_tree(tmp_path, {"train": {"a": ""}})
    (root / "data.yaml").write_text(f"train: images/train\nnames: {names}\n")
    with pytest.raises(UserError, match=rule):
        load_detection_set(root, "train")


def test_yolo_label_that_is_no_text(tmp_path: Path) -> None:
    root = yolo_tree(tmp_path, {"train": {"a": "", "b": ""}, "val": {"c": ""}})
    (root / "labels/train/a.txt").write_bytes(b"\xff\xfe0")
    (root / "labels/train/b.txt").unlink()
    (root / "labels/train/b.txt").mkdir()
    found = load_detection_set(root, "train").findings
    assert [(f.severity, f.file, f.where) for f in found] == [
        ("error", "labels/train/a.txt", ""),
        ("error", "labels/train/b.txt", ""),
    ]
    assert all(f.rule.startswith("unreadable: ") for f in found)
