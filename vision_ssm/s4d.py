"""S4D: a scan whose coefficients are constants, so that it is a convolution (Gu et al., 2022)."""

import math
from typing import cast

import torch
from torch import Tensor, nn

from kernels import s4d
from vision_ssm.errors import UserError
from vision_ssm.mixing import MixingMatrix
from vision_ssm.scan_parameters import DT_MAX, DT_MIN, exact, spare_from_decay


class S4D(MixingMatrix, nn.Module):
    """Diagonal state space with constant coefficients (Gu et al., 2022; initialised as S4D-Lin).

    Shape: (B, L, ..., C) -> (B, L, ..., C)

    Args:
        channels: C.
        state_size: N, real states per channel: N / 2 complex modes.
        reverse: Read from the end.
        total: Have one more state per channel, of decay 1: the sum of all inputs so far, weighted by a gain that starts
            at zero (option ``polar``).
    """

    def __init__(self, channels: int, *, state_size: int = 16, reverse: bool = False, total: bool = False) -> None:
        super().__init__()
        if state_size < 2 or state_size % 2:
            raise UserError(f"state_size: got {state_size}, S4D needs an even number of states (two per complex mode)")
        modes = state_size // 2
        low, high = math.log(DT_MIN), math.log(DT_MAX)
        self.reverse = reverse
        self.log_dt = nn.Parameter(torch.empty(channels).uniform_(low, high))
        self.log_A_real = nn.Parameter(torch.full((channels, modes), math.log(0.5)))
        self.A_imag = nn.Parameter(math.pi * torch.arange(modes).float().repeat(channels, 1))
        self.C = nn.Parameter(torch.randn(channels, modes, 2) * 0.5**0.5)
        self.D = nn.Parameter(torch.randn(channels))
        self.total_gain = nn.Parameter(torch.zeros(channels)) if total else None
        spare_from_decay(self.log_dt, self.log_A_real, self.A_imag)

    def forward(self, x: Tensor, axis: int = 1) -> Tensor:
        """See the class; any axis but the last can be read."""
        if self.total_gain is not None:
            return self.advance(x, axis)[0]
        return cast(Tensor, s4d(x, *self._constants(x), reverse=self.reverse, dim=axis))

    def advance(self, x: Tensor, axis: int, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A piece of a longer sequence, exactly as in the whole.

        Args:
            x: The piece.
            axis: The axis that is read.
            start: The state that the piece before gave, None at the beginning.

        Returns:
            The output, and the state: x's shape without the axis, then (modes, 2); with ``total`` one mode more.
        """
        modes = None if start is None else start[..., : self.log_A_real.shape[1], :].contiguous()
        y, final = cast(
            tuple[Tensor, Tensor],
            s4d(
                x, *self._constants(x), reverse=self.reverse, dim=axis, initial_state=modes, return_final_state=True
            ),
        )  # fmt: skip
        if self.total_gain is None:
            return y, final
        values = x.to(final.dtype)
        sums = values.flip(axis).cumsum(axis).flip(axis) if self.reverse else values.cumsum(axis)
        if start is not None:
            sums = sums + start[..., -1, 0].unsqueeze(axis)
        y = y + (exact(self.total_gain * self.log_dt.exp(), x) * sums).to(y.dtype)
        last = sums.select(axis, 0 if self.reverse else -1)
        return y, torch.cat([final, torch.stack([last, torch.zeros_like(last)], dim=-1).unsqueeze(-2)], dim=-2)

    def _constants(self, x: Tensor) -> list[Tensor]:
        return [exact(c, x) for c in (self.log_dt, self.log_A_real, self.A_imag, self.C, self.D)]
