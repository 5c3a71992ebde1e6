"""What a change of the sampling rate costs: the pitch of damped oscillations, trained at one rate, tested at others.

The toy of Qi et al. ("SMR: State memory replay for long sequence modeling", 2024): a recurrence learns at one step
between samples, and meets another. Signals are exp(-t / 4) cos(w t + phase), 64 samples; w is to be told. A model hears
samples alone, so it cannot be told the step; only the damping gives it away. The reference "reads the training rate" is
a perfect model that believes the step to be that of training.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from vision_ssm.probe.options import SamplingOptions
from vision_ssm.probe.report import Report
from vision_ssm.probe.stack import Stack, StackConfig, fit

# Shapes: B signals, L samples.

LENGTH, STEP, DAMPING = 64, 0.1, 0.25
LOW, HIGH = 2.0, 8.0
"""Range of w in radians a second."""
BATCH, TEST, LR = 64, 1024, 4e-3
RATES = {"0.1": (STEP, 0.0), "0.08": (0.08, 0.0), "0.125": (0.125, 0.0), "jitter 50 %": (STEP, 0.5)}
"""Column -> mean step in seconds, and the largest relative deviation of a step."""


def signals(count: int, step: float, jitter: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(B, L, 1) samples and (B,) w."""
    w = LOW + (HIGH - LOW) * torch.rand(count, 1, generator=generator)
    phase = 2 * torch.pi * torch.rand(count, 1, generator=generator)
    steps = step * (1 + jitter * (2 * torch.rand(count, LENGTH, generator=generator) - 1))
    t = steps.cumsum(1) - steps[:, :1]
    return ((-DAMPING * t).exp() * (w * t + phase).cos())[..., None], w[:, 0]


def pitch(model: Stack, x: Tensor) -> Tensor:
    """(B,) w in radians a second."""
    return (LOW + HIGH) / 2 + (HIGH - LOW) / 2 * model(x).mean((1, 2))


def _batches(generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield signals(BATCH, STEP, 0.0, generator)


def errors(config: StackConfig, steps: int, seed: int) -> list[float]:
    """Root mean square error in radians a second at every rate, after training at ``STEP``."""
    torch.manual_seed(seed)
    model = Stack(config, nn.Linear(1, config.dim), 1, length=None)
    fit(
        model, _batches(torch.Generator().manual_seed(seed)),
        lambda x, w: (pitch(model, x) - w).square().mean(), steps=steps, lr=LR,
    )  # fmt: skip
    found = []
    for step, jitter in RATES.values():
        x, w = signals(TEST, step, jitter, torch.Generator().manual_seed(10_000 + seed))
        with torch.inference_mode():
            found.append((pitch(model, x) - w).square().mean().sqrt().item())
    return found


def measure(options: SamplingOptions, stacks: list[StackConfig]) -> Report:
    """Mean and largest deviation over seeds, for every stack."""
    columns = ("stack", *RATES, *(f"+- {name}" for name in RATES))
    rms = ((LOW**2 + LOW * HIGH + HIGH**2) / 3) ** 0.5
    spread = (HIGH - LOW) / 12**0.5
    rows: list[tuple] = [
        ("reference: always the mean", *[spread] * len(RATES), *[None] * len(RATES)),
        (
            "reference: reads the training rate",
            *(None if j else rms * abs(s / STEP - 1) for s, j in RATES.values()),
            *[None] * 4,
        ),
    ]
    for config in stacks:
        found = torch.tensor([errors(config, options.steps, seed) for seed in range(options.seeds)])
        mean = found.mean(0)
        rows.append((config.label, *mean.tolist(), *(found - mean).abs().amax(0).tolist()))
    return Report("sampling", options.settings(stacks), columns, rows, axes={"ylabel": "error, radians a second"})
