"""Annotation formats: COCO json, Pascal VOC xml and YOLO txt, told apart by what the folder holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from detection.formats import coco, voc, yolo
from detection.formats.common import DetectionSet, Finding, Format, ImageRecord, Severity
from vision_ssm.errors import UserError

__all__ = [
    "DetectionSet",
    "Finding",
    "Format",
    "ImageRecord",
    "Severity",
    "available_splits",
    "detect_format",
    "find_sets",
    "load_detection_set",
]

_EXPECTED = (
    "expected one of\n"
    "  COCO: annotations/instances_train.json and instances_val.json (or train/_annotations.coco.json)\n"
    "  VOC:  Annotations/, JPEGImages/ and ImageSets/Main/train.txt (or VOCdevkit/VOC2007, or train/*.xml)\n"
    "  YOLO: data.yaml with names, train and val"
)
_READERS = {"yolo": yolo, "voc": voc, "coco": coco}


def detect_format(root: str | Path) -> Format:
    """How a folder is annotated. A yaml counts before xml, and xml before json, where a folder has several.

    Raises:
        UserError: The folder is missing or holds none of the formats; the message shows what was expected.
    """
    root = Path(root)
    if not root.exists():
        raise UserError(f"data set {root} does not exist; {_EXPECTED}")
    found = _recognise(root)
    if found is None:
        raise UserError(f"no annotations found in {root}; {_EXPECTED}")
    return found


def available_splits(root: str | Path) -> tuple[str, ...]:
    """The splits of a folder, "train" first."""
    found = _READERS[detect_format(root)].find_files(Path(root))
    order = ("train", "val", "test", "trainval")
    return tuple(split for split in order if split in found)


def load_detection_set(root: str | Path, split: str, *, names: Sequence[str] | None = None) -> DetectionSet:
    """Read one split of a data set. No picture is decoded.

    Args:
        root: The folder (or the yaml of a YOLO set); see `detect_format`.
        split: "train", "val" or "test".
        names: Class names in the order of the labels; by default those of the set, the same for every split.

    Raises:
        UserError: No known format, no such split, or a file that cannot be read at all. Smaller defects become
            findings of the result; `DetectionSet.refuse_errors` raises for those of severity "error".
    """
    root = Path(root)
    return _READERS[detect_format(root)].load(root, split, names)


def find_sets(root: str | Path) -> list[Path]:
    """The folder itself when it is a data set, else the data sets among its sub-folders.

    Raises:
        UserError: There is none.
    """
    root = Path(root)
    if root.is_dir() and _recognise(root) is None:
        found = [folder for folder in sorted(root.iterdir()) if folder.is_dir() and _recognise(folder)]
        if found:
            return found
    detect_format(root)
    return [root]


def _recognise(root: Path) -> Format | None:
    if yolo.find_yaml(root) is not None:
        return "yolo"
    if voc.find_files(root):
        return "voc"
    return "coco" if coco.find_files(root) else None
