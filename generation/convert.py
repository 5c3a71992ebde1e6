"""Published weights -> our parameter names: the video U-Net and its temporal layers."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from generation.unet_blocks import HEAD_WIDTH
from vision_ssm.checkpoint import load_checkpoint, load_matching
from vision_ssm.errors import UserError
from vision_ssm.files import check_new

ANCHOR = "init_conv.weight"
"""Published name that every U-Net of Oshima et al. has, after any prefix of its wrapper."""
CONSTANT = "rotary_emb.freqs"
"""Rotary frequencies, which the published modules keep as a parameter."""
BIAS_TABLE = "time_rel_pos_bias.relative_attention_bias.weight"
"""Only softmax attention reads it; the other published networks carry it without a use."""

# Published name in the U-Net -> ours. All rules that match are applied, in order.
RENAMES = (
    (r"^time_rel_pos_bias\.relative_attention_bias\.", "frame_bias.table."),
    (r"^init_conv\.", "stem."),
    (r"^init_temporal_layer\.", "stem_temporal."),
    (r"^time_mlp\.(\d+)\.", lambda m: f"time_embedding.mlp.{int(m[1]) - 1}."),
    (r"^((?:downs|ups)\.\d+)\.([01])\.", lambda m: f"{m[1]}.block{int(m[2]) + 1}."),
    (r"^((?:downs|ups)\.\d+)\.2\.", r"\1.spatial."),
    (r"^((?:downs|ups)\.\d+)\.3\.", r"\1.temporal."),
    (r"^((?:downs|ups)\.\d+)\.4\.", r"\1.resample."),
    (r"^mid_block([12])\.", r"middle\1."),
    (r"^mid_spatial_attn\.", "middle_spatial."),
    (r"^mid_temporal_layer\.", "middle_temporal."),
    (r"^final_conv\.0\.", "head."),
    (r"^final_conv\.1\.", "out."),
    (r"\.mlp\.1\.", ".time."),
    (r"\.block([12])\.proj\.", r".conv\1."),
    (r"\.block([12])\.norm\.", r".norm\1."),
    (r"\.res_conv\.", ".shortcut."),
    (r"\.fn\.norm\.gamma$", ".norm.weight"),
    (r"\.fn\.(?:fn\.)+", ".layer."),
)
IN_LAYER = re.compile(r"((?:stem_|middle_|(?:downs|ups)\.\d+\.)temporal\.layer\.)(.+)$")

# Per variant: published linear layers and convolutions -> ours; the place of a scan (0 forwards, 1 backwards).
LINEARS = {
    "attention": {},
    "glu": {"fc1": "mlp.0", "fc2": "mlp.2"},
    "mlp": {"fc1": "mlp.0", "fc2": "mlp.2"},
    "gated": {
        "fc1": "branches.0.0", "fc2": "branches.0.3", "fc_rev1": "branches.1.0", "fc_rev2": "branches.1.3",
        "fc_shortcut": "shortcut", "fc3": "widen", "fc_out": "out",
    },
    "mamba": {
        "fc_init": "in_proj", "conv": "branches.0.conv", "conv_rev": "branches.1.conv", "fc_out": "out_proj",
    },
}  # fmt: skip
SCANS = {"glu": "branches.{}.0", "mlp": "scans.{}", "gated": "branches.{}.2", "mamba": "branches.{}.scan"}
S6_LEAVES = {"A_log": "scan.A_log", "D": "scan.D", "dt_proj.weight": "scan.dt_weight", "dt_proj.bias": "scan.dt_bias"}


def convert_layer(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the parameters of one published temporal layer.

    Args:
        state_dict: Names inside the layer, as ``s4d.kernel.C``, ``fc1.weight`` or ``to_qkv.weight``.

    Returns:
        The state dict of the layer of `generation.temporal` of the same kind.
    """
    variant = _variant(state_dict)
    entries = (_layer_entry(name, tensor, variant) for name, tensor in state_dict.items() if name != CONSTANT)
    return dict(entries)


def _variant(names: Iterable[str]) -> str:
    """Which of our layers has these published parameters."""
    modules = {name.partition(".")[0] for name in names}
    marks = {"to_qkv": "attention", "fc_init": "mamba", "fc_shortcut": "gated"}
    found = next((variant for mark, variant in marks.items() if mark in modules), None)
    return found or ("glu" if any(".output_linear." in name for name in names) else "mlp")


def _layer_entry(name: str, tensor: Tensor, variant: str) -> tuple[str, Tensor]:
    module, _, leaf = name.partition(".")
    if module in LINEARS[variant]:
        return f"{LINEARS[variant][module]}.{leaf}", tensor
    scan = re.match(r"(s4d|s6)(_rev)?\.(?:kernel\.)?(.+)$", name)
    if scan is None or variant == "attention":
        return name, tensor
    direction, leaf = 1 if scan[2] else 0, scan[3]
    if leaf.startswith("output_linear.0."):  # a convolution of width 1, (2 C, C, 1)
        return f"branches.{direction}.2.{leaf.rpartition('.')[2]}", tensor.squeeze(-1) if tensor.ndim == 3 else tensor
    place = SCANS[variant].format(direction)
    if scan[1] == "s6" and leaf in S6_LEAVES:
        return f"{place}.{S6_LEAVES[leaf]}", tensor.unsqueeze(0)
    return f"{place}.{leaf}", tensor


def from_official(state_dict: Mapping[str, Tensor], *, linear_attention: bool = False) -> dict[str, Tensor]:
    """Convert a published U-Net of Oshima et al. (either version of their code, any temporal layer).

    Args:
        state_dict: Published names after any common prefix (``denoise_fn.module.``); what lies outside of the prefix,
            as the tables of the diffusion process, is left out. Half precision becomes float32.
        linear_attention: The two kinds of attention have the same parameters; say here if the weights are of "l-attn".

    Returns:
        A complete state dict for ``SSMVideoUNet(**config_from_state_dict(result))``.

    Raises:
        UserError: Not such a U-Net, or parameters are missing, left over or of a wrong shape.
    """
    from generation.unet import SSMVideoUNet

    prefix = next((key.removesuffix(ANCHOR) for key in state_dict if key.endswith(ANCHOR)), None)
    if prefix is None:
        raise UserError(f"no published video U-Net of Oshima et al.: no parameter is named {ANCHOR}")
    published = {name.removeprefix(prefix): t.float() for name, t in state_dict.items() if name.startswith(prefix)}
    converted = _renamed(published)
    if linear_attention or "stem_temporal.layer.to_qkv.weight" not in converted:
        converted.pop("frame_bias.table.weight", None)
    with torch.device("meta"):
        twin = SSMVideoUNet(**config_from_state_dict(converted))
    load_matching(twin, converted).require_complete("the published state dict")
    return converted


def _renamed(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names and shapes of all parameters of the U-Net."""
    first = "init_temporal_layer.fn.fn.fn."
    variant = _variant([name.removeprefix(first) for name in published if name.startswith(first)])
    converted: dict[str, Tensor] = {}
    for name, tensor in published.items():
        if name.endswith(CONSTANT):
            continue
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        layer = IN_LAYER.match(name)
        if layer is not None:
            leaf, tensor = _layer_entry(layer[2], tensor, variant)
            name = layer[1] + leaf
        converted[name] = tensor if layer is not None else _reshaped(name, tensor)
    return converted


def _reshaped(name: str, tensor: Tensor) -> Tensor:
    """Convolutions over (1, k, k) are ours over (k, k), those of width 1 are linear layers, gains have one axis."""
    if tensor.ndim == 5 and tensor.shape[0] == 1:
        return tensor.flatten()
    if re.search(r"(^out|\.shortcut|\.to_qkv|\.to_out)\.weight$", name):
        return tensor.flatten(1)
    return tensor.squeeze(2) if tensor.ndim == 5 else tensor


def config_from_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the arguments of ``SSMVideoUNet`` off a state dict in our names; groups leave no trace and are 8.

    Raises:
        UserError: The tensors are not those of an SSMVideoUNet.
    """
    try:
        dim, in_channels = state_dict["stem.weight"].shape[:2]
        heads = state_dict["downs.0.spatial.layer.to_qkv.weight"].shape[0] // (3 * HEAD_WIDTH)
        mults = [
            state_dict[f"downs.{i}.block1.conv1.weight"].shape[0] // dim for i in range(_count(state_dict, "downs."))
        ]
    except KeyError as missing:
        raise UserError(f"not the weights of an SSMVideoUNet: {missing} is not among them") from None
    return {
        "dim": dim,
        "dim_mults": mults,
        "in_channels": in_channels,
        "heads": heads,
        "time_layers": sum(bool(re.match(r"time_embedding\.mlp\.\d+\.weight", name)) for name in state_dict),
        **_temporal_config(state_dict, heads),
    }


def _count(names: Iterable[str], prefix: str) -> int:
    """How many members the module list `prefix` has."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)})


def _temporal_config(state_dict: Mapping[str, Tensor], heads: int) -> dict[str, Any]:
    prefix = "stem_temporal.layer."
    layer = {name.removeprefix(prefix): t for name, t in state_dict.items() if name.startswith(prefix)}
    if "to_qkv.weight" in layer:
        kind = "attention" if "frame_bias.table.weight" in state_dict else "linear_attention"
        return {"temporal": kind, "head_width": layer["to_qkv.weight"].shape[0] // (3 * heads)}
    marks = {"in_proj.weight": "mamba", "shortcut.weight": "gated", "branches.0.2.weight": "glu"}
    variant = next((variant for mark, variant in marks.items() if mark in layer), "mlp")
    scan = SCANS[variant].format(0)
    try:
        s6 = f"{scan}.x_proj.weight" in layer
        size = layer[f"{scan}.scan.A_log"].shape[-1] if s6 else 2 * layer[f"{scan}.A_imag"].shape[-1]
    except KeyError as missing:
        raise UserError(f"not the temporal layer of an SSMVideoUNet: {missing} is not among its parameters") from None
    width = next((layer[name].shape[0] for name in ("mlp.0.weight", "shortcut.weight") if name in layer), None)
    return {
        "temporal": "s6" if s6 else "s4d",
        "variant": variant,
        "bidirectional": _count(layer, "scans." if variant == "mlp" else "branches.") == 2,
        "state_size": size,
        "hidden": width,
    }


def run_convert(file: str | Path, output: str | Path, *, linear_attention: bool = False) -> int:
    """Convert a published file to a folder for ``SSMVideoUNet.from_pretrained`` and say what it is.

    No code in the file is run. Of averaged and plain weights in one file the averaged are taken.

    Args:
        file: A `.pt` file as the published training writes, or any file of its weights.
        output: The folder; made if it does not exist.
        linear_attention: See `from_official`.

    Raises:
        UserError: No published U-Net, or the folder cannot be written.
    """
    from generation.unet import SSMVideoUNet

    published, _ = load_checkpoint(file)
    try:
        weights = from_official(published, linear_attention=linear_attention)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    config = config_from_state_dict(weights)
    model = SSMVideoUNet(**config)
    load_matching(model, weights).require_complete(file)
    check_new(output)
    model.save_pretrained(output)
    print(f"{output}: {', '.join(f'{key} {value}' for key, value in config.items())}; {len(weights)} tensors")
    return 0
