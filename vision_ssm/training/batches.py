"""Which samples make which batch, reproducibly: order, sharding, augmentation seeds and the loader."""

import random
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from vision_ssm.errors import UserError


class SampleKey(NamedTuple):
    """What a training set is indexed with: which sample, and in which pass it is drawn."""

    seed: int
    epoch: int
    """From 0."""
    index: int

    def rng(self) -> np.random.Generator:
        """The generator for this sample's augmentation in this epoch."""
        return np.random.default_rng(list(self))


def seed_everything(*parts: int, device: torch.device | None = None) -> None:
    """Seed the global generators of random, numpy and torch (and of a CUDA device) from a tuple of integers."""
    words = np.random.SeedSequence(parts).generate_state(2)
    random.seed(int(words[0]))
    np.random.seed(words[0])
    # not torch.manual_seed: it also walks over all GPUs, and this runs for every sample in every worker
    torch.default_generator.manual_seed(int(words[1]))
    if device is not None and device.type == "cuda":
        torch.cuda.manual_seed(int(words[1]))


@lru_cache(maxsize=2)
def _order(length: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(length)


class BatchStream(Sampler[list[SampleKey]]):
    """Batches of sample keys from one end of a run to the other, without a break between epochs.

    Batch b is a function of its number alone, so a resumed run starts at any batch without reading those before, and
    every process takes its share of the same batch. Each epoch is one permutation of the samples; its last batch is
    filled up from the permutation's beginning, so that all batches are full and no sample is left out.

    Args:
        length: Samples in the training set.
        batch_size: Samples in a batch, over all processes.
        stop: Number of batches in the run. ``start``, 0 at first, is where iterating begins.
        rank: This process.
        processes: Number of processes; divides ``batch_size``.
    """

    def __init__(
        self, length: int, *, batch_size: int, seed: int, stop: int, rank: int = 0, processes: int = 1
    ) -> None:
        if length < 1:
            raise UserError("the training set is empty: nothing to train on")
        if batch_size % processes:
            raise UserError(
                f"batch_size counts the samples of all processes and must be a multiple of their number: "
                f"got {batch_size} for {processes} processes"
            )
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start, self.stop, self.rank, self.processes = 0, stop, rank, processes
        self.per_epoch = batches_per_epoch(length, batch_size)

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[SampleKey]]:
        return (self.keys(batch) for batch in range(self.start, self.stop))

    def keys(self, batch: int) -> list[SampleKey]:
        """This process's samples of batch number ``batch``, counted from the beginning of the run."""
        epoch, number = divmod(batch, self.per_epoch)
        order = _order(self.length, self.seed, epoch)
        places = np.arange(number * self.batch_size + self.rank, (number + 1) * self.batch_size, self.processes)
        return [SampleKey(self.seed, epoch, int(i)) for i in order[places % self.length]]


def batches_per_epoch(length: int, batch_size: int) -> int:
    """Batches in which every sample occurs."""
    return -(-length // batch_size)


@dataclass(frozen=True)
class _Failed:
    """A sample that cannot be read, on its way from a worker to the training process."""

    message: str


class _SeededSamples(Dataset):
    """The training set with the global generators seeded for each sample."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __getitem__(self, key: SampleKey) -> Any:
        seed_everything(*key)
        try:
            return self.data[key]
        except UserError as error:
            # as a value: an exception would arrive wrapped in the worker's traceback
            return _Failed(str(error))


class _Collate:
    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        failed = next((sample for sample in samples if isinstance(sample, _Failed)), None)
        return failed or self.collate(samples)


def _start_worker(_: int) -> None:
    # these reach the whole process group; only the training process may act on them, which still needs batches
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if cv2 := sys.modules.get("cv2"):
        cv2.setNumThreads(0)


def iterate_batches(
    data: Dataset, stream: BatchStream, collate: Callable[[list[Any]], Any], *, workers: int, pin_memory: bool
) -> Iterator[Any]:
    """Load the batches of a stream, ahead of time in ``workers`` processes.

    Raises:
        UserError: a sample cannot be read, with the message of the data set.
    """
    loader = DataLoader(
        _SeededSamples(data),
        batch_sampler=stream,
        num_workers=workers,
        collate_fn=_Collate(collate),
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # its own, or creating the iterator would draw from the global one
    )
    for batch in loader:
        if isinstance(batch, _Failed):
            raise UserError(batch.message)
        yield batch


def load_batch(data: Dataset, stream: BatchStream, collate: Callable[[list[Any]], Any], number: int) -> Any:
    """Load batch ``number`` once more, exactly as it was."""
    samples = _SeededSamples(data)
    return collate([samples[key] for key in stream.keys(number)])
