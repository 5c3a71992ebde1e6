"""COCO json: `annotations/instances_<split>.json` or one `_annotations.coco.json` in each split's folder."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from detection.formats.common import BoxList, DetectionSet, Finding, Picture, assemble, fill_sizes, relative
from vision_ssm.errors import UserError

_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_CATEGORIES = re.compile(rb'"categories"\s*:\s*(?=\[)')
_POLYGONS = re.compile(rb'"segmentation"\s*:\s*\[[-+.\deE,\s\[\]]*\]')
_LONGEST_LIST = 4_000_000  # bytes; LVIS, with 1203 described classes, needs 0.6 million


def find_files(root: Path) -> dict[str, Path]:
    """The annotation file of each split; empty when the folder holds none.

    Of several files for a split, `instances_*` wins over others (captions, keypoints), then the newest year.
    """
    candidates = [*(root / "annotations").glob("*.json"), *root.glob("*.json"), *root.glob("*/_annotations.coco.json")]
    found: dict[str, Path] = {}
    for path in sorted(candidates, key=lambda p: (p.name.startswith("instances"), p.name)):
        if path.name.startswith(("captions", "person_keypoints", "image_info", "stuff", "panoptic")):
            continue
        name = path.parent.name if path.name.startswith("_annotations") else path.stem
        words = [re.sub(r"\d+$", "", word) for word in re.split(r"[_\-. ]", name.lower())]
        for word in words:
            if word in _SPLIT_WORDS:
                found[_SPLIT_WORDS[word]] = path
    return found


def load(root: Path, split: str, names: Sequence[str] | None = None) -> DetectionSet:
    """Read one split; boxes `x, y, width, height` become corners.

    Args:
        root: Folder with the annotation files and the pictures.
        split: "train", "val" or "test".
        names: Class names in the order of the labels; by default all categories of all splits, by their id.

    Raises:
        UserError: The split is not there, its file is no COCO json, or two splits number a class differently.
    """
    files = find_files(root)
    if split not in files:
        raise UserError(f"{root} has no split {split!r}; its COCO files give: {', '.join(sorted(files)) or 'none'}")
    path = files[split]
    data = _parse(path)
    categories = _all_categories(files)
    ordered = _order(categories, names)
    label_of = {category: label for label, (category, _) in enumerate(ordered) if category >= 0}
    file = relative(path, root)
    pictures, findings = _pictures(root, path, data["images"])
    boxes = _boxes(data["annotations"], pictures, label_of, file, [name for _, name in ordered])
    del data  # the parsed json of a large set is gigabytes
    pictures, unreadable = fill_sizes(pictures, root)
    return assemble(
        root, split, "coco", category_ids=(category for category, _ in ordered), pictures=pictures, boxes=boxes,
        unreadable=unreadable, findings=findings,
    )  # fmt: skip


def _parse(path: Path) -> dict:
    """The json without its polygons, which are most of a large file and not used: a third of the time and memory."""
    try:
        data = json.loads(_POLYGONS.sub(b'"segmentation":0', path.read_bytes()))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no readable json: {error}") from error
    for key in ("images", "annotations"):
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise UserError(f"{path} is no COCO file: it has no list {key!r}")
    return data


def _read_categories(path: Path) -> dict[int, str]:
    """The categories of a file, found without parsing the hundreds of megabytes before them."""
    text = path.read_bytes()
    for match in _CATEGORIES.finditer(text):
        try:
            found, _ = json.JSONDecoder().raw_decode(
                text[match.end() : match.end() + 4_000_000].decode("utf-8", "replace")
            )
            return {int(entry["id"]): str(entry["name"]) for entry in found}
        except (ValueError, KeyError, TypeError):
            continue
    raise UserError(f"{path} is no COCO file: it has no list 'categories' of id and name")


def _all_categories(files: dict[str, Path]) -> dict[int, str]:
    """The union over the splits, checked for agreement."""
    union: dict[int, str] = {}
    for path in files.values():
        for category, name in _read_categories(path).items():
            if union.setdefault(category, name) != name:
                raise UserError(
                    f"{path} calls category {category} {name!r}, another split calls it {union[category]!r}; "
                    "give all splits the same categories"
                )
    if len(set(union.values())) != len(union):
        twice = sorted({name for name in union.values() if list(union.values()).count(name) > 1})
        where = ", ".join(map(str, files.values()))
        raise UserError(
            f"{where}: more than one category id for {', '.join(twice)}; give all splits the same categories"
        )
    return union


def _order(categories: dict[int, str], names: Sequence[str] | None) -> list[tuple[int, str]]:
    """(category id, name) by label; a given name that the set lacks gets a negative id."""
    if names is None:
        return sorted(categories.items())
    ids = {name: category for category, name in categories.items()}
    return [(ids.get(name, -1 - label), name) for label, name in enumerate(names)]


def _pictures(root: Path, path: Path, entries: list[dict]) -> tuple[list[Picture], list[Finding]]:
    """Pictures in the order of the file; size 0 for those that are not there."""
    pictures, findings = [], []
    seen: set[int] = set()
    file = relative(path, root)
    folder = _picture_folder(root, path, entries)
    listed = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    for entry in entries:
        try:
            image_id, name = int(entry["id"]), str(entry["file_name"])
            width, height = int(entry.get("width") or 0), int(entry.get("height") or 0)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
            rule = "picture entry without id, file_name or whole numbers for width and height"
            findings.append(Finding("error", file, f"image {str(entry)[:80]}", rule, "complete the entry"))
            continue
        if image_id in seen:
            fix = "give every picture an id of its own"
            findings.append(Finding("error", file, f"image id {image_id}", "picture id used twice", fix))
            continue
        seen.add(image_id)
        there = name in listed or (folder / name).is_file()
        pictures.append(Picture(folder / name, width if there else 0, height if there else 0, image_id))
    return pictures, findings


def _picture_folder(root: Path, path: Path, entries: list[dict]) -> Path:
    """The folder that `file_name` refers to: the first of the usual ones that has one of the first pictures."""
    stem = path.stem.removeprefix("instances_")
    plain = re.sub(r"\d+$", "", stem)
    usual = [root / base / name for name in (stem, plain) for base in ("", "images")]
    usual += [path.parent, root / "images", root / "JPEGImages", root]
    first = [str(entry.get("file_name", "")) for entry in entries[:20] if isinstance(entry, dict)]
    for folder in usual:
        if any(name and (folder / name).is_file() for name in first):
            return folder
    return next((folder for folder in usual if folder.is_dir()), root)


def _boxes(
    annotations: list[dict], pictures: list[Picture], label_of: dict[int, int], file: str, names: list[str]
) -> BoxList:
    """The annotations, each with its id as its place."""
    position = {picture.image_id: index for index, picture in enumerate(pictures)}
    boxes = BoxList(names)
    for index, annotation in enumerate(annotations):
        try:
            where = f"annotation {annotation.get('id', index)}"
            x, y, width, height = (float(value) for value in annotation["bbox"])
            image_id, category = int(annotation["image_id"]), int(annotation["category_id"])
            crowd, area = bool(annotation.get("iscrowd", 0)), annotation.get("area")
            area = float("nan") if area is None else float(area)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
            rule = "annotation without a number as image_id, category_id or area, or without a bbox of four numbers"
            boxes.refuse((file, f"annotation {str(annotation)[:80]}"), rule, "complete or delete it")
            continue
        if image_id not in position:
            rule = f"refers to picture id {image_id}, which the file does not list"
            boxes.refuse((file, where), rule, "list the picture or delete the object")
        elif category not in label_of:
            boxes.refuse_class((file, where), category)
        else:
            picture = position[image_id]
            place = (file, f"{where} of {pictures[picture].path.name}")
            corners = (x, y, x + width, y + height)
            boxes.add(picture, corners, label_of[category], place, ignore=crowd, area=area)
    return boxes
