"""Published weights of Vim and VMamba -> our parameter names; weights -> the network they were made for."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import timm
import torch
from torch import Tensor

from vision_ssm.checkpoint import load_matching
from vision_ssm.errors import UserError
from vision_ssm.published_ss2d import ss2d_entry

VIM_ANCHOR, VMAMBA_ANCHOR = "layers.0.mixer.A_b_log", "layers.0.blocks.0.op.A_logs"
"""Published names that only a Vim, and only a VMamba of the second version, has."""
SIDE = 224
"""Pixels that all published files but finely tuned ones were trained at."""

# Published name inside a mixer ("" forwards, "_b" backwards) -> ours inside a direction.
VIM_LEAVES = {
    "conv1d{}.weight": "conv.weight", "conv1d{}.bias": "conv.bias", "x_proj{}.weight": "x_proj.weight",
    "dt_proj{}.weight": "scan.dt_weight", "dt_proj{}.bias": "scan.dt_bias", "A{}_log": "scan.A_log", "D{}": "scan.D",
}  # fmt: skip
# Published name in a VMamba -> ours. All rules that match are applied, in order.
VMAMBA_RENAMES = (
    (r"^patch_embed\.0\.", "stem.0."),
    (r"^patch_embed\.2\.", "stem.1."),
    (r"^patch_embed\.5\.", "stem.3."),
    (r"^patch_embed\.7\.", "stem.4."),
    (r"^layers\.(\d+)\.downsample\.1\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.0."),
    (r"^layers\.(\d+)\.downsample\.3\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.1."),
    (r"^layers\.", "stages."),
    (r"^classifier\.norm\.", "norm."),
    (r"^classifier\.head\.", "head.fc."),
    (r"(\.blocks\.\d+)\.norm\.", r"\1.norm1."),
    (r"\.op\.", ".ss2d."),
)


def from_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a published Vim ("bimambav2", class token in the middle) or VMamba (second version, without a gate).

    Args:
        state_dict: Published names. Half precision becomes float32.

    Returns:
        A complete state dict for the network of ``network_of(result)``.

    Raises:
        UserError: Neither of the two, or parameters are missing, left over or of a wrong shape.
    """
    published = {name: t.float() if t.is_floating_point() else t for name, t in state_dict.items()}
    if VIM_ANCHOR in published:
        converted = _from_vim(published)
    elif VMAMBA_ANCHOR in published:
        converted = {}
        for name, tensor in published.items():
            converted |= _vmamba_entry(name, tensor)
    else:
        raise UserError(
            f"no published Vim or VMamba (second version): there is no parameter {VIM_ANCHOR} and no {VMAMBA_ANCHOR}"
        )
    name, options = network_of(converted)
    with torch.device("meta"):
        twin = timm.create_model(name, **options)
    load_matching(twin, converted).require_complete("the published state dict")
    return converted


def vim_mixer(state_dict: Mapping[str, Tensor], *, averaged: bool = True) -> dict[str, Tensor]:
    """Convert the bidirectional mixer ("v2") of a published Vim.

    Args:
        state_dict: Names inside the mixer: ``in_proj.weight``, ``conv1d_b.weight``, ``A_b_log``...
        averaged: Whether the published model halves the sum of the directions (`if_divide_out`). Ours always does;
            where the published one does not, the output projection is doubled, which is exact.

    Returns:
        The state dict of a ``vision_ssm.mamba.BidirectionalMamba``.

    Raises:
        UserError: A parameter is missing or unknown.
    """
    converted: dict[str, Tensor] = {}
    try:
        converted["in_proj.weight"] = state_dict["in_proj.weight"]
        converted["out_proj.weight"] = state_dict["out_proj.weight"] * (1 if averaged else 2)
        for module, suffix in (("forwards", ""), ("backwards", "_b")):
            for published, ours in VIM_LEAVES.items():
                tensor = state_dict[published.format(suffix)]
                converted[f"{module}.{ours}"] = tensor.unsqueeze(0) if ours.startswith("scan.") else tensor
    except KeyError as missing:
        raise UserError(f"no bidirectional mixer of a published Vim: it has no parameter {missing}") from None
    if len(converted) < len(state_dict):
        known = {"in_proj.weight", "out_proj.weight"} | {leaf.format(s) for leaf in VIM_LEAVES for s in ("", "_b")}
        raise UserError(f"a mixer of another kind than Vim's v2: it has {', '.join(sorted(state_dict.keys() - known))}")
    return converted


def _from_vim(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names; the class token takes its position over from the middle of the positions."""
    converted: dict[str, Tensor] = {}
    mixers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in published.items():
        mixer = re.match(r"layers\.(\d+)\.mixer\.(.+)$", name)
        if mixer is None:
            converted[re.sub(r"^norm_f\.", "norm.", re.sub(r"^layers\.", "blocks.", name))] = tensor
        else:
            mixers.setdefault(f"blocks.{mixer[1]}.mixer.", {})[mixer[2]] = tensor
    for prefix, mixer in mixers.items():
        converted |= {prefix + name: tensor for name, tensor in vim_mixer(mixer).items()}
    positions, token = converted.get("pos_embed"), converted.get("cls_token")
    if positions is None or token is None:
        raise UserError("a Vim of another kind than ours, without a class token in the middle or without positions")
    middle = (positions.shape[1] - 1) // 2
    converted["cls_token"] = token + positions[:, middle : middle + 1]
    converted["pos_embed"] = torch.cat((positions[:, :middle], positions[:, middle + 1 :]), dim=1)
    return converted


def _vmamba_entry(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Our name and shape; linear layers were published as such and as convolutions of width 1."""
    for pattern, replacement in VMAMBA_RENAMES:
        name = re.sub(pattern, replacement, name)
    if ".mlp." in name and tensor.ndim > 1:
        tensor = tensor.flatten(1)
    return ss2d_entry(name, tensor, gated=False)


def network_of(weights: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """The network that weights in our names were made for.

    Returns:
        Its name in timm and the arguments of ``timm.create_model`` for it.

    Raises:
        UserError: The tensors are not those of one of our backbones.
    """
    try:
        return _vim_of(weights) if "cls_token" in weights else _vmamba_of(weights)
    except KeyError as missing:
        raise UserError(f"not the weights of a Vim or a VMamba: {missing} is not among them") from None


def _vim_of(weights: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    dim, in_chans, patch = weights["patch_embed.proj.weight"].shape[:3]
    grid = math.isqrt(weights["pos_embed"].shape[1])
    half = max(patch // 2, 1)
    stride = half if (grid - 1) * half + patch == SIDE else patch  # the finer-grained files are of the same side
    return {192: "vssm_vim_tiny", 384: "vssm_vim_small", 768: "vssm_vim_base"}.get(dim, "vssm_vim_tiny"), {
        "img_size": (grid - 1) * stride + patch,
        "patch_size": patch,
        "patch_stride": stride,
        "in_chans": in_chans,
        "num_classes": len(weights["head.bias"]),
        "embed_dim": dim,
        "depth": _count(weights, "blocks."),
        "state_size": weights["blocks.0.mixer.forwards.scan.A_log"].shape[-1],
    }


def _vmamba_of(weights: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    dim = len(weights["stem.4.weight"])
    depths = [_count(weights, f"stages.{i}.blocks.") for i in range(_count(weights, "stages."))]
    _, inner, states = weights["stages.0.blocks.0.ss2d.scan.A_log"].shape
    size = "base" if dim == 128 else "small" if sum(depths) > 16 else "tiny"
    return f"vssm_vmamba_{size}", {
        "in_chans": weights["stem.0.weight"].shape[1],
        "num_classes": len(weights["head.fc.bias"]),
        "depths": depths,
        "embed_dim": dim,
        "ssm_ratio": inner / dim,
        "state_size": states,
    }


def _count(names: Iterable[str], prefix: str) -> int:
    """Members of the module list `prefix`."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)})
