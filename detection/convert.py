"""Published Mamba-YOLO weights -> our parameter names; weights -> the configuration they were made for."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from detection.head import REG_MAX
from detection.model import SCALES, STAGE_CHANNELS, MambaYOLO
from vision_ssm.errors import UserError
from vision_ssm.published_ss2d import ss2d_entry

# Layer index in the published state dict (`model.<index>.`) -> our module.
LAYERS = {
    0: "backbone.stem",
    2: "backbone.merges.0",
    4: "backbone.merges.1",
    6: "backbone.merges.2",
    8: "backbone.sppf",
    11: "neck.top_down4",
    14: "neck.top_down3",
    15: "neck.down3",
    17: "neck.bottom_up4",
    18: "neck.down4",
    20: "neck.bottom_up5",
    21: "head",
}
STAGES = {1: "backbone.stages.0", 3: "backbone.stages.1", 5: "backbone.stages.2", 7: "backbone.stages.3"}

# Name inside a layer -> ours, but for what a scan has. All rules that match are applied, in order.
RENAMES = (
    (r"^conv\.([01])\.", r"0.\1."),  # stem
    (r"^conv\.3\.", "1.0."),
    (r"^conv\.4\.", "1.1."),
    (r"^pw_linear\.", ""),  # merge
    (r"^cv1\.", "reduce."),  # pyramid pooling
    (r"^cv2\.(?=conv|bn)", "expand."),
    (r"^cv2\.", "box."),  # head
    (r"^cv3\.", "cls."),
    (r"^dfl\.conv\.weight$", "bins"),
    (r"(^|\.)conv\.(?=weight$)", r"\g<1>0."),  # the convolution and the norm of a Conv
    (r"(^|\.)bn\.", r"\g<1>1."),
    (r"^(proj_conv|in_proj)\.(?=[01]\.)", "proj."),  # ODSS block
    (r"^norm([2]?)\.norm\.", lambda m: "norm2." if m[1] else "norm1."),
    (r"^lsblock\.fc1\.", "local.conv."),
    (r"^lsblock\.fc2\.", "local.fc1."),
    (r"^lsblock\.fc3\.", "local.fc2."),
    (r"^lsblock\.norm\.", "local.norm."),
    (r"^mlp\.dwconv\.", "mlp.conv."),
    (r"^mlp\.fc2\.", "mlp.fc."),
    (r"^op\.", "ss2d.0."),
)


def convert_entry(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Rename and reshape one published parameter (or its gradient).

    Args:
        name: Published name, ``model.<layer>.<...>``.
        tensor: Its values.

    Returns:
        One entry under our name, or two where we keep the halves of a projection apart.

    Raises:
        UserError: The name belongs to no layer of Mamba-YOLO.
    """
    found = re.match(r"model\.(\d+)\.(?:(\d+)\.)?(.+)$", name)
    index = int(found[1]) if found else -1
    if found is None or index not in LAYERS.keys() | STAGES.keys():
        raise UserError(f"{name} is no parameter of a published Mamba-YOLO (layers model.0 to model.21)")
    prefix = f"{STAGES[index]}.{found[2] or 0}" if index in STAGES else LAYERS[index]
    leaf = found[3]
    for pattern, replacement in RENAMES:
        leaf = re.sub(pattern, replacement, leaf)
    if leaf.startswith("mlp.fc1."):  # two of ours, one after the other along the rows
        names = (f"{prefix}.{leaf.replace('fc1', half)}" for half in ("gate", "value"))
        return dict(zip(names, tensor.chunk(2), strict=True))
    return ss2d_entry(f"{prefix}.{leaf}", _reshape(f"{prefix}.{leaf}", tensor))


def _reshape(name: str, tensor: Tensor) -> Tensor:
    """Published shape -> ours, for the few parameters that we store otherwise."""
    if re.search(r"merges\.\d\.0\.weight$", name):  # (C', 4C, 1, 1), squares ordered by column, then row
        return tensor.unflatten(1, (2, 2, -1)).permute(0, 3, 2, 1, 4, 5)[..., 0, 0].contiguous()
    return tensor.flatten() if name == "head.bins" else tensor


def from_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a published Mamba-YOLO state dict; size, classes and variant are read off the tensors.

    Args:
        state_dict: Names ``model.<layer>.<...>``, any common prefix before them. Half precision becomes float32.

    Returns:
        A complete state dict for ``MambaYOLO(**config_from_state_dict(result))``.

    Raises:
        UserError: Not a Mamba-YOLO state dict, or parameters are missing, left over or of a wrong shape.
    """
    anchor = "model.0.conv.0.weight"
    prefix = next((key.removesuffix(anchor) for key in state_dict if key.endswith(anchor)), None)
    if prefix is None:
        raise UserError(f"not a published Mamba-YOLO state dict: no parameter is named {anchor}")
    converted: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if name.startswith(prefix):
            tensor = tensor.float() if tensor.is_floating_point() else tensor
            converted |= convert_entry(name.removeprefix(prefix), tensor)
    converted.setdefault("head.bins", torch.arange(REG_MAX, dtype=torch.float32))
    _check_complete(converted)
    return converted


def config_from_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the arguments of ``MambaYOLO`` off a state dict in our names.

    The initialisation leaves no trace in trained weights and is given as ``official``; the mixers are SS2D, which is
    all that published weights have.

    Raises:
        UserError: The tensors are not those of a Mamba-YOLO.
    """
    try:
        width = state_dict["backbone.stem.1.0.weight"].shape[0]
        num_classes = state_dict["head.cls.0.2.bias"].shape[0]
    except KeyError as missing:
        raise UserError(f"not the weights of a Mamba-YOLO: {missing} is not among them") from None
    sizes = {scale.channels(STAGE_CHANNELS[0]): size for size, scale in SCALES.items()}
    if width not in sizes:
        raise UserError(f"the stem has {width} channels; Mamba-YOLO T, B, L have {', '.join(map(str, sizes))}")
    depth = SCALES[sizes[width]].depth
    blocks = [_count_blocks(state_dict, stage) for stage in STAGES.values()]
    return {
        "size": sizes[width],
        "num_classes": num_classes,
        "lsblock": any(".local." in name for name in state_dict),
        "stage_repeats": tuple(max(round(count / depth), 1) for count in blocks),
        "width": None,
        "init": "official",
        "mixer": "s6",
        "mixer_pattern": "same",
        "polar": (0, 0),
        "smr": 0,
        "backbone": {},
    }


def _count_blocks(names: Iterable[str], stage: str) -> int:
    indices = {int(name.removeprefix(stage + ".").split(".")[0]) for name in names if name.startswith(stage + ".")}
    return max(indices, default=0) + 1


def _check_complete(state_dict: Mapping[str, Tensor]) -> None:
    """Compare names and shapes with the model that the tensors describe."""
    config = config_from_state_dict(state_dict)
    with torch.device("meta"):
        wanted = MambaYOLO(**config).state_dict()
    model = f"Mamba-YOLO-{config['size'].upper()} with {config['num_classes']} classes"
    for problem, names in (
        ("lacks", wanted.keys() - state_dict.keys()),
        ("has too much, against", state_dict.keys() - wanted.keys()),
    ):
        if names:
            raise UserError(f"the state dict {problem} {model}: {_some(names)}")
    for name, tensor in wanted.items():
        if tensor.shape != state_dict[name].shape:
            given = tuple(state_dict[name].shape)
            raise UserError(f"{name} has shape {given}, {model} needs {tuple(tensor.shape)}")


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
