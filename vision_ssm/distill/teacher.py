"""The teacher: a trained vision transformer of timm, and what its attention does to tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import timm
import torch
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vision_ssm.checkpoint import load_checkpoint, load_matching
from vision_ssm.classify.config import ClassifyDataConfig, NetworkConfig, Statistics
from vision_ssm.classify.model import STATISTICS, build_network, check_side, classifier_from, find_weights
from vision_ssm.config import near_match
from vision_ssm.distill.config import TeacherConfig
from vision_ssm.distill.student import check_attention
from vision_ssm.errors import UserError


class Teacher(NamedTuple):
    """A network to learn from, and how timm builds one like it."""

    network: VisionTransformer
    built: NetworkConfig


class Tapped(NamedTuple):
    """What a vision transformer gave, and what went into and came out of its mixers, (B, L, C) for each layer."""

    logits: Tensor
    inputs: list[Tensor]
    outputs: list[Tensor]


def load_teacher(config: TeacherConfig, classes: Sequence[str], data: ClassifyDataConfig) -> Teacher:
    """The teacher in eval mode, frozen, on the CPU; it takes pictures normalised as `data` says.

    Args:
        config: where it is.
        classes: of the data, in order.
        data: side and statistics of the pictures.

    Raises:
        UserError: nothing there, no plain vision transformer, other classes or another size of pictures.
    """
    if config.name:
        network = _of_timm(config, len(classes), data.statistics)
        built = NetworkConfig(config.name, config.options)
    elif config.weights:
        network, built = _of_checkpoint(config.weights, classes, data)
    else:
        raise UserError("no teacher: give a folder of `vssm classify train` as --teacher.weights, or --teacher.name")
    check_attention(network)
    check_side(network, built.name, data.side)
    return Teacher(cast(VisionTransformer, network.requires_grad_(False).eval()), built)


def _of_checkpoint(place: str, classes: Sequence[str], data: ClassifyDataConfig) -> tuple[nn.Module, NetworkConfig]:
    found = find_weights(place)
    weights, config = load_checkpoint(found)
    network = classifier_from(weights, config, found)
    if list(config["classes"]) != list(classes):
        raise UserError(
            f"the teacher {place} tells {', '.join(config['classes'])} apart, the data has {', '.join(classes)}: give "
            "data with the same classes"
        )
    if config["side"] != data.side:
        raise UserError(f"the teacher {place} sees squares of {config['side']} pixels: set data.side to that")
    if (statistics := config.get("statistics", "plain")) != data.statistics:
        raise UserError(f"the teacher {place} expects pixels normalised otherwise: set data.statistics to {statistics}")
    return network, NetworkConfig(**config["network"])


def _of_timm(config: TeacherConfig, classes: int, statistics: Statistics) -> nn.Module:
    if not timm.is_model(config.name):
        raise UserError(f"timm has no network {config.name!r}{near_match(config.name, timm.list_models())}")
    if config.weights:
        network = build_network(NetworkConfig(config.name, config.options), classes)
        load_matching(network, load_checkpoint(Path(config.weights))[0]).require_complete(config.weights)
    else:
        try:
            network = timm.create_model(config.name, pretrained=True, **config.options)
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"timm's pretrained weights of {config.name} could not be had ({reason}); give a file as "
                "--teacher.weights"
            ) from None
        if network.num_classes != classes:
            raise UserError(
                f"{config.name} tells {network.num_classes} classes apart, the data has {classes}: give it a head "
                "first (`vssm classify train --weights`), and that run as --teacher.weights"
            )
    check_attention(network)
    _fold_normalisation(cast(VisionTransformer, network), statistics)
    return network


@torch.no_grad()
def _fold_normalisation(network: VisionTransformer, statistics: Statistics) -> None:
    """Let a network of timm take pictures that are normalised otherwise: its patch embedding undoes the difference."""
    mean, std = (torch.tensor(network.pretrained_cfg[key]) for key in ("mean", "std"))  # pyright: ignore
    given_mean, given_std = (torch.tensor(values) for values in STATISTICS[statistics])
    patches = getattr(network.patch_embed, "proj", None)
    if not isinstance(patches, nn.Conv2d) or patches.bias is None:
        raise UserError("distillation takes vision transformers whose patches are one convolution with a bias")
    offset = (given_mean - mean) / std
    patches.bias += (patches.weight * offset[:, None, None]).sum((1, 2, 3))
    patches.weight *= (given_std / std)[:, None, None]


def tapped(network: VisionTransformer, images: Tensor) -> Tapped:
    """Run a vision transformer and keep what its mixers read and give."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def keep(module: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
        inputs.append(given[0])
        outputs.append(result)

    hooks = [block.attn.register_forward_hook(keep) for block in network.blocks]  # pyright: ignore
    try:
        logits = network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return Tapped(logits, inputs, outputs)


def attention_matrix(attention: Attention, x: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(P)) of every head, (B, E, L, L), of tokens (B, L, C)."""
    q, k, _ = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return (attention.q_norm(q) * attention.scale @ attention.k_norm(k).mT).softmax(dim=-1)
