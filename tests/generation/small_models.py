"""Models small enough for tests, with every weight that starts at zero filled, so that nothing is hidden."""

from typing import Any

import torch
from torch import nn

from generation.dim import DiM


def small_dim(**changes: Any) -> DiM:
    """A DiM of width 32 and 3 layers with random weights, in evaluation mode."""
    torch.manual_seed(0)
    model = DiM("tiny", **{"width": 32, "depth": 3, "sample_size": 8, "num_classes": 3, **changes})
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return model.eval()
