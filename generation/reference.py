"""What real samples are like, as numbers: computed from data, or read from a small .npz that holds no pictures."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from generation.attributes import measure_all
from generation.config import SYNTHETIC, GenerateDataConfig
from generation.data import Samples
from generation.distances import frechet_distance, kernel_distance, moments, precision_recall
from generation.features import Features
from generation.sources import find_source
from vision_ssm.data.labelled import Split
from vision_ssm.errors import UserError
from vision_ssm.files import replacing
from vision_ssm.training.batches import SampleKey

_FEATURE_KEYS = ("mean", "covariance", "features")


@dataclass(frozen=True)
class Reference:
    """Real samples in the features of a network, or by the attributes of moving shapes."""

    about: dict[str, Any]
    """Data, counts, network, and the scores of held-out real samples (the floor)."""
    mean: Tensor | None = None
    """(D,) float64, of all of them."""
    covariance: Tensor | None = None
    """(D, D) float64."""
    features: Tensor | None = None
    """(m, D) of all, or of those that are kept."""
    attributes: np.ndarray | None = None
    """(m, 6) of `generation.attributes`."""

    def save(self, path: Path, *, keep: int = 2_000) -> None:
        """Write an .npz; of the features, at most `keep` evenly chosen ones as float16."""
        arrays: dict[str, np.ndarray] = {"about": np.array(json.dumps(self.about))}
        if self.mean is not None and self.covariance is not None and self.features is not None:
            places = np.linspace(0, len(self.features) - 1, min(keep, len(self.features))).astype(int)
            kept = self.features[places].numpy().astype(np.float16)
            arrays |= {"mean": self.mean.numpy(), "covariance": self.covariance.numpy(), "features": kept}
        if self.attributes is not None:
            arrays["attributes"] = self.attributes[:keep].astype(np.float32)
        with replacing(path) as temporary:
            np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> "Reference":
        """Read what `save` wrote.

        Raises:
            UserError: missing, damaged or something else.
        """
        try:
            with np.load(path, allow_pickle=False) as found:
                table = dict(found)
            about = json.loads(str(table["about"]))
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise UserError(f"{path} is no reference of `vssm generate reference`: {error}") from None
        tensors = {name: torch.from_numpy(table[name]) for name in _FEATURE_KEYS if name in table}
        return cls(about, **tensors, attributes=table.get("attributes"))


def feature_reference(data: str, config: GenerateDataConfig, network: Features) -> Reference:
    """All real samples of a data set, and the floor: its held-out split against its training split.

    Args:
        data: folder, idx files or .npz.
        config: size and length of the samples.
        network: features.
    """
    parts = {split: _features_of(data, split, config, network) for split in _splits(data)}
    features = torch.cat(list(parts.values()))
    counts = {split: len(part) for split, part in parts.items()}
    about = {"data": Path(data).name, "counts": counts, "side": config.side, "features": network.facts(), "floor": None}
    if len(parts) == 2:
        about["floor"] = {
            "of": f"{counts['val']} held-out real samples against {counts['train']} real ones",
            "frechet": frechet_distance(parts["val"], parts["train"]),
            "kernel": kernel_distance(parts["val"], parts["train"]),
            **precision_recall(parts["val"], parts["train"]),
        }
    return Reference(about, *moments(features), features=features)


def attribute_reference(count: int, config: GenerateDataConfig) -> Reference:
    """Attributes of `count` held-out synthetic clips."""
    source = find_source(replace(config, train=SYNTHETIC, val=""), "val")
    if count > len(source):
        raise UserError(f"count must be at most {len(source)} synthetic clips, got {count}")
    table = measure_all(source.read(index) for index in range(count))
    about = {"data": SYNTHETIC, "counts": {"val": count}, "side": config.side, "frames": config.frames}
    return Reference(about, attributes=table)


def _splits(data: str) -> tuple[Split, ...]:
    """The splits that a data set has; one without splits is its own training set."""
    root = Path(data)
    has_idx = root.is_dir() and next(root.glob("t10k-*"), None) is not None
    has_val = root.is_dir() and any((root / name).is_dir() for name in ("val", "validation", "test"))
    return ("train", "val") if has_idx or has_val else ("train",)


def _features_of(data: str, split: Split, config: GenerateDataConfig, network: Features) -> Tensor:
    chosen = replace(config, train=data, val="", augment="none", labels=False)
    samples = Samples(find_source(chosen, split), chosen, augment=False)
    parts = []
    for start in range(0, len(samples), 256):
        keys = [SampleKey(0, 0, index) for index in range(start, min(start + 256, len(samples)))]
        batch = torch.stack([samples[key][0] for key in keys])
        parts.append(network(batch.transpose(1, 2) if batch.ndim == 5 else batch)[0])
    return torch.cat(parts)
