"""Parameters and floating-point operations of a detector, part by part."""

from dataclasses import dataclass

import torch

from detection.head import STRIDES
from detection.model import MambaYOLO
from detection.timm_backbone import TimmBackbone
from vision_ssm.errors import UserError
from vision_ssm.flops import COUNTING, count_flops


@dataclass(frozen=True)
class Part:
    """One part of the network: its name, parameters, and FLOPs outside and inside the scans."""

    name: str
    parameters: int
    flops: int
    scan_flops: int


@dataclass(frozen=True)
class Summary:
    """Parts of a network for one image of a given size; ``str()`` is a table."""

    title: str
    parts: tuple[Part, ...]

    @property
    def parameters(self) -> int:
        """All parameters, the 16 fixed bin values of the head among them."""
        return sum(part.parameters for part in self.parts)

    @property
    def flops(self) -> int:
        """All FLOPs, scans included."""
        return sum(part.flops + part.scan_flops for part in self.parts)

    def __str__(self) -> str:
        rows = [(part.name, part.parameters, part.flops, part.scan_flops) for part in self.parts]
        rows.append(("sum", self.parameters, sum(row[2] for row in rows), sum(row[3] for row in rows)))
        lines = [self.title, f"{'part':<20}{'parameters':>12}{'GFLOPs':>10}{'in scans':>10}{'together':>10}"]
        lines += [f"{n:<20}{p:>12,}{f / 1e9:>10.3f}{s / 1e9:>10.3f}{(f + s) / 1e9:>10.3f}" for n, p, f, s in rows]
        return "\n".join((*lines, COUNTING))


def summarize(model: MambaYOLO, size: int | tuple[int, int] = 640) -> Summary:
    """Count parameters and FLOPs of a model.

    Args:
        model: The detector; its weights are not touched, nothing is computed.
        size: Side of a square image, or (height, width), in pixels; multiples of 32.

    Returns:
        The counts; print it for a table that says how it was counted.

    Raises:
        UserError: The size is not a positive multiple of 32.
    """
    height, width = size if isinstance(size, tuple) else (size, size)
    if min(height, width) < STRIDES[-1]:
        raise UserError(f"size: expected positive multiples of {STRIDES[-1]}, got {height}x{width}")
    with torch.device("meta"):
        twin = MambaYOLO(**model.config)
    counts = count_flops(twin, height, width).get_flop_counts()
    scan = torch.ops.vision_ssm.selective_scan
    parts = []
    for name in _part_names(model):
        found = counts.get(f"{type(model).__name__}.{name}", {})
        in_scans = found.get(scan, 0)
        parameters = sum(p.numel() for p in model.get_submodule(name).parameters())
        parts.append(Part(name, parameters, sum(found.values()) - in_scans, in_scans))
    config = model.config
    title = f"Mamba-YOLO-{config['size'].upper()}, {config['num_classes']} classes, {height}x{width} pixels"
    return Summary(title, tuple(parts))


def _part_names(model: MambaYOLO) -> list[str]:
    """Stem, stages and merges in their order and pyramid pooling, or one of timm's; the neck's blocks, the head."""
    if isinstance(model.backbone, TimmBackbone):
        names = ["backbone"]
    else:
        names = ["backbone.stem", "backbone.stages.0"]
        for i in range(len(model.backbone.merges)):
            names += [f"backbone.merges.{i}", f"backbone.stages.{i + 1}"]
        names += ["backbone.sppf"]
    return [*names, *(f"neck.{name}" for name, _ in model.neck.named_children()), "head"]
