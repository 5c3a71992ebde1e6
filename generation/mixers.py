"""Sequence mixers of a DiM: bidirectional selective scan (Vision Mamba, section 3.3) and bidirectional SSD (Mamba-2).

Both read any axis of a channels-last tensor in place, so temporal layers transpose nothing. A causal mixer has the
forward direction alone and hands on what it has read, its convolution's last inputs and its scan's state, so that a
sequence can be continued later; a bidirectional one takes such states from both sides of a piece.
"""

import math
from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import causal_conv1d, selective_scan, ssd
from vision_ssm.errors import UserError
from vision_ssm.mamba import DirectionalScan
from vision_ssm.mixing import MixingMatrix
from vision_ssm.scan_parameters import DT_FLOOR, DT_MAX, DT_MIN

# Shapes: ... batch axes, L the axis that is read, C model width, D = 2 C inner channels, E heads, P = D / E channels
# per head, N state size, R rank of the step size, T taps of the convolution.

MixerName = Literal["s6", "ssd"]
EXPAND, TAPS = 2, 4
S6_STATES, SSD_STATES, HEAD_WIDTH = 16, 64, 64


class ScanState(NamedTuple):
    """What a direction has read so far; its size does not depend on how much that was."""

    conv: Tensor
    """The last T - 1 inputs of the convolution: the mixer's axes with T - 1 in place of L."""
    scan: Tensor
    """(..., D, N) for s6, (..., E, P, N) for ssd, without the axis that is read; float32."""


class Direction(ABC):
    """One reading direction of a mixer."""

    @abstractmethod
    def read(self, projected: Tensor, axis: int, state: ScanState | None) -> tuple[Tensor, ScanState]:
        """Read a piece of the sequence.

        Args:
            projected: What the mixer's input projection gives, channels last.
            axis: The axis that is read.
            state: Of the same direction after the piece before (in reading order), None at the beginning.

        Returns:
            (..., D) outputs in place, and the state after the piece.
        """


class S6Direction(DirectionalScan, Direction):
    """Short convolution, projections and gated selective scan; the parameters are those of ``DirectionalScan``."""

    def __init__(self, dim: int, *, state_size: int, reverse: bool) -> None:
        super().__init__(
            EXPAND * dim,
            state_size=state_size,
            rank=math.ceil(dim / 16),
            conv_size=TAPS,
            reverse=reverse,
            backend="auto",
        )
        _spare_from_decay(self.scan.A_log, self.scan.D)

    def read(self, projected: Tensor, axis: int, state: ScanState | None) -> tuple[Tensor, ScanState]:
        """See ``Direction``; ``projected`` is value and gate, 2 D."""
        value, gate = projected.chunk(2, dim=-1)
        u, conv = _convolve(value, self.conv, axis, state, reverse=self.reverse)
        delta, B, C = self.x_proj(u).split(self.split, dim=-1)  # (..., R | N | N)
        y, scan = selective_scan(
            u,
            delta,
            _exact(self.scan.A[0], u),
            B,
            C,
            _exact(self.scan.D[0], u),
            delta_weight=self.scan.dt_weight[0],
            delta_bias=_exact(self.scan.dt_bias[0], u),
            softplus=True,
            z=gate,
            reverse=self.reverse,
            dim=axis,
            initial_state=None if state is None else state.scan,
            return_final_state=True,
        )
        return y, ScanState(conv, scan)


class SSDDirection(nn.Module, Direction):
    """Short convolution of input, B and C, then SSD with one decay per head."""

    def __init__(self, dim: int, *, state_size: int, reverse: bool) -> None:
        super().__init__()
        inner = EXPAND * dim
        self.reverse = reverse
        self.heads = _heads(inner)
        self.split = (inner, state_size, state_size)
        self.conv = nn.Conv1d(sum(self.split), sum(self.split), TAPS, groups=sum(self.split))
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())  # the range that Mamba-2 starts from
        self.D = nn.Parameter(torch.ones(self.heads))
        steps = torch.empty(self.heads).uniform_(math.log(DT_MIN), math.log(DT_MAX)).exp().clamp(min=DT_FLOOR)
        self.dt_bias = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))  # inverse of softplus
        _spare_from_decay(self.A_log, self.D)

    def read(self, projected: Tensor, axis: int, state: ScanState | None) -> tuple[Tensor, ScanState]:
        """See ``Direction``; ``projected`` is gate, input, B, C and step sizes, D | D | N | N | E."""
        inner = self.split[0]
        _, xBC, dt = projected.split((inner, sum(self.split), self.heads), dim=-1)
        xBC, conv = _convolve(xBC, self.conv, axis, state, reverse=self.reverse)
        x, B, C = xBC.split(self.split, dim=-1)
        y, scan = ssd(
            x.unflatten(-1, (self.heads, -1)),
            dt,
            -_exact(self.A_log, x).exp(),
            B.unsqueeze(-2),
            C.unsqueeze(-2),
            _exact(self.D, x),
            dt_bias=_exact(self.dt_bias, x),
            softplus=True,
            reverse=self.reverse,
            dim=axis,
            initial_state=None if state is None else state.scan,
            return_final_state=True,
        )
        return y.flatten(-2), ScanState(conv, scan)


class Mixer(MixingMatrix, nn.Module, ABC):
    """Input projection, a scan in one or two directions, output projection.

    The outputs of two directions are averaged: their plain sum doubles the activations, which is where published
    models lose mixed precision.

    Shape: (..., C) -> (..., C), read along any axis but the last.
    """

    in_proj: nn.Linear
    forwards: S6Direction | SSDDirection
    backwards: S6Direction | SSDDirection | None
    out_proj: nn.Linear

    def forward(self, x: Tensor, axis: int) -> Tensor:
        """Mix whole sequences along ``axis``."""
        return self.advance(x, axis)[0]

    def advance(
        self, x: Tensor, axis: int, before: ScanState | None = None, after: ScanState | None = None
    ) -> tuple[Tensor, ScanState]:
        """Mix a piece of longer sequences, exactly as in the whole.

        Args:
            x: (..., C) the piece.
            axis: The axis along which it is a piece.
            before: State that the piece before gave, None for the first.
            after: What ``look_back`` gave for the piece after, None for the last; of no use to a causal mixer.

        Returns:
            The output, and the forward state after the piece.
        """
        projected = self.in_proj(x)
        y, state = self.forwards.read(projected, axis, before)
        if self.backwards is not None:
            y = 0.5 * (y + self.backwards.read(projected, axis, after)[0])
        return self.out_proj(self.gated(y, projected)), state

    def look_back(self, x: Tensor, axis: int, after: ScanState | None = None) -> ScanState | None:
        """The backward direction's state at the start of a piece, which the piece before it needs; None if causal."""
        return None if self.backwards is None else self.backwards.read(self.in_proj(x), axis, after)[1]

    @abstractmethod
    def gated(self, y: Tensor, projected: Tensor) -> Tensor:
        """What goes into the output projection: (..., D) -> (..., D)."""


class S6Mixer(Mixer):
    """Vision Mamba's mixer: input projection, gate and output projection shared by the directions, the rest not.

    Shape: (..., C) -> (..., C)

    Args:
        dim: C.
        state_size: N.
        causal: Read forwards only.
    """

    def __init__(self, dim: int, *, state_size: int = S6_STATES, causal: bool = False) -> None:
        super().__init__()
        self.in_proj = nn.Linear(dim, 2 * EXPAND * dim, bias=False)
        self.forwards = S6Direction(dim, state_size=state_size, reverse=False)
        self.backwards = None if causal else S6Direction(dim, state_size=state_size, reverse=True)
        self.out_proj = nn.Linear(EXPAND * dim, dim, bias=False)

    def gated(self, y: Tensor, projected: Tensor) -> Tensor:
        """The scan gates its output itself."""
        return y


class SSDMixer(Mixer):
    """Mamba-2's mixer in two directions: products of matrices instead of a scan, so it suits GPUs best.

    The projections of input, B, C and step sizes are shared by the directions; convolution, decays and biases are not.

    Shape: (..., C) -> (..., C)

    Args:
        dim: C, a multiple of 32, so that heads of 64 channels (fewer if 2 C is less) fill 2 C.
        state_size: N.
        causal: Read forwards only.
    """

    def __init__(self, dim: int, *, state_size: int = SSD_STATES, causal: bool = False) -> None:
        super().__init__()
        inner = EXPAND * dim
        self.in_proj = nn.Linear(dim, 2 * inner + 2 * state_size + _heads(inner), bias=False)
        self.forwards = SSDDirection(dim, state_size=state_size, reverse=False)
        self.backwards = None if causal else SSDDirection(dim, state_size=state_size, reverse=True)
        self.norm = nn.RMSNorm(inner, eps=1e-5)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def gated(self, y: Tensor, projected: Tensor) -> Tensor:
        """Gate, then norm, as Mamba-2; the norm in its weight's type, so that autocast does not shorten it."""
        return self.norm((y * F.silu(projected[..., : y.shape[-1]])).to(self.norm.weight.dtype))


def build_mixer(name: MixerName, dim: int, *, state_size: int | None, causal: bool) -> Mixer:
    """The mixer of that name; without ``state_size`` it has 16 states for s6, 64 for ssd.

    Raises:
        UserError: Another name, or a state size that cannot be.
    """
    if state_size is not None and not 1 <= state_size <= 256:
        raise UserError(f"state_size must be 1 to 256, got {state_size}")
    if name == "s6":
        return S6Mixer(dim, state_size=state_size or S6_STATES, causal=causal)
    if name == "ssd":
        return SSDMixer(dim, state_size=state_size or SSD_STATES, causal=causal)
    raise UserError(f'mixer must be "s6" (selective scan) or "ssd" (Mamba-2), got {name!r}')


def _convolve(
    x: Tensor, conv: nn.Conv1d, axis: int, state: ScanState | None, *, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution and SiLU; also the inputs that the next piece needs."""
    y, last = causal_conv1d(
        x,
        conv.weight.squeeze(1),
        conv.bias,
        activation="silu",
        reverse=reverse,
        dim=axis,
        initial_state=None if state is None else state.conv,
        return_final_state=True,
    )
    return y, last


def _exact(parameter: Tensor, like: Tensor) -> Tensor:
    """Decays, skips and biases of steps are float32 in every model, float64 beside float64."""
    return parameter.to(torch.float64 if like.dtype == torch.float64 else torch.float32)


def _heads(inner: int) -> int:
    width = min(HEAD_WIDTH, inner)
    if inner % width:
        raise UserError(f"width must be a multiple of 32 for the ssd mixer and its heads, got {inner // 2}")
    return inner // width


def _spare_from_decay(*parameters: nn.Parameter) -> None:
    """Mark parameters that weight decay must not touch, as ``vision_ssm.training.optim`` understands it."""
    for parameter in parameters:
        parameter._no_weight_decay = True  # pyright: ignore[reportAttributeAccessIssue]
