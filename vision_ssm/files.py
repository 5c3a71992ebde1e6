"""Writing files so that a reader, or a later run, never meets half of one."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from vision_ssm.errors import UserError


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
