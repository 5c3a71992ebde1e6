"""Triton back end of the causal convolution: chooses chunks and launches the kernels of `gpu_kernels`."""

# num_warps is an argument of every launch that the kernels' signatures do not have:
# pyright: reportCallIssue=false, reportArgumentType=false
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from .gpu_kernels import conv_backward_kernel, conv_forward_kernel

CHANNELS = 128
"""Most channels of a program: one warp with four in each lane."""
ROWS = 8
"""Rows of an input that a program fetches together."""


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@dataclass(frozen=True)
class _Plan:
    """Sizes, chunks and grid of one launch."""

    batch: int
    length: int
    lines: int
    channels: int
    width: int
    chunk: int
    warps: int
    """Programs (of one warp each) that fill the GPU."""

    @staticmethod
    def of(x: Tensor, width: int, *, beyond: int, warps: int) -> "_Plan":
        """Chunks of one length by which all programs together just fill the GPU; each is read ``beyond`` its end.

        ``warps`` is how many run at once on a multiprocessor, given their registers: a few programs more would have to
        wait for all the others.
        """
        batch, length, lines, channels = x.shape
        warps *= _multiprocessors(x.device)
        columns = batch * lines * _cdiv(channels, CHANNELS)
        rows = _cdiv(_cdiv(columns * length, warps) + beyond, ROWS) * ROWS
        return _Plan(batch, length, lines, channels, width, max(2 * ROWS, rows) - beyond, warps)

    @property
    def chunks(self) -> int:
        return _cdiv(self.length, self.chunk)

    @property
    def tasks(self) -> int:
        return self.batch * self.lines * self.chunks

    @property
    def block(self) -> int:
        return max(32, min(CHANNELS, triton.next_power_of_2(self.channels)))

    @property
    def reps(self) -> int:
        """Programs of one channel block; each takes every reps-th task."""
        return min(self.tasks, _cdiv(self.warps, _cdiv(self.channels, self.block)))

    @property
    def grid(self) -> tuple[int]:
        return (self.reps * _cdiv(self.channels, self.block),)

    @property
    def arguments(self) -> dict[str, int]:
        return {
            "length": self.length, "lines": self.lines, "channels": self.channels, "chunk": self.chunk,
            "n_chunks": self.chunks, "n_tasks": self.tasks, "WIDTH": self.width, "BD": self.block, "U": ROWS,
        }  # fmt: skip


def _read_from(t: Tensor, reverse: bool) -> tuple[Tensor, tuple[int, int, int]]:
    """A view whose first element is the first position read, and its strides (batch, step, line) in reading order."""
    b, step, line, _ = t.stride()
    return (t[:, -1:], (b, -step, line)) if reverse else (t, (b, step, line))


def _strides(t: Tensor | None) -> tuple[int, int, int]:
    """Strides (batch, step, line) of a state."""
    return (0, 0, 0) if t is None else (t.stride(0), t.stride(1), t.stride(2))


def _state(t: Tensor | None) -> Tensor | None:
    """None also for a state of no positions (one tap), whose address is null."""
    return None if t is None or t.numel() == 0 else t.contiguous()


def _on(t: Tensor):
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None,
    *, silu: bool, reverse: bool, want_final: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (B, L, W, D), and the final state (B, T - 1, W, D) or an empty tensor."""
    width = weight.shape[1]
    plan = _Plan.of(x, width, beyond=0, warps=20)
    y = x.new_empty(x.shape)
    final = x.new_empty(plan.batch, width - 1, plan.lines, plan.channels) if want_final else x.new_empty(0)
    start, end = _state(initial_state), final if final.numel() else None
    (x_first, s_x), (y_first, s_y) = _read_from(x, reverse), _read_from(y, reverse)
    with _on(x):
        conv_forward_kernel[plan.grid](
            x_first, weight, bias, start, y_first, end, s_x, _strides(start), s_y, _strides(end),
            **plan.arguments, SILU=silu, num_warps=1,
        )  # fmt: skip
    return y, final


def backward(
    grad_y: Tensor, grad_final: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None,
    initial_state: Tensor | None, *, silu: bool, reverse: bool, needs: tuple[bool, ...],
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of x, weight, bias and initial_state that ``needs`` asks for; the same bits at every call."""
    width = weight.shape[1]
    if grad_y.stride(-1) != 1:
        grad_y = grad_y.contiguous()
    plan = _Plan.of(x, width, beyond=width - 1, warps=11)
    start, g_final = _state(initial_state), _state(grad_final)
    gx = x.new_empty(x.shape) if needs[0] else None
    g_start = torch.empty_like(initial_state, memory_format=torch.contiguous_format) if needs[3] else None
    g_out = g_start if g_start is not None and g_start.numel() else None
    wide = torch.float32
    partial = x.new_empty((plan.reps, width + 1, plan.channels), dtype=wide) if needs[1] or needs[2] else None
    (x_first, s_x), (dy_first, s_dy) = _read_from(x, reverse), _read_from(grad_y, reverse)
    gx_first, s_gx = (None, (0, 0, 0)) if gx is None else _read_from(gx, reverse)
    with _on(x):
        conv_backward_kernel[plan.grid](
            x_first, dy_first, weight, bias, start, g_final, gx_first, g_out, partial,
            s_x, s_dy, _strides(start), _strides(g_final), s_gx, _strides(g_out),
            **plan.arguments, SILU=silu, num_warps=1,
        )  # fmt: skip
    if partial is None:
        return [gx, None, None, g_start]
    total = partial.sum(0)
    g_weight = total[:width].t().to(weight.dtype) if needs[1] else None
    g_bias = total[width].to(bias.dtype) if needs[2] and bias is not None else None
    return [gx, g_weight, g_bias, g_start]
