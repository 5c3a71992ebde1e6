"""How alike tokens become with depth (over-smoothing; Wang et al., 2025, section 4).

Two gauges of the tokens after every block, and of what the block alone gives: the mean cosine of two tokens of a
picture (1: all point one way), and the relative Dirichlet energy, the mean square distance of neighbours over twice the
mean square of the tokens about their mean (1: neighbours are as unlike as any two; 0: constant along the sequence).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_ssm.probe import digits
from vision_ssm.probe.options import SmoothOptions
from vision_ssm.probe.report import Curve, Report
from vision_ssm.probe.stack import StackConfig

# Shapes: B pictures, L tokens, C width.

PICTURES = 64


def cosine(tokens: Tensor) -> float:
    """Mean over pictures and pairs of different tokens, (B, L, C)."""
    directions = F.normalize(tokens, dim=-1)
    length = tokens.shape[1]
    return ((directions.sum(1).square().sum(-1) - length) / (length * (length - 1))).mean().item()


def energy(tokens: Tensor) -> float:
    """Relative Dirichlet energy along the sequence, (B, L, C)."""
    steps = tokens.diff(dim=1).square().sum(-1).mean()
    spread = (tokens - tokens.mean(1, keepdim=True)).square().sum(-1).mean()
    return (steps / (2 * spread).clamp(min=1e-30)).item()


@torch.inference_mode()
def _gauges(states: list[tuple[Tensor, Tensor]]) -> list[tuple[float, float, float, float]]:
    return [(cosine(h), energy(h), cosine(added), energy(added)) for h, added in states]


def measure(options: SmoothOptions, stacks: list[StackConfig]) -> Report:
    """The gauges by depth for every stack, on digits as sequences of pixels."""
    pixels, labels = digits.load()
    columns = ("stack", "after block", "cosine", "energy", "cosine of its output", "energy of its output")
    rows, curves = [], []
    for config in stacks:
        torch.manual_seed(options.seed)
        model = digits.classifier(config)
        if options.steps:
            digits.train(model, pixels, labels, pool="mean", steps=options.steps, seed=options.seed)
        with torch.inference_mode():
            found = _gauges(model.states(pixels[-PICTURES:]))
        rows += [(config.label, depth, *gauges) for depth, gauges in enumerate(found)]
        for name, i in (("cosine", 0), ("energy", 1)):
            curves.append(Curve(f"{config.label}: {name}", range(len(found)), [gauges[i] for gauges in found]))
    axes = {"xlabel": "blocks", "ylabel": "cosine, relative energy"}
    return Report("smooth", options.settings(stacks), columns, rows, curves, axes)
