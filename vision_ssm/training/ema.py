"""Moving averages of a model's weights."""

import math

import numpy as np
from timm.utils import ModelEmaV3
from torch import nn

from vision_ssm.training.config import EmaConfig


class Ema(ModelEmaV3):
    """timm's average of all floating-point parameters and buffers, with the warm-up of the YOLO recipe.

    Update t (from 1) has decay ``decay * (1 - exp(-t / warmup_steps))``; ``module`` is the averaged model.
    """

    def __init__(self, model: nn.Module, config: EmaConfig) -> None:
        super().__init__(model, decay=config.decay)
        self.warmup_steps = config.warmup_steps

    def get_decay(self, step: int | None = None) -> float:
        """Decay factor of update ``step``."""
        return self.decay if step is None else self.decay * (1 - math.exp(-step / self.warmup_steps))


class PowerEma(ModelEmaV3):
    """Average whose weights grow as a power of the step, so that it always spans the same share of the run.

    Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3.1.

    Update t (from 1) has decay ``(1 - 1 / t) ** (exponent + 1)``: the first one takes the weights as they are.

    Args:
        model: What is averaged.
        width: Standard deviation of the weights' profile, as a share of the steps so far.
    """

    def __init__(self, model: nn.Module, width: float) -> None:
        super().__init__(model, decay=0.0)
        self.width, self.exponent = width, power_exponent(width)

    def get_decay(self, step: int | None = None) -> float:
        """Decay factor of update ``step``."""
        return self.decay if step is None else (1 - 1 / step) ** (self.exponent + 1)


def power_exponent(width: float) -> float:
    """The exponent g whose profile has this relative width: width**2 * (g + 2)**2 * (g + 3) = g + 1."""
    inverse = width**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())
