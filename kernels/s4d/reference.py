"""S4D as an obvious loop of complex numbers: the definition that both forms of torch_path.py are compared with.

Shapes: B sequences before the axis, L positions, W sequences after the axis, D channels, N complex modes.
"""

import torch
from torch import Tensor


def s4d_reference(
    u: Tensor, log_dt: Tensor, log_A_real: Tensor, A_imag: Tensor, C: Tensor, D: Tensor | None,
    initial_state: Tensor | None, *, reverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """h_t = exp(dt A) h_{t-1} + (exp(dt A) - 1) / A u_t and y_t = 2 Re <C, h_t> + D u_t, one position after the other.

    Args:
        u: (B, L, W, D).
        log_dt: (D,); dt = exp(log_dt).
        log_A_real, A_imag: (D, N); A = -exp(log_A_real) + i A_imag.
        C: (D, N, 2), real and imaginary part.
        D: (D,) or None.
        initial_state: (B, W, D, N, 2), the state before the first position read; None for zero.
        reverse: read from the last position.

    Returns:
        y (B, L, W, D) in u.dtype, and the final state (B, W, D, N, 2) in the dtype of the parameters.
    """
    batch, length, lines, _ = u.shape
    A = torch.complex(-log_A_real.exp(), A_imag)
    step = torch.exp(log_dt.exp()[:, None] * A)
    gain, c = (step - 1) / A, torch.view_as_complex(C.contiguous())
    if initial_state is None:
        h = step.new_zeros(batch, lines, *step.shape)
    else:
        h = torch.view_as_complex(initial_state.contiguous())
    outputs: dict[int, Tensor] = {}
    for t in reversed(range(length)) if reverse else range(length):
        value = u[:, t].to(log_dt.dtype)
        h = step * h + gain * value[..., None]
        y = 2 * (c * h).real.sum(-1)
        outputs[t] = y if D is None else y + D * value
    y = torch.stack([outputs[t] for t in range(length)], dim=1)
    return y.to(u.dtype), torch.view_as_real(h)
