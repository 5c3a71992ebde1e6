"""Weights of a restorer from wherever they come: shipped by name, our folders, .safetensors, published .pth files."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from restoration.card import WeightsCard
from restoration.convert import config_from_state_dict, from_official, is_official
from restoration.networks import Restorer, build_model, model_config
from restoration.tasks import SHIPPED, shipped_weights
from vision_ssm.checkpoint import load_checkpoint, load_matching, save_checkpoint
from vision_ssm.config import near_match
from vision_ssm.errors import UserError
from vision_ssm.files import check_new, write_text

TASK_OF_SCALE = {1: "denoise", 2: "sr2", 4: "sr4"}
"""Task of a published MambaIR that enlarges so many times."""


def resolve_weights(path: str | Path) -> Path:
    """`path` itself where it exists, else the weights of that name that come with the package.

    Raises:
        UserError: neither; the message lists the shipped names.
    """
    if Path(path).exists():
        return Path(path)
    shipped = shipped_weights()
    if str(path) in shipped:
        return SHIPPED / str(path)
    raise UserError(
        f"no weights {str(path)!r}: give a checkpoint folder (as `vssm restore train` writes), a .safetensors or a "
        f"published MambaIR's .pth file, or a shipped name ({', '.join(shipped) or 'none'})"
        f"{near_match(str(path), shipped)}"
    )


def load_model(path: str | Path) -> tuple[Restorer, WeightsCard]:
    """The network with its weights, on the CPU in float32 and eval mode, and what is known of them.

    Published names are recognised and converted. A network for super-resolution either enlarges by itself
    (``model.scale`` equals the card's) or is given the image enlarged beforehand (``model.scale`` is 1).

    Raises:
        UserError: no such file, no restorer, damaged, or the weights do not fit the card beside them.
    """
    weights, values = load_checkpoint(resolve_weights(path))
    try:
        if not values and is_official(weights):  # a checkpoint with a config is never a published file
            weights = from_official(weights)
            values = _published_card(weights).to_dict()
        card = WeightsCard.from_dict(values)
        model = build_model(card.model)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    load_matching(model, weights).require_complete(path)
    return model.eval(), card


def save_weights(folder: str | Path, model: Restorer, card: WeightsCard, *, half: bool = False) -> None:
    """Write a checkpoint folder with a README for people.

    Args:
        folder: Made if it does not exist; an older checkpoint in it stays whole until the new one is complete.
        model: Its weights are stored.
        card: Its ``model`` must be the model's.
        half: Store float16, for weights that ship.

    Raises:
        UserError: The card describes another network, or the folder cannot be written.
    """
    with torch.device("meta"):
        described = build_model(card.model)
    if model_config(described) != model_config(model):
        raise UserError(f"the card describes the network {dict(card.model)}, the model is {model_config(model)}")
    weights = model.state_dict()
    save_checkpoint(folder, {name: _stored(tensor, half) for name, tensor in weights.items()}, card.to_dict())
    write_text(Path(folder) / "README.md", _readme(Path(folder).name, sum(t.numel() for t in weights.values()), card))


def run_convert(file: str | Path, output: str | Path) -> int:
    """Convert a published MambaIR file to a checkpoint folder and say what it is. No code in the file is run.

    Raises:
        UserError: No published MambaIR, or the folder cannot be written.
    """
    published, _ = load_checkpoint(file)
    try:
        weights = from_official(published)
        card = _published_card(weights)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    model = build_model(card.model)
    load_matching(model, weights).require_complete(file)
    check_new(output)
    save_weights(output, model, card)
    described = ", ".join(f"{key} {value}" for key, value in card.model.items())
    print(f"{output}: {described}; task {card.task}; {len(weights)} tensors")
    return 0


def run_pack(weights: str | Path, output: str | Path) -> int:
    """Write a restorer in half precision, without what only its run needs; it is computed with in single precision.

    Raises:
        UserError: No restorer there, or the folder cannot be written.
    """
    model, card = load_model(weights)
    check_new(output)
    save_weights(output, model, card, half=True)
    size = sum(file.stat().st_size for file in Path(output).iterdir())
    print(f"{output}: task {card.task}, {size / 1e6:.2f} MB")
    return 0


def _published_card(weights: dict[str, Tensor]) -> WeightsCard:
    """A published file says nothing about itself; what can be read off the tensors."""
    config = config_from_state_dict(weights)
    scale = config.get("scale", 1)
    if scale not in TASK_OF_SCALE:
        raise UserError(
            f"this MambaIR enlarges {scale} times and there is no such task; in Python it runs: "
            "`restoration.MambaIR(kind, scale=3)` with the weights of `restoration.from_official`"
        )
    return WeightsCard(
        model=config,
        task=TASK_OF_SCALE[scale],
        scale=scale,
        trained_on="not said in the published file",
        licence="as its publisher says; MambaIR's code is Apache-2.0",
    )


def _stored(tensor: Tensor, half: bool) -> Tensor:
    return tensor.half() if half and tensor.is_floating_point() else tensor


def _readme(name: str, parameters: int, card: WeightsCard) -> str:
    rows: dict[str, Any] = {
        "network": ", ".join(f"{key} {value}" for key, value in card.model.items()),
        "parameters": f"{parameters:,}",
        "task": f"{card.task} (enlarges {card.scale} times)" if card.scale > 1 else card.task,
        "degradation": ", ".join(f"{key} {value}" for key, value in card.degradation.items()) or "not recorded",
        "trained on": card.trained_on,
        "licence": card.licence,
        "steps": card.steps if card.steps is not None else "not recorded",
        "seed": card.seed if card.seed is not None else "not recorded",
    }
    lines = [f"# {name}", "", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
    return "\n".join((*lines, "", f"`vssm restore run PICTURE -o OUT --task {card.task} --weights {name}`", ""))
