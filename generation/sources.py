"""Where pictures and clips come from: folders, idx files, videos, UCF-101, arrays, tar shards, moving shapes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np

from generation.config import SYNTHETIC, GenerateDataConfig
from generation.shards import ShardSource
from generation.synthetic import MovingShapes
from vision_ssm.data.images import list_images, read_image
from vision_ssm.data.labelled import LabelledPictures, Split, find_labelled, split_folder, to_square
from vision_ssm.data.video import VIDEO_SUFFIXES, read_frames
from vision_ssm.errors import UserError

HELD_OUT_CLIPS = 4_096
"""Moving shapes that are not trained on."""
_HELD_OUT_SEED = 1_000_003
_SAMPLE_KEYS = ("images", "videos", "latents", "arr_0")


class Source(Protocol):
    """Pictures or whole videos, and their classes."""

    classes: tuple[str, ...]
    """Names; empty where there are none."""

    def __len__(self) -> int: ...

    def label(self, index: int) -> int:
        """Class of a sample; -1 where there are none."""
        ...

    def read(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8 picture, (F, H, W, 3) uint8 frames, or floats (C, h, w) or (C, F, h, w) of latents."""
        ...


def find_source(config: GenerateDataConfig, split: Split, classes: Sequence[str] | None = None) -> Source:
    """The training or the held-out set of a configuration.

    Args:
        config: where it is.
        split: train or val.
        classes: those of the training set, for the held-out one.

    Raises:
        UserError: nothing of that kind there, or damaged files.
    """
    place = (config.val or config.train) if split == "val" else config.train
    if place == SYNTHETIC:
        seed, count = (0, config.clips) if split == "train" else (_HELD_OUT_SEED, HELD_OUT_CLIPS)
        return MovingShapes(count, frames=config.frames, side=config.side, seed=seed)
    path = Path(place)
    if not place:
        raise UserError(f"nothing to train on: give --data.train FOLDER, or --data.train {SYNTHETIC}")
    if path.suffix in (".npy", ".npz"):
        return ArraySource.load(path)
    if not path.is_dir():
        raise UserError(
            f"the data {place!r} are no folder, no .npy or .npz file and not {SYNTHETIC!r}; give one of these"
        )
    if shards := sorted(split_folder(path, split).glob("*.tar")):
        return ShardSource(shards)
    if config.frames:
        return VideoFiles.find(path, split, config, classes)
    return _pictures(path, split, classes)


class PictureFiles:
    """Pictures with or without classes."""

    def __init__(self, found: LabelledPictures | Sequence[Path]) -> None:
        self.found = found
        self.classes = found.classes if isinstance(found, LabelledPictures) else ()

    def __len__(self) -> int:
        return len(self.found)

    def label(self, index: int) -> int:
        """Class of picture `index`."""
        return int(self.found.labels[index]) if isinstance(self.found, LabelledPictures) else -1

    def read(self, index: int) -> np.ndarray:
        """Picture `index`, (H, W, 3) uint8."""
        return self.found.read(index) if isinstance(self.found, LabelledPictures) else read_image(self.found[index])


class ArraySource:
    """Samples of an .npy or .npz file.

    Args:
        samples: (n, H, W, C) or (n, F, H, W, C) uint8, floats from 0 to 1 in the same order, or latents.
        labels: (n,) classes, or None.
        classes: their names.
        latents: floats (n, C, h, w) or (n, C, F, h, w) as the network sees them.
    """

    def __init__(
        self,
        samples: np.ndarray,
        labels: np.ndarray | None = None,
        classes: Sequence[str] = (),
        *,
        latents: bool = False,
    ) -> None:
        self.samples, self.labels, self.latents = samples, labels, latents
        if labels is not None and not classes:
            classes = [str(i) for i in range(int(labels.max(initial=0)) + 1)]
        self.classes = tuple(classes)

    @classmethod
    def load(cls, path: Path) -> "ArraySource":
        """Read a file: of an .npz the keys images, videos, latents or arr_0, with labels and classes where it has them.

        Raises:
            UserError: missing, damaged or of another shape.
        """
        try:
            found = np.load(path, allow_pickle=False, mmap_mode="r" if path.suffix == ".npy" else None)
            table = dict(found) if isinstance(found, np.lib.npyio.NpzFile) else {"arr_0": found}
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"cannot read {path}: {error}") from None
        key = next((name for name in _SAMPLE_KEYS if name in table), None)
        if key is None:
            raise UserError(f"{path} has none of the arrays {', '.join(_SAMPLE_KEYS)}; it has {', '.join(table)}")
        samples, labels = table[key], table.get("labels")
        if samples.ndim not in (4, 5) or not len(samples):
            raise UserError(
                f"{path}: {key} has shape {samples.shape}; pictures are (n, H, W, C), clips (n, F, H, W, C)"
            )
        if key != "latents" and samples.shape[-1] not in (1, 3):
            raise UserError(f"{path}: {key} has shape {samples.shape}; the last axis must be 1 or 3 channels")
        if labels is not None and labels.shape != (len(samples),):
            raise UserError(f"{path}: {len(samples)} samples, but labels of shape {labels.shape}")
        return cls(samples, labels, [str(name) for name in table.get("classes", ())], latents=key == "latents")

    def __len__(self) -> int:
        return len(self.samples)

    def label(self, index: int) -> int:
        """Class of sample `index`."""
        return -1 if self.labels is None else int(self.labels[index])

    def read(self, index: int) -> np.ndarray:
        """Sample `index`; floats of pictures become uint8."""
        sample = np.asarray(self.samples[index])
        if self.latents or sample.dtype == np.uint8:
            return sample if self.latents or sample.shape[-1] == 3 else np.repeat(sample, 3, axis=-1)
        sample = np.rint(sample.astype(np.float32).clip(0, 1) * 255).astype(np.uint8)
        return sample if sample.shape[-1] == 3 else np.repeat(sample, 3, axis=-1)


class VideoFiles:
    """Videos with or without classes, decoded at the size that is needed.

    Args:
        files: videos.
        labels: class of each, or None.
        classes: names.
        side: frames are squares of this side.
    """

    def __init__(self, files: Sequence[Path], labels: Sequence[int] | None, classes: Sequence[str], side: int) -> None:
        self.files, self.labels, self.classes, self.side = list(files), labels, tuple(classes), side

    @classmethod
    def find(
        cls, root: Path, split: Split, config: GenerateDataConfig, classes: Sequence[str] | None = None
    ) -> "VideoFiles":
        """UCF-101 by its lists, a folder per class, or all videos below a folder without classes (as MineRL's).

        Raises:
            UserError: no videos there.
        """
        lists = next(iter(sorted(root.rglob("trainlist01.txt"))), None)
        if lists is not None:
            files, names = _ucf_files(root, lists.parent, split, config.split_number)
        else:
            root = split_folder(root, split)
            files = sorted(f for f in root.rglob("*") if f.suffix.lower() in VIDEO_SUFFIXES and f.is_file())
            names = _class_names(root, files)
        if not files:
            raise UserError(f"no videos in {root}; known endings: {' '.join(VIDEO_SUFFIXES)}")
        if not names:
            return cls(files, None, (), config.side)
        known = tuple(classes or sorted(set(names)))
        if unknown := sorted(set(names) - set(known)):
            raise UserError(f"{root} has classes that the training set has not: {', '.join(unknown)}")
        return cls(files, [known.index(name) for name in names], known, config.side)

    def __len__(self) -> int:
        return len(self.files)

    def label(self, index: int) -> int:
        """Class of video `index`."""
        return -1 if self.labels is None else self.labels[index]

    def read(self, index: int) -> np.ndarray:
        """All frames of video `index`, (F, S, S, 3) uint8."""
        return np.stack([to_square(frame, self.side) for frame in read_frames(self.files[index])])


def _pictures(path: Path, split: Split, classes: Sequence[str] | None) -> PictureFiles:
    folder = split_folder(path, split)
    if next(path.glob("*-images-idx3-ubyte*"), None) is not None or any(f.is_dir() for f in folder.iterdir()):
        return PictureFiles(find_labelled(path, split, classes))
    return PictureFiles(list_images(folder))


def _class_names(root: Path, files: Sequence[Path]) -> list[str]:
    """Names of the folders that hold the videos; none where every video has a folder to itself, or there is one."""
    if any(len(file.relative_to(root).parts) != 2 for file in files):
        return []
    names = [file.parent.name for file in files]
    return names if 1 < len(set(names)) < len(names) else []


def _ucf_files(root: Path, lists: Path, split: Split, number: int) -> tuple[list[Path], list[str]]:
    """Videos of an official split of UCF-101, lines "Class/v_Class_g01_c01.avi 1" in ucfTrainTestlist."""
    file = lists / f"{'train' if split == 'train' else 'test'}list{number:02d}.txt"
    try:
        lines = [line.split()[0] for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    where = {path.name: path for path in root.rglob("*.avi")}
    missing = [line for line in lines if Path(line).name not in where]
    if missing:
        raise UserError(f"{len(missing)} of {len(lines)} videos of {file.name} are not in {root}, first {missing[0]}")
    return [where[Path(line).name] for line in lines], [line.split("/")[0] for line in lines]


def to_channels(picture: np.ndarray, channels: int) -> np.ndarray:
    """(..., 3) uint8 as (..., 1) grey, or as it is."""
    if channels == picture.shape[-1]:
        return picture
    flat = picture.reshape(-1, picture.shape[-2], 3)
    return cv2.cvtColor(flat, cv2.COLOR_RGB2GRAY).reshape(*picture.shape[:-1], 1)
