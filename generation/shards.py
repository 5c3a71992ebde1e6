"""WebDataset shards: tar files in which the files of one sample stand together under one name."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vision_ssm.data.images import IMAGE_SUFFIXES, decode_image
from vision_ssm.errors import UserError

_Member = tuple[Path, int, int]  # shard, offset, size


class ShardSource:
    """Samples of .tar files: a picture (or .npy of pictures, clips or latents) and its class (.cls, or .json "label").

    The tables of contents are read once, samples by seeking, so that any order is quick.

    Args:
        files: the shards.

    Raises:
        UserError: a damaged shard, or one without samples.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.members: list[_Member] = []
        self.names: list[str] = []
        labels: list[int] = []
        for file in files:
            for name, parts in _table(file).items():
                kind = next((end for end in parts if end in (*IMAGE_SUFFIXES, ".npy")), None)
                if kind is None:
                    continue
                self.members.append(parts[kind])
                self.names.append(f"{file}:{name}{kind}")
                labels.append(_label(parts))
        if not self.members:
            raise UserError(f"{files[0].parent}: the shards hold no pictures and no .npy files")
        if -1 in labels and max(labels) >= 0:
            raise UserError(f"{self.names[labels.index(-1)]} has no .cls and no .json with a label, others have")
        self.labels = labels
        self.classes = tuple(str(i) for i in range(max(labels) + 1))

    def __len__(self) -> int:
        return len(self.members)

    def label(self, index: int) -> int:
        """Class of sample `index`; -1 where there are none."""
        return self.labels[index]

    def read(self, index: int) -> np.ndarray:
        """Sample `index`: (H, W, 3) uint8, or what its .npy holds."""
        data, name = _bytes(self.members[index]), self.names[index]
        if not name.endswith(".npy"):
            return decode_image(data, name)
        try:
            return np.load(io.BytesIO(data), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise UserError(f"cannot read {name}: {error}") from None


def _table(file: Path) -> dict[str, dict[str, _Member]]:
    """Name of each sample -> ending -> place of its file."""
    samples: dict[str, dict[str, _Member]] = {}
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                if member.isfile():
                    folder, _, base = member.name.rpartition("/")
                    name, _, ending = base.partition(".")
                    place = (file, member.offset_data, member.size)
                    samples.setdefault(f"{folder}/{name}", {})[f".{ending.lower()}"] = place
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"cannot read the shard {file}: {error}") from None
    return samples


def _bytes(member: _Member) -> bytes:
    file, offset, size = member
    with file.open("rb") as stream:
        stream.seek(offset)
        return stream.read(size)


def _label(parts: dict[str, _Member]) -> int:
    try:
        if ".cls" in parts:
            return int(_bytes(parts[".cls"]))
        if ".json" in parts:
            content: Any = json.loads(_bytes(parts[".json"]))
            return int(content.get("label", -1)) if isinstance(content, dict) else -1
    except ValueError as error:
        raise UserError(f"{parts.get('.cls', parts.get('.json'))}: not a class: {error}") from None
    return -1
