"""YOLO txt: a yaml with `names`, `train`, `val`, and for each picture a file of lines `class cx cy w h` in 0..1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import yaml

from detection.formats.common import BoxList, DetectionSet, Picture, assemble, fill_sizes, read_lines, relative
from vision_ssm.data.images import IMAGE_SUFFIXES
from vision_ssm.errors import UserError

_SPLITS = {"train": ("train",), "val": ("val", "valid"), "test": ("test",)}
# Rounding may put an edge a little outside; from here on the numbers are pixels.
_LARGEST = 2.0


def find_yaml(root: Path) -> Path | None:
    """The file that describes the set: the path itself, `data.yaml`, or any yaml with `names` and a split."""
    if root.is_file():
        return root if root.suffix in (".yaml", ".yml") else None
    candidates = [root / "data.yaml", root / "dataset.yaml", *sorted([*root.glob("*.yaml"), *root.glob("*.yml")])]
    for path in candidates:
        if path.is_file():
            content = _parse_yaml(path)
            if "names" in content and any(key in content for keys in _SPLITS.values() for key in keys):
                return path
    return None


def find_files(root: Path) -> dict[str, list[Path]]:
    """The pictures of each split; empty when the folder is no YOLO set.

    Raises:
        UserError: The yaml names a folder or list that is not there.
    """
    path = find_yaml(root)
    if path is None:
        return {}
    content = _parse_yaml(path)
    found = {}
    for split, keys in _SPLITS.items():
        entry = next((content[key] for key in keys if content.get(key)), None)
        if entry is not None:
            entries = entry if isinstance(entry, list) else [entry]
            found[split] = [picture for item in entries for picture in _pictures_of(path, content, str(item))]
    return found


def load(root: Path, split: str, names: Sequence[str] | None = None) -> DetectionSet:
    """Read one split; lines with more than four numbers are polygons and give their bounding box.

    Args:
        root: Folder with a yaml, or the yaml itself.
        split: "train", "val" or "test".
        names: Class names in the order of the labels; by default those of the yaml.

    Raises:
        UserError: No yaml, no such split, or no class names.
    """
    files = find_files(root)
    if split not in files:
        raise UserError(f"{root} has no split {split!r}; its yaml gives: {', '.join(files) or 'none'}")
    path = find_yaml(root)
    assert path is not None
    own = _names(path)
    names = own if names is None else tuple(names)
    folder = path.parent
    pictures, unreadable = fill_sizes([Picture(p, 0, 0, number) for number, p in enumerate(files[split], 1)], folder)
    boxes = _boxes(pictures, own, names, folder)
    return assemble(
        root, split, "yolo", category_ids=range(len(names)), pictures=pictures, boxes=boxes, unreadable=unreadable
    )


def label_file(picture: Path) -> Path:
    """`images/train/a.jpg` -> `labels/train/a.txt` (the last `images` of the path), else the txt beside the picture."""
    parts = list(picture.parts)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == "images":
            parts[index] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _parse_yaml(path: Path) -> dict:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is no readable yaml: {' '.join(str(error).split())}") from error
    return content if isinstance(content, dict) else {}


def _names(path: Path) -> tuple[str, ...]:
    names = _parse_yaml(path).get("names")
    if isinstance(names, dict) and set(names) == set(range(len(names))):
        names = [names[label] for label in range(len(names))]
    if not isinstance(names, list) or not names:
        raise UserError(f"{path}: `names` must be a list of class names or number: name from 0, it is {names!r}")
    names = tuple(str(name) for name in names)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{path}: `names` has more than one class called {', '.join(twice)}; give each its own name")
    return names


def _pictures_of(path: Path, content: dict, entry: str) -> list[Path]:
    """Pictures of one entry: a folder (to any depth), or a txt file that lists them."""
    bases = [path.parent / str(content["path"])] if content.get("path") else []
    bases.append(path.parent)
    # Roboflow writes ../train/images for a folder that lies beside the yaml.
    tried = [base / name for base in bases for name in (entry, entry.removeprefix("../"))]
    source = next((item for item in tried if item.exists()), None)
    if source is None:
        raise UserError(f"{path} names {entry!r}, which is not there; looked for {', '.join(map(str, tried[::2]))}")
    if source.is_file():
        return [_beside(source, line) for line in read_lines(source)]
    return sorted(file for file in source.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)


def _beside(listing: Path, line: str) -> Path:
    return Path(line) if Path(line).is_absolute() else listing.parent / line.removeprefix("./")


def _boxes(pictures: list[Picture], own: Sequence[str], names: Sequence[str], root: Path) -> BoxList:
    """The lines of the label files, each with its file and number as its place; no file means no objects."""
    label_of = {name: label for label, name in enumerate(names)}
    boxes = BoxList(names)
    for index, picture in enumerate(pictures):
        path = label_file(picture.path)
        file = relative(path, root)
        try:
            lines = _lines(path)
        except (OSError, UnicodeDecodeError) as error:
            boxes.refuse((file, ""), f"unreadable: {error}", "save it as text, one object a line, or delete it")
            continue
        for number, line in enumerate(lines, 1):
            place = (file, f"line {number}")
            parsed = _parse_line(line, len(own))
            if isinstance(parsed, str):
                boxes.refuse(place, parsed, "write `class cx cy w h` with the last four in 0..1 and classes from 0")
            elif parsed is not None and own[parsed[0]] not in label_of:
                boxes.refuse_class(place, own[parsed[0]])
            elif parsed is not None:
                label, corners = parsed
                scaled = [v * s for v, s in zip(corners, (picture.width, picture.height) * 2, strict=True)]
                boxes.add(index, scaled, label_of[own[label]], place)
    return boxes


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        return []


def _parse_line(line: str, classes: int) -> tuple[int, tuple[float, float, float, float]] | str | None:
    """(class, normalised corners), None for an empty line, or what is wrong with it."""
    words = line.split()
    if not words:
        return None
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        return f"not a line of numbers: {line[:60]!r}"
    if len(numbers) != 5 and (len(numbers) < 7 or len(numbers) % 2 == 0):
        return f"{len(numbers)} columns, expected 5 (box) or an odd number from 7 (polygon)"
    label, values = numbers[0], numbers[1:]
    if not 0 <= label < classes or label != int(label):
        return f"unknown class {words[0]}, allowed are 0 to {classes - 1}"
    if any(abs(value) > _LARGEST for value in values):
        return f"numbers beyond 0..1 ({max(values, key=abs):g}): pixels instead of fractions of the picture"
    if any(math.isnan(value) for value in values) or len(values) == 4:
        cx, cy, width, height = values[:4]
        return int(label), (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
    return int(label), (min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2]))
