"""`vssm restore run`: files, folders and videos through a restorer, every result complete or not there."""

import glob
import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from restoration.outputs import check_inputs_kept, final_target, find_targets, video_target
from restoration.picture import Picture
from restoration.picture_reader import read_picture
from restoration.picture_writer import write_picture
from restoration.reading import header_of, with_name
from restoration.restorer import USUAL, Method, PictureRestorer, Route
from restoration.video import count_frames, restore_video
from vision_ssm.data.media import is_video
from vision_ssm.device import size_text
from vision_ssm.errors import UserError, is_out_of_memory
from vision_ssm.files import check_writable


def run_restore(
    inputs: Sequence[str | Path],
    *,
    output: str | Path,
    task: str | None = None,
    weights: str | Path | None = None,
    mask: str | Path | None = None,
    device: str = "auto",
    route: Route = USUAL,
    scratch: str | Path | None = None,
    format: str | None = None,
    dry_run: bool = False,
) -> int:
    """Restore pictures and videos and write the results.

    Args:
        inputs: pictures, videos, folders (to any depth), glob patterns.
        output: a folder, in which the tree of the inputs is kept, or for a single input the name of the result.
        task: a name of `restoration.tasks`; None for that of the weights.
        weights: see `PictureRestorer.from_pretrained`.
        mask: for inpainting: a picture that is black where pixels are missing, as `vssm restore degrade` writes it, or
            a folder of such pictures with the names of the inputs.
        device: "auto", "cpu", "cuda", ...
        route: whole picture, strips or tiles; precision.
        scratch: folder for the maps of strips, by default beside the result; removed when the picture is done.
        format: ending of the resulting pictures ("png", "tif", ...); None keeps that of each file.
        dry_run: only say what would be done, how much memory it would take and about how long.

    Returns:
        0, or 1 if files could not be restored; they are named on standard error and the rest is done.

    Raises:
        UserError: wrong option, no weights, nothing to do, an output that cannot be written.
    """
    output = Path(output)
    suffix = f".{format}" if format else None
    targets = find_targets(inputs, output)
    named = output in targets.values()
    if named and suffix not in (None, output.suffix):
        raise UserError(f"-o {output} and --format {format} contradict each other; leave out --format")
    if named:
        suffix = output.suffix  # another format than the one asked for is refused
    check_inputs_kept(targets, suffix)
    restorer = PictureRestorer.from_pretrained(weights, task, device=device, route=route)
    if restorer.needs_mask and mask is None:
        raise UserError("inpainting needs --mask: a picture that is black where pixels are missing")
    if mask is not None and not restorer.needs_mask:
        raise UserError(f"--mask is for inpainting; the task {restorer.card.task!r} takes none")
    if mask is not None and not Path(mask).exists():
        raise UserError(f"--mask {mask}: no such file or folder")
    if dry_run:
        return _Forecast(restorer).run(targets)
    check_writable(output.parent if named else output)
    if scratch is not None:
        check_writable(scratch)
    job = _Job(restorer, suffix, None if mask is None else Path(mask), None if scratch is None else Path(scratch))
    started = time.perf_counter()
    for path, target in tqdm(targets.items(), desc="restore", unit="file", leave=False, disable=None):
        job.do(path, target)
    print(f"{job.summary(time.perf_counter() - started)}; written to {output}")
    return 1 if job.failed else 0


@dataclass
class _Job:
    """Restores file after file and counts."""

    restorer: PictureRestorer
    suffix: str | None
    mask: Path | None
    scratch: Path | None
    pictures: int = 0
    videos: int = 0
    frames: int = 0
    failed: list[Path] = field(default_factory=list)

    def do(self, path: Path, target: Path) -> None:
        """Restore one file; what goes wrong with it is said and counted."""
        try:
            if is_video(path):
                self._video(path, video_target(target))
            else:
                self._picture(path, target)
        except (UserError, OSError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise  # a bug, not this file
            self.failed.append(path)
            _say(path, f"not restored: {'out of memory' if is_out_of_memory(error) else error}")

    def _picture(self, path: Path, target: Path) -> None:
        picture = read_picture(path)
        target = final_target(target, picture, self.suffix)
        for note in picture.notes:
            _say(path, note)
        known = None if self.mask is None else _read_known(self._mask_of(path), picture)
        scratch = self._scratch_of(target)
        try:
            with tqdm(total=1.0, desc=path.name, leave=False, disable=None, bar_format=_BAR) as bar:
                result = self.restorer.restore(
                    picture.to_tensor(), known=known, scratch=scratch, say=partial(_say, path), tick=bar.update
                )
        except KeyboardInterrupt:
            if scratch.exists():
                _say(path, f"interrupted; the same command goes on with it (what is done is in {scratch})")
            raise
        write_picture(target, picture.with_result(result))
        self.pictures += 1

    def _video(self, path: Path, target: Path) -> None:
        say = _once(partial(_say, path))
        scratch = None if self.scratch is None else self._scratch_of(target)
        known: list[Tensor] = []

        def restore(frame: np.ndarray) -> np.ndarray:
            picture = Picture(frame)
            if self.mask is not None and not known:
                known.append(_read_known(self._mask_of(path), picture))
            result = self.restorer.restore(
                picture.to_tensor(), known=known[0] if known else None, scratch=scratch, say=say
            )
            return picture.with_result(result).pixels

        self.frames += restore_video(path, target, restore, say)
        self.videos += 1

    def _mask_of(self, path: Path) -> Path:
        assert self.mask is not None
        if not self.mask.is_dir():
            return self.mask
        found = sorted(self.mask.rglob(f"{glob.escape(path.stem)}.*"))
        if not found:
            raise UserError(f"the folder {self.mask} has no mask of the name {path.stem}")
        return found[0]

    def _scratch_of(self, target: Path) -> Path:
        if self.scratch is None:
            return target.with_name(f".{target.name}.unfinished")
        place = hashlib.sha256(str(target.resolve()).encode()).hexdigest()[:8]
        return self.scratch / f"{target.name}.{place}"

    def summary(self, seconds: float) -> str:
        """One line on what was done."""
        parts = [f"{self.pictures} pictures"]
        if self.videos:
            parts.append(f"{self.videos} videos ({self.frames} frames)")
        return f"{' and '.join(parts)} restored, {len(self.failed)} failed, in {seconds:.1f} s"


_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


class _Forecast:
    """Says what would be done."""

    def __init__(self, restorer: PictureRestorer) -> None:
        self.restorer = restorer
        self.speeds: dict[Method, float] = {}

    def run(self, targets: dict[Path, Path]) -> int:
        """Print a line for each file and the sum; returns the exit code."""
        total, failed = 0.0, 0
        for path in targets:
            try:
                total += self._one(path)
            except UserError as error:
                failed += 1
                tqdm.write(with_name(path, error), file=sys.stderr)
        print(f"{len(targets) - failed} files, about {_duration(total)} on {self.restorer.device}; nothing was written")
        return 1 if failed else 0

    def _one(self, path: Path) -> float:
        if is_video(path):
            height, width, frames = count_frames(path)
        else:
            (width, height), frames = header_of(path).shown_size, 1
        plan = self.restorer.plan(height, width)
        if plan.method not in self.speeds:
            self.speeds[plan.method] = self.restorer.speed(plan.method)
        seconds = frames * plan.pixels / self.speeds[plan.method]
        disk = f", {size_text(plan.scratch)} of scratch files" if plan.scratch else ""
        many = f", {frames} frames" if is_video(path) else ""
        why = f" ({plan.reason})" if plan.reason else ""
        print(
            f"{path}: {width}x{height}{many}: {_METHODS[plan.method]}{why}, about {size_text(plan.memory)} of "
            f"memory{disk}, about {_duration(seconds)}"
        )
        return seconds


_METHODS: dict[Method, str] = {"whole": "whole picture at once", "strips": "exact strips", "tiles": "independent tiles"}


def _read_known(path: Path, picture: Picture) -> Tensor:
    """(1, H, W), 1.0 where a mask is not black: these pixels are known."""
    try:
        mask = read_picture(path)
    except UserError as error:
        raise UserError(f"the mask {path}: {error}") from None
    if mask.size != picture.size:
        (height, width), (own_height, own_width) = mask.size, picture.size
        raise UserError(f"the mask {path} is {width}x{height}, the picture {own_width}x{own_height}")
    return torch.from_numpy(mask.pixels.any(axis=2).astype(np.float32))[None]


def _say(path: Path, message: str) -> None:
    tqdm.write(f"{path}: {message}", file=sys.stderr)


def _once(say: Callable[[str], None]) -> Callable[[str], None]:
    """Says each message the first time only: what is true of one frame is true of thousands."""
    said: set[str] = set()

    def say_once(message: str) -> None:
        if message not in said:
            said.add(message)
            say(message)

    return say_once


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
