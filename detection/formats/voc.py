"""Pascal VOC xml: `Annotations`, `JPEGImages` and `ImageSets/Main`, or xml beside the pictures in `train/`, `val/`.

Everingham et al., "The Pascal Visual Object Classes (VOC) Challenge", 2010. Corners are 1-based and inclusive, so the
continuous edges are xmin - 1, ymin - 1, xmax, ymax.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from detection.formats.common import BoxList, DetectionSet, Finding, Picture, assemble, fill_sizes, read_lines, relative
from vision_ssm.data.images import IMAGE_SUFFIXES
from vision_ssm.errors import UserError

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_SIDE_BY_SIDE = {"train": ("train",), "val": ("val", "valid"), "test": ("test",)}


@dataclass(frozen=True)
class _Object:
    name: str
    corners: tuple[float, float, float, float] | None
    difficult: bool


@dataclass(frozen=True)
class _Annotation:
    """One xml file; `objects` is None when it is missing or broken, then `problem` says why."""

    xml: Path
    filename: str
    width: int
    height: int
    objects: tuple[_Object, ...] | None
    problem: str = ""


def find_files(root: Path) -> dict[str, list[Path]]:
    """The xml files of each split; empty when the folder is no VOC tree.

    A devkit folder that holds VOC2007 with its test set gives the usual protocol: `train` is the union of every
    year's trainval, `val` and `test` are the test set of 2007. Otherwise splits go by the names in ImageSets/Main.
    """
    years = _years(root)
    if not years:
        return {split: files for split in _SIDE_BY_SIDE if (files := _side_by_side(root, split))}
    first = years[0]
    if first != root and (first / "ImageSets/Main/test.txt").is_file():
        lists = {"train": [(year, "trainval") for year in years], "val": [(first, "test")], "test": [(first, "test")]}
    else:
        lists = {split: [(year, split) for year in years] for split in ("train", "val", "trainval", "test")}
    found = {}
    for split, parts in lists.items():
        files = [xml for year, name in parts for xml in _listed(year, name)]
        if files:
            found[split] = files
    return found


def load(root: Path, split: str, names: Sequence[str] | None = None) -> DetectionSet:
    """Read one split.

    Args:
        root: A folder with Annotations, JPEGImages, ImageSets/Main; a VOCdevkit; or train/, val/ with xml and pictures.
        split: "train", "val", "test"; "trainval" where ImageSets/Main has it.
        names: Class names in the order of the labels; by default the official 20 when the folder uses no others and is
            named like VOC's own, else those found in all splits, sorted.

    Raises:
        UserError: The split is not there.
    """
    splits = find_files(root)
    if split not in splits:
        raise UserError(f"{root} has no split {split!r}; its VOC lists give: {', '.join(splits) or 'none'}")
    files = splits[split]
    if names is None:  # the class list must not depend on the split that is read
        everything = dict.fromkeys(xml for listed in splits.values() for xml in listed)
        parsed = {annotation.xml: annotation for annotation in _parse_all(list(everything))}
        names = _class_names(root, parsed.values())
    else:
        parsed = {annotation.xml: annotation for annotation in _parse_all(files)}
    annotations = [parsed[xml] for xml in files]
    findings = _problems(annotations, root)
    annotations = [annotation for annotation in annotations if annotation.objects is not None]
    pictures, unreadable = fill_sizes(_pictures(annotations), root)
    boxes = _boxes(annotations, names, root)
    return assemble(
        root, split, "voc", category_ids=range(1, len(names) + 1), pictures=pictures, boxes=boxes,
        unreadable=unreadable, findings=findings,
    )  # fmt: skip


def _is_tree(folder: Path) -> bool:
    return (folder / "Annotations").is_dir() and (folder / "ImageSets/Main").is_dir()


def _years(root: Path) -> list[Path]:
    """The folder itself, or the VOC20xx folders of a devkit, oldest first."""
    if _is_tree(root):
        return [root]
    for devkit in (root, root / "VOCdevkit"):
        years = sorted(folder for folder in devkit.glob("VOC20[0-9][0-9]") if _is_tree(folder))
        if years:
            return years
    return []


def _listed(year: Path, split: str) -> list[Path]:
    """The xml files that ImageSets/Main/<split>.txt names; a second column (of a class list) is not read."""
    path = year / "ImageSets/Main" / f"{split}.txt"
    if not path.is_file():
        return []
    return [year / "Annotations" / f"{line.split()[0]}.xml" for line in read_lines(path)]


def _side_by_side(root: Path, split: str) -> list[Path]:
    return sorted(xml for name in _SIDE_BY_SIDE[split] for xml in (root / name).glob("*.xml"))


def _parse_all(files: list[Path]) -> list[_Annotation]:
    """Threads hide the waiting for a slow disk; parsing itself holds the interpreter."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(_parse, files, chunksize=64))


def _parse(xml: Path) -> _Annotation:
    try:
        tree = ET.fromstring(xml.read_bytes())
    except FileNotFoundError:
        return _Annotation(xml, "", 0, 0, None, "annotation file not found")
    except (OSError, ET.ParseError, ValueError) as error:
        return _Annotation(xml, "", 0, 0, None, f"broken xml: {error}")
    size = tree.find("size")
    width, height = (_side(size, key) for key in ("width", "height"))
    objects = tuple(_parse_object(element) for element in tree.findall("object"))
    return _Annotation(xml, (tree.findtext("filename") or "").strip(), width, height, objects)


def _parse_object(element: ET.Element) -> _Object:
    box = element.find("bndbox")
    values = [value for key in _CORNERS if (value := _number(box, key)) is not None]
    corners = None
    if len(values) == 4:
        xmin, ymin, xmax, ymax = values
        # An empty box stays as it is written, so that the finding about it shows the file's own numbers.
        shift = 1 if xmax > xmin and ymax > ymin else 0
        corners = (xmin - shift, ymin - shift, xmax, ymax)
    difficult = (element.findtext("difficult") or "0").strip() == "1"
    return _Object((element.findtext("name") or "").strip(), corners, difficult)


def _number(parent: ET.Element | None, key: str) -> float | None:
    try:
        return float(parent.findtext(key, "")) if parent is not None else None
    except ValueError:
        return None


def _side(size: ET.Element | None, key: str) -> int:
    """A side of the picture in pixels; 0, so that the picture itself is asked, where none is written."""
    value = _number(size, key)
    return int(value) if value is not None and math.isfinite(value) else 0


def _class_names(root: Path, annotations: Iterable[_Annotation]) -> tuple[str, ...]:
    found = {item.name for annotation in annotations for item in annotation.objects or () if item.name}
    official = any(year.name.startswith("VOC20") for year in _years(root))
    return VOC_CLASSES if official and found <= set(VOC_CLASSES) else tuple(sorted(found))


def _problems(annotations: list[_Annotation], root: Path) -> list[Finding]:
    fix = "put the xml there or take it out of the split"
    broken = [annotation for annotation in annotations if annotation.objects is None]
    return [Finding("error", relative(item.xml, root), "", item.problem, fix) for item in broken]


def _pictures(annotations: list[_Annotation]) -> list[Picture]:
    """The picture of each xml: same stem, else the `filename` it gives; size 0 for those that are not there."""
    listings: dict[Path, dict[str, Path]] = {}
    pictures = []
    for number, annotation in enumerate(annotations, 1):
        folder = annotation.xml.parent
        if folder.name == "Annotations":
            folder = folder.parent / "JPEGImages"
        if folder not in listings:
            files = folder.iterdir() if folder.is_dir() else ()
            listings[folder] = {file.stem: file for file in files if file.suffix.lower() in IMAGE_SUFFIXES}
        path = listings[folder].get(annotation.xml.stem)
        if path is None and annotation.filename:
            path = listings[folder].get(Path(annotation.filename).stem)
        if path is None:
            pictures.append(Picture(folder / f"{annotation.xml.stem}.jpg", 0, 0, number))
        else:
            pictures.append(Picture(path, annotation.width, annotation.height, number))
    return pictures


def _boxes(annotations: list[_Annotation], names: Sequence[str], root: Path) -> BoxList:
    """The objects, each with its file and number as its place."""
    label_of = {name: label for label, name in enumerate(names)}
    boxes = BoxList(names)
    for picture, annotation in enumerate(annotations):
        file = relative(annotation.xml, root)
        for number, item in enumerate(annotation.objects or (), 1):
            place = (file, f"object {number} ({item.name})")
            if item.name not in label_of:
                boxes.refuse_class(place, item.name)
            elif item.corners is None:
                rule = "object without a bndbox of four numbers"
                boxes.refuse(place, rule, "draw the box again or delete the object")
            else:
                boxes.add(picture, item.corners, label_of[item.name], place, ignore=item.difficult)
    return boxes
