"""What `vssm detect predict` writes: drawn pictures and videos, COCO results, YOLO txt."""

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm import tqdm

from detection.predict import Detector
from detection.predict_options import PredictOptions
from detection.prediction import Prediction
from vision_ssm.data.media import is_video, named_files
from vision_ssm.data.video import video_info, video_writer
from vision_ssm.errors import UserError
from vision_ssm.files import check_writable, write_text
from vision_ssm.viz import PICTURE_SUFFIXES

KINDS = ("pictures", "json", "txt")
"""What can be saved."""

_WRITABLE_VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".m4v")


def run_predict(
    sources: Sequence[str | Path],
    *,
    weights: str | Path,
    output: str | Path,
    save: Sequence[str] = ("pictures", "json"),
    options: PredictOptions | None = None,
    device: str = "auto",
) -> int:
    """Predict on files and write the results.

    In `output`: `pictures/` (drawn pictures and videos), `predictions.json` (COCO results) and `txt/` (YOLO labels, one
    file for each picture or frame) with `classes.txt`. Names and sub-folders are those of the inputs. Files of
    an earlier run are replaced; every file appears complete or not at all.

    Args:
        sources: pictures, folders, glob patterns, videos.
        weights: checkpoint folder.
        output: folder to write to.
        save: any of "pictures", "json", "txt".
        options: how to look; the usual ones if not given.
        device: "auto", "cpu", "cuda", ...

    Returns:
        0, or 1 if files could not be read; they are named on standard error and the rest is done.

    Raises:
        UserError: wrong option, nothing to look at, an output folder that cannot be written, or one in which an input
            would be overwritten.
    """
    output = Path(output)
    _check_kinds(save)
    files = named_files(sources, output)
    _check_output(output, files, save)
    detector = Detector.from_pretrained(weights, device)
    failed: list[UserError] = []
    stream = detector.stream(list(files), options, on_error=failed.append)
    tally = _Tally()
    results: list[dict[str, Any]] = []
    with tqdm(stream, desc="predict", unit="img", leave=False, disable=None) as bar:
        for path, predictions in groupby(bar, key=lambda one: one.path):
            assert path is not None
            _write_file(output, files[path], path, _recorded(predictions, detector, tally, results, files), save)
    if "json" in save:
        write_text(output / "predictions.json", json.dumps(results) + "\n")
    if "txt" in save:
        write_text(output / "classes.txt", "".join(f"{name}\n" for name in detector.names))
    for error in failed:
        print(f"not read: {error}", file=sys.stderr)
    print(f"{tally.summary(detector.names)}, {len(failed)} not read; written to {output}")
    return 1 if failed else 0


@dataclass
class _Tally:
    """Counts for the summary line."""

    started: float = field(default_factory=time.perf_counter)
    pictures: int = 0
    frames: int = 0
    labels: Counter[int] = field(default_factory=Counter)

    def summary(self, names: Sequence[str]) -> str:
        seconds = time.perf_counter() - self.started
        seen = self.pictures + self.frames
        looked = f"{self.pictures} pictures" + (f" and {self.frames} video frames" if self.frames else "")
        classes = ", ".join(f"{names[label]} {count}" for label, count in self.labels.most_common(5))
        more = ", ..." if len(self.labels) > 5 else ""
        found = f"{self.labels.total()} objects" + (f" ({classes}{more})" if classes else "")
        return f"{looked}: {found} in {seconds:.1f} s ({1000 * seconds / max(seen, 1):.0f} ms each)"


def _recorded(
    predictions: Iterator[Prediction],
    detector: Detector,
    tally: _Tally,
    results: list[dict[str, Any]],
    files: dict[Path, Path],
) -> Iterator[Prediction]:
    """The same predictions, counted and added to the COCO results on the way."""
    for one in predictions:
        assert one.path is not None
        tally.pictures += one.frame is None
        tally.frames += one.frame is not None
        tally.labels.update(one.labels.tolist())
        results += one.to_coco(_image_id(one, files[one.path]), detector.category_ids)
        yield one


def _image_id(prediction: Prediction, name: Path) -> int | str:
    """COCO's number where the file is named so (000000000139.jpg), else the name, for a frame with its number."""
    if prediction.frame is not None:
        return f"{name.as_posix()}#{prediction.frame}"
    return int(name.stem) if name.stem.isdecimal() else name.as_posix()


def _write_file(output: Path, name: Path, path: Path, predictions: Iterator[Prediction], save: Sequence[str]) -> None:
    """Pictures and labels of one file; takes every prediction, also when nothing is to be written."""
    if not is_video(path):
        for one in predictions:
            if "pictures" in save:
                one.save(_picture_path(output, name))
            if "txt" in save:
                write_text(output / "txt" / name.with_suffix(".txt"), one.to_yolo())
    elif "pictures" in save:
        with video_writer(_picture_path(output, name), video_info(path).fps) as append:
            for one in _labelled(predictions, output, name, save):
                append(one.draw())
    else:
        for _ in _labelled(predictions, output, name, save):
            continue


def _labelled(predictions: Iterator[Prediction], output: Path, name: Path, save: Sequence[str]) -> Iterator[Prediction]:
    """The same predictions of a video's frames; their labels are written on the way."""
    for one in predictions:
        if "txt" in save:
            write_text(output / "txt" / name.with_suffix("") / f"{one.frame:06d}.txt", one.to_yolo())
        yield one


def _picture_path(output: Path, name: Path) -> Path:
    """Where the drawn picture or video goes; endings that cannot be written become .png or .mp4."""
    suffix = name.suffix.lower()
    if is_video(name):
        kept = suffix in _WRITABLE_VIDEOS
        return output / "pictures" / (name if kept else name.with_suffix(".mp4"))
    return output / "pictures" / (name if suffix in PICTURE_SUFFIXES else name.with_suffix(".png"))


def _check_kinds(save: Sequence[str]) -> None:
    unknown = [kind for kind in save if kind not in KINDS]
    if unknown or not save:
        raise UserError(f"save must be one or more of {', '.join(KINDS)}; got {', '.join(unknown) or 'nothing'}")


def _check_output(output: Path, files: dict[Path, Path], save: Sequence[str]) -> None:
    """Fail before the work is done if the results cannot be written or would replace an input."""
    if "pictures" in save:
        inputs = {path.resolve() for path in files}
        for name in files.values():
            target = _picture_path(output, name)
            if target.resolve() in inputs:
                raise UserError(f"the output {target} would overwrite an input; choose another output folder")
    check_writable(output)
