"""Sequence mixers by name: scans (s6, ssd, s4d), ssd without an order, attention, and a control without either.

All read any axis of a channels-last tensor in place, so temporal layers transpose nothing. A causal scan has the
forward direction alone and hands on what it has read, its convolution's last inputs and its state, so that a sequence
can be continued later; a bidirectional one takes such states from both sides of a piece.
"""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import ssd_noncausal
from vision_ssm.directions import (
    EXPAND,
    HEAD_WIDTH,
    S6_STATES,
    SSD_STATES,
    ConvDirection,
    Parts,
    Read,
    S4DDirection,
    S6Direction,
    ScanState,
    SSDDirection,
    first_steps,
    heads_of,
)
from vision_ssm.errors import UserError
from vision_ssm.mixer_config import NO_OPTIONS, MixerName, ScanOptions, check_mixer
from vision_ssm.mixing import MixingMatrix
from vision_ssm.scan_parameters import exact, spare_from_decay

# Shapes: ... batch axes, L the axis that is read, C model width, D = 2 C inner channels, E heads, P = D / E channels
# per head, N state size, R rank of the step size, T taps of the convolution.

NC_TAPS = 3
"""Width of nc_ssd's convolution, the only thing in it that knows the order."""


class Mixer(nn.Module, ABC):
    """What lets the positions along one axis see one another.

    Shape: (..., C) -> (..., C), read along any axis but the last.
    """

    recurrent: ClassVar[bool] = False
    """Whether ``advance`` can go on from a state."""

    @abstractmethod
    def forward(self, x: Tensor, axis: int) -> Tensor:
        """Mix whole sequences along ``axis``."""

    def advance(
        self,
        x: Tensor,
        axis: int,
        before: ScanState | None = None,
        after: ScanState | None = None,
        *,
        last: bool = False,
    ) -> Read:
        """Mix a piece of longer sequences, exactly as in the whole.

        Args:
            x: (..., C) the piece.
            axis: The axis along which it is a piece.
            before: State that the piece before gave, None for the first.
            after: What ``look_back`` gave for the piece after, None for the last; of no use to a causal mixer.
            last: Nothing will go on from here, so no state is given, which of short pieces is most of the numbers.

        Returns:
            The output, and the forward state after the piece, None if ``last``.

        Raises:
            UserError: This mixer has no recurrence.
        """
        raise UserError(
            f"{type(self).__name__} has no recurrence: it reads a sequence as a whole and cannot go on from a state; "
            "what streams, or is computed in pieces, needs s6, ssd, s4d or gated_conv along that axis"
        )

    def branch(self, x: Tensor, axis: int, step: int = 1) -> Tensor:
        """Positions of side sequences, each as if it followed what stands before it in another, the main sequence.

        Args:
            x: (2 B, ..., C) B side sequences, then their main ones; main ones do not see the others.
            axis: The axis that is read.
            step: Positions that branch off together, such as those of a frame; they do see one another.

        Returns:
            Outputs of both, shaped as x.

        Raises:
            UserError: This mixer looks ahead, or has no recurrence.
        """
        raise UserError(f"{type(self).__name__} has no recurrence, so nothing can branch off what it has read")

    def look_back(self, x: Tensor, axis: int, after: ScanState | None = None) -> ScanState | None:
        """The backward direction's state at the start of a piece, which the piece before it needs; None if causal.

        Raises:
            UserError: As ``advance``.
        """
        self.advance(x, axis)
        return None


class ScanMixer(Mixer):
    """Input projection, a scan in one or two directions, output projection.

    The outputs of two directions are averaged: their plain sum doubles the activations, which is where published
    models lose mixed precision.
    """

    recurrent = True
    in_proj: nn.Linear
    forwards: S6Direction | SSDDirection | S4DDirection | ConvDirection
    backwards: S6Direction | SSDDirection | S4DDirection | ConvDirection | None
    out_proj: nn.Linear

    def forward(self, x: Tensor, axis: int) -> Tensor:
        """Mix whole sequences along ``axis``."""
        return self._mixed(x, axis, None, None, last=True)[0]

    def advance(
        self,
        x: Tensor,
        axis: int,
        before: ScanState | None = None,
        after: ScanState | None = None,
        *,
        last: bool = False,
    ) -> Read:
        """See ``Mixer``."""
        return self._mixed(x, axis, before, after, last=last)

    def _mixed(self, x: Tensor, axis: int, before: ScanState | None, after: ScanState | None, *, last: bool) -> Read:
        parts = self.parts(self.in_proj(x))
        y, state = self.forwards.read(parts, axis, before, last=last)
        if self.backwards is not None:
            y = 0.5 * (y + self.backwards.read(parts, axis, after, last=True)[0])
        return self.out(y, parts), state

    def branch(self, x: Tensor, axis: int, step: int = 1) -> Tensor:
        """See ``Mixer``; step after step."""
        if self.backwards is not None:
            raise UserError("a mixer that reads both ways has no past to branch off from: build it with causal=True")
        state, outputs = None, []
        for side, main in zip(*(part.split(step, dim=axis) for part in x.chunk(2)), strict=True):
            y = self.advance(side, axis, state, last=True)[0]
            after, state = self.advance(main, axis, state)
            outputs.append(torch.cat([y, after]))
        return torch.cat(outputs, dim=axis)

    def look_back(self, x: Tensor, axis: int, after: ScanState | None = None) -> ScanState | None:
        """See ``Mixer``."""
        return None if self.backwards is None else self.backwards.read(self.parts(self.in_proj(x)), axis, after)[1]

    def parts(self, projected: Tensor) -> Parts:
        """What the directions read: value and gate, each (..., D)."""
        return projected.chunk(2, dim=-1)

    def out(self, y: Tensor, parts: Parts) -> Tensor:
        """The directions' outputs (..., D), which they have gated themselves, -> (..., C)."""
        return self.out_proj(y)


class GatedScanMixer(MixingMatrix, ScanMixer):
    """Vision Mamba's frame: input projection, gate and output projection shared by the directions, the rest not.

    Args:
        dim: C.
        state_size: N.
        causal: Read forwards only.
        options: Of the scans.
    """

    direction: ClassVar[type[S6Direction] | type[S4DDirection]]

    def __init__(
        self, dim: int, *, state_size: int = S6_STATES, causal: bool = False, options: ScanOptions = NO_OPTIONS
    ) -> None:
        super().__init__()
        self.in_proj = nn.Linear(dim, 2 * EXPAND * dim, bias=False)
        self.forwards = self.direction(dim, state_size=state_size, reverse=False, options=options)
        self.backwards = None
        if not causal:
            self.backwards = self.direction(dim, state_size=state_size, reverse=True, options=options)
        self.out_proj = nn.Linear(EXPAND * dim, dim, bias=False)


class S6Mixer(GatedScanMixer):
    """Vision Mamba's mixer, by selective scans."""

    direction = S6Direction


class S4DMixer(GatedScanMixer):
    """The same by S4D, an even number of states: what a scan gives whose coefficients do not depend on the input."""

    direction = S4DDirection


class SSDMixer(MixingMatrix, ScanMixer):
    """Mamba-2's mixer in two directions: products of matrices instead of a scan, so it suits GPUs best.

    The projections of input, B, C and step sizes are shared by the directions; convolution, decays and biases are not.

    Args:
        dim: C, a multiple of 32, so that heads of 64 channels (fewer if 2 C is less) fill 2 C.
        state_size: N.
        causal: Read forwards only.
        options: Of the scans.
    """

    forwards: SSDDirection

    def __init__(
        self, dim: int, *, state_size: int = SSD_STATES, causal: bool = False, options: ScanOptions = NO_OPTIONS
    ) -> None:
        super().__init__()
        inner = EXPAND * dim
        self.split = (inner, inner + 2 * state_size, heads_of(inner))
        self.in_proj = nn.Linear(dim, sum(self.split), bias=False)
        self.forwards = SSDDirection(dim, state_size=state_size, reverse=False, options=options)
        self.backwards = None if causal else SSDDirection(dim, state_size=state_size, reverse=True, options=options)
        self.norm = nn.RMSNorm(inner, eps=1e-5)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def branch(self, x: Tensor, axis: int, step: int = 1) -> Tensor:
        """See ``Mixer``; single positions in one scan of twice the length."""
        if self.backwards is not None or self.forwards.options != NO_OPTIONS or step > 1:
            return super().branch(x, axis, step)
        parts = self.parts(self.in_proj(x))
        return self.out(self.forwards.branch(parts, axis), parts)

    def parts(self, projected: Tensor) -> Parts:
        """Gate; input, B and C; step sizes: D | D + 2 N | E."""
        return projected.split(self.split, dim=-1)

    def out(self, y: Tensor, parts: Parts) -> Tensor:
        """Gate, norm and output projection, as Mamba-2."""
        return norm_out(y * F.silu(parts[0]), self.norm, self.out_proj)


class GatedConvMixer(ScanMixer):
    """The control: the frame of ``GatedScanMixer`` without its scan, a gated CNN block (after MambaOut, 2024).

    A position sees the ``TAPS`` - 1 before it and, unless causal, as many after it.

    Args:
        dim: C.
        causal: Read forwards only.
    """

    def __init__(self, dim: int, *, causal: bool = False) -> None:
        super().__init__()
        self.in_proj = nn.Linear(dim, 2 * EXPAND * dim, bias=False)
        self.forwards = ConvDirection(dim, reverse=False)
        self.backwards = None if causal else ConvDirection(dim, reverse=True)
        self.out_proj = nn.Linear(EXPAND * dim, dim, bias=False)


class NonCausalSSDMixer(MixingMatrix, Mixer):
    """SSD without an order (VSSD, 2024): every position reads one sum over all; a short convolution knows the order.

    Args:
        dim: C, a multiple of 32, as for ``SSDMixer``.
        state_size: N.
    """

    def __init__(self, dim: int, *, state_size: int = SSD_STATES) -> None:
        super().__init__()
        inner = EXPAND * dim
        self.heads = heads_of(inner)
        self.split = (inner, state_size, state_size)
        self.in_proj = nn.Linear(dim, inner + sum(self.split) + self.heads, bias=False)
        self.conv = nn.Conv1d(sum(self.split), sum(self.split), NC_TAPS, padding=NC_TAPS // 2, groups=sum(self.split))
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.heads))
        self.dt_bias = nn.Parameter(first_steps(self.heads))
        self.norm = nn.RMSNorm(inner, eps=1e-5)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        spare_from_decay(self.A_log, self.D)

    def forward(self, x: Tensor, axis: int) -> Tensor:
        """See ``Mixer``."""
        lines, shape = as_lines(x, axis)
        z, xBC, dt = self.in_proj(lines).split((self.split[0], sum(self.split), self.heads), dim=-1)
        xBC = F.silu(self.conv(xBC.transpose(1, 2))).transpose(1, 2).contiguous()
        u, B, C = xBC.split(self.split, dim=-1)
        y = ssd_noncausal(
            u.unflatten(-1, (self.heads, -1)),
            dt,
            -exact(self.A_log, u).exp(),
            B.unsqueeze(-2),
            C.unsqueeze(-2),
            exact(self.D, u),
            dt_bias=exact(self.dt_bias, u),
            softplus=True,
        )
        return from_lines(norm_out(y.flatten(-2) * F.silu(z), self.norm, self.out_proj), shape, axis)


class AttentionMixer(MixingMatrix, Mixer):
    """Softmax attention with several heads: all pairs of positions, so the cost grows with the square of the length.

    Args:
        dim: C; heads have 64 channels, or the largest common divisor of C and 64.
        causal: Look back only.
    """

    def __init__(self, dim: int, *, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = dim // math.gcd(dim, HEAD_WIDTH), causal
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, axis: int) -> Tensor:
        """See ``Mixer``."""
        lines, shape = as_lines(x, axis)
        q, k, v = self.qkv(lines).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (S, E, L, P)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return from_lines(self.proj(y.transpose(1, 2).flatten(2)), shape, axis)


SCAN_MIXERS = {"s6": S6Mixer, "ssd": SSDMixer, "s4d": S4DMixer}


def build_mixer(
    name: MixerName,
    dim: int,
    *,
    state_size: int | None = None,
    causal: bool = False,
    options: ScanOptions = NO_OPTIONS,
) -> Mixer:
    """The mixer of that name.

    Args:
        name: s6, ssd, nc_ssd, s4d, attention or gated_conv.
        dim: C.
        state_size: N; None for 16 (s6, s4d) or 64 (ssd, nc_ssd). Attention and gated_conv have none.
        causal: Every position sees those before it only.
        options: Of scans.

    Raises:
        UserError: Another name, or what that mixer cannot have.
    """
    check_mixer(name)
    options.check(name)
    if state_size is not None and not 1 <= state_size <= 256:
        raise UserError(f"state_size must be 1 to 256, got {state_size}")
    sized = {} if state_size is None else {"state_size": state_size}
    if name in SCAN_MIXERS:
        return SCAN_MIXERS[name](dim, causal=causal, options=options, **sized)
    if name == "nc_ssd":
        if causal:
            raise UserError("mixer nc_ssd has no order, so it cannot read forwards only: use ssd, or causal: false")
        return NonCausalSSDMixer(dim, **sized)
    if sized:
        raise UserError(f"mixer {name} has no states: leave state_size out, got {state_size}")
    return AttentionMixer(dim, causal=causal) if name == "attention" else GatedConvMixer(dim, causal=causal)


def norm_out(y: Tensor, norm: nn.RMSNorm, out_proj: nn.Linear) -> Tensor:
    """Norm and projection, (..., D) -> (..., C).

    The norm's weight goes into the projection's and autocast does not make y longer: a norm in y's own type without a
    weight is one kernel, which sums in float32. In float32 it was most of a short mixer's memory traffic.
    """
    with torch.autocast(y.device.type, enabled=False):
        y = F.rms_norm(y, norm.normalized_shape, eps=norm.eps)
    return F.linear(y, out_proj.weight * norm.weight)


def as_lines(x: Tensor, axis: int) -> tuple[Tensor, torch.Size]:
    """(..., C) -> (S, L, C) with L the axis that is read, and what ``from_lines`` needs to go back."""
    moved = x.movedim(axis, -2)
    return moved.reshape(-1, *moved.shape[-2:]), moved.shape


def from_lines(lines: Tensor, shape: torch.Size, axis: int) -> Tensor:
    """Inverse of ``as_lines``."""
    return lines.reshape(shape).movedim(-2, axis)
