"""Floating-point operations of a network with scans, counted by torch's counter; nothing is computed."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import kernels  # noqa: F401 (registers the scan operator, which a network without scans has not)

SCAN_OPERATIONS = 9
"""Operations per step of one state of one channel in one direction, the count that VMamba published."""

COUNTING = (
    "FLOPs for one image: 2 per multiply-add of convolutions and matrix products, plus selective scans: per pixel, "
    f"direction and channel {SCAN_OPERATIONS} for each state (VMamba's count) and 2 for each rank of the step-size "
    "product. Scans by SSD are not counted. Norms, activations and additions are left out, as is usual."
)


def scan_flops(
    x: torch.Size,
    delta: torch.Size,
    A: torch.Size,
    Bm: torch.Size,
    C: torch.Size,
    D: torch.Size | None,
    delta_weight: torch.Size | None,
    *_: object,
    out_shape: object = None,
) -> int:
    """FLOPs of one call of the scan operator ``vision_ssm::selective_scan``, from the shapes of its arguments."""
    directions, state_size = A[0], A[2]
    rank = 0 if delta_weight is None else delta_weight[-1]
    return x.numel() * directions * (SCAN_OPERATIONS * state_size + 2 * rank)


def count_flops(twin: nn.Module, height: int, width: int) -> FlopCounterMode:
    """Run a network on the meta device on one image of the given size and return the filled counter."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.vision_ssm.selective_scan: scan_flops})
    with counter, torch.no_grad():
        twin.eval()(torch.empty(1, 3, height, width, device="meta"))
    return counter
