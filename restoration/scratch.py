"""Maps of a network in files, and a journal of what is done: what an interrupted run goes on from."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from vision_ssm.errors import UserError
from vision_ssm.files import to_disk, write_text

_FLOAT = 4
_JOURNAL, _ENDING = "journal.json", ".map"
_SAME_START = 120  # seconds within which two boot times are the same: the clock may have been set


@dataclass(frozen=True)
class Map:
    """A named (height, width, channels) float32 map; one of 1 x 1 holds values for the whole picture."""

    name: str
    height: int
    width: int
    channels: int

    @property
    def bytes(self) -> int:
        """Size of its file."""
        return self.height * self.width * self.channels * _FLOAT


class Scratch:
    """The folder with the maps of one run and the journal of what is done.

    Args:
        folder: made if it is not there.
        identity: what the result depends on; maps of a run with another identity are removed.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder = folder
        self.identity = identity
        self.done = self._passes_done()
        if not self.done:
            self.remove()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the scratch folder {folder}: {error.strerror or error}") from error

    def _passes_done(self) -> int:
        try:
            journal = json.loads((self.folder / _JOURNAL).read_text(encoding="utf-8"))
            started, done = journal["started"], journal["done"]
        except (OSError, ValueError, KeyError, TypeError):
            return 0
        # Without a clean stop the last maps may never have left the machine's memory before it was switched off.
        intact = started is None or abs(started - psutil.boot_time()) < _SAME_START
        return done if intact and journal.get("identity") == self.identity else 0

    def note(self, done: int, *, stopped: bool = False) -> None:
        """Remember that the first `done` passes are complete; when `stopped`, so that it survives a loss of power."""
        self.done = done
        if stopped:
            for file in self.folder.glob(f"*{_ENDING}"):
                to_disk(file)
        started = None if stopped else psutil.boot_time()
        write_text(
            self.folder / _JOURNAL, json.dumps({"identity": self.identity, "done": done, "started": started}) + "\n"
        )

    @property
    def bytes(self) -> int:
        """Size of all maps that are there."""
        return sum(file.stat().st_size for file in self.folder.glob(f"*{_ENDING}"))

    def make(self, of: Map) -> None:
        """An empty file for a map."""
        with open(self._file(of), "wb") as file:
            file.truncate(of.bytes)

    def drop(self, of: Map) -> None:
        """Remove a map that is not needed any more."""
        self._file(of).unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the maps and the journal, and the folder if nothing else is in it."""
        for file in (*self.folder.glob(f"*{_ENDING}"), self.folder / _JOURNAL):
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def read(self, of: Map, rows: slice, columns: slice) -> Tensor:
        """A window of a map, (1, C, h, w) in channels-last memory."""
        window = np.empty((rows.stop - rows.start, columns.stop - columns.start, of.channels), np.float32)
        with open(self._file(of), "rb", buffering=0) as file:
            for at, part in _stretches(of, rows, columns, window):
                file.seek(at)
                _read_all(file, part)
        return torch.from_numpy(window).permute(2, 0, 1)[None]

    def write(self, of: Map, rows: slice, columns: slice, values: Tensor) -> None:
        """Put (1, C, h, w) values into a window of a map."""
        window = np.ascontiguousarray(values[0].permute(1, 2, 0).float().cpu().numpy())
        with open(self._file(of), "r+b", buffering=0) as file:
            for at, part in _stretches(of, rows, columns, window):
                file.seek(at)
                _write_all(file, part)

    def _file(self, of: Map) -> Path:
        return self.folder / f"{of.name}{_ENDING}"


def _stretches(of: Map, rows: slice, columns: slice, window: np.ndarray) -> Iterator[tuple[int, memoryview]]:
    """Places in the file of the contiguous parts of a window, and those parts."""
    pixel, line = of.channels * _FLOAT, of.width * of.channels * _FLOAT
    start = rows.start * line + columns.start * pixel
    if columns.stop - columns.start == of.width:
        yield start, window.reshape(-1).data.cast("B")
    else:
        for k, row in enumerate(window):
            yield start + k * line, row.reshape(-1).data.cast("B")


def _read_all(file, part: memoryview) -> None:
    """Fill `part`; one call of the system reads at most 2 GiB."""
    while part:
        count = file.readinto(part)
        if not count:
            raise UserError(f"{file.name} is cut off: the scratch folder was changed; remove it and start again")
        part = part[count:]


def _write_all(file, part: memoryview) -> None:
    """Write all of `part`; one call of the system writes at most 2 GiB."""
    while part:
        part = part[file.write(part) :]
