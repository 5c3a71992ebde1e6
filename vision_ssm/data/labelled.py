"""Pictures with one class each: a folder per class (as ImageNet unpacks), or the idx files of the MNIST family."""

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from vision_ssm.data.images import IMAGE_SUFFIXES, read_image
from vision_ssm.errors import UserError

Split = Literal["train", "val"]

_SPLIT_FOLDERS: dict[Split, tuple[str, ...]] = {"train": ("train", "training"), "val": ("val", "validation", "test")}
_IDX_PREFIX: dict[Split, str] = {"train": "train", "val": "t10k"}
_IDX_BYTES = 0x08
"""Element type of an idx file of bytes."""


class LabelledPictures:
    """Pictures that are read when asked for, and their classes.

    Args:
        classes: names; a label is a place in them.
        labels: (n,) classes.
        pictures: files, or an array (n, H, W) or (n, H, W, 3) uint8.
    """

    def __init__(self, classes: Sequence[str], labels: np.ndarray, pictures: Sequence[Path] | np.ndarray) -> None:
        self.classes: tuple[str, ...] = tuple(classes)
        self.labels, self.pictures = np.asarray(labels, dtype=np.int64), pictures

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> np.ndarray:
        """Picture `index`, (H, W, 3) uint8 RGB.

        Raises:
            UserError: the file is damaged.
        """
        found = self.pictures[index]
        if isinstance(found, Path):
            return read_image(found)
        return np.repeat(found[:, :, None], 3, axis=2) if found.ndim == 2 else found

    def name(self, index: int) -> str:
        """What messages and tables call picture `index`."""
        found = self.pictures[index]
        return str(found) if isinstance(found, Path) else str(index)


def find_labelled(source: str | Path, split: Split, classes: Sequence[str] | None = None) -> LabelledPictures:
    """The pictures of a split.

    Args:
        source: folder with idx files (train-images-idx3-ubyte and so on, gzipped or not), with a folder per split
            (train, val or test), or with a folder per class.
        split: which of them; a folder without splits is taken whole.
        classes: those of the training set, whose order gives the labels; by default those found, sorted.

    Raises:
        UserError: nothing of that kind there, damaged, or a class that is not among `classes`.
    """
    root = Path(source)
    if not str(source) or not root.is_dir():
        raise UserError(f"{str(source)!r} is no folder; give one with a folder per class, or with idx files")
    if next(root.glob("*-idx?-ubyte*"), None) is not None:
        return _from_idx(root, split, classes)
    root = split_folder(root, split)
    found = {folder.name: _pictures(folder) for folder in sorted(root.iterdir()) if folder.is_dir()}
    found = {name: files for name, files in found.items() if files}
    if not found:
        raise UserError(f"no pictures in folders per class below {root}; it needs {root}/CLASS/*.jpg (or png, ...)")
    names = tuple(classes or found)
    if unknown := sorted(set(found) - set(names)):
        raise UserError(f"{root} has classes that the training set has not: {', '.join(unknown)}")
    labels = np.concatenate([np.full(len(files), names.index(name)) for name, files in found.items()])
    return LabelledPictures(names, labels, [file for files in found.values() for file in files])


def split_folder(root: Path, split: Split) -> Path:
    """The folder of a split below `root`; `root` itself where it has no splits.

    Raises:
        UserError: it has the other split only.
    """
    found = {name: folder for name in _SPLIT_FOLDERS for folder in _first_folder(root, _SPLIT_FOLDERS[name])}
    if split in found:
        return found[split]
    if found:
        raise UserError(f"{root} has no split {split}: none of the folders {', '.join(_SPLIT_FOLDERS[split])} is there")
    return root


def to_square(picture: np.ndarray, side: int) -> np.ndarray:
    """The central square of a picture at another size: (H, W, C) -> (side, side, C) uint8."""
    height, width = picture.shape[:2]
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    picture = picture[top : top + short, left : left + short]
    if short == side:
        return picture
    return cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA if short > side else cv2.INTER_CUBIC)


def read_idx(path: str | Path) -> np.ndarray:
    """The array of bytes in an idx file, gzipped or not.

    Raises:
        UserError: missing, cut off, or not of bytes.
    """
    path = Path(path)
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != _IDX_BYTES or not 1 <= data[3] <= 4:
        raise UserError(f"{path} is no idx file of bytes (as of MNIST and Fashion-MNIST)")
    begin = 4 + 4 * data[3]
    shape = tuple(int.from_bytes(data[at : at + 4], "big") for at in range(4, begin, 4))
    values = np.frombuffer(data[begin:], np.uint8)
    if values.size != np.prod(shape):
        raise UserError(f"{path} is cut off: its header says {shape}, it holds {values.size} values")
    return values.reshape(shape)


def _first_folder(root: Path, names: Sequence[str]) -> list[Path]:
    return [root / name for name in names if (root / name).is_dir()][:1]


def _pictures(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())


def _from_idx(root: Path, split: Split, classes: Sequence[str] | None) -> LabelledPictures:
    arrays = []
    for kind in ("images-idx3", "labels-idx1"):
        files = sorted(root.glob(f"{_IDX_PREFIX[split]}-{kind}-ubyte*"))
        if not files:
            raise UserError(f"{root} has no {_IDX_PREFIX[split]}-{kind}-ubyte or .gz for the split {split}")
        arrays.append(read_idx(files[0]))
    pictures, labels = arrays
    if pictures.ndim != 3 or labels.ndim != 1 or len(pictures) != len(labels):
        raise UserError(f"{root}: {pictures.shape} pictures and {labels.shape} labels do not belong together")
    names = tuple(classes or map(str, range(int(labels.max(initial=0)) + 1)))
    if labels.max(initial=0) >= len(names):
        raise UserError(f"{root} has label {labels.max()}, the training set only the classes {', '.join(names)}")
    return LabelledPictures(names, labels, pictures)
