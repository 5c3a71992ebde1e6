"""Recorded values of published models: weights that follow from a parameter's name, and the files that hold the rest.

A weight is a function of its name and shape only, so a golden file needs inputs and outputs alone.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

ASSETS = Path(__file__).parent / "assets" / "golden"


def fill(name: str, shape: tuple[int, ...]) -> Tensor:
    """The weight of a parameter: seeded by the checksum of its name, scaled by what it is."""
    leaf = name.rsplit(".", 1)[-1]
    noise = _noise(name, shape)
    if leaf == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    if leaf == "running_var":
        values = 0.5 + np.abs(noise)
    elif leaf == "running_mean":
        values = 0.1 * noise
    elif leaf in ("A_logs", "A_log", "A_b_log"):
        values = np.log(np.arange(1, shape[-1] + 1, dtype=np.float32)) + 0.05 * noise
    elif leaf in ("Ds", "D", "D_b"):
        values = 1 + 0.1 * noise
    elif leaf == "dt_projs_bias" or name.endswith(("dt_proj.bias", "dt_proj_b.bias")):
        values = -4 + 0.3 * noise
    elif len(shape) >= 2:
        fan_in = shape[-1] if leaf in ("x_proj_weight", "dt_projs_weight") else math.prod(shape[1:])
        values = noise / np.sqrt(max(fan_in, 1))
    else:
        values = 0.1 * noise if leaf.endswith("bias") else 1 + 0.1 * noise
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def _noise(name: str, shape: tuple[int, ...]) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    return generator.standard_normal(shape).astype(np.float32)


def weights(folder: Path, stem: str) -> dict[str, Tensor]:
    """Weights of `shapes_<stem>.json`, under the names given there less a leading `<stem>.`."""
    shapes = json.loads((folder / f"shapes_{stem}.json").read_text())
    return {name.removeprefix(f"{stem}."): fill(name, tuple(shape)) for name, shape in shapes.items()}


def values(folder: Path, stem: str) -> dict[str, Tensor]:
    """Recorded tensors of one golden file."""
    return load_file(folder / f"{stem}.safetensors")
