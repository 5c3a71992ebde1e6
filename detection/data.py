"""From a data set on disk to batches: training samples by key, rectangular validation batches."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from detection import augment
from detection.augment import Sample
from detection.data_config import AugmentConfig
from detection.formats import DetectionSet, ImageRecord
from detection.letterbox import letterbox, rectangular_batches, resize_long_side
from vision_ssm.errors import UserError
from vision_ssm.training.batches import BatchStream, SampleKey, iterate_batches
from vision_ssm.viz import draw_boxes, grid, save_picture

Cache = Literal["none", "ram"]
_USABLE_MEMORY = 0.8  # of what is free; the rest is for the model and the batches on their way


class TrainDataset(Dataset):
    """Augmented training samples; a key (seed, epoch, index) always gives the same sample.

    Boxes to ignore (COCO crowd, VOC `difficult`) are left out.

    Args:
        dataset: The pictures.
        image_size: Side of the samples, a multiple of 32.
        config: Augmentation.
        epochs: Length of the training, which says when `config.close_mosaic` begins.
        cache: "ram" reads all pictures now and keeps them, resized; worker processes share that memory where they are
            forked (Linux).

    Raises:
        UserError: The set has errors or no picture, or does not fit into memory.
    """

    def __init__(
        self, dataset: DetectionSet, *, image_size: int, config: AugmentConfig, epochs: int, cache: Cache = "none"
    ) -> None:
        dataset.refuse_errors()
        self.records = dataset.records
        self.image_size, self.config = image_size, config
        self.mosaic_epochs = epochs - config.close_mosaic
        self._cached = _read_all(self.records, image_size) if cache == "ram" else None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: SampleKey) -> dict[str, Tensor]:
        """One sample: image (3, S, S) uint8, labels (n,) int64, boxes (n, 4) float32 normalised cx, cy, w, h."""
        rng = key.rng()
        joined = key.epoch < self.mosaic_epochs
        sample = self._sample(key.index, joined, rng)
        if joined and rng.random() < self.config.mixup:
            other = self._sample(int(rng.integers(len(self))), joined, rng)
            sample = augment.mixup(sample, other, rng)
        image = augment.change_colors(sample.image, self.config, rng)
        sample = augment.random_flips(Sample(image, sample.boxes, sample.labels), self.config, rng)
        return {
            "image": _to_tensor(sample.image),
            "labels": torch.from_numpy(sample.labels),
            "boxes": torch.from_numpy(_normalise(sample.boxes, (self.image_size, self.image_size))),
        }

    def _sample(self, index: int, joined: bool, rng: np.random.Generator) -> Sample:
        if joined and rng.random() < self.config.mosaic:
            others = rng.integers(len(self), size=3).tolist()
            samples = [self._load(i) for i in (index, *others)]
            return augment.mosaic(samples, self.image_size, self.config, rng)
        return augment.random_affine(self._load(index), self.image_size, self.config, rng)

    def _load(self, index: int) -> Sample:
        record = self.records[index]
        image = _read_resized(record, self.image_size) if self._cached is None else self._cached[index]
        wanted = ~record.ignore
        ratio = self.image_size / max(record.width, record.height)
        return Sample(image, record.boxes[wanted] * np.float32(ratio), record.labels[wanted])


def collate(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Batch of `TrainDataset` samples.

    Returns:
        images (B, 3, S, S) uint8; batch_index (n,) int64, labels (n,) int64, boxes (n, 4) float32 normalised
        cx, cy, w, h of all pictures in a row.
    """
    counts = torch.tensor([len(sample["labels"]) for sample in samples])
    return {
        "images": torch.stack([sample["image"] for sample in samples]),
        "batch_index": torch.repeat_interleave(torch.arange(len(samples)), counts),
        "labels": torch.cat([sample["labels"] for sample in samples]),
        "boxes": torch.cat([sample["boxes"] for sample in samples]),
    }


class ValDataset(Dataset):
    """Whole validation batches: pictures of similar aspect, letterboxed to one shape, in a fixed order.

    Args:
        dataset: The pictures.
        image_size: Long side in pixels.
        batch_size: Pictures in a batch.
        rectangular: False pads every picture to (image_size, image_size), in the order of the set.
    """

    def __init__(self, dataset: DetectionSet, *, image_size: int, batch_size: int, rectangular: bool = True) -> None:
        dataset.refuse_errors()
        self.records, self.image_size = dataset.records, image_size
        if rectangular:
            sizes = [(record.width, record.height) for record in self.records]
            self.batches = rectangular_batches(sizes, batch_size, image_size)
        else:
            order, shape = list(range(len(self.records))), (image_size, image_size)
            self.batches = [(order[i : i + batch_size], shape) for i in range(0, len(order), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Batch `index`, as `collate` gives it, with `records` and `geometry` (B, 3): ratio, left, top.

        The boxes leave out those to ignore; `records` has all.
        """
        members, shape = self.batches[index]
        records = [self.records[i] for i in members]
        samples, geometry = [], []
        for record in records:
            image, (ratio, left, top) = letterbox(record.read(), self.image_size, shape)
            wanted = ~record.ignore
            boxes = record.boxes[wanted] * np.float32(ratio) + np.array((left, top) * 2, np.float32)
            samples.append(
                {
                    "image": _to_tensor(image),
                    "labels": torch.from_numpy(record.labels[wanted]),
                    "boxes": torch.from_numpy(_normalise(boxes, shape)),
                }
            )
            geometry.append((ratio, left, top))
        return {**collate(samples), "records": records, "geometry": torch.tensor(geometry, dtype=torch.float32)}


class ValLoader:
    """Iterates over the batches of a `ValDataset`, loaded ahead in `workers` processes; `len()` counts batches."""

    def __init__(self, batches: ValDataset, *, workers: int = 0) -> None:
        self.batches = batches
        self._loader = DataLoader(
            _Guarded(batches),
            batch_size=None,
            num_workers=min(workers, len(batches)),
            worker_init_fn=_start_worker,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its own: drawing from the global one would disturb a running training
        )

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The batches; a UserError of a worker arrives without the worker's traceback."""
        for batch in self._loader:
            if isinstance(batch, str):
                raise UserError(batch)
            yield batch


class _Guarded(Dataset):
    """Batches, or the message of the UserError that reading one raised."""

    def __init__(self, batches: ValDataset) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Any] | str:
        try:
            return self.batches[index]
        except UserError as error:
            return str(error)


def val_loader(
    dataset: DetectionSet, *, image_size: int, batch_size: int = 16, workers: int = 0, rectangular: bool = True
) -> ValLoader:
    """Validation batches of a data set; see `ValDataset`.

    Raises:
        UserError: The set has errors or no picture, or a number is out of range; while iterating, a picture cannot be
            read.
    """
    for name, value, least in (("image_size", image_size, 32), ("batch_size", batch_size, 1), ("workers", workers, 0)):
        if value < least:
            raise UserError(f"{name} must be at least {least}, got {value}")
    batches = ValDataset(dataset, image_size=image_size, batch_size=batch_size, rectangular=rectangular)
    return ValLoader(batches, workers=workers)


def loader_speed(data: TrainDataset, *, batch_size: int, workers: int, batches: int = 20) -> float:
    """Images per second that loading alone reaches; the first batch, which starts the workers, is not counted."""
    stream = BatchStream(len(data), batch_size=batch_size, seed=0, stop=batches + 1)
    loaded = iterate_batches(data, stream, collate, workers=workers, pin_memory=False)
    next(loaded)
    start = time.perf_counter()
    images = sum(len(batch["images"]) for batch in loaded)
    return images / (time.perf_counter() - start)


def save_batch_picture(batch: dict[str, Any], path: str | Path, names: Sequence[str], *, limit: int = 16) -> None:
    """Draw a batch (of `collate` or `val_loader`) with its boxes as a grid of at most `limit` pictures."""
    images, boxes = batch["images"].cpu().numpy(), batch["boxes"].cpu().numpy()
    owner, labels = batch["batch_index"].cpu().numpy(), batch["labels"].cpu().numpy()
    drawn = []
    for index, image in enumerate(images[:limit]):
        own = owner == index
        scale = np.array((image.shape[2], image.shape[1]) * 2, np.float32)
        center, half = boxes[own, :2], boxes[own, 2:] / 2
        corners = np.concatenate((center - half, center + half), axis=1) * scale
        captions = [names[int(label)] for label in labels[own]]
        drawn.append(draw_boxes(np.ascontiguousarray(image.transpose(1, 2, 0)), corners, labels[own], captions or None))
    save_picture(path, grid(drawn))


def _start_worker(_: int) -> None:
    cv2.setNumThreads(0)


def _read_resized(record: ImageRecord, size: int) -> np.ndarray:
    return resize_long_side(record.read(), size)[0]


def _read_all(records: Sequence[ImageRecord], size: int) -> list[np.ndarray]:
    """All pictures, resized; refused beforehand when they cannot fit."""
    needed = sum(3 * size * size * min(r.width, r.height) / max(r.width, r.height) for r in records)
    free = psutil.virtual_memory().available
    if needed > _USABLE_MEMORY * free:
        raise UserError(
            f"cache: ram needs {needed / 1e9:.1f} GB for {len(records)} pictures, {free / 1e9:.1f} GB are free; "
            "use cache: none"
        )
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda record: _read_resized(record, size), records))


def _to_tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def _normalise(boxes: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """xyxy pixels -> cx, cy, w, h as shares of (height, width)."""
    center, side = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    scale = np.array((shape[1], shape[0]) * 2, np.float32)
    return (np.concatenate((center, side), axis=1) / scale).astype(np.float32)
