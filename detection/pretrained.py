"""Weights of a detector from wherever they come: shipped by name, our folders, .safetensors, published .pt files."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from detection.convert import config_from_state_dict, from_official
from detection.model import MambaYOLO
from vision_ssm.checkpoint import load_checkpoint, load_matching
from vision_ssm.config import near_match
from vision_ssm.errors import UserError

SHIPPED = Path(__file__).resolve().parent / "weights"


def resolve_weights(path: str | Path) -> Path:
    """`path` itself where it exists, else the weights of that name that come with the package.

    Raises:
        UserError: neither; the message lists the shipped names.
    """
    if Path(path).exists():
        return Path(path)
    shipped = sorted(folder.name for folder in SHIPPED.glob("*") if folder.is_dir())
    if str(path) in shipped:
        return SHIPPED / str(path)
    raise UserError(
        f"no weights {str(path)!r}: give a checkpoint folder (as `vssm detect train` writes), a .safetensors or a .pt "
        f"file, or a shipped name ({', '.join(shipped) or 'none'}){near_match(str(path), shipped)}"
    )


def load_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict in our names, and the configuration that lies with it.

    Published parameter names are recognised and converted. Where no configuration lies with the weights, `model` is
    read off the tensors and the classes are called by their numbers.

    Raises:
        UserError: no such file, not a Mamba-YOLO, damaged.
    """
    resolved = resolve_weights(path)
    try:
        weights, config = load_checkpoint(resolved)
        if any(name.endswith("model.0.conv.0.weight") for name in weights):
            weights = from_official(weights)
        if config.get("task", "detect") != "detect":
            raise UserError(f"{path} holds weights for the task {config['task']!r}, not for detection")
        if "model" not in config:
            config = config | {"model": config_from_state_dict(weights)}
    except UserError as error:
        raise (error if str(path) in str(error) else UserError(f"{path}: {error}")) from None
    if not isinstance(config["model"], dict) or not isinstance(config["model"].get("num_classes"), int):
        raise UserError(f"{path}: config.json is damaged: its `model` lacks the whole number `num_classes`")
    config = {"names": [str(i) for i in range(config["model"]["num_classes"])], "image_size": 640, **config}
    if wrong := [key for key, holds in _EXPECTED.items() if key in config and not holds(config[key])]:
        raise UserError(
            f"{path}: config.json is damaged: `names` is a list of text, `image_size` a whole number from 32 up, "
            f"`category_ids` a list of whole numbers; wrong is {wrong[0]}: {str(config[wrong[0]])[:60]}"
        )
    return weights, {"task": "detect", **config}


def starting_weights(path: str | Path) -> dict[str, Tensor]:
    """Weights that a training may start from: a detector's, or a classifier's for the part that it shares.

    A classifier saw normalised pixels, the detector does not; the batch norm after the first convolution, which goes by
    the batch in training, takes that out.

    Raises:
        UserError: as `load_weights`.
    """
    weights, config = load_checkpoint(resolve_weights(path))
    return weights if config.get("task") == "classify" else load_weights(path)[0]


def _list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


_EXPECTED: dict[str, Callable[[Any], bool]] = {
    "names": partial(_list_of, str),
    "image_size": lambda value: isinstance(value, int) and value >= 32,
    "category_ids": partial(_list_of, int),
}
"""What else of a checkpoint's configuration is used to predict."""


def load_model(path: str | Path) -> tuple[MambaYOLO, dict[str, Any]]:
    """The network with its weights, on the CPU in eval mode, and its configuration (`names`, `image_size`, ...).

    Raises:
        UserError: as `load_weights`; or the weights do not fit the configuration beside them.
    """
    weights, config = load_weights(path)
    try:
        model = MambaYOLO(**config["model"])
    except (TypeError, UserError) as error:
        raise UserError(f"{path}: config.json is damaged: {error}") from None
    load_matching(model, weights).require_complete(path)
    if len(config["names"]) != model.num_classes:
        raise UserError(
            f"{path}: config.json names {len(config['names'])} classes, the network has {model.num_classes}"
        )
    if len(config.get("category_ids", config["names"])) != len(config["names"]):
        raise UserError(f"{path}: config.json is damaged: `category_ids` has not one number for each class")
    return model.eval(), config
