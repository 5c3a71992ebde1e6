"""The learned constants of a selective scan (S6), held for K scans at once, and how they are initialised."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

# Shapes: K scans (directions), D channels, N state size, R rank of the step size.

Init = Literal["official", "vmamba"]
DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4  # Mamba, section 3.6: range of the initial step sizes


class ScanParameters(nn.Module):
    """Decay, skip and step-size projection of K selective scans over D channels.

    The parameters stay in float32 under autocast; the scan reads them as they are.

    Args:
        scans: K, number of directions that own a set of constants.
        channels: D.
        state_size: N.
        rank: R, width of the low-rank step size.
        init: ``official`` is what the released Mamba-YOLO code does (A = -1 for every state, step-size weights and
            biases standard normal); ``vmamba`` is Mamba's own rule (A = -1..-N, steps log-uniform in [0.001, 0.1]).
    """

    def __init__(self, scans: int, channels: int, *, state_size: int, rank: int, init: Init = "vmamba") -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(scans, channels, state_size))
        self.D = nn.Parameter(torch.empty(scans, channels))
        self.dt_weight = nn.Parameter(torch.empty(scans, channels, rank))
        self.dt_bias = nn.Parameter(torch.empty(scans, channels))
        self.reset_parameters(init)

    @torch.no_grad()
    def reset_parameters(self, init: Init) -> None:
        """Fill all parameters by the named rule."""
        nn.init.ones_(self.D)
        if init == "official":
            nn.init.zeros_(self.A_log)
            nn.init.normal_(self.dt_weight)
            nn.init.normal_(self.dt_bias)
        elif init == "vmamba":
            states = torch.arange(1, self.A_log.shape[-1] + 1, dtype=self.A_log.dtype)
            self.A_log.copy_(states.log().expand_as(self.A_log))
            bound = self.dt_weight.shape[-1] ** -0.5
            nn.init.uniform_(self.dt_weight, -bound, bound)
            low, high = math.log(DT_MIN), math.log(DT_MAX)
            steps = torch.empty_like(self.dt_bias).uniform_(low, high).exp().clamp(min=DT_FLOOR)
            self.dt_bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # inverse of softplus
        else:
            raise ValueError(f'init must be "official" or "vmamba", got {init!r}')

    def exact(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A, D and bias of the step sizes for a scan of ``like``: float64 beside such, else float32 in any model."""
        kind = torch.float64 if like.dtype == torch.float64 else torch.float32
        return -self.A_log.to(kind).exp(), self.D.to(kind), self.dt_bias.to(kind)

    @property
    def A(self) -> Tensor:  # noqa: N802 (the name of the literature)
        """(K, D, N) negative real decay rates."""
        return -self.A_log.exp()
