"""Parameters and multiply-adds of a restorer, counted on a twin without weights."""

import copy
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from restoration.networks import Restorer, model_config
from restoration.pretrained import load_model, resolve_weights
from vision_ssm.checkpoint import WEIGHTS_FILE

SCAN_OPERATIONS = 9
"""Operations per step of one state of one channel in one direction, the count that VMamba published."""

SIZES = (256, 512)

COUNTING = (
    "MAC: multiply-adds of convolutions and matrix products, the step sizes' among them. Scan: "
    f"{SCAN_OPERATIONS} FLOPs per pixel, direction, channel and state (VMamba's count). Norms, activations and "
    "additions are left out, as is usual."
)


@dataclass(frozen=True)
class Operations:
    """Work for one image: multiply-adds outside the scans and floating-point operations inside them."""

    macs: int
    scan_flops: int


def count_operations(model: nn.Module, height: int, width: int, *, channels: int = 3) -> Operations:
    """Count the work of any network for one image; nothing is computed.

    Args:
        model: Takes (1, channels, height, width).
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        channels: Of the image.

    Returns:
        The counts; `COUNTING` says what is in them.
    """
    step_macs = 0

    def scan_flops(x, delta, A, Bm, C, D, delta_weight, *_: object, out_shape: object = None) -> int:
        nonlocal step_macs
        directions, state_size = A[0], A[2]
        rank = 0 if delta_weight is None else delta_weight[-1]
        step_macs += x.numel() * directions * rank
        return x.numel() * directions * state_size * SCAN_OPERATIONS

    twin = copy.deepcopy(model).to("meta").eval()
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.vision_ssm.selective_scan: scan_flops})
    with counter, torch.no_grad():
        twin(torch.empty(1, channels, height, width, device="meta"))
    in_scans = counter.get_flop_counts()["Global"].get(torch.ops.vision_ssm.selective_scan, 0)
    return Operations((counter.get_total_flops() - in_scans) // 2 + step_macs, in_scans)


@dataclass(frozen=True)
class Summary:
    """Size of a restorer and its work for square images; ``str()`` is a table."""

    title: str
    parameters: int
    operations: dict[int, Operations]
    """Side of the image that the network reads -> work."""

    def __str__(self) -> str:
        lines = [f"{self.title}: {self.parameters:,} parameters", f"{'image':>12}{'GMAC':>10}{'scan GFLOP':>12}"]
        for side, work in self.operations.items():
            lines.append(f"{f'{side}x{side}':>12}{work.macs / 1e9:>10.2f}{work.scan_flops / 1e9:>12.2f}")
        return "\n".join((*lines, COUNTING))


def summarize(model: Restorer) -> Summary:
    """Parameters of a restorer and its work at 256x256 and 512x512 pixels of the image that it reads."""
    title = ", ".join(f"{value}" if key == "name" else f"{key} {value}" for key, value in model_config(model).items())
    operations = {side: count_operations(model, side, side, channels=model.in_channels) for side in SIZES}
    return Summary(title, sum(p.numel() for p in model.parameters()), operations)


def run_info(weights: str | Path) -> int:
    """Print what is known of weights: task, network, size, work, training data, licence, checksum.

    Raises:
        UserError: No such weights, or none of a restorer.
    """
    path = resolve_weights(weights)
    model, card = load_model(path)
    file = path / WEIGHTS_FILE if path.is_dir() else path
    degradation = ", ".join(f"{key} {value}" for key, value in card.degradation.items())
    facts = {
        "task": card.task,
        "enlarges": f"{card.scale} times, {_enlarged_by(model.scale)}" if card.scale > 1 else "no",
        "degradation": degradation or "not recorded",
        "trained on": card.trained_on,
        "licence": card.licence,
        "steps": "not recorded" if card.steps is None else f"{card.steps:,}",
        "seed": "not recorded" if card.seed is None else card.seed,
        "file": f"{file.stat().st_size / 1e6:.1f} MB, sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}",
    }
    print(weights)
    for key, value in facts.items():
        print(f"  {key:<12} {value}")
    print(summarize(model))
    return 0


def _enlarged_by(scale: int) -> str:
    return "by the network" if scale > 1 else "bicubic before the network"
