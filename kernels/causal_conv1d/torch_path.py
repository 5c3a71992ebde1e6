"""Plain torch back end of the causal convolution: one multiply-add over the whole tensor for each tap, any device.

Shapes as in reference.py.
"""

import torch
from torch import Tensor


def _read(x: Tensor, initial_state: Tensor | None, width: int, reverse: bool) -> Tensor:
    """Everything that is read, the state first: (B, T - 1 + L, W, D) in the dtype of the sums."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, _, lines, channels = x.shape
    if initial_state is None:
        initial_state = x.new_zeros(batch, width - 1, lines, channels)
    return torch.cat([initial_state.to(acc), (x.flip(1) if reverse else x).to(acc)], dim=1)


def _before_activation(read: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """bias + sum_j weight_j read_{t + j}, (B, L, W, D)."""
    taps = weight.to(read.dtype).unbind(1)
    length = read.shape[1] - len(taps) + 1
    total = read[:, :length] * taps[0]
    for j, tap in enumerate(taps[1:], start=1):
        total = torch.addcmul(total, read[:, j : j + length], tap)
    return total if bias is None else total + bias.to(read.dtype)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None,
    *, silu: bool, reverse: bool, want_final: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (B, L, W, D), and the final state (B, T - 1, W, D) or an empty tensor."""
    read = _read(x, initial_state, weight.shape[1], reverse)
    y = _before_activation(read, weight, bias)
    y = (y * torch.sigmoid(y) if silu else y).to(x.dtype)
    final = read[:, x.shape[1] :].to(x.dtype) if want_final else x.new_empty(0)
    return (y.flip(1) if reverse else y).contiguous(), final.contiguous()


def backward(
    grad_y: Tensor, grad_final: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None,
    initial_state: Tensor | None, *, silu: bool, reverse: bool, needs: tuple[bool, ...],
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of x, weight, bias and initial_state that ``needs`` asks for."""
    width, length = weight.shape[1], x.shape[1]
    read = _read(x, initial_state, width, reverse)
    g = (grad_y.flip(1) if reverse else grad_y).to(read.dtype)
    if silu:
        pre = _before_activation(read, weight, bias)
        s = torch.sigmoid(pre)
        g = g * s * (1 + pre * (1 - s))
    found: list[Tensor | None] = [None] * 4
    if needs[0] or needs[3]:
        g_read = torch.zeros_like(read)
        for j, tap in enumerate(weight.to(read.dtype).unbind(1)):
            g_read[:, j : j + length].addcmul_(g, tap)
        if grad_final is not None:
            g_read[:, length:] += grad_final
        g_x = g_read[:, width - 1 :]
        found[0] = (g_x.flip(1) if reverse else g_x).to(x.dtype) if needs[0] else None
        if needs[3] and initial_state is not None:
            found[3] = g_read[:, : width - 1].to(initial_state.dtype, copy=True)  # not a view beside found[0]
    if needs[1]:
        taps = [(g * read[:, j : j + length]).sum((0, 1, 2)) for j in range(width)]
        found[1] = torch.stack(taps, dim=1).to(weight.dtype)
    if needs[2] and bias is not None:
        found[2] = g.sum((0, 1, 2)).to(bias.dtype)
    return found
