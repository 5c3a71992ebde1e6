"""The learned constants of a selective scan (S6), held for K scans at once, and how they are initialised."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
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
        ones: States more per channel that never decay, without parameters (option ``polar``).
    """

    def __init__(
        self, scans: int, channels: int, *, state_size: int, rank: int, init: Init = "vmamba", ones: int = 0
    ) -> None:
        super().__init__()
        self.ones = ones
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
        return self._with_ones(-exact(self.A_log, like).exp()), exact(self.D, like), exact(self.dt_bias, like)

    @property
    def A(self) -> Tensor:  # noqa: N802 (the name of the literature)
        """(K, D, N) negative real decay rates; with ``ones``, (K, D, N + ones), the last ones zero."""
        return self._with_ones(-self.A_log.exp())

    def _with_ones(self, A: Tensor) -> Tensor:
        return F.pad(A, (0, self.ones)) if self.ones else A


def present_only(u: Tensor, delta: Tensor, delta_weight: Tensor, delta_bias: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """What states of decay 0 give, y_t = <B_t, C_t> delta_t u_t: no rate is low enough to make that exact in a scan.

    Args:
        u: (..., D).
        delta: (..., R).
        delta_weight: (D, R).
        delta_bias: (D,).
        B: (..., Z), of the states of decay 0.
        C: As B.

    Returns:
        (..., D) in u's dtype.
    """
    steps = F.softplus(F.linear(delta, delta_weight.to(delta.dtype)).to(delta_bias.dtype) + delta_bias)
    return ((B * C).sum(-1, keepdim=True) * steps * u).to(u.dtype)


def exact(parameter: Tensor, like: Tensor) -> Tensor:
    """Decays, skips and biases of steps are float32 in every model, float64 beside float64."""
    return parameter.to(torch.float64 if like.dtype == torch.float64 else torch.float32)


def spare_from_decay(*parameters: nn.Parameter) -> None:
    """Mark parameters that weight decay must not touch, as ``vision_ssm.training.optim`` understands it."""
    for parameter in parameters:
        parameter._no_weight_decay = True  # pyright: ignore[reportAttributeAccessIssue]
