"""The selective scan (S6) in one dimension and in four directions over an image: public functions and torch operator.

Recurrence (Gu and Dao, "Mamba", 2023, equations 1 to 4 with B discretised by Euler's rule, as the published code does):
h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t, y_t = <C_t, h_t> + D u_t.

Both public functions reduce to one canonical form, which every back end implements:
x (B, H, W, D) with any strides but a contiguous last axis; delta (B, H, W, K, D) or (B, H, W, K, R) with delta_weight
(K, D, R); Bm, C (B, H, W, K, G, N); A (K, D, N); D, delta_bias (K, D); `orders`, one reading order per direction (see
reference.py). States are (B, K, D, N) for images and (B, W, 1, D, N) for lines. A one-dimensional scan over axis `dim`
is a set of lines: H is the scanned axis, B the axes before it, W the axes after it.
"""

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor

from ..dispatch import choose_backend
from ..observe import observed
from ..operators import as_given, refuse_second_derivative
from . import checks, export_path, torch_path
from .reference import (
    COLUMNS,
    COLUMNS_REVERSED,
    LINES,
    LINES_REVERSED,
    ROWS,
    ROWS_REVERSED,
    selective_scan_reference,
    step_sizes,
)  # fmt: skip

Backend = Literal["auto", "reference", "torch", "c", "triton"]
DIRECTIONS = {"rows": ROWS, "columns": COLUMNS, "rows_reversed": ROWS_REVERSED, "columns_reversed": COLUMNS_REVERSED}
"""Names of the reading orders of an image; a reversed one starts at the last pixel."""


def _implementation(name: str, x: Tensor, orders: Sequence[int], states: int):
    if name == "torch":
        return torch_path
    if name == "c":
        from . import c_path

        return c_path
    from . import gpu, gpu_small_state

    return gpu_small_state if gpu_small_state.suits(x, tuple(orders), states) else gpu


@torch.library.custom_op("vision_ssm::selective_scan", mutates_args=())
def _scan_op(
    x: Tensor, delta: Tensor, A: Tensor, Bm: Tensor, C: Tensor, D: Tensor | None, delta_weight: Tensor | None,
    delta_bias: Tensor | None, z: Tensor | None, initial_state: Tensor | None,
    orders: Sequence[int], softplus: bool, merge: bool, need_backward: bool, want_final: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Canonical scan: y, final states (empty if not wanted), and what the backward pass needs."""
    path = _implementation(choose_backend(backend, x.device, x.dtype), x, orders, A.shape[2])
    with as_given(x):
        return path.forward(
            x, delta, A, Bm, C, D, delta_weight, delta_bias, z, initial_state,
            orders=tuple(orders), softplus=softplus, merge=merge, need_backward=need_backward, want_final=want_final,
        )  # fmt: skip


@_scan_op.register_fake
def _(
    x, delta, A, Bm, C, D, delta_weight, delta_bias, z, initial_state, orders, softplus, merge, need_backward,
    want_final, backend,
):  # fmt: skip
    batch, height, width, channels = x.shape
    path = _implementation(choose_backend(backend, x.device, x.dtype), x, orders, A.shape[2])
    y = x.new_empty(x.shape if merge else (batch, height, width, len(orders), channels))
    sequences = (batch, width) if orders[0] >= LINES else (batch,)
    final = A.new_empty((*sequences, len(orders), channels, A.shape[2]) if want_final else (0,))
    kept = path.saved_shape(x, tuple(orders), Bm.shape[4], A.shape[2]) if need_backward else (0,)
    return y, final, A.new_empty(kept)


@torch.library.custom_op("vision_ssm::selective_scan_backward", mutates_args=())
def _scan_backward_op(
    grad_y: Tensor, grad_final: Tensor | None,
    x: Tensor, delta: Tensor, A: Tensor, Bm: Tensor, C: Tensor, D: Tensor | None, delta_weight: Tensor | None,
    delta_bias: Tensor | None, z: Tensor | None, initial_state: Tensor | None, saved: Tensor,
    orders: Sequence[int], softplus: bool, merge: bool, needs: Sequence[bool], backend: str,
) -> list[Tensor]:  # fmt: skip
    """The gradients that are needed, in the order of the inputs."""
    path = _implementation(choose_backend(backend, x.device, x.dtype), x, orders, A.shape[2])
    with as_given(x):
        found = path.backward(
            grad_y, grad_final, x, delta, A, Bm, C, D, delta_weight, delta_bias, z, initial_state, saved,
            orders=tuple(orders), softplus=softplus, merge=merge, needs=tuple(needs),
        )  # fmt: skip
    return [cast(Tensor, g).contiguous() for g, need in zip(found, needs, strict=True) if need]


@_scan_backward_op.register_fake
def _(
    grad_y,
    grad_final,
    x,
    delta,
    A,
    Bm,
    C,
    D,
    delta_weight,
    delta_bias,
    z,
    initial_state,
    saved,
    orders,
    softplus,
    merge,
    needs,
    backend,
):
    inputs = (x, delta, A, Bm, C, D, delta_weight, delta_bias, z, initial_state)
    return [t.new_empty(t.shape) for t, need in zip(inputs, needs, strict=True) if need]


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.orders, ctx.softplus, ctx.merge, _, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_y, grad_final, _):
    *tensors, saved = ctx.saved_tensors
    x = tensors[0]
    needs = [bool(n) and t is not None for n, t in zip(ctx.needs_input_grad, tensors, strict=False)]
    if grad_y is None:
        grad_y = x.new_zeros(()).expand(x.shape if ctx.merge else (*x.shape[:3], len(ctx.orders), x.shape[3]))
    found = iter(
        _scan_backward_op(grad_y, grad_final, *tensors, saved, ctx.orders, ctx.softplus, ctx.merge, needs, ctx.backend)
    )
    return *(next(found) if need else None for need in needs), *(None,) * 6


_scan_op.register_autograd(_backward, setup_context=_setup_context)


_scan_backward_op.register_autograd(refuse_second_derivative("selective_scan"))


@observed("s6")
def _canonical_scan(
    x: Tensor, delta: Tensor, A: Tensor, Bm: Tensor, C: Tensor, D: Tensor | None, delta_weight: Tensor | None,
    delta_bias: Tensor | None, z: Tensor | None, initial_state: Tensor | None, *,
    orders: tuple[int, ...], softplus: bool, merge: bool, want_final: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs and, if wanted, final states of checked tensors in canonical form; small ones become contiguous here."""
    D, delta_weight, delta_bias, initial_state = (
        None if t is None else t.contiguous() for t in (D, delta_weight, delta_bias, initial_state)
    )
    optional = (D, delta_weight, delta_bias, z, initial_state)
    tensors = (x, delta, A.contiguous(), Bm, C, *optional)
    if backend == "reference":
        with as_given(x):
            return selective_scan_reference(*tensors, orders=orders, softplus=softplus, merge=merge)
    need_backward = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if not torch.compiler.is_compiling():
        choose_backend(backend, x.device, x.dtype)  # an error here reads better than inside the operator
    y, final, _ = _scan_op(*tensors, list(orders), softplus, merge, need_backward, want_final, backend)
    return y, final


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, *,
    delta_weight: Tensor | None = None, delta_bias: Tensor | None = None, softplus: bool = False,
    z: Tensor | None = None, reverse: bool = False, dim: int = 1,
    initial_state: Tensor | None = None, return_final_state: bool = False, backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Selective scan over one axis of a channels-last tensor: h <- exp(delta A) h + delta B u, y = <C, h> + D u.

    Args:
        u: (..., channels), any number of axes; axis `dim` is scanned, the others are batch.
        delta: step sizes, u's shape; or (..., rank) when `delta_weight` is given, and the product is formed inside.
        A: (channels, state), the negative real matrix itself (modules keep its log), state 1 to 256.
        B: u's leading axes, then (state) or (groups, state); channel c reads group c // (channels / groups).
        C: as B.
        D: (channels,) skip, or None.
        delta_weight: (channels, rank), or None.
        delta_bias: (channels,), added before the softplus, or None.
        softplus: whether the step sizes pass through a softplus.
        z: u's shape; the result is multiplied by silu(z) after the D skip.
        reverse: read from the end; y stays in place and the final state is the one at position 0.
        dim: the scanned axis (not the last).
        initial_state: u's shape without `dim`, then (state); float32, or float64 for float64 inputs.
        return_final_state: also return the state after the last position read.
        backend: auto, reference, torch, c or triton; auto takes the fastest that can run here.

    u, z: float64, float32, bfloat16 or float16 and y the same; delta, B, C, delta_weight that or float32; A, D and
    delta_bias float32 (float64 with u). Only the last axis of each tensor must be contiguous. State, decays and sums
    are float32 (float64 with u). Gradients flow to every tensor, from y and from the final state, and are
    deterministic; there are no second derivatives (backend="reference" has them).

    Returns:
        y, u's shape and dtype; with `return_final_state` also the state, shaped as `initial_state`.

    Raises:
        ValueError: a shape, dtype, device or layout does not fit; the message names the argument.
        RuntimeError: the back end asked for cannot run here.
    """
    if export_path.active():
        return export_path.selective_scan_export(
            u, delta, A, B, C, D, delta_weight=delta_weight, delta_bias=delta_bias, softplus=softplus, z=z,
            reverse=reverse, dim=dim, initial_state=initial_state, return_final_state=return_final_state,
        )  # fmt: skip
    dim = _check_selective_scan(u, delta, A, B, C, D, delta_weight, delta_bias, z, dim, initial_state)
    before, after = u.shape[:dim], u.shape[dim + 1 : -1]
    lead = (before.numel(), u.shape[dim], after.numel())

    def one_direction(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.unsqueeze(0)

    groups = 1 if B.ndim == u.ndim else B.shape[-2]
    y, final = _canonical_scan(
        u.reshape(*lead, u.shape[-1]),
        delta.reshape(*lead, 1, delta.shape[-1]),
        A.unsqueeze(0),
        B.reshape(*lead, 1, groups, A.shape[1]),
        C.reshape(*lead, 1, groups, A.shape[1]),
        one_direction(D),
        one_direction(delta_weight),
        one_direction(delta_bias),
        None if z is None else z.reshape(*lead, u.shape[-1]),
        None if initial_state is None else initial_state.reshape(lead[0], lead[2], 1, *A.shape),
        orders=(LINES_REVERSED if reverse else LINES,),
        softplus=softplus,
        merge=True,
        want_final=return_final_state,
        backend=backend,
    )
    y = y.reshape(u.shape)
    return (y, final.reshape(*before, *after, *A.shape)) if return_final_state else y


def _check_selective_scan(u, delta, A, B, C, D, delta_weight, delta_bias, z, dim, initial_state) -> int:
    """Raise ValueError for anything that does not fit; returns `dim` counted from the front."""
    if u.ndim < 2:
        raise ValueError(f"u: got shape {tuple(u.shape)}, expected at least (length, channels)")
    axis = dim + u.ndim if dim < 0 else dim
    if not 0 <= axis < u.ndim - 1:
        raise ValueError(f"dim: got {dim} for u of shape {tuple(u.shape)}; any axis but the last (channels) is allowed")
    lead, channels = tuple(u.shape[:-1]), u.shape[-1]
    if A.ndim != 2:
        raise ValueError(f"A: got shape {tuple(A.shape)}, expected (channels, state)")
    checks.check_shape("A", A, (channels, A.shape[1]), "(channels, state)")
    checks.check_state_size(A)
    check_rank(delta_weight, (channels,), "(channels, rank)")
    rank = channels if delta_weight is None else delta_weight.shape[-1]
    checks.check_shape("delta", delta, (*lead, rank), "u's leading axes and " + _last_of_delta(delta_weight))
    grouped = B.ndim == u.ndim + 1
    wanted = (*lead, B.shape[-2], A.shape[1]) if grouped else (*lead, A.shape[1])
    checks.check_shape("B", B, wanted, "u's leading axes and (state) or (groups, state)")
    checks.check_shape("C", C, tuple(B.shape), "B's shape")
    checks.check_groups(channels, B.shape[-2] if grouped else 1)
    checks.check_shape("D", D, (channels,), "(channels)")
    checks.check_shape("delta_bias", delta_bias, (channels,), "(channels)")
    checks.check_shape("z", z, tuple(u.shape), "u's shape")
    state = (*lead[:axis], *lead[axis + 1 :], channels, A.shape[1])
    checks.check_shape("initial_state", initial_state, state, "u's shape without the scanned axis, then state")
    like_u = {"delta": delta, "B": B, "C": C, "delta_weight": delta_weight}
    exact = {"A": A, "D": D, "delta_bias": delta_bias, "initial_state": initial_state}
    if z is not None and z.dtype != u.dtype:
        raise ValueError(f"z: got dtype {z.dtype}, expected {u.dtype} (as u)")
    checks.check_dtypes("u", u, like_u, exact)
    checks.check_layout("u", u, {"delta": delta, "B": B, "C": C, "z": z}, like_u | exact)
    return axis


def check_rank(delta_weight: Tensor | None, lead: tuple[int, ...], meaning: str) -> None:
    """delta_weight is None or (*lead, rank), rank at least 1."""
    if delta_weight is None:
        return
    if delta_weight.ndim != len(lead) + 1 or tuple(delta_weight.shape[:-1]) != lead or delta_weight.shape[-1] < 1:
        raise ValueError(
            f"delta_weight: got shape {tuple(delta_weight.shape)}, expected {meaning} = {lead} and a rank of at least 1"
        )


def _last_of_delta(delta_weight: Tensor | None) -> str:
    return "(channels)" if delta_weight is None else "(rank), the last axis of delta_weight"


def selective_scan_2d(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    directions: Sequence[str] = ("rows", "columns", "rows_reversed", "columns_reversed"),
    delta_weight: Tensor | None = None,
    delta_bias: Tensor | None = None,
    softplus: bool = False,
    merge: Literal["sum", "none"] = "sum",
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scans over an image along several reading orders (the cross scan of VMamba), summed in place.

    Args:
        x: (batch, height, width, channels).
        delta: (batch, height, width, K, channels), or (..., K, rank) with `delta_weight`; K = number of directions.
        A: (K, channels, state), negative.
        B: (batch, height, width, K, state).
        C: as B.
        D: (K, channels) skip, or None.
        directions: any of rows, columns, rows_reversed, columns_reversed; a reversed one starts at the last pixel.
        delta_weight: (K, channels, rank), or None.
        delta_bias: (K, channels), added before the softplus, or None.
        softplus: whether the step sizes pass through a softplus.
        merge: "sum" over the directions, or "none" for a K axis before the channels.
        initial_state: (batch, K, channels, state), each in its direction's own reading order, so that strips of rows
            under the row directions, and of columns under the column directions, continue exactly.
        return_final_state: also return the states after the last pixel that each direction reads.
        backend: as in `selective_scan`; dtypes, gradients and errors too.

    Returns:
        y (batch, height, width, channels) in x's dtype, or (batch, height, width, K, channels) for merge="none"; with
        `return_final_state` also the states (batch, K, channels, state).
    """
    if merge not in ("sum", "none"):
        raise ValueError(f"merge: got {merge!r}, expected 'sum' or 'none'")
    if export_path.active():
        return export_path.selective_scan_2d_export(
            x, delta, A, B, C, D, directions=directions, delta_weight=delta_weight, delta_bias=delta_bias,
            softplus=softplus, merge=merge, initial_state=initial_state, return_final_state=return_final_state,
        )  # fmt: skip
    _check_selective_scan_2d(x, delta, A, B, C, D, directions, delta_weight, delta_bias, initial_state)
    orders = tuple(DIRECTIONS[d] for d in directions)
    y, final = _canonical_scan(
        x, delta, A, B.unsqueeze(4), C.unsqueeze(4), D, delta_weight, delta_bias, None, initial_state,
        orders=orders, softplus=softplus, merge=merge == "sum", want_final=return_final_state, backend=backend,
    )  # fmt: skip
    return (y, final) if return_final_state else y


def _check_selective_scan_2d(x, delta, A, B, C, D, directions, delta_weight, delta_bias, initial_state) -> None:
    if x.ndim != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (batch, height, width, channels)")
    unknown = [d for d in directions if d not in DIRECTIONS]
    if isinstance(directions, str) or unknown or not directions or len(set(directions)) < len(directions):
        raise ValueError(f"directions: got {directions!r}, expected different ones of {', '.join(DIRECTIONS)}")
    lead, channels, k = tuple(x.shape[:3]), x.shape[3], len(directions)
    if A.ndim != 3:
        raise ValueError(f"A: got shape {tuple(A.shape)}, expected (directions, channels, state)")
    checks.check_shape("A", A, (k, channels, A.shape[2]), "(directions, channels, state)")
    checks.check_state_size(A)
    check_rank(delta_weight, (k, channels), "(directions, channels, rank)")
    rank = channels if delta_weight is None else delta_weight.shape[-1]
    last = "(directions) and " + _last_of_delta(delta_weight)
    checks.check_shape("delta", delta, (*lead, k, rank), f"(batch, height, width), {last}")
    checks.check_shape("B", B, (*lead, k, A.shape[2]), "(batch, height, width, directions, state)")
    checks.check_shape("C", C, tuple(B.shape), "B's shape")
    for name, t in (("D", D), ("delta_bias", delta_bias)):
        checks.check_shape(name, t, (k, channels), "(directions, channels)")
    state = (x.shape[0], k, channels, A.shape[2])
    checks.check_shape("initial_state", initial_state, state, "(batch, directions, channels, state)")
    like_x = {"delta": delta, "B": B, "C": C, "delta_weight": delta_weight}
    exact = {"A": A, "D": D, "delta_bias": delta_bias, "initial_state": initial_state}
    checks.check_dtypes("x", x, like_x, exact)
    checks.check_layout("x", x, {"delta": delta, "B": B, "C": C}, like_x | exact)


def selective_scan_summary(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    *,
    delta_weight: Tensor | None = None,
    delta_bias: Tensor | None = None,
    softplus: bool = False,
    reverse: bool = False,
    dim: int = 1,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """What a segment does to a state: by this pair, segments are combined across chunks, strips or processes.

    A segment takes the state h to final + exp(total * A) * h. Arguments as in `selective_scan`.

    Returns:
        final: the state after the segment when it starts from zero, u's shape without `dim`, then (state).
        total: the step sizes after bias and softplus, summed over the segment, u's shape without `dim`; float32
            (float64 with u).
    """
    _, final = selective_scan(
        u, delta, A, B, B, delta_weight=delta_weight, delta_bias=delta_bias, softplus=softplus, reverse=reverse,
        dim=dim, return_final_state=True, backend=backend,
    )  # fmt: skip
    acc = torch.float64 if u.dtype == torch.float64 else torch.float32
    with as_given(u):
        steps = step_sizes(delta, delta_weight, delta_bias, softplus=softplus, dtype=acc)
    return final, steps.sum(dim)
