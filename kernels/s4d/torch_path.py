"""S4D in plain torch, in its two forms: a convolution by FFT over the whole length, and the recurrence.

Shapes as in reference.py; `z` = dt A and `gain` = (exp(z) - 1) / A are pairs of real tensors (D, N): no complex number
but the spectra of the FFT exists, so that everything else compiles, and runs where complex numbers do not.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Pair(NamedTuple):
    """Real and imaginary part, tensors of one shape."""

    real: Tensor
    imag: Tensor

    def __matmul__(self, other: "Pair") -> "Pair":
        """The product, element by element."""
        return Pair(
            self.real * other.real - self.imag * other.imag, self.real * other.imag + self.imag * other.real
        )  # fmt: skip

    def unsqueeze(self, dim: int) -> "Pair":
        """Both parts with one axis more."""
        return Pair(self.real.unsqueeze(dim), self.imag.unsqueeze(dim))

    def stack(self) -> Tensor:
        """The parts as the last axis."""
        return torch.stack(self, dim=-1)


class Modes(NamedTuple):
    """What every position needs of the parameters, (D, N) each."""

    z: Pair
    step: Pair
    gain: Pair
    c: Pair


def discretise(log_dt: Tensor, log_A_real: Tensor, A_imag: Tensor, C: Tensor) -> Modes:
    """Zero-order hold with B = 1 (Gu et al., "On the Parameterization and Initialization of Diagonal State Space
    Models", 2022, section 3): step = exp(dt A), gain = (exp(dt A) - 1) / A."""
    dt = log_dt.exp().unsqueeze(1)
    a = Pair(-log_A_real.exp(), A_imag)
    z = Pair(dt * a.real, dt * a.imag)
    # exp(z) - 1 without cancellation for small z: expm1(x) cos(y) - 2 sin(y / 2)^2
    above_one = torch.expm1(z.real) * z.imag.cos() - 2 * (z.imag / 2).sin().square()
    step = Pair(above_one + 1, z.real.exp() * z.imag.sin())
    size = a.real.square() + a.imag.square()
    gain = Pair(above_one, step.imag) @ Pair(a.real / size, -a.imag / size)
    return Modes(z, step, gain, Pair(C[..., 0], C[..., 1]))


def powers(z: Pair, length: int) -> Pair:
    """exp(z)^t for t = 0 .. length - 1, (D, N, L)."""
    t = torch.arange(length, device=z.real.device, dtype=z.real.dtype)
    turn = torch.atan2(z.imag.sin(), z.imag.cos())  # within half a turn, so that t times it keeps its digits
    size, angle = (z.real.unsqueeze(-1) * t).exp(), turn.unsqueeze(-1) * t
    return Pair(size * angle.cos(), size * angle.sin())


def convolution_kernel(modes: Modes, table: Pair) -> Tensor:
    """Taps K_t = 2 Re <C, gain step^t>, (D, L), from the table of powers."""
    return 2 * ((modes.c @ modes.gain).unsqueeze(-1) @ table).real.sum(1)


def fft_length(length: int) -> int:
    """The smallest even product of 2, 3 and 5 that holds a sequence and as many zeros, less one."""
    size = max(2, 2 * length - 1 + (2 * length - 1) % 2)
    while True:
        rest = size
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return size
        size += 2


def convolve(
    u: Tensor, log_dt: Tensor, log_A_real: Tensor, A_imag: Tensor, C: Tensor, D: Tensor | None,
    initial_state: Tensor | None, reverse: bool, want_final: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and the final state (empty if not wanted) by FFT; backwards is the conjugate spectrum, nothing flips."""
    modes = discretise(log_dt, log_A_real, A_imag, C)
    length = u.shape[1]
    wide = u.to(log_dt.dtype)
    table = powers(modes.z, length)
    size = fft_length(length)
    spectrum = torch.fft.rfft(convolution_kernel(modes, table).T, n=size, dim=0).unsqueeze(1)  # (F, 1, D)
    y = torch.fft.rfft(wide, n=size, dim=1) * (spectrum.conj() if reverse else spectrum)
    y = torch.fft.irfft(y, n=size, dim=1)[:, :length]
    if D is not None:
        y = torch.addcmul(y, wide, D)
    if initial_state is not None:
        y = y + _outputs_of(initial_state, modes, table, reverse)
    final = _final_state(wide, initial_state, modes, table, reverse) if want_final else wide.new_empty(0)
    return y.to(u.dtype), final


def _outputs_of(state: Tensor, modes: Modes, table: Pair, reverse: bool) -> Tensor:
    """What the initial state adds to y: 2 Re <C, step^(t + 1) h>, (B, L, W, D)."""
    rows = (modes.c @ modes.step).unsqueeze(-1) @ table
    rows = 2 * torch.stack([rows.real, -rows.imag], dim=2).flatten(1, 2)  # (D, 2N, L)
    y = torch.einsum("bwdm,dml->blwd", state.flatten(3), rows)
    return y.flip(1) if reverse else y


def _final_state(u: Tensor, initial_state: Tensor | None, modes: Modes, table: Pair, reverse: bool) -> Tensor:
    """step^L h + sum_t gain step^(L - 1 - t) u_t, (B, W, D, N, 2)."""
    rows = (modes.gain.unsqueeze(-1) @ table).stack()  # (D, N, L, 2)
    state = torch.einsum("blwd,dnlk->bwdnk", u, rows if reverse else rows.flip(2))
    if initial_state is None:
        return state
    last = Pair(table.real[..., -1], table.imag[..., -1]) @ modes.step
    return state + (last @ Pair(initial_state[..., 0], initial_state[..., 1])).stack()


def recur(
    u: Tensor, log_dt: Tensor, log_A_real: Tensor, A_imag: Tensor, C: Tensor, D: Tensor | None,
    initial_state: Tensor | None, reverse: bool, want_final: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and the final state (empty if not wanted), position after position: what a stream of frames needs."""
    modes = discretise(log_dt, log_A_real, A_imag, C)
    wide = u.to(log_dt.dtype)
    h = Pair(*initial_state.unbind(-1)) if initial_state is not None else None
    outputs: list[Tensor] = []
    for value in reversed(wide.unbind(1)) if reverse else wide.unbind(1):
        real, imag = (gain * value.unsqueeze(-1) for gain in modes.gain)
        if h is not None:
            kept = modes.step @ h
            real, imag = real + kept.real, imag + kept.imag
        h = Pair(real, imag)
        y = 2 * (modes.c @ h).real.sum(-1)
        outputs.append(y if D is None else torch.addcmul(y, value, D))
    y = torch.stack(outputs[::-1] if reverse else outputs, dim=1)
    final = h.stack() if want_final and h is not None else wide.new_empty(0)
    return y.to(u.dtype), final
