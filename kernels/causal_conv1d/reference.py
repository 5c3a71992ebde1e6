"""The causal convolution as an obvious loop: the definition every back end is compared with.

Shapes: B sequences before the axis, L positions, W sequences after the axis, D channels, T taps (the width).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, *, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor]:
    """y_t = act(bias + sum_j weight_j x_{t - (T - 1) + j}), one position after the other; gradients by autograd.

    Args:
        x: (B, L, W, D).
        weight: (D, T); the last tap meets the current input.
        bias: (D,) or None.
        initial_state: (B, T - 1, W, D), what was read before x, in reading order; None for zeros.
        silu: whether act is SiLU, else the identity.
        reverse: read from the last position.

    Returns:
        y (B, L, W, D), and the last T - 1 inputs read (B, T - 1, W, D), both in x.dtype.
    """
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, length, lines, channels = x.shape
    taps = weight.to(acc).unbind(1)
    if initial_state is None:
        initial_state = x.new_zeros(batch, len(taps) - 1, lines, channels)
    read = [*initial_state.to(acc).unbind(1), *(x.flip(1) if reverse else x).to(acc).unbind(1)]
    outputs = []
    for t in range(length):
        y = torch.zeros_like(read[-1]) if bias is None else bias.to(acc).expand_as(read[-1])
        for j, tap in enumerate(taps):
            y = y + tap * read[t + j]
        outputs.append(F.silu(y) if silu else y)
    y = torch.stack(outputs, dim=1).to(x.dtype)
    last = read[length:]
    final = torch.stack(last, dim=1).to(x.dtype) if last else x.new_empty(batch, 0, lines, channels)
    return (y.flip(1) if reverse else y), final
