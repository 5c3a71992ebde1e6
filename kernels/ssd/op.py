"""State space duality (SSD, Mamba-2) in one dimension, both ways, over an image, and without an order.

Recurrence of one head (Dao and Gu, "Transformers are SSMs", 2024, section 3): h_t = exp(dt_t A) h_{t-1} + dt_t x_t
B_t^T and y_t = h_t C_t + D x_t, with x_t (head_dim), B_t and C_t (state), h (head_dim, state), A < 0 one number a head.

The functions over an order reduce to one canonical form, which every back end implements: x (B, H, W, E, P) with any
strides but a contiguous last axis; dt (B, H, W, K, E); Bm, C (B, H, W, K, G, N); A, D, dt_bias (K, E); `orders`, one
reading order per direction (kernels/selective_scan/reference.py). States are (B, W, K, E, P, N) for lines along axis H,
(B, 1, K, E, P, N) for images. `strict`: reversed directions leave a position's own input out of its output.
"""

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor

from ..observe import observed
from ..operators import as_given, choose_without_c, refuse_second_derivative
from ..selective_scan.op import DIRECTIONS
from ..selective_scan.reference import LINES, LINES_REVERSED, step_sizes
from . import checks, torch_path
from .reference import lines_of, ssd_reference

Backend = Literal["auto", "reference", "torch", "triton"]


def _implementation(name: str):
    if name == "torch":
        return torch_path
    from . import gpu

    return gpu


@torch.library.custom_op("vision_ssm::ssd", mutates_args=())
def _ssd_op(
    x: Tensor, dt: Tensor, A: Tensor, Bm: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None,
    orders: Sequence[int], chunk: int, softplus: bool, merge: bool, strict: bool, need_backward: bool,
    want_final: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Canonical SSD: y, final states (empty if not wanted), and what the backward pass needs."""
    path = _implementation(choose_without_c("ssd", backend, x.device, x.dtype))
    with as_given(x):
        return path.forward(
            x, dt, A, Bm, C, D, dt_bias, initial_state, orders=tuple(orders), chunk=chunk, softplus=softplus,
            merge=merge, strict=strict, need_backward=need_backward, want_final=want_final,
        )  # fmt: skip


@_ssd_op.register_fake
def _(
    x, dt, A, Bm, C, D, dt_bias, initial_state, orders, chunk, softplus, merge, strict, need_backward, want_final,
    backend,
):  # fmt: skip
    batch, height, width, heads, head_dim = x.shape
    path = _implementation(choose_without_c("ssd", backend, x.device, x.dtype))
    y = x.new_empty(x.shape if merge else (batch, height, width, len(orders), heads, head_dim))
    orders = tuple(orders)
    state = (batch, lines_of(x, orders), len(orders), heads, head_dim, Bm.shape[5])
    shape, dtype = path.saved(x, orders, Bm.shape[4], Bm.shape[5], chunk, started=initial_state is not None)
    return y, A.new_empty(state if want_final else (0,)), x.new_empty(shape if need_backward else (0,), dtype=dtype)


@torch.library.custom_op("vision_ssm::ssd_backward", mutates_args=())
def _ssd_backward_op(
    grad_y: Tensor, grad_final: Tensor | None,
    x: Tensor, dt: Tensor, A: Tensor, Bm: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, saved: Tensor,
    orders: Sequence[int], chunk: int, softplus: bool, merge: bool, strict: bool, needs: Sequence[bool], backend: str,
) -> list[Tensor]:  # fmt: skip
    """The gradients that are needed, in the order of the inputs."""
    path = _implementation(choose_without_c("ssd", backend, x.device, x.dtype))
    with as_given(x):
        found = path.backward(
            grad_y, grad_final, x, dt, A, Bm, C, D, dt_bias, initial_state, saved, orders=tuple(orders), chunk=chunk,
            softplus=softplus, merge=merge, strict=strict, needs=tuple(needs),
        )  # fmt: skip
    return [cast(Tensor, g).contiguous() for g, need in zip(found, needs, strict=True) if need]


@_ssd_backward_op.register_fake
def _(
    grad_y, grad_final, x, dt, A, Bm, C, D, dt_bias, initial_state, saved, orders, chunk, softplus, merge, strict,
    needs, backend,
):  # fmt: skip
    inputs = (x, dt, A, Bm, C, D, dt_bias, initial_state)
    return [t.new_empty(t.shape) for t, need in zip(inputs, needs, strict=True) if need]


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.orders, ctx.chunk, ctx.softplus, ctx.merge, ctx.strict, _, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_y, grad_final, _):
    *tensors, saved = ctx.saved_tensors
    x = tensors[0]
    needs = [bool(n) and t is not None for n, t in zip(ctx.needs_input_grad, tensors, strict=False)]
    if grad_y is None:
        grad_y = x.new_zeros(()).expand(x.shape if ctx.merge else (*x.shape[:3], len(ctx.orders), *x.shape[3:]))
    found = iter(
        _ssd_backward_op(
            grad_y,
            grad_final,
            *tensors,
            saved,
            ctx.orders,
            ctx.chunk,
            ctx.softplus,
            ctx.merge,
            ctx.strict,
            needs,
            ctx.backend,
        )
    )
    return *(next(found) if need else None for need in needs), *(None,) * 8


_ssd_op.register_autograd(_backward, setup_context=_setup_context)


_ssd_backward_op.register_autograd(refuse_second_derivative("ssd"))


@observed("ssd")
def _canonical_ssd(
    x: Tensor, dt: Tensor, A: Tensor, Bm: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, *,
    orders: tuple[int, ...], chunk: int, softplus: bool, backend: str, merge: bool = True, strict: bool = False,
    want_final: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs and, if wanted, final states of checked tensors in canonical form; small ones become contiguous here."""
    D, dt_bias, initial_state = (None if t is None else t.contiguous() for t in (D, dt_bias, initial_state))
    tensors = (x, dt, A.contiguous(), Bm, C, D, dt_bias, initial_state)
    name = choose_without_c("ssd", backend, x.device, x.dtype) if not torch.compiler.is_compiling() else backend
    if name == "reference":
        with as_given(x):
            return ssd_reference(*tensors, orders=orders, softplus=softplus, merge=merge, strict=strict)
    need_backward = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y, final, _ = _ssd_op(*tensors, list(orders), chunk, softplus, merge, strict, need_backward, want_final, backend)
    return y, final


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, *,
    chunk: int = 256, dt_bias: Tensor | None = None, softplus: bool = False, reverse: bool = False, dim: int = 1,
    initial_state: Tensor | None = None, return_final_state: bool = False, backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """State space duality (Mamba-2) over one axis: h <- exp(dt A) h + dt x B^T, y = h C + D x, for every head.

    Args:
        x: (..., heads, head_dim), usually (batch, length, heads, head_dim); axis `dim` is scanned, the other leading
            axes are batch.
        dt: step sizes, (..., heads) with x's leading axes.
        A: (heads,), the negative decay rate itself (modules keep its log).
        B: x's leading axes, then (groups, state), state 1 to 256; head e reads group e // (heads / groups).
        C: as B.
        D: (heads,) skip, or None.
        chunk: longest chunk in positions. Chunks become products of matrices; back ends take a shorter one where that
            is faster. The result does not depend on it beyond rounding.
        dt_bias: (heads,), added before the softplus, or None.
        softplus: whether the step sizes pass through a softplus.
        reverse: read from the end; y stays in place and the final state is the one at position 0.
        dim: the scanned axis (not the last two).
        initial_state: x's leading axes without `dim`, then (heads, head_dim, state); float32 (float64 with x).
        return_final_state: also return the state after the last position read.
        backend: auto, reference, torch or triton; auto takes the fastest that can run here.

    x: float64, float32, bfloat16 or float16 and y the same; dt, B, C that or float32; A, D and dt_bias float32 (float64
    with x). Only the last axes of x, B and C must be contiguous. Decays and sums are float32 (float64 with x), products
    of bfloat16 inputs have bfloat16 operands. Gradients flow to every tensor, from y and from the final state, and are
    deterministic; there are no second derivatives (backend="reference" has them).

    Returns:
        y, x's shape and dtype; with `return_final_state` also the state, shaped as `initial_state`.

    Raises:
        ValueError: a shape, dtype, device or layout does not fit; the message names the argument.
        RuntimeError: the back end asked for cannot run here.
    """
    axis = checks.check_axis(x, dim)
    checks.check_chunk(chunk)
    before, after = tuple(x.shape[:axis]), tuple(x.shape[axis + 1 : -2])
    checks.check_tensors(
        x, dt, A, B, C, D, dt_bias, initial_state, directions=None, state_lead=(*before, *after)
    )  # fmt: skip
    lead = _three_axes(x, axis)
    state = (*x.shape[-2:], B.shape[-1])
    y, final = _canonical_ssd(
        x.reshape(*lead, *x.shape[-2:]),
        dt.reshape(*lead, 1, dt.shape[-1]),
        A.unsqueeze(0),
        B.reshape(*lead, 1, *B.shape[-2:]),
        C.reshape(*lead, 1, *C.shape[-2:]),
        None if D is None else D.unsqueeze(0),
        None if dt_bias is None else dt_bias.unsqueeze(0),
        None if initial_state is None else initial_state.reshape(lead[0], lead[2], 1, *state),
        orders=(LINES_REVERSED if reverse else LINES,),
        chunk=chunk,
        softplus=softplus,
        want_final=return_final_state,
        backend=backend,
    )
    y = y.reshape(x.shape)
    return (y, final.reshape(*before, *after, *state)) if return_final_state else y


def _three_axes(x: Tensor, axis: int) -> tuple[int, int, int]:
    """Sizes before the scanned axis, of it, and after it (heads and head_dim left out)."""
    before, after = x.shape[:axis], x.shape[axis + 1 : -2]
    return before.numel(), x.shape[axis], after.numel()


def ssd_bidirectional(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, *,
    chunk: int = 256, dt_bias: Tensor | None = None, softplus: bool = False, dim: int = 1, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """SSD both ways with every pair of positions counted once: forward from j <= i, backward from j > i.

    The second direction's own inputs reach only the positions before them, so the diagonal of the mixing matrix comes
    from the forward direction alone. Both directions run in one pass over the chunks.

    Args:
        x: (..., heads, head_dim); axis `dim` is scanned, the other leading axes are batch.
        dt: (..., 2, heads): step sizes forward and backward. Directions that share parameters pass expanded views,
            `dt.unsqueeze(-2).expand(..., 2, heads)`.
        A: (2, heads), negative.
        B: x's leading axes, then (2, groups, state).
        C: as B.
        D: (heads,) skip, added once, or None.
        chunk: as in `ssd`.
        dt_bias: (2, heads), added before the softplus, or None.
        softplus: whether the step sizes pass through a softplus.
        dim: the scanned axis (not the last two).
        backend: as in `ssd`; dtypes, gradients and errors too.

    Returns:
        y, x's shape and dtype.
    """
    axis = checks.check_axis(x, dim)
    checks.check_chunk(chunk)
    checks.check_shape("D", D, (x.shape[-2],), "(heads)")
    skip = None if D is None else torch.stack([D, torch.zeros_like(D)])
    checks.check_tensors(x, dt, A, B, C, skip, dt_bias, None, directions=2, state_lead=())
    lead = _three_axes(x, axis)
    y, _ = _canonical_ssd(
        x.reshape(*lead, *x.shape[-2:]), dt.reshape(*lead, 2, dt.shape[-1]), A, B.reshape(*lead, 2, *B.shape[-2:]),
        C.reshape(*lead, 2, *C.shape[-2:]), skip, dt_bias, None, orders=(LINES, LINES_REVERSED), chunk=chunk,
        softplus=softplus, strict=True, backend=backend,
    )  # fmt: skip
    return y.reshape(x.shape)


def ssd_2d(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, *,
    directions: Sequence[str] = ("rows", "columns", "rows_reversed", "columns_reversed"),
    chunk: int = 256, dt_bias: Tensor | None = None, softplus: bool = False, merge: Literal["sum", "none"] = "sum",
    initial_state: Tensor | None = None, return_final_state: bool = False, backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """SSD over an image along several reading orders, summed in place; no direction is copied on the GPU.

    Args:
        x: (batch, height, width, heads, head_dim).
        dt: (batch, height, width, K, heads); K = number of directions.
        A: (K, heads), negative.
        B: (batch, height, width, K, groups, state).
        C: as B.
        D: (K, heads) skip, or None.
        directions: any of rows, columns, rows_reversed, columns_reversed; a reversed one starts at the last pixel.
        chunk: as in `ssd`.
        dt_bias: (K, heads), added before the softplus, or None.
        softplus: whether the step sizes pass through a softplus.
        merge: "sum" over the directions, or "none" for a K axis before the heads.
        initial_state: (batch, K, heads, head_dim, state), each in its direction's own reading order, so that strips of
            rows under the row directions, and of columns under the column directions, continue exactly.
        return_final_state: also return the states after the last pixel that each direction reads.
        backend: as in `ssd`; dtypes, gradients and errors too.

    Returns:
        y (batch, height, width, heads, head_dim) in x's dtype, or (batch, height, width, K, heads, head_dim) for
        merge="none"; with `return_final_state` also the states (batch, K, heads, head_dim, state).
    """
    if merge not in ("sum", "none"):
        raise ValueError(f"merge: got {merge!r}, expected 'sum' or 'none'")
    if x.ndim != 5:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (batch, height, width, heads, head_dim)")
    checks.check_directions(directions, tuple(DIRECTIONS))
    checks.check_chunk(chunk)
    checks.check_tensors(
        x, dt, A, B, C, D, dt_bias, initial_state, directions=len(directions), state_lead=(x.shape[0],)
    )  # fmt: skip
    y, final = _canonical_ssd(
        x, dt, A, B, C, D, dt_bias, None if initial_state is None else initial_state.unsqueeze(1),
        orders=tuple(DIRECTIONS[d] for d in directions), chunk=chunk, softplus=softplus, merge=merge == "sum",
        want_final=return_final_state, backend=backend,
    )  # fmt: skip
    return (y, final.squeeze(1)) if return_final_state else y


@observed("ssd_noncausal")
def ssd_noncausal(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, *,
    dt_bias: Tensor | None = None, softplus: bool = False,
) -> Tensor:  # fmt: skip
    """SSD without an order (Shi et al., "VSSD", 2024): every position reads one sum, h = sum_j dt_j |A| x_j B_j^T.

    The decay has become the weight of a position, y_i = h C_i + D x_i. Permuting the positions permutes the result, so
    a model needs a convolution or positions beside it. Two matrix products; autograd differentiates them any number of
    times.

    Args:
        x: (batch, ..., heads, head_dim); all axes between are positions, (length) or (height, width).
        dt: x's leading axes, then (heads).
        A: (heads,), negative.
        B: x's leading axes, then (groups, state).
        C: as B.
        D: (heads,) skip, or None.
        dt_bias: (heads,), added before the softplus, or None.
        softplus: whether the step sizes pass through a softplus.

    Returns:
        y, x's shape and dtype; dtypes of the inputs as in `ssd`. Sums are float32 (float64 with x); on a GPU the
        products of bfloat16 inputs have bfloat16 operands.

    Raises:
        ValueError: a shape, dtype, device or layout does not fit; the message names the argument.
    """
    if x.ndim < 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected at least (batch, length, heads, head_dim)")
    checks.check_tensors(x, dt, A, B, C, D, dt_bias, None, directions=None, state_lead=())
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    operand = x.dtype if x.is_cuda and x.dtype == torch.bfloat16 else acc
    groups = B.shape[-2]
    with as_given(x):
        weight = step_sizes(dt, None, dt_bias, softplus=softplus, dtype=acc) * A.abs()
        u, weight = x.flatten(1, -3), weight.flatten(1, -2).unsqueeze(-1)  # (B, L, E, P), (B, L, E, 1)
        rows = (u * weight).to(operand).unflatten(2, (groups, -1)).flatten(3).permute(0, 2, 3, 1)  # (B, G, EP, L)
        b, c = (t.flatten(1, -3).transpose(1, 2).to(operand) for t in (B, C))  # (B, G, L, N)
        y = c @ (rows @ b).transpose(-1, -2)  # (B, G, L, EP)
        y = y.transpose(1, 2).flatten(2).unflatten(2, tuple(x.shape[-2:]))
        if D is not None:
            y = y + D[:, None] * u
        return y.reshape(x.shape).to(x.dtype)
