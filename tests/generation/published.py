"""Golden files of the published video networks: weights that follow from names, recorded inputs, outputs, gradients."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tests import golden

SHIPPED = golden.ASSETS / "generation"


class Case(NamedTuple):
    """One golden file."""

    config: dict[str, Any]
    weights: dict[str, Tensor]
    """Under the published names."""
    values: dict[str, Tensor]


def read(stem: str, folder: Path = SHIPPED) -> Case:
    described = json.loads((folder / f"{stem}.json").read_text())
    weights = {name: fill(name, tuple(shape)) for name, shape in described["shapes"].items()}
    return Case(described["config"], weights, golden.values(folder, stem))


def fill(name: str, shape: tuple[int, ...]) -> Tensor:
    """The weight of a parameter: `tests.golden.fill`, and rules for the constants of S4D, gains and rotary tables."""
    leaf = name.rpartition(".")[2]
    if leaf == "freqs":
        return torch.from_numpy((10000.0 ** -(np.arange(shape[0]) / shape[0])).astype(np.float32))
    noise = golden._noise(name, shape)
    special = {
        "log_dt": lambda: -2.5 + 0.5 * noise,
        "log_A_real": lambda: math.log(0.5) + 0.1 * noise,
        "A_imag": lambda: math.pi * np.arange(shape[-1], dtype=np.float32) + 0.05 * noise,
        "C": lambda: noise,
        "gamma": lambda: 1 + 0.1 * noise,
    }
    return torch.from_numpy(special[leaf]().astype(np.float32)) if leaf in special else golden.fill(name, shape)
