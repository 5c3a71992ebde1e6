"""What an untrained mixer can tell about the order of events: linear read-outs of random paths.

Cirone et al., "Theoretical foundations of deep selective state-space models", 2024: a layer whose decays depend on the
input sees more of a path's signature than one with constant decays, and depth or dense transitions raise what it sees.
Nothing is trained but a ridge regression on the outputs, so no training trick hides what a layer lacks.

Paths are piecewise linear in three dimensions, few pieces of many steps: with independent steps, what a block's
convolution and activation make of single steps drowns what the path does. Every path ends with the same read-out
tokens; the features are the mixer's outputs at these, so only what the mixer carries over counts.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_ssm.probe.options import ExpressivityOptions
from vision_ssm.probe.report import Report
from vision_ssm.probe.stack import StackConfig

# Shapes: B paths, L steps, C model width, R read-out tokens, N states of a reference.

PIECES, STEPS = 4, 12
SETTLE, READ = 4, 16
"""Tokens after the path: those that fill the convolutions' windows, then those that are read."""
TARGETS = ("S1*S2", "Levy area", "S12", "S123")
SPEED = 4.0
"""Steps of a path in units of the embedding: small beside the constant part of a token, so that blocks stay smooth."""
GAIN = 0.2
"""Spread of the references' random coefficients: level after level of the signature counts less by about so much."""
STATES, BLOCK = 64, 4
"""Of the references, and the side of a block in the block-diagonal one."""
RIDGE = 1e-8
GROUP = 500
"""Paths at a time."""
REFERENCES = ("LTI", "gate only", "diagonal", "two diagonal", "block-diagonal", "dense")


def paths(count: int, seed: int) -> Tensor:
    """(B, L, 3) float64 steps; the whole has unit variance in every dimension."""
    generator = torch.Generator().manual_seed(seed)
    pieces = torch.randn(count, PIECES, 3, generator=generator, dtype=torch.float64) / math.sqrt(PIECES)
    return pieces.repeat_interleave(STEPS, dim=1) / STEPS


def signature(steps: Tensor) -> Tensor:
    """(B, L, 3) -> (B, 4): the targets, exact for piecewise linear paths (Chen's identity step by step)."""
    d1, d2, d3 = steps.unbind(-1)
    x1, x2, _ = (steps.cumsum(1) - steps).unbind(-1)
    s12 = (x1 + d1 / 2) * d2
    s21 = (x2 + d2 / 2) * d1
    before = s12.cumsum(1) - s12
    s123 = before * d3 + x1 * d2 * d3 / 2 + d1 * d2 * d3 / 6
    area = (s12 - s21).sum(1) / 2
    return torch.stack([d1.sum(1) * d2.sum(1), area, s12.sum(1), s123.sum(1)], dim=1)


def read_out(features: Tensor, targets: Tensor) -> list[float]:
    """R2 on the last quarter of the paths, of a ridge regression on the others."""
    fitted = 3 * len(features) // 4
    centre, spread = features[:fitted].mean(0), features[:fitted].std(0).clamp(min=1e-30)
    x = F.pad((features - centre) / spread, (0, 1), value=1.0)
    gram = x[:fitted].T @ x[:fitted] + RIDGE * fitted * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(gram, x[:fitted].T @ targets[:fitted])
    wrong = (x[fitted:] @ weights - targets[fitted:]).square().sum(0)
    spread = (targets[fitted:] - targets[fitted:].mean(0)).square().sum(0)
    return (1 - wrong / spread).tolist()


@torch.inference_mode()
def stack_features(config: StackConfig, steps: Tensor, seed: int) -> Tensor:
    """(B, R C): outputs of untrained mixers, one after the other with residuals and norms between them."""
    torch.manual_seed(seed)
    dim = config.dim
    embed, constant, tail = torch.randn(3, dim), torch.randn(dim), torch.randn(SETTLE + READ, dim)
    mixers = [config.build(i) for i in range(len(config.mixers))]
    features = []
    for group in steps.float().split(GROUP):
        h = torch.cat([SPEED * group @ embed + constant, tail.expand(len(group), -1, -1)], dim=1)
        for i, mixer in enumerate(mixers):
            added = mixer(F.layer_norm(h, (dim,)) if i else h, 1)
            h = h + F.layer_norm(added, (dim,))
        features.append(added[:, -READ:].flatten(1).double())
    return torch.cat(features)


def reference_features(name: str, steps: Tensor, seed: int) -> Tensor:
    """(B, N) final states of a random layer of the theory, z <- f(step) z + b step, with N = 64.

    ``LTI``: f constant. ``gate only``: f = exp(a step) per state, no input term. ``diagonal``: with it. ``two
    diagonal``: a second layer driven by the path and a random mix of the first. ``block-diagonal`` and ``dense``: f = 1
    + sum of A_i step_i with random A_i of 4 x 4 blocks, or full.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return GAIN * torch.randn(*shape, generator=generator, dtype=steps.dtype)

    if name == "LTI":
        decay = 0.9 + 0.1 * torch.rand(STATES, generator=generator, dtype=steps.dtype)
        return _diagonal(decay.log().expand(*steps.shape[:2], -1), steps @ random(3, STATES))[:, -1]
    if name == "gate only":
        return (steps @ random(3, STATES)).sum(1).exp()
    if name in ("diagonal", "two diagonal"):
        first = _diagonal(steps @ random(3, STATES), steps @ random(3, STATES))
        if name == "diagonal":
            return first[:, -1]
        moves = torch.cat([first[:, :1], first.diff(dim=1)], dim=1) @ random(STATES, 3) / (GAIN * math.sqrt(STATES))
        steps = torch.cat([steps, moves], dim=-1)
        return _diagonal(steps @ random(6, STATES), steps @ random(6, STATES))[:, -1]
    side = BLOCK if name == "block-diagonal" else STATES
    transitions = random(3, STATES // side, side, side) / math.sqrt(side)
    inputs = steps @ random(3, STATES)
    z = torch.zeros_like(inputs[:, 0])
    for t in range(steps.shape[1]):
        turned = torch.einsum("iknm,bkm->bikn", transitions, z.unflatten(-1, (-1, side))).flatten(2)
        z = z + (steps[:, t, :, None] * turned).sum(1) + inputs[:, t]
    return z


def _diagonal(log_decays: Tensor, inputs: Tensor) -> Tensor:
    """(B, L, N) states of z <- exp(log_decay) z + input; exp(log_decay) may exceed 1, so step by step."""
    z, states = torch.zeros_like(inputs[:, 0]), []
    for decay, value in zip(log_decays.exp().unbind(1), inputs.unbind(1), strict=True):
        z = decay * z + value
        states.append(z)
    return torch.stack(states, dim=1)


def measure(options: ExpressivityOptions, stacks: list[StackConfig]) -> Report:
    """R2 of every target for every row."""
    steps = paths(options.paths, options.seed)
    targets = signature(steps)
    columns, rows = ("layer", *TARGETS), []
    for name in REFERENCES if options.references else ():
        rows.append((f"reference: {name}", *read_out(reference_features(name, steps, options.seed), targets)))
    for config in stacks:
        row = read_out(stack_features(config, steps, options.seed), targets)
        rows.append((config.label, *row))
    axes = {"ylabel": "R2 on new paths"}
    return Report("expressivity", {"paths": options.paths, "seed": options.seed}, columns, rows, axes=axes)
