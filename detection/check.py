"""Looking at a data set before training on it: counts, class histogram, and every defect with its cure."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from detection.formats import (
    DetectionSet,
    Finding,
    Format,
    ImageRecord,
    Severity,
    available_splits,
    detect_format,
    find_sets,
    load_detection_set,
)
from detection.formats.common import relative
from vision_ssm.data.images import read_header
from vision_ssm.errors import UserError

_SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
_SHOWN_NOTES = 20


@dataclass(frozen=True, eq=False)
class SplitCount:
    """Counts of one split.

    Attributes:
        split: Its name.
        pictures: Pictures with a usable annotation.
        boxes: Boxes to train on and to score.
        ignored: COCO crowd and VOC `difficult` boxes.
        empty: Pictures without any box.
        histogram: (classes,) boxes of each class.
    """

    split: str
    pictures: int
    boxes: int
    ignored: int
    empty: int
    histogram: np.ndarray


@dataclass(frozen=True, eq=False)
class CheckReport:
    """What `check` found; `str(report)` is the page to print."""

    root: Path
    format: Format
    names: tuple[str, ...]
    splits: tuple[SplitCount, ...]
    findings: tuple[Finding, ...]

    def of(self, severity: Severity) -> list[Finding]:
        """The findings of one severity."""
        return [finding for finding in self.findings if finding.severity == severity]

    def exit_code(self, strict: bool = False) -> int:
        """1 with errors (or, if `strict`, with warnings), else 0."""
        return int(bool(self.of("error") or (strict and self.of("warning"))))

    def __str__(self) -> str:
        lines = [f"{self.root}: {self.format}, {len(self.names)} classes", ""]
        lines += _table(
            ("split", "pictures", "boxes", "ignored", "without boxes"),
            [(s.split, s.pictures, s.boxes, s.ignored, s.empty) for s in self.splits],
        )
        lines += ["", *self._histogram()]
        for severity in _SEVERITIES:
            found = self.of(severity)
            shown = found if severity != "note" else found[:_SHOWN_NOTES]
            lines += ["", f"{len(found)} {severity}{'' if len(found) == 1 else 's'}"]
            lines += [f"  {_place(finding)}: {finding.rule}; {finding.fix}" for finding in shown]
            if len(found) > len(shown):
                lines.append(f"  ... and {len(found) - len(shown)} more")
        return "\n".join(lines)

    def _histogram(self) -> list[str]:
        used = [label for label in range(len(self.names)) if any(s.histogram[label] for s in self.splits)]
        rows = [(self.names[label], *(int(s.histogram[label]) for s in self.splits)) for label in used]
        lines = _table(("class", *(s.split for s in self.splits)), rows)
        unused = len(self.names) - len(used)
        return [*lines, f"{unused} classes have no box"] if unused else lines


def check(root: str | Path, *, names: Sequence[str] | None = None, progress: bool = False) -> CheckReport:
    """Read every annotation and every picture of a data set.

    Args:
        root: Folder of the set (or the yaml of a YOLO set).
        names: Class names, where they are to be fixed.
        progress: Show a progress bar (never where the output is not a terminal).

    Returns:
        Counts and findings. Training refuses a set with errors; warnings are boxes that it drops or clips.

    Raises:
        UserError: The folder is missing or holds no known format.
    """
    root = Path(root)
    counts, findings = [], []
    known_names: tuple[str, ...] = ()
    seen: dict[Path, str] = {}
    for split in available_splits(root):
        if split == "trainval" and seen:
            continue  # the union of splits that have been looked at
        try:
            dataset = load_detection_set(root, split, names=names)
        except UserError as error:
            findings.append(Finding("error", str(root), split, str(error), "repair the file"))
            continue
        known_names = dataset.names
        counts.append(_count(dataset))
        findings += dataset.findings
        new = [record for record in dataset.records if record.path not in seen]
        findings += _overlaps(dataset, seen)
        findings += _of_each(_look_at, new, root, progress)
        seen.update({record.path: split for record in new})
    return CheckReport(root, detect_format(root), known_names, tuple(counts), _in_order(findings))


def check_all(root: str | Path, *, names: Sequence[str] | None = None, progress: bool = False) -> list[CheckReport]:
    """`check` of a data set, or of each of those in a folder of data sets."""
    return [check(folder, names=names, progress=progress) for folder in find_sets(root)]


def _count(dataset: DetectionSet) -> SplitCount:
    labels = [record.labels[~record.ignore] for record in dataset.records]
    histogram = np.bincount(np.concatenate([np.zeros(0, np.int64), *labels]), minlength=len(dataset.names))
    return SplitCount(
        split=dataset.split,
        pictures=len(dataset.records),
        boxes=int(histogram.sum()),
        ignored=sum(int(record.ignore.sum()) for record in dataset.records),
        empty=sum(not len(record.labels) for record in dataset.records),
        histogram=histogram,
    )


def _overlaps(dataset: DetectionSet, seen: dict[Path, str]) -> list[Finding]:
    """Pictures that were trained on already; val and test may be one and the same (VOC2007)."""
    return [
        Finding(
            "warning",
            relative(record.path, dataset.root),
            f"split {dataset.split}",
            "picture is in the training split too, so scores on it mean nothing",
            "take it out of one of the two",
        )
        for record in dataset.records
        if seen.get(record.path) == "train"
    ]


def unreadable_pictures(dataset: DetectionSet, *, progress: bool = False) -> list[Finding]:
    """Decode every picture of a split: an error for each that is damaged, or not of the size that its annotation says.

    Args:
        dataset: The split.
        progress: Show a progress bar (never where the output is not a terminal).
    """
    return _of_each(_decoded, dataset.records, dataset.root, progress)


def _of_each(
    findings: Callable[[ImageRecord, Path], list[Finding]], records: Sequence[ImageRecord], root: Path, progress: bool
) -> list[Finding]:
    """The findings about all records, several at a time."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda record: findings(record, root), records)
        bar = tqdm(results, total=len(records), desc="pictures", leave=False, disable=None if progress else True)
        return [finding for found in bar for finding in found]


def _decoded(record: ImageRecord, root: Path) -> list[Finding]:
    """Nothing, or why a picture cannot be used."""
    try:
        record.read()
    except UserError as error:
        fix = "put a good picture there or take it out of the split"
        return [Finding("error", relative(record.path, root), "", str(error), fix)]
    return []


def _look_at(record: ImageRecord, root: Path) -> list[Finding]:
    """Findings about one picture, which is decoded."""
    file, findings = relative(record.path, root), _decoded(record, root)
    if findings:
        return findings
    header = read_header(record.path)
    if not len(record.labels):
        findings.append(Finding("note", file, "", "picture without boxes", "nothing to do if nothing is on it"))
    if header.is_grey:
        findings.append(Finding("note", file, "", "grey picture, used as RGB", "nothing to do"))
    if (record.width, record.height) != header.shown_size:
        rule = "its EXIF rotation is not applied, because the annotation gives the size of the stored picture"
        findings.append(Finding("note", file, "", rule, "nothing to do if the boxes were drawn on the stored picture"))
    return findings


def _in_order(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Errors first, then as they came; each once, though two splits may share a file."""
    by_severity = defaultdict(dict)
    for finding in findings:
        by_severity[finding.severity][finding] = None
    return tuple(finding for severity in _SEVERITIES for finding in by_severity[severity])


def _place(finding: Finding) -> str:
    return f"{finding.file}, {finding.where}" if finding.where else finding.file


def _table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines of a table: first column left, the others right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return [
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in cells)
    ]


def run_check(root: str | Path, *, strict: bool = False) -> int:
    """Print the reports of `check_all`.

    Returns:
        The exit code: 1 when a set has errors (or, if `strict`, warnings), else 0.
    """
    reports = check_all(root, progress=True)
    print("\n\n".join(str(report) for report in reports))
    return max(report.exit_code(strict) for report in reports)
