"""S4D, the diagonal state space with constant coefficients: public function.

Both forms of torch_path.py take u as (B, L, W, D): L is the axis that is scanned, B the axes before it, W those after
it, channels last. The parameters hold nothing per position, so what is kept for the backward pass is u alone.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..observe import observed
from ..selective_scan import checks
from .torch_path import convolve, recur

SHORT = 4
"""Up to this length the recurrence is used: its cost per position is a few products, that of an FFT a constant."""
BLOCK = 1 << 28
"""Most numbers of u that are convolved together: their spectra take 4 GiB, and no index passes 2^31."""


Parameters = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]
"""log_dt, log_A_real, A_imag, C, D."""


def _as_given(u: Tensor) -> AbstractContextManager:
    """Context without autocast: spectra and states are float32 whatever surrounds the call."""
    return nullcontext() if u.is_meta else torch.autocast(u.device.type, enabled=False)


@observed("s4d")
def s4d(
    u: Tensor, log_dt: Tensor, log_A_real: Tensor, A_imag: Tensor, C: Tensor, D: Tensor | None = None, *,
    reverse: bool = False, dim: int = 1, initial_state: Tensor | None = None, return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """S4D over one axis of a channels-last tensor: h <- exp(dt A) h + (exp(dt A) - 1) / A u, y = 2 Re <C, h> + D u.

    dt = exp(log_dt), A = -exp(log_A_real) + i A_imag; each channel has its own complex modes, half of the states of the
    real system (Gu et al., "On the Parameterization and Initialization of Diagonal State Space Models", 2022). Long
    sequences are convolved by FFT, those of up to 4 positions (a stream of frames) run the recurrence; the two agree.

    Args:
        u: (batch, length, channels), or any number of axes, channels last; axis `dim` is scanned, the others are batch.
        log_dt: (channels,).
        log_A_real: (channels, modes).
        A_imag: (channels, modes).
        C: (channels, modes, 2), real and imaginary part.
        D: (channels,) skip, or None.
        reverse: read from the end; y stays in place and the final state is the one at position 0.
        dim: the scanned axis (not the last).
        initial_state: u's shape without `dim`, then (modes, 2): (batch, channels, modes, 2) in the usual case, real and
            imaginary part; None for zero.
        return_final_state: also return the state after the last position read.

    u: float64, float32, bfloat16 or float16 and y the same; parameters, states, spectra and sums float32 (float64 with
    u), also under autocast. Gradients flow to every tensor, from y and from the final state, any number of times; the
    backward pass keeps u and the initial state and computes the rest again.

    Returns:
        y, u's shape and dtype; with `return_final_state` also the state, shaped as `initial_state`.

    Raises:
        ValueError: a shape, dtype, device or layout does not fit; the message names the argument.
    """
    axis = _check(u, log_dt, log_A_real, A_imag, C, D, dim, initial_state)
    before, after, modes = u.shape[:axis], u.shape[axis + 1 : -1], tuple(C.shape)
    lead = (before.numel(), u.shape[axis], after.numel())
    start = None if initial_state is None else initial_state.reshape(lead[0], lead[2], *modes)
    y, final = _in_blocks(
        u.reshape(*lead, u.shape[-1]), (log_dt, log_A_real, A_imag, C, D), start, reverse, return_final_state
    )
    y = y.reshape(u.shape)
    return (y, final.reshape(*before, *after, *modes)) if return_final_state else y


def _in_blocks(
    u: Tensor, parameters: Parameters, start: Tensor | None, reverse: bool, want_final: bool
) -> tuple[Tensor, Tensor]:
    """y and the final state of canonical tensors, few enough sequences at a time; sequences know nothing of others."""
    batch, _, lines, _ = u.shape
    axis, state_axis, count = (0, 0, batch) if batch > lines else (2, 1, lines)
    rows = max(1, BLOCK * count // u.numel())
    if rows >= count:
        return _run(u, parameters, start, reverse, want_final)
    pieces = u.split(rows, dim=axis)
    starts = [None] * len(pieces) if start is None else start.split(rows, dim=state_axis)
    done = [_run(p, parameters, s, reverse, want_final) for p, s in zip(pieces, starts, strict=True)]
    y = torch.cat([piece for piece, _ in done], dim=axis)
    return y, torch.cat([final for _, final in done], dim=state_axis) if want_final else done[0][1]


def _run(
    u: Tensor, parameters: Parameters, start: Tensor | None, reverse: bool, want_final: bool
) -> tuple[Tensor, Tensor]:
    """One block, in the form that suits its length; with gradients, only the inputs are kept for them."""
    form = recur if u.shape[1] <= SHORT else convolve
    arguments = (u, *parameters, start, reverse, want_final)
    with _as_given(u):
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in arguments):
            return checkpoint(form, *arguments, use_reentrant=False, preserve_rng_state=False)
        return form(*arguments)


def _check(u, log_dt, log_A_real, A_imag, C, D, dim, initial_state) -> int:
    """Raise ValueError for anything that does not fit; returns `dim` counted from the front."""
    if u.ndim < 2:
        raise ValueError(f"u: got shape {tuple(u.shape)}, expected at least (length, channels)")
    axis = dim + u.ndim if dim < 0 else dim
    if not 0 <= axis < u.ndim - 1:
        raise ValueError(f"dim: got {dim} for u of shape {tuple(u.shape)}; any axis but the last (channels) is allowed")
    channels = u.shape[-1]
    if log_A_real.ndim != 2 or log_A_real.shape[1] < 1:
        raise ValueError(f"log_A_real: got shape {tuple(log_A_real.shape)}, expected (channels, modes), 1 mode or more")
    checks.check_shape("log_dt", log_dt, (channels,), "(channels)")
    shape = (channels, log_A_real.shape[1])
    checks.check_shape("log_A_real", log_A_real, shape, "(channels, modes)")
    checks.check_shape("A_imag", A_imag, shape, "(channels, modes)")
    checks.check_shape("C", C, (*shape, 2), "(channels, modes, real and imaginary part)")
    checks.check_shape("D", D, (channels,), "(channels)")
    state = (*u.shape[:axis], *u.shape[axis + 1 : -1], *shape, 2)
    checks.check_shape("initial_state", initial_state, state, "u's shape without the scanned axis, then (modes, 2)")
    others = {"log_dt": log_dt, "log_A_real": log_A_real, "A_imag": A_imag, "C": C, "D": D}
    others["initial_state"] = initial_state
    checks.check_dtypes("u", u, {}, others)
    checks.check_layout("u", u, {}, others)
    return axis
