"""What every annotation format is read into: pictures with boxes, and the findings made on the way.

Boxes are float32 xyxy in pixels with continuous edges: a box that covers the whole picture is (0, 0, width, height).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from vision_ssm.data.images import read_header, read_image
from vision_ssm.errors import UserError

Severity = Literal["error", "warning", "note"]
Format = Literal["coco", "voc", "yolo"]

# Annotation tools round to whole pixels, so an edge may lie up to one pixel outside without being a mistake.
_ROUNDING = 1.0
_REPLACE = "put a readable picture there or take it out of the split"


@dataclass(frozen=True)
class Finding:
    """One defect of a data set.

    Attributes:
        severity: "error" stops training, "warning" changes or drops a box, "note" is worth knowing.
        file: The file at fault, relative to the set's folder where it lies inside.
        where: Line, object or annotation in that file; "" for the whole file.
        rule: What is wrong.
        fix: What to do about it.
    """

    severity: Severity
    file: str
    where: str
    rule: str
    fix: str


@dataclass(frozen=True, eq=False)
class ImageRecord:
    """One picture and its boxes.

    The annotation's width and height decide the frame of the boxes: where they match the picture after its EXIF
    rotation, boxes refer to the rotated picture; where they match only the stored one, to that. Where the annotation
    gives no size (YOLO), the rotated picture counts.

    Attributes:
        path: The picture.
        width: Columns of the frame the boxes refer to.
        height: Rows of it.
        boxes: (n, 4) float32 xyxy pixels, inside the frame, none empty.
        labels: (n,) int64 in 0..classes-1.
        ignore: (n,) bool; COCO crowd and VOC `difficult`: neither trained on nor scored.
        areas: (n,) float32 pixels; the object's area where the annotation gives one, else the box's.
        image_id: COCO's id, else the position in the split from 1.
    """

    path: Path
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    ignore: np.ndarray
    areas: np.ndarray
    image_id: int

    def read(self) -> np.ndarray:
        """The picture in the frame of its boxes, (height, width, 3) uint8 RGB.

        Raises:
            UserError: The picture cannot be read, or has another size than its annotation says.
        """
        expected = (self.height, self.width)
        image = read_image(self.path)
        if image.shape[:2] == expected:
            return image
        stored = read_image(self.path, apply_exif=False)
        if stored.shape[:2] == expected:
            return stored
        raise UserError(
            f"{self.path} is {image.shape[1]}x{image.shape[0]} pixels, its annotation says {self.width}x{self.height}; "
            "correct the annotation or put the original picture back"
        )


@dataclass(frozen=True, eq=False)
class DetectionSet:
    """One split of a data set.

    Attributes:
        root: The folder that was named.
        split: "train", "val", "test", or another split the folder has.
        format: How it is annotated.
        names: Class names; a label is an index into them. The same for every split of the folder.
        category_ids: The set's own number of each class (COCO's sparse ids; 1, 2, ... for VOC; 0, 1, ... for YOLO).
        records: The pictures.
        findings: Defects met while reading the annotations.
    """

    root: Path
    split: str
    format: Format
    names: tuple[str, ...]
    category_ids: tuple[int, ...]
    records: tuple[ImageRecord, ...]
    findings: tuple[Finding, ...]

    def refuse_errors(self) -> None:
        """Refuse a set that cannot be used.

        Raises:
            UserError: There are findings of severity "error" (the message lists the first), or no picture.
        """
        errors = [finding for finding in self.findings if finding.severity == "error"]
        if errors:
            first = "\n".join(f"  {f.file} {f.where}: {f.rule}; {f.fix}" for f in errors[:5])
            raise UserError(
                f"{self.root} ({self.split}) has {len(errors)} errors, the first:\n{first}\n"
                f"`vssm detect check {self.root}` lists all of them"
            )
        if not self.records:
            raise UserError(f"{self.root} has no pictures in its split {self.split!r}")


@dataclass(frozen=True)
class Picture:
    """A picture named by the annotations; width or height 0 where they do not say."""

    path: Path
    width: int
    height: int
    image_id: int


@dataclass(frozen=True, eq=False)
class BoxTable:
    """All boxes of a split as flat columns, before they are checked.

    Attributes:
        picture: (n,) index into the list of pictures.
        boxes: (n, 4) float64 xyxy pixels, as annotated.
        labels: (n,) int64.
        ignore: (n,) bool.
        areas: (n,) float64; NaN where the area of the box counts.
        places: File and place in it of each row, for findings.
    """

    picture: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    ignore: np.ndarray
    areas: np.ndarray
    places: Sequence[tuple[str, str]]


class BoxList:
    """What a reader gathers: boxes, where each was read, and errors.

    Args:
        names: Class names in the order of the labels.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.findings: list[Finding] = []
        self._rows: list[tuple[int, Sequence[float], int, bool, float]] = []
        self._places: list[tuple[str, str]] = []

    def add(
        self,
        picture: int,
        corners: Sequence[float],
        label: int,
        place: tuple[str, str],
        *,
        ignore: bool = False,
        area: float = float("nan"),
    ) -> None:
        """Take a box of xyxy pixels in the picture of this index; `place` is (file, where)."""
        self._rows.append((picture, corners, label, ignore, area))
        self._places.append(place)

    def refuse(self, place: tuple[str, str], rule: str, fix: str) -> None:
        """Note an error instead of a box."""
        self.findings.append(Finding("error", *place, rule, fix))

    def refuse_class(self, place: tuple[str, str], given: object) -> None:
        """Note a label that is none of the classes."""
        shown = ", ".join(self.names[:10]) + (", ..." if len(self.names) > 10 else "")
        fix = f"use one of {len(self.names)} classes ({shown}) or add it to them"
        self.refuse(place, f"unknown class {given!r}", fix)

    def table(self) -> BoxTable:
        """The boxes as columns."""
        picture, boxes, labels, ignore, areas = zip(*self._rows, strict=True) if self._rows else ((), (), (), (), ())
        return BoxTable(
            picture=np.array(picture, np.int64),
            boxes=np.array(boxes, np.float64).reshape(-1, 4),
            labels=np.array(labels, np.int64),
            ignore=np.array(ignore, bool),
            areas=np.array(areas, np.float64),
            places=self._places,
        )


def assemble(
    root: Path,
    split: str,
    format: Format,
    *,
    category_ids: Iterable[int],
    pictures: Sequence[Picture],
    boxes: BoxList,
    unreadable: Sequence[Finding],
    findings: Sequence[Finding] = (),
) -> DetectionSet:
    """A split from what its reader gathered; `unreadable` as `fill_sizes` gives it, `findings` those about files."""
    records, changed = build_records(pictures, boxes.table())
    found = (*findings, *boxes.findings, *unreadable, *changed)
    return DetectionSet(root, split, format, boxes.names, tuple(category_ids), records, found)


def build_records(pictures: Sequence[Picture], table: BoxTable) -> tuple[tuple[ImageRecord, ...], list[Finding]]:
    """Check the boxes, clip them to their pictures and deal them out.

    Returns:
        One record per picture of known size in the given order, and a warning for every box that was dropped or
        clipped by more than one pixel (up to that, it is rounding).
    """
    sizes = np.array([(p.width, p.height) for p in pictures], np.float64).reshape(-1, 2)
    limits = np.tile(sizes[table.picture], 2)
    keep, clipped, findings = _clip(table, limits)
    order = np.flatnonzero(keep)
    order = order[np.argsort(table.picture[order], kind="stable")]
    ends = np.searchsorted(table.picture[order], np.arange(len(pictures)), side="right")
    boxes = clipped[order].astype(np.float32)
    sides = boxes[:, 2:] - boxes[:, :2]
    areas = np.where(np.isnan(table.areas[order]), sides.prod(1), table.areas[order]).astype(np.float32)
    labels, ignore = table.labels[order], table.ignore[order]
    parts = np.split(np.arange(len(order)), ends[:-1]) if len(pictures) else []
    records = tuple(
        ImageRecord(p.path, p.width, p.height, boxes[i], labels[i], ignore[i], areas[i], p.image_id)
        for p, i in zip(pictures, parts, strict=True)
        if p.width > 0
    )
    return records, findings


def _clip(table: BoxTable, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[Finding]]:
    """(rows to keep, boxes inside their pictures, findings)."""
    boxes = table.boxes
    finite = np.all(np.isfinite(boxes), axis=1)
    filled = np.all(boxes[:, 2:] > boxes[:, :2], axis=1)
    clipped = np.clip(np.where(finite[:, None], boxes, 0.0), 0.0, limits)
    inside = np.all(clipped[:, 2:] > clipped[:, :2], axis=1)
    cut = np.any(np.abs(clipped - boxes) > _ROUNDING, axis=1)
    known = np.all(limits > 0, axis=1)
    findings = []
    for row in np.flatnonzero(known & (~finite | ~filled | ~inside | cut)):
        corners = ", ".join(f"{v:g}" for v in boxes[row])
        size = f"{limits[row, 0]:g}x{limits[row, 1]:g}"
        if not finite[row]:
            rule, fix = f"box ({corners}) is not a number: dropped", "write the corners again"
        elif not filled[row]:
            rule, fix = f"box ({corners}) has no area: dropped", "draw the box again or delete the object"
        elif not inside[row]:
            rule = f"box ({corners}) lies outside the picture ({size}): dropped"
            fix = "delete the object, or look whether it belongs to another picture"
        else:
            rule = f"box ({corners}) reaches out of the picture ({size}): clipped"
            fix = "draw the box again; if all boxes do so, look whether the picture was resized"
        findings.append(Finding("warning", *table.places[int(row)], rule, fix))
    return known & finite & filled & inside, clipped, findings


def fill_sizes(pictures: Iterable[Picture], root: Path) -> tuple[list[Picture], list[Finding]]:
    """Take missing widths and heights from the headers of the pictures, several at a time.

    Returns:
        The pictures, and an error for each that is missing or no picture (it keeps size 0 and is left out later).
    """

    def fill(picture: Picture) -> Picture | Finding:
        if picture.width > 0 and picture.height > 0:
            return picture
        try:
            width, height = read_header(picture.path).shown_size
        except UserError as error:
            return Finding("error", relative(picture.path, root), "", str(error), _REPLACE)
        return Picture(picture.path, width, height, picture.image_id)

    pictures = list(pictures)
    if all(p.width > 0 and p.height > 0 for p in pictures):
        return pictures, []
    with ThreadPoolExecutor() as pool:
        filled = list(pool.map(fill, pictures))
    findings = [item for item in filled if isinstance(item, Finding)]
    kept = [old if isinstance(new, Finding) else new for old, new in zip(pictures, filled, strict=True)]
    return kept, findings


def read_lines(path: Path) -> list[str]:
    """The lines of a list of pictures that hold something, without the space around them.

    Raises:
        UserError: The file cannot be read, or is no text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8 (byte {error.start}); save it as UTF-8") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def relative(path: Path, root: Path) -> str:
    """`path` as people name it inside the set: relative to `root` where it lies below it."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
