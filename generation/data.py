"""Training samples: pictures (C, S, S), clips (C, F, S, S) and latents, with their classes."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from generation.config import GenerateDataConfig
from generation.sources import Source, to_channels
from generation.synthetic import MovingShapes
from vision_ssm.data.labelled import to_square
from vision_ssm.errors import UserError
from vision_ssm.training.batches import SampleKey

# Shapes: C channels, F frames, S side.


class Samples(Dataset):
    """Samples of a source; a key (seed, epoch, index) always gives the same one.

    Decoded samples stay in memory where they fit into `config.cache_gib`.

    Args:
        source: what is read.
        config: size, frames, augmentation.
        augment: False for the held-out set: no mirrors, and of each video the first clip.
    """

    def __init__(self, source: Source, config: GenerateDataConfig, *, augment: bool = True) -> None:
        self.source, self.config, self.augment = source, config, augment
        self.labelled = config.labels and bool(source.classes)
        self.kept: list[np.ndarray] | None = None
        if not len(source):
            raise UserError("the data set is empty: nothing to train on")
        first = self._squares(0)
        self._check(first)
        if first.nbytes * len(source) <= config.cache_gib * 2**30 and not isinstance(source, MovingShapes):
            self.kept = [first, *(self._squares(index) for index in range(1, len(source)))]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, int]:
        """A picture (C, S, S) or clip (C, F, S, S) uint8, or latents float32; and its class, -1 for none."""
        rng = key.rng()
        label = self.source.label(key.index) if self.labelled else -1
        whole = self._squares(key.index) if self.kept is None else self.kept[key.index]
        if _is_latent(whole):
            return torch.from_numpy(np.ascontiguousarray(whole, dtype=np.float32)), label
        sample = self._clip(whole, key.index, rng) if self.config.frames else whole
        if self.augment:
            sample = _turned(sample, self.config.augment, rng)
        axes = (3, 0, 1, 2) if sample.ndim == 4 else (2, 0, 1)
        return torch.from_numpy(np.ascontiguousarray(sample.transpose(axes))), label

    def held_out(self, count: int) -> tuple[Tensor, Tensor]:
        """`count` samples at even distances, as one batch: (n, C, ...) and (n,) classes."""
        count = min(count, len(self))
        found = [self[SampleKey(0, 0, i * len(self) // count)] for i in range(count)]
        return torch.stack([sample for sample, _ in found]), torch.tensor([label for _, label in found])

    def _squares(self, index: int) -> np.ndarray:
        """A sample at the size that is needed, all of its frames."""
        sample = self.source.read(index)
        if _is_latent(sample):
            return sample
        side = self.config.side
        if sample.ndim == 4:
            resized = sample if sample.shape[1:3] == (side, side) else np.stack([to_square(f, side) for f in sample])
        else:
            resized = to_square(sample, side)
        return to_channels(resized, self.config.channels)

    def _clip(self, video: np.ndarray, index: int, rng: np.random.Generator) -> np.ndarray:
        frames, stride = self.config.frames, self.config.stride
        span = (frames - 1) * stride + 1
        if len(video) < span:
            names: Any = getattr(self.source, "files", None)
            raise UserError(
                f"{names[index] if names else f'video {index}'} has {len(video)} frames; clips of {frames} frames with "
                f"stride {stride} need {span}: take it out, or lower data.frames or data.stride"
            )
        start = int(rng.integers(len(video) - span + 1)) if self.augment else 0
        return video[start : start + span : stride]

    def _check(self, sample: np.ndarray) -> None:
        wanted = 4 if self.config.frames else 3
        if sample.ndim != wanted:
            kind = "clips; set data.frames to their length" if sample.ndim == 4 else "pictures; set data.frames to 0"
            raise UserError(f"the data are {kind}")


class PerturbedSamples(Samples):
    """Moving shapes after pasts with errors (`data.past.bodies`), as a stream's frames have them.

    The frames are no clip: each is what rightly follows the frame of the past before it.
    """

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, int, Tensor]:  # type: ignore[override]
        """Frames (C, F, S, S) uint8, their class, and their past in the form of the frames."""
        rng, source = key.rng(), self.source
        assert isinstance(source, MovingShapes)  # GenerateDataConfig takes no other with such errors
        both = np.stack(source.read_perturbed(key.index, self.config.past.bodies * rng.uniform(), rng), axis=1)
        if self.augment:
            both = _turned(both, self.config.augment, rng)
        frames, past = torch.from_numpy(np.ascontiguousarray(both.transpose(1, 4, 0, 2, 3)))
        return frames, source.label(key.index) if self.labelled else -1, past


def to_unit(samples: Tensor) -> Tensor:
    """uint8 pictures as floats from -1 to 1; latents as they are."""
    return samples.float() / 127.5 - 1 if samples.dtype == torch.uint8 else samples.float()


def to_pixels(samples: Tensor) -> Tensor:
    """Floats from -1 to 1 as uint8, clipped and rounded."""
    return ((samples.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _is_latent(sample: np.ndarray) -> bool:
    return sample.dtype != np.uint8


def _turned(sample: np.ndarray, augment: str, rng: np.random.Generator) -> np.ndarray:
    """Pictures (..., H, W, C), all alike mirrored or in one of the 8 ways in which a square can lie."""
    plane = (sample.ndim - 3, sample.ndim - 2)
    if augment == "turns":
        sample = np.rot90(sample, int(rng.integers(4)), plane)
    if augment != "none" and rng.integers(2):
        sample = np.flip(sample, plane[1])
    return sample
