"""Writing files so that a reader, or a later run, never meets half of one."""

import contextlib
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from vision_ssm.errors import UserError


def check_writable(folder: str | Path) -> None:
    """Make a folder and try to write into it, so that work whose result could not be kept is not begun.

    Raises:
        UserError: It cannot be made or written.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to the output folder {folder}: {error.strerror or error}") from error


def check_new(folder: str | Path) -> None:
    """As `check_writable`, for a folder that has to be new or empty, so that nothing is replaced.

    Raises:
        UserError: It holds something, or cannot be made or written.
    """
    check_writable(folder)
    if any(Path(folder).iterdir()):
        raise UserError(f"{folder} is not empty, and nothing in it is replaced: give a new folder")


def shipped_or_path(place: str | Path, shipped: Path) -> Path:
    """What exists at `place`; else the folder of that name in `shipped`; else `place`, for the message that follows."""
    path = Path(place)
    named = shipped / path
    return named if not path.exists() and len(path.parts) == 1 and named.is_dir() else path


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, with the same ending; on success it takes the place of `path`.

    Folders are made as needed. After an exception the temporary file is removed and `path` is as it was.

    Raises:
        UserError: The folder or the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another folder") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a whole file at once, replacing an old one only when the new one is complete.

    Raises:
        UserError: The folder or the file cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """As `write_bytes`, for text in UTF-8 with line ends as given."""
    write_bytes(path, text.encode())


def to_disk(path: str | Path) -> None:
    """Force a file's bytes, or a folder's names, to the disk, so that they survive a loss of power."""
    folder = Path(path).is_dir()
    if os.name == "nt" and folder:
        return  # Windows has no such call for folders
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
