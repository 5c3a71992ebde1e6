"""The bidirectional Mamba mixer over a sequence of tokens (Vision Mamba, section 3.3 and algorithm 1)."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from kernels import selective_scan
from kernels.selective_scan.op import Backend
from vision_ssm.memory_replay import MemoryReplay
from vision_ssm.mixer_config import NO_OPTIONS, ScanOptions
from vision_ssm.mixing import MixingMatrix
from vision_ssm.scan_parameters import ScanParameters, present_only

# Shapes: B batch, L tokens, C model width, D = expand * C inner channels, N state size, R rank of the step size.


class DirectionalScan(MixingMatrix, nn.Module):
    """One reading direction of the mixer: short convolution, projections, gated selective scan.

    Nothing is reversed in memory: the backward direction convolves with the mirrored kernel and scans from the end.

    Args:
        channels: D.
        state_size: N.
        rank: R.
        conv_size: Taps of the causal depthwise convolution.
        reverse: Read the sequence from its end.
        backend: Back end of the scan, see ``kernels.selective_scan``.
        options: Of the scan.
    """

    def __init__(
        self,
        channels: int,
        *,
        state_size: int,
        rank: int,
        conv_size: int,
        reverse: bool,
        backend: Backend,
        options: ScanOptions = NO_OPTIONS,
    ) -> None:
        super().__init__()
        self.reverse = reverse
        self.backend: Backend = backend
        self.options = options
        states = state_size + sum(options.polar)
        self.split = (rank, states, states)
        self.conv = nn.Conv1d(channels, channels, conv_size, groups=channels)
        self.x_proj = nn.Linear(channels, sum(self.split), bias=False)
        self.scan = ScanParameters(1, channels, state_size=state_size, rank=rank, ones=options.polar[0])
        self.replay = MemoryReplay(channels, options.smr, reverse=reverse) if options.smr else None

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """(B, L, D) input and gate -> (B, L, D)."""
        taps = self.conv.kernel_size[0] - 1
        padding, kernel = ((0, taps), self.conv.weight.flip(-1)) if self.reverse else ((taps, 0), self.conv.weight)
        u = F.conv1d(F.pad(x.transpose(1, 2), padding), kernel, self.conv.bias, groups=self.conv.groups)
        u = F.silu(u).transpose(1, 2).contiguous()
        return self.scanned(u, z.to(u.dtype), last=True)[0]

    def scanned(
        self, u: Tensor, gate: Tensor, axis: int = 1, start: Tensor | None = None, memory: Tensor | None = None, *,
        last: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """What follows the convolution, along any axis but the last.

        Returns:
            The gated output, the state after it (None if this is the ``last`` piece) and the replayed memory after it.
        """
        if self.replay is not None:
            u, memory = self.replay(u, axis, memory)
        delta, B, C = self.x_proj(u).split(self.split, dim=-1)  # (..., R | N | N)
        zeros = self.options.polar[1]
        kept = B.shape[-1] - zeros
        A, D, bias = (constant[0] for constant in self.scan.exact(u))
        weight = self.scan.dt_weight[0]
        result = selective_scan(
            u,
            delta,
            A,
            B[..., :kept],
            C[..., :kept],
            D,
            delta_weight=weight,
            delta_bias=bias,
            softplus=True,
            z=gate,
            reverse=self.reverse,
            dim=axis,
            initial_state=start,
            return_final_state=not last,
            backend=self.backend,
        )
        y, final = output_and_state(result)
        if zeros:
            y = y + present_only(u, delta, weight, bias, B[..., kept:], C[..., kept:]) * F.silu(gate)
        return y, final, memory


class BidirectionalMamba(MixingMatrix, nn.Module):
    """Mixer that scans the tokens forwards and backwards; every token sees all others.

    Both directions share the input projection, the gate and the output projection; convolution, projections and scan
    constants exist once per direction. The two outputs are averaged: their plain sum doubles the activations.

    Shape: (B, L, C) -> (B, L, C)

    Args:
        dim: C.
        state_size: N, states per channel.
        expand: D / C.
        conv_size: Taps of the causal depthwise convolutions.
        dt_rank: R; ceil(C / 16) if not given.
        backend: Back end of the scan, see ``kernels.selective_scan``.
        options: Of the scans.
    """

    def __init__(
        self,
        dim: int,
        *,
        state_size: int = 16,
        expand: float = 2.0,
        conv_size: int = 4,
        dt_rank: int | None = None,
        backend: Backend = "auto",
        options: ScanOptions = NO_OPTIONS,
    ) -> None:
        super().__init__()
        inner = int(expand * dim)
        rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.forwards, self.backwards = (
            DirectionalScan(
                inner,
                state_size=state_size,
                rank=rank,
                conv_size=conv_size,
                reverse=reverse,
                backend=backend,
                options=options,
            )
            for reverse in (False, True)
        )
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        value, gate = self.in_proj(x).chunk(2, dim=-1)
        return self.out_proj(0.5 * (self.forwards(value, gate) + self.backwards(value, gate)))


def output_and_state(result: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    """What a scan returns, with or without its final state."""
    return (result, None) if isinstance(result, Tensor) else result
