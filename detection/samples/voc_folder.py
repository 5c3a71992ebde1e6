"""Writing a data set as Pascal VOC, complete or not at all."""

from __future__ import annotations

import json
import shutil
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from vision_ssm.errors import UserError
from vision_ssm.viz import save_picture

_MARK = "sample.json"


class VocFolder:
    """Collects pictures with their boxes into `JPEGImages`, `Annotations` and `ImageSets/Main` of a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._stems: dict[str, list[str]] = {}
        for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (root / name).mkdir(parents=True)

    def add(self, split: str, name: str, image: np.ndarray, boxes: np.ndarray, classes: Sequence[str]) -> None:
        """Write one picture.

        Args:
            split: List in ImageSets/Main that names it.
            name: File name with its ending, .png or .jpg.
            image: (H, W, 3) uint8 RGB.
            boxes: (n, 4) xyxy, whole pixels, continuous edges; written 1-based and inclusive, as VOC has it.
            classes: Name of each box.
        """
        stem = Path(name).stem
        save_picture(self.root / "JPEGImages" / name, image)
        tree = ET.Element("annotation")
        ET.SubElement(tree, "folder").text = "JPEGImages"
        ET.SubElement(tree, "filename").text = name
        _numbers(ET.SubElement(tree, "size"), width=image.shape[1], height=image.shape[0], depth=3)
        for (x1, y1, x2, y2), label in zip(boxes.astype(int).tolist(), classes, strict=True):
            item = ET.SubElement(tree, "object")
            ET.SubElement(item, "name").text = label
            _numbers(item, truncated=0, difficult=0)
            _numbers(ET.SubElement(item, "bndbox"), xmin=x1 + 1, ymin=y1 + 1, xmax=x2, ymax=y2)
        ET.indent(tree)
        ET.ElementTree(tree).write(self.root / "Annotations" / f"{stem}.xml", encoding="utf-8")
        self._stems.setdefault(split, []).append(stem)

    def finish(self) -> None:
        """Write the lists of the splits."""
        for split, stems in self._stems.items():
            path = self.root / "ImageSets/Main" / f"{split}.txt"
            path.write_text("".join(f"{stem}\n" for stem in stems), encoding="utf-8")


def build_folder(folder: Path, recipe: dict, fill: Callable[[Path], None]) -> bool:
    """Make a folder through a temporary one beside it, so that it appears complete or not at all.

    Args:
        folder: The folder to make; missing, empty, or made before from the same recipe.
        recipe: What decides the content; written into the folder.
        fill: Writes the content into the folder it is given.

    Returns:
        False when the folder was there already.

    Raises:
        UserError: The folder holds something else, or cannot be written.
    """
    mark = folder / _MARK
    if mark.is_file() and _read_mark(mark) == json.loads(json.dumps(recipe)):
        return False
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} holds other files; name a new folder or empty this one")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            made = Path(temporary) / "made"
            made.mkdir()
            fill(made)
            (made / _MARK).write_text(json.dumps(recipe, indent=1), encoding="utf-8")
            if folder.exists():
                folder.rmdir()
            shutil.move(made, folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}") from error
    return True


def _numbers(parent: ET.Element, **values: int) -> None:
    for name, value in values.items():
        ET.SubElement(parent, name).text = str(value)


def _read_mark(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
