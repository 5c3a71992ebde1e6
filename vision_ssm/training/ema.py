"""Moving average of a model's weights."""

import math

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
