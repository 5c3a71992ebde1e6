"""How time and class reach a DiM: their embeddings, and the three ways of a layer to take them in.

``adaln_zero``: every layer computes shift, scale and gate from time + class, all zero at the start (DiT, section 3.2).
``adaln_single``: one such computation for the whole net and a learned offset per layer (PixArt-alpha, section 2.3).
``token``: time and class stand before the places of every frame as two more tokens (DiS; closest to DiM's paper).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from vision_ssm.errors import UserError

# Shapes: B batch, f frames that have a noise level of their own (F, or 1 for all alike), D channels.

Conditioning = Literal["adaln_zero", "adaln_single", "token"]
TIME_CHANNELS = 256


def sincos(positions: Tensor, channels: int) -> Tensor:
    """(n,) numbers -> (n, channels): cosines, then sines, of periods from 2 pi up to 10,000 times that."""
    return get_timestep_embedding(positions, channels, flip_sin_to_cos=True, downscale_freq_shift=0)


def grid_positions(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """(height * width, channels) fixed positions of a grid of any size: rows in one half, columns in the other."""
    rows, columns = (sincos(torch.arange(n, device=device), channels // 2) for n in (height, width))
    return torch.cat([rows.repeat_interleave(width, 0), columns.repeat(height, 1)], dim=-1)


class TimeEmbedding(nn.Module):
    """Noise level in the scheduler's units (0 to 1000, fractions allowed) to a vector: (B, f) -> (B, f, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inner = nn.Linear(TIME_CHANNELS, dim)
        self.outer = nn.Linear(dim, dim)
        for layer in (self.inner, self.outer):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, timestep: Tensor) -> Tensor:
        """See the class."""
        waves = sincos(timestep.flatten(), TIME_CHANNELS).to(self.inner.weight.dtype)
        return self.outer(F.silu(self.inner(waves))).unflatten(0, timestep.shape)


class ClassEmbedding(nn.Module):
    """Class numbers to vectors: (B,) -> (B, D). The last row stands for "no class".

    Args:
        num_classes: How many classes there are; numbers run from 0.
        dim: D.
        dropout: Share of labels that training replaces by "no class", for classifier-free guidance; sampling, which
            needs no gradients, never does.
    """

    def __init__(self, num_classes: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dropout = dropout
        self.table = nn.Embedding(num_classes + 1, dim)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, labels: Tensor) -> Tensor:
        """See the class; ``num_classes`` itself is the label of "no class"."""
        # looking at the values of GPU labels would stall it, at those of a graph break it; the table checks them too
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            check_labels(labels, self.num_classes, no_class=True)
        if self.training and self.dropout > 0 and torch.is_grad_enabled():
            dropped = torch.rand(labels.shape, device=labels.device) < self.dropout
            labels = torch.where(dropped, self.num_classes, labels)
        return self.table(labels)


def check_labels(labels: Tensor, num_classes: int, *, no_class: bool) -> None:
    """Refuse classes that a model does not have.

    Args:
        labels: Numbers from 0.
        num_classes: How many classes the model has.
        no_class: Whether ``num_classes`` itself may be given, for "no class".

    Raises:
        UserError: Names the first such label and the range.
    """
    wrong = labels[(labels < 0) | (labels >= num_classes + no_class)]
    if wrong.numel():
        raise UserError(f"there is no class {int(wrong[0])}: this model knows the classes 0 to {num_classes - 1}")


class AdaLNZero(nn.Module):
    """A layer's own shift, scale and gate from time + class, zero at the start."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = zero_linear(dim, 3 * dim)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """(B, f, 1, D), SiLU applied -> three of (B, f, 1, D)."""
        return self.linear(condition).chunk(3, dim=-1)


class AdaLNSingle(nn.Module):
    """A layer's learned offset to the shift, scale and gate that the net computes once, zero at the start.

    Args:
        dim: D.
        own_gate: The gate is the offset alone, so that a layer that is added to a trained net starts closed.
    """

    def __init__(self, dim: int, *, own_gate: bool) -> None:
        super().__init__()
        self.own_gate = own_gate
        self.offset = nn.Parameter(torch.zeros(3 * dim))

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """(B, f, 1, 3 D) of the whole net -> shift, scale and gate, (B, f, 1, D) or the gate (D,)."""
        shift, scale, gate = (condition + self.offset).chunk(3, dim=-1)
        return shift, scale, self.offset.chunk(3)[2] if self.own_gate else gate


class Unconditioned(nn.Module):
    """A learned shift, scale and gate for nets whose conditions are tokens; a closed gate is an identity layer."""

    def __init__(self, dim: int, *, open_gate: bool) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(dim))
        self.scale = nn.Parameter(torch.zeros(dim))
        self.gate = nn.Parameter(torch.full((dim,), float(open_gate)))

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Anything -> three of (D,)."""
        return self.shift, self.scale, self.gate


def build_modulation(kind: Conditioning, dim: int, *, added: bool) -> AdaLNZero | AdaLNSingle | Unconditioned:
    """What gives a layer its shift, scale and gate.

    Args:
        kind: The conditioning.
        dim: D.
        added: The layer may be added to a net trained on images, so it must start as the identity.

    Raises:
        UserError: There is no such conditioning.
    """
    if kind == "adaln_zero":
        return AdaLNZero(dim)
    if kind == "adaln_single":
        return AdaLNSingle(dim, own_gate=added)
    if kind == "token":
        return Unconditioned(dim, open_gate=not added)
    raise UserError(f'conditioning must be "adaln_zero", "adaln_single" or "token", got {kind!r}')


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer that gives zeros until it has learned something."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
