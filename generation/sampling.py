"""The loop from noise to sample, shared by the pipelines and the stream: any scheduler of diffusers, with guidance."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from generation.objectives import STEPS
from vision_ssm.errors import UserError

# Shapes: B batch.

Generators = torch.Generator | list[torch.Generator] | None
Predict = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(noisy samples, noise levels (rows,), class labels (rows,) or None) -> prediction."""


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: the prediction is moved away from the one for "no class".

    Raises:
        UserError: A scale below 1, or an interval that is none.
    """

    scale: float = 1.0
    """1 is off."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Noise levels, from 0 (clean) to 1 (noise), between which it acts (Kynkaanniemi et al., 2404.07724)."""

    def __post_init__(self) -> None:
        low, high = self.interval
        if self.scale < 1:
            raise UserError(f"guidance_scale must be at least 1 (1 is off), got {self.scale}")
        if not 0 <= low < high <= 1:
            raise UserError(f"guidance_interval must be two growing numbers from 0 to 1, got {self.interval}")

    def active(self, timestep: Tensor) -> bool:
        """Whether it acts at this noise level."""
        level = float(timestep) / STEPS
        return self.scale > 1 and self.interval[0] <= level <= self.interval[1]

    def predict(
        self, predict: Predict, x: Tensor, timestep: Tensor, labels: Tensor | None, no_class: int | None
    ) -> Tensor:
        """The guided prediction for samples x (B, ...) at one noise level."""
        if not self.active(timestep) or labels is None or no_class is None:
            return predict(x, timestep.expand(len(x)), labels)
        both = torch.cat([labels, torch.full_like(labels, no_class)])
        guided, free = predict(torch.cat([x, x]), timestep.expand(2 * len(x)), both).chunk(2)
        return free + self.scale * (guided - free)


def check_guidance(guidance: Guidance, labels: Tensor | None) -> None:
    """Refuse guidance towards nothing.

    Raises:
        UserError: It is on and there are no classes to guide to.
    """
    if guidance.scale > 1 and labels is None:
        raise UserError(f"guidance_scale {guidance.scale} needs class_labels to guide towards")


def set_steps(scheduler: Any, steps: int, device: torch.device) -> Tensor:
    """Prepare a scheduler for a new sample; returns the noise levels to go through.

    Raises:
        UserError: The number of steps is not positive, or above that of the noise levels that there are.
    """
    most = scheduler.config.num_train_timesteps
    if not 1 <= steps <= most:
        raise UserError(f"num_inference_steps must be 1 to {most}, got {steps}")
    scheduler.set_timesteps(steps, device=device)
    return scheduler.timesteps


def denoise(
    scheduler: Any,
    noise: Tensor,
    timesteps: Tensor,
    predict: Callable[[Tensor, Tensor], Tensor],
    *,
    generator: Generators,
    after_step: Callable[[int, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Go from noise to samples; the samples stay in float32 whatever the model computes in.

    Args:
        scheduler: Any of diffusers', prepared by ``set_steps``.
        noise: Standard normal, any shape.
        timesteps: What ``set_steps`` gave.
        predict: (samples, noise level) -> prediction, shaped as the samples.
        generator: For schedulers that draw noise in every step; a list has one per sample.
        after_step: (number of the step, noise level, samples) -> samples to go on with.

    Returns:
        Samples, shaped as ``noise``.
    """
    draws = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if draws else {}
    scales = hasattr(scheduler, "scale_model_input")  # flow matching has no need to
    x = noise.float() * getattr(scheduler, "init_noise_sigma", 1.0)
    for i, t in enumerate(timesteps):
        prediction = predict(scheduler.scale_model_input(x, t) if scales else x, t)
        x = scheduler.step(prediction.float(), t, x, return_dict=False, **extra)[0]
        if after_step is not None:
            x = after_step(i, t, x)
    return x
