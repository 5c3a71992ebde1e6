"""Depthwise causal convolution over one axis of a channels-last tensor: public function and torch operator.

Every back end implements one canonical form: x (B, L, W, D) with any strides but a contiguous last axis, where L is the
axis that is read, B the axes before it and W those after it; weight (D, T); bias (D,); states (B, T - 1, W, D).
"""

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor

from ..operators import as_given, choose_without_c, refuse_second_derivative
from ..selective_scan import checks, export_path
from . import torch_path
from .reference import causal_conv1d_reference

Backend = Literal["auto", "reference", "torch", "triton"]
MAX_WIDTH = 16
"""Largest number of taps: the kernels keep a window of that many inputs in registers."""


def _implementation(name: str):
    if name == "torch":
        return torch_path
    from . import gpu

    return gpu


@torch.library.custom_op("vision_ssm::causal_conv1d", mutates_args=())
def _conv_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None,
    silu: bool, reverse: bool, want_final: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Canonical convolution: y and the final state (empty if not wanted)."""
    path = _implementation(choose_without_c("causal_conv1d", backend, x.device, x.dtype))
    with as_given(x):
        return path.forward(
            x, weight, bias, initial_state, silu=silu, reverse=reverse, want_final=want_final
        )  # fmt: skip


@_conv_op.register_fake
def _(x, weight, bias, initial_state, silu, reverse, want_final, backend):
    batch, _, lines, channels = x.shape
    final = x.new_empty(batch, weight.shape[1] - 1, lines, channels) if want_final else x.new_empty(0)
    return x.new_empty(x.shape), final


@torch.library.custom_op("vision_ssm::causal_conv1d_backward", mutates_args=())
def _conv_backward_op(
    grad_y: Tensor, grad_final: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None,
    initial_state: Tensor | None, silu: bool, reverse: bool, needs: Sequence[bool], backend: str,
) -> list[Tensor]:  # fmt: skip
    """The gradients that are needed, in the order of the inputs."""
    path = _implementation(choose_without_c("causal_conv1d", backend, x.device, x.dtype))
    with as_given(x):
        found = path.backward(
            grad_y, grad_final, x, weight, bias, initial_state, silu=silu, reverse=reverse, needs=tuple(needs)
        )
    return [cast(Tensor, g).contiguous() for g, need in zip(found, needs, strict=True) if need]


@_conv_backward_op.register_fake
def _(grad_y, grad_final, x, weight, bias, initial_state, silu, reverse, needs, backend):
    inputs = (x, weight, bias, initial_state)
    return [t.new_empty(t.shape) for t, need in zip(inputs, needs, strict=True) if need]


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.silu, ctx.reverse, ctx.want_final, ctx.backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_y, grad_final):
    tensors = ctx.saved_tensors
    x = tensors[0]
    needs = [bool(n) and t is not None for n, t in zip(ctx.needs_input_grad, tensors, strict=False)]
    if grad_y is None:
        grad_y = x.new_zeros(()).expand(x.shape)
    if not ctx.want_final:
        grad_final = None
    found = iter(_conv_backward_op(grad_y, grad_final, *tensors, ctx.silu, ctx.reverse, needs, ctx.backend))
    return *(next(found) if need else None for need in needs), None, None, None, None


_conv_op.register_autograd(_backward, setup_context=_setup_context)


_conv_backward_op.register_autograd(refuse_second_derivative("causal_conv1d"))


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: Literal["silu"] | None = None,
    reverse: bool = False, dim: int = 1, initial_state: Tensor | None = None, return_final_state: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Depthwise causal convolution: y_t = act(bias + sum_j weight_j x_{t - (width - 1) + j}), each channel by itself.

    Args:
        x: (batch, length, channels), or any number of axes, channels last; axis `dim` is read, the others are batch.
            Only the last axis must be contiguous.
        weight: (channels, width), width 1 to 16; the last tap meets the current input, as in a left-padded
            `torch.nn.Conv1d(groups=channels)` whose weight is (channels, 1, width).
        bias: (channels,), or None.
        activation: "silu", or None.
        reverse: read from the end (the taps then meet later positions); y stays in place.
        dim: the axis that is read (not the last).
        initial_state: what was read before x, in reading order, oldest first: x's shape with width - 1 in place of the
            length, (batch, width - 1, channels) in the usual case; x's dtype or float32. None for zeros.
        return_final_state: also return the last width - 1 inputs read, the `initial_state` of what follows.
        backend: auto, reference, torch or triton; auto takes triton on a GPU (not for float64), else torch.

    x: float64, float32, bfloat16 or float16 and y the same; weight and bias that or float32. Sums are float32 (float64
    with x). Gradients flow to x, weight, bias and initial_state, from y and from the final state, and are
    deterministic; there are no second derivatives (backend="reference" has them).

    Returns:
        y, x's shape and dtype; with `return_final_state` also the state, shaped as `initial_state`, in x's dtype.

    Raises:
        ValueError: a shape, dtype, device, layout or activation does not fit; the message names the argument.
        RuntimeError: the back end asked for cannot run here.
    """
    dim = _check(x, weight, bias, activation, dim, initial_state)
    before, after, width = x.shape[:dim], x.shape[dim + 1 : -1], weight.shape[1]
    lead = (before.numel(), after.numel())
    canonical = x.reshape(lead[0], x.shape[dim], lead[1], x.shape[-1])
    start = None if initial_state is None else initial_state.reshape(lead[0], width - 1, lead[1], x.shape[-1])
    tensors = (canonical, weight.contiguous(), None if bias is None else bias.contiguous(), start)
    silu = activation == "silu"
    if backend == "reference":
        with as_given(x):
            y, final = causal_conv1d_reference(*tensors, silu=silu, reverse=reverse)
    elif export_path.active():
        y, final = torch_path.forward(*tensors, silu=silu, reverse=reverse, want_final=return_final_state)
    else:
        if not torch.compiler.is_compiling():
            # An error here reads better than inside the operator.
            choose_without_c("causal_conv1d", backend, x.device, x.dtype)
        y, final = _conv_op(*tensors, silu, reverse, return_final_state, backend)
    y = y.reshape(x.shape)
    return (y, final.reshape(*before, width - 1, *after, x.shape[-1])) if return_final_state else y


def _check(x, weight, bias, activation, dim, initial_state) -> int:
    """Raise ValueError for anything that does not fit; returns `dim` counted from the front."""
    if x.ndim < 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected at least (length, channels)")
    axis = dim + x.ndim if dim < 0 else dim
    if not 0 <= axis < x.ndim - 1:
        raise ValueError(f"dim: got {dim} for x of shape {tuple(x.shape)}; any axis but the last (channels) is allowed")
    channels = x.shape[-1]
    if weight.ndim != 2 or weight.shape[0] != channels or not 1 <= weight.shape[1] <= MAX_WIDTH:
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}, expected (channels, width) = ({channels}, 1 to {MAX_WIDTH}); "
            "squeeze the middle axis of a Conv1d weight with weight.squeeze(1)"
        )
    if activation not in (None, "silu"):
        raise ValueError(f"activation: got {activation!r}, expected None or 'silu'")
    checks.check_shape("bias", bias, (channels,), "(channels)")
    state = (*x.shape[:axis], weight.shape[1] - 1, *x.shape[axis + 1 :])
    checks.check_shape("initial_state", initial_state, state, "x's shape with width - 1 positions")
    others = {"weight": weight, "bias": bias, "initial_state": initial_state}
    checks.check_dtypes("x", x, others, {})
    checks.check_layout("x", x, {}, others)
    return axis
