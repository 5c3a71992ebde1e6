"""`vssm classify summary`: parameters and FLOPs of a network."""

import torch

from vision_ssm.classify.config import NetworkConfig
from vision_ssm.classify.model import build_network
from vision_ssm.errors import UserError
from vision_ssm.flops import COUNTING, count_flops


def run_summary(name: str, *, classes: int = 1000, side: int = 224) -> int:
    """Print parameters and FLOPs of an untrained network for one square image.

    Raises:
        UserError: No such network, fewer than one class or pixel, or an image that the network does not take.
    """
    if classes < 1 or side < 1:
        raise UserError(f"classes and side must be 1 or more, got {classes} and {side}")
    with torch.device("meta"):
        network = build_network(NetworkConfig(name), classes)
    try:
        counted = count_flops(network, side, side).get_flop_counts()["Global"]
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"{name} does not take images of {side}x{side}: {error}") from None
    scans = counted.pop(torch.ops.vision_ssm.selective_scan, 0)
    rest = sum(counted.values())
    parameters = sum(p.numel() for p in network.parameters())
    print(
        f"{name}: {parameters:,} parameters; at {side}x{side} {(rest + scans) / 1e9:.2f} GFLOPs, {scans / 1e9:.2f} of "
        f"them in scans ({rest / 2e9:.2f} GMAC outside)\n{COUNTING}"
    )
    return 0
