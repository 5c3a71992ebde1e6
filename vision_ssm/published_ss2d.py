"""Parameters of the published SS2D modules (VMamba, MambaIR, Mamba-YOLO) -> names and shapes of `vision_ssm.ss2d`."""

import re

from torch import Tensor

from vision_ssm.ss2d import DIRECTIONS

RENAMES = (
    (r"\bconv2d\.", "conv."),
    (r"\bout_norm\.", "norm."),
    (r"\bA_logs$", "scan.A_log"),
    (r"\bDs$", "scan.D"),
    (r"\bdt_projs_", "scan.dt_"),
    (r"\bx_proj_weight$", "x_proj.weight"),
)
"""Published name -> ours, by all rules that match."""


def ss2d_entry(name: str, tensor: Tensor, *, gated: bool = True) -> dict[str, Tensor]:
    """Rename and reshape one published parameter, whatever stands before its name; one of no scan stays as it is.

    Linear layers, published as such or as convolutions of width 1, become convolutions. Of a ``gated`` module, the
    second half of ``in_proj`` is the gate's, an entry of its own with us.
    """
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    if re.search(r"\b(in|out)_proj\.weight$", name):  # (2 D or D, C), (C, D)
        tensor = tensor.flatten(1)[..., None, None]
    if gated and re.search(r"\bin_proj\.weight$", name):
        scanned, gate = tensor.chunk(2)
        return {name: scanned, re.sub(r"in_proj\.weight$", "gate_proj.weight", name): gate}
    if re.search(r"\bx_proj\.weight$", name):  # (K, R + 2N, D)
        tensor = tensor.flatten(0, 1)[..., None, None]
    if re.search(r"\bscan\.(A_log|D)$", name):  # (K * D, ...)
        tensor = tensor.unflatten(0, (len(DIRECTIONS), -1))
    return {name: tensor}
