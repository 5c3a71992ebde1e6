"""Plain torch back end of the causal convolution, any device.

oneDNN's depthwise convolution for float32 on the CPU, which reads channels-last maps as they are; elsewhere, where
torch's convolutions walk channel by channel (float64) or round (TF32), one multiply-add over the whole tensor per tap.

Shapes as in reference.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight


def _read(x: Tensor, initial_state: Tensor | None, width: int, reverse: bool) -> Tensor:
    """Everything that is read, the state first: (B, T - 1 + L, W, D) in the dtype of the sums."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, _, lines, channels = x.shape
    if initial_state is None:
        initial_state = x.new_zeros(batch, width - 1, lines, channels)
    return torch.cat([initial_state.to(acc), (x.flip(1) if reverse else x).to(acc)], dim=1)


def _by_onednn(read: Tensor) -> bool:
    return read.device.type == "cpu" and read.dtype == torch.float32


def _maps(t: Tensor) -> Tensor:
    """(B, L, W, D) -> (B, D, L, W)."""
    return t.permute(0, 3, 1, 2)


def _correlate(read: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """bias + sum_j weight_j read_{t + j}, (B, L, W, D)."""
    weight, bias = weight.to(read.dtype), None if bias is None else bias.to(read.dtype)
    if _by_onednn(read):
        return F.conv2d(_maps(read), weight[:, None, :, None], bias, groups=len(weight)).permute(0, 2, 3, 1)
    taps = weight.unbind(1)
    length = read.shape[1] - len(taps) + 1
    total = read[:, :length] * taps[0]
    for j, tap in enumerate(taps[1:], start=1):
        total = torch.addcmul(total, read[:, j : j + length], tap)
    return total if bias is None else total + bias


def _of_weight(read: Tensor, g: Tensor, width: int) -> Tensor:
    """sum of g_t read_{t + j}, (D, T)."""
    if _by_onednn(read):
        shape = (g.shape[3], 1, width, 1)
        return conv2d_weight(_maps(read), shape, _maps(g), groups=shape[0])[:, 0, :, 0]
    return torch.stack([(g * read[:, j : j + g.shape[1]]).sum((0, 1, 2)) for j in range(width)], dim=1)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None,
    *, silu: bool, reverse: bool, want_final: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (B, L, W, D), and the final state (B, T - 1, W, D) or an empty tensor."""
    read = _read(x, initial_state, weight.shape[1], reverse)
    y = _correlate(read, weight, bias)
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
        pre = _correlate(read, weight, bias)
        s = torch.sigmoid(pre)
        g = g * s * (1 + pre * (1 - s))
    found: list[Tensor | None] = [None] * 4
    if needs[0] or needs[3]:
        g_read = _correlate(F.pad(g, (0, 0, 0, 0, width - 1, width - 1)), weight.flip(1))
        if grad_final is not None:
            g_read[:, length:] += grad_final
        g_x = g_read[:, width - 1 :]
        found[0] = (g_x.flip(1) if reverse else g_x).to(x.dtype) if needs[0] else None
        if needs[3] and initial_state is not None:
            found[3] = g_read[:, : width - 1].to(initial_state.dtype, copy=True)  # not a view beside found[0]
    if needs[1]:
        found[1] = _of_weight(read, g, width).to(weight.dtype)
    if needs[2] and bias is not None:
        found[2] = g.sum((0, 1, 2)).to(bias.dtype)
    return found
