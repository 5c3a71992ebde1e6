"""Published MambaIR weights -> our parameter names; weights -> the network they were made for."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from restoration.mambair import LAYOUTS, TAIL_WIDTH, Kind
from restoration.networks import build_model
from vision_ssm.checkpoint import load_matching
from vision_ssm.errors import UserError
from vision_ssm.foreign import find_state_dict
from vision_ssm.published_ss2d import ss2d_entry

ANCHORS = {"conv_first.weight": "mambair", "patch_embed.proj.weight": "mambair-unet"}
"""Published name that only one of the networks has -> our name of the network."""

# Published name -> ours. All rules that match are applied in order; those of a block do for both networks.
BLOCK_RENAMES = (
    (r"\bln_([12])\.", r"norm\1."),
    (r"\bskip_scale$", "scale1.gamma"),
    (r"\bskip_scale2$", "scale2.gamma"),
    (r"\bconv_blk\.cab\.(\d)\.attention\.1\.", r"conv.\1.fc1."),
    (r"\bconv_blk\.cab\.(\d)\.attention\.3\.", r"conv.\1.fc2."),
    (r"\bconv_blk\.cab\.", "conv."),
    (r"\bself_attention\.", "ss2d."),
)
MAMBAIR_RENAMES = (
    (r"^conv_first\.", "stem."),
    (r"^patch_embed\.norm\.", "stem_norm."),
    (r"^layers\.(\d+)\.(?:residual_group\.)?", r"groups.\1."),
    (r"^conv_after_body\.", "body."),
)
UNET_RENAMES = (
    (r"^patch_embed\.proj\.", "stem."),
    (r"^encoder_level(\d)\.", lambda m: f"encoder.{int(m[1]) - 1}.blocks."),
    (r"^down(\d)_\d\.body\.", lambda m: f"encoder.{int(m[1]) - 1}.down."),
    (r"^latent\.", "middle."),
    (r"^up\d_(\d)\.body\.", lambda m: f"decoder.{3 - int(m[1])}.up."),
    (r"^reduce_chan_level(\d)\.", lambda m: f"decoder.{3 - int(m[1])}.merge."),
    (r"^decoder_level(\d)\.", lambda m: f"decoder.{3 - int(m[1])}.blocks."),
    (r"^refinement\.", "head.0."),
    (r"^output\.", "head.1."),
)


def convert_entry(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Rename and reshape one published parameter of a block or of anything inside it.

    Args:
        name: Published name, with any prefix before the block's part of it.
        tensor: Its values.

    Returns:
        One entry under our name, or two where we keep the halves of a projection apart.
    """
    for pattern, replacement in BLOCK_RENAMES:
        name = re.sub(pattern, replacement, name)
    return ss2d_entry(name, tensor)


def is_official(state_dict: Mapping[str, Any]) -> bool:
    """Whether these are published names of MambaIR or of its U-Net."""
    return any(anchor in state_dict for anchor in ANCHORS)


def from_official(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Convert published MambaIR weights; kind and scale are read off the tensors.

    Args:
        state_dict: Published names and tensors, or the dict of a released file that holds them as `params`. Half
            precision becomes float32.

    Returns:
        A complete state dict for ``build_model(config_from_state_dict(result))``.

    Raises:
        UserError: Not a MambaIR, or parameters are missing, left over or of a wrong shape.
    """
    published = find_state_dict(state_dict)
    kind = next((name for anchor, name in ANCHORS.items() if anchor in published), None)
    if kind is None:
        raise UserError(f"no published MambaIR: there is no parameter {' and no '.join(ANCHORS)}")
    renames = MAMBAIR_RENAMES + _tail_renames(published) if kind == "mambair" else UNET_RENAMES
    converted: dict[str, Tensor] = {}
    for name, tensor in published.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        converted |= convert_entry(name, tensor.float() if tensor.is_floating_point() else tensor)
    with torch.device("meta"):
        twin = build_model(config_from_state_dict(converted))
    load_matching(twin, converted).require_complete("the published state dict")
    return converted


def _tail_renames(published: Mapping[str, Tensor]) -> tuple[tuple[str, str], ...]:
    """Of the three tails; only where there is a convolution before the shuffles do these follow a LeakyReLU."""
    if "conv_before_upsample.0.weight" not in published:
        return ((r"^(upsample\.0|conv_last)\.", "tail.0."),)
    shuffles = sum(name.startswith("upsample.") and name.endswith(".weight") for name in published)
    return (
        (r"^conv_before_upsample\.0\.", "tail.0."),
        (r"^upsample\.0\.", "tail.2."),
        (r"^upsample\.2\.", "tail.4."),
        (r"^conv_last\.", f"tail.{2 + 2 * shuffles}."),
    )


def config_from_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """The network that weights under our names belong to: `name` and the arguments, as ``build_model`` takes them.

    Raises:
        UserError: Neither a MambaIR nor its U-Net.
    """
    if {"stem.weight", "stem_norm.weight", "tail.0.weight"} <= state_dict.keys():
        return {"name": "mambair", **_mambair_config(state_dict)}
    if {"stem.weight", "head.1.weight"} <= state_dict.keys():
        return {"name": "mambair-unet"}
    raise UserError("these are not the weights of a MambaIR; weights of another network need the config.json with them")


def _mambair_config(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    channels = state_dict["stem.weight"].shape[1]
    if channels != 3:
        raise UserError(
            f"this MambaIR reads {channels} channel(s), as those published for grey JPEG pictures; RGB runs here"
        )
    width, first = state_dict["stem_norm.weight"].shape[0], state_dict["tail.0.weight"].shape[0]
    kind: Kind = "light" if width == LAYOUTS["light"].width else "classic" if first == TAIL_WIDTH else "denoise"
    if kind == "light":
        scale = round((first / 3) ** 0.5)
    elif kind == "classic":
        shuffled = state_dict.get("tail.2.weight", torch.empty(0)).shape[0]
        scale = 3 if shuffled == 9 * TAIL_WIDTH else 4 if "tail.6.weight" in state_dict else 2
    else:
        scale = 1
    return {"kind": kind, "scale": scale}
