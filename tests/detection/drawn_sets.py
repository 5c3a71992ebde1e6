"""Tiny data sets that tests draw themselves."""

import json
from pathlib import Path

import cv2
import numpy as np


def draw(path: Path, width: int = 64, height: int = 48, seed: int = 0) -> Path:
    """A smooth coloured picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    assert cv2.imwrite(str(path), cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC))
    return path


def coco_json(path: Path, images: list[dict], annotations: list[dict], categories: dict[int, str]) -> None:
    """A COCO file with annotation ids filled in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    numbered = [{"id": number, **annotation} for number, annotation in enumerate(annotations, 1)]
    listed = [{"id": number, "name": name} for number, name in categories.items()]
    path.write_text(json.dumps({"images": images, "annotations": numbered, "categories": listed}))


def voc_xml(path: Path, objects: list[tuple], size: tuple[int, int] | None = (64, 48)) -> None:
    """A VOC file of (name, xmin, ymin, xmax, ymax[, difficult]) objects."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [f"<annotation><filename>{path.stem}.jpg</filename>"]
    if size:
        parts.append(f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>")
    for name, xmin, ymin, xmax, ymax, *difficult in objects:
        parts.append(
            f"<object><name>{name}</name><difficult>{difficult[0] if difficult else 0}</difficult>"
            f"<part><name>head</name></part><bndbox><xmin>{xmin}</xmin><ymin>{ymin}</ymin>"
            f"<xmax>{xmax}</xmax><ymax>{ymax}</ymax></bndbox></object>"
        )
    path.write_text("".join([*parts, "</annotation>"]))


def voc_tree(root: Path, splits: dict[str, dict[str, list[tuple]]]) -> Path:
    """A VOC tree: split -> stem -> objects, with drawn 64x48 pictures."""
    for split, files in splits.items():
        listing = root / "ImageSets/Main" / f"{split}.txt"
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text("".join(f"{stem}\n" for stem in files))
        for seed, (stem, objects) in enumerate(files.items()):
            draw(root / "JPEGImages" / f"{stem}.jpg", seed=seed)
            voc_xml(root / "Annotations" / f"{stem}.xml", objects)
    return root


def yolo_tree(root: Path, labels: dict[str, dict[str, str]], names: object = ("cat", "dog")) -> Path:
    """A YOLO tree: split -> stem -> text of the label file, with drawn 64x48 pictures."""
    for split, files in labels.items():
        for seed, (stem, text) in enumerate(files.items()):
            draw(root / "images" / split / f"{stem}.jpg", seed=seed)
            label = root / "labels" / split / f"{stem}.txt"
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text(text)
    lines = [f"{split}: images/{split}" for split in labels]
    names = list(names) if isinstance(names, tuple) else names
    (root / "data.yaml").write_text("\n".join([*lines, f"names: {json.dumps(names)}"]))
    return root
