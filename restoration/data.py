"""Training samples: random crops of clean pictures, degraded on the fly, or of pairs."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from restoration.config import Folders, RestoreDataConfig
from restoration.degrade import Degradation, crop_to_multiple
from restoration.folders import Example, ExampleSet, Split, find_examples
from restoration.reading import Reader, to_tensor
from vision_ssm.errors import UserError
from vision_ssm.training.batches import SampleKey
from vision_ssm.viz import grid, save_picture

# Shapes: s scale, S side of a crop of the target.


def load_sets(folders: Folders, *, split: Split, scale: int) -> list[ExampleSet]:
    """The sets in one folder or several.

    Raises:
        UserError: No folder given, nothing in one of them, or clean pictures and pairs mixed.
    """
    roots = [folders] if isinstance(folders, str) else list(folders)
    if not roots or not all(roots):
        raise UserError(f"no pictures: give their folder as --data.{split} (clean pictures, or pairs)")
    sets = [find_examples(root, split=split, scale=scale) for root in roots]
    if len({found.paired for found in sets}) > 1:
        raise UserError(f"clean pictures and pairs cannot be mixed: {'; '.join(map(str, sets))}")
    return sets


class CropDataset(Dataset):
    """Random crops; a key (seed, epoch, index) always gives the same one.

    Args:
        examples: clean pictures, or pairs.
        read: gives their pixels.
        degradation: makes the inputs of clean pictures; not used with pairs.
        scale: of the task; targets are so many times larger than inputs.
        config: crops (their side is rounded up to a multiple of the scale; a picture that is smaller is reflected),
            samples in an epoch, flips, shrinking.
        epochs: length of the training, which says when crops grow.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        read: Reader,
        *,
        degradation: Degradation,
        scale: int,
        config: RestoreDataConfig,
        epochs: int,
    ) -> None:
        self.examples, self.read, self.degradation = tuple(examples), read, degradation
        self.scale, self.config, self.epochs = scale, config, epochs

    def __len__(self) -> int:
        return max(self.config.epoch_samples, len(self.examples))

    def __getitem__(self, key: SampleKey) -> dict[str, Tensor]:
        """Sample with ``input`` (C, S / s, S / s) float32 and ``target`` (3, S, S) uint8, or float32 for deep ones."""
        rng = key.rng()
        side = -(-self.config.crop_at(key.epoch / self.epochs) // self.scale)  # of the input's grid
        example = self.examples[key.index % len(self.examples)]
        target = self.read(example.target)
        turn = int(rng.integers(8)) if self.config.flips else 0
        if example.input is None:
            clean = _turned(_shrunk_crop(target, side * self.scale, self.config.shrink, rng), turn)
            degraded = self.degradation.apply(to_tensor(clean), seed=int(rng.integers(2**48)))
            return {"input": degraded, "target": _target(clean)}
        planes = [self.read(example.input), *([self.read(example.mask)] if example.mask else [])]
        top, left = _corner(planes[0].shape, side, rng)
        small = [_turned(_crop(plane, top, left, side), turn) for plane in planes]
        clean = _turned(_crop(target, top * self.scale, left * self.scale, side * self.scale), turn)
        return {"input": with_mask(*map(to_tensor, small)), "target": _target(clean)}


def with_mask(image: Tensor, mask: Tensor | None = None) -> Tensor:
    """(3, H, W), or (4, H, W) with the first channel of a mask's picture as its last, 1.0 where it is not black."""
    return image if mask is None else torch.cat((image, (mask[:1] > 0).to(image)))


def collate(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Batch of samples; targets become floats if not all have 8 bits."""
    targets = [sample["target"] for sample in samples]
    if len({target.dtype for target in targets}) > 1:
        targets = [as_float(target) for target in targets]
    return {"input": torch.stack([sample["input"] for sample in samples]), "target": torch.stack(targets)}


def as_float(images: Tensor) -> Tensor:
    """8-bit images as floats with 1.0 for white; floats as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def read_example(example: Example, read: Reader, scale: int) -> tuple[Tensor, Tensor | None]:
    """Clean picture (3, H, W) cut to a multiple of the scale, and its given input (C, h, w) or None.

    Raises:
        UserError: A file that cannot be read, a picture smaller than the scale, or two that do not belong together.
    """
    target = crop_to_multiple(to_tensor(read(example.target)), scale)
    if example.input is None:
        return target, None
    mask = to_tensor(read(example.mask)) if example.mask else None
    given = with_mask(to_tensor(read(example.input)), mask)
    height, width = (side // scale for side in target.shape[1:])
    if not (0 <= given.shape[1] - height <= 1 and 0 <= given.shape[2] - width <= 1):
        raise UserError(f"{example.input} and {example.target} differ in size by more than the scale {scale}")
    return target, given[:, :height, :width]


def save_batch_picture(batch: dict[str, Tensor], path: str | Path, *, most: int = 8) -> None:
    """Write the first samples of a batch, the inputs above their targets."""
    targets = as_float(batch["target"][:most])
    size = list(targets.shape[2:])
    inputs = torch.nn.functional.interpolate(batch["input"][:most, :3], size=size, mode="nearest")
    save_picture(path, grid([as_picture(image) for image in (*inputs, *targets)], columns=len(targets)))


def as_picture(image: Tensor) -> np.ndarray:
    """(3, H, W) floats -> (H, W, 3) uint8, clipped and rounded."""
    return (image.detach().cpu().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def _target(pixels: np.ndarray) -> Tensor:
    if pixels.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    return to_tensor(pixels)


def _shrunk_crop(pixels: np.ndarray, side: int, least: float, rng: np.random.Generator) -> np.ndarray:
    """A random crop, made smaller by a random factor from ``least`` to 1 as far as the picture is large enough."""
    factor = 1.0 if least == 1 else max(rng.uniform(least, 1), side / min(pixels.shape[:2]))
    cut = _random_crop(pixels, max(side, round(side / factor)), rng)
    return cut if len(cut) == side else cv2.resize(cut, (side, side), interpolation=cv2.INTER_AREA)


def _random_crop(pixels: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    return _crop(pixels, *_corner(pixels.shape, side, rng), side)


def _corner(shape: tuple[int, ...], side: int, rng: np.random.Generator) -> tuple[int, int]:
    top, left = (int(rng.integers(max(length - side, 0) + 1)) for length in shape[:2])
    return top, left


def _crop(pixels: np.ndarray, top: int, left: int, side: int) -> np.ndarray:
    cut = pixels[top : top + side, left : left + side]
    below, right = side - cut.shape[0], side - cut.shape[1]
    return cv2.copyMakeBorder(cut, 0, below, 0, right, cv2.BORDER_REFLECT_101) if below or right else cut


def _turned(pixels: np.ndarray, turn: int) -> np.ndarray:
    """One of the 8 ways in which a square can lie."""
    turned = np.rot90(pixels, turn % 4)
    return turned[:, ::-1] if turn >= 4 else turned
