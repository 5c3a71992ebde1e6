"""Attention of every frame to all others, place by place, beside which the scans of `generation.temporal` are measured.

Shapes: B batch, F frames, C channels, E heads, P head width. x is (B, F, ..., C), channels last.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.observe import announce
from vision_ssm.mixing import MixingMatrix

BUCKETS, MAX_DISTANCE = 32, 32
ROTATED = 32
"""At most so many channels of a head are rotated."""


class FramePositionBias(nn.Module):
    """Learned bias of the scores by the distance of two frames, in buckets (T5), for both directions.

    Args:
        heads: E.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.table = nn.Embedding(BUCKETS, heads)

    def forward(self, frames: int) -> Tensor:
        """(E, F, F): bias of query frame i for key frame j."""
        place = torch.arange(frames, device=self.table.weight.device)
        return self.table(_bucket(place[:, None] - place)).permute(2, 0, 1)


def _bucket(distance: Tensor) -> Tensor:
    """Exact distances up to a quarter of the buckets, then logarithmic; the other half for keys that come later."""
    half, exact = BUCKETS // 2, BUCKETS // 4
    size = distance.abs()
    far = (size.clamp(min=exact) / exact).log() / math.log(MAX_DISTANCE / exact) * (half - exact)
    bucket = torch.where(size < exact, size, (exact + far.long()).clamp(max=half - 1))
    return bucket + half * (distance < 0)


def rotate(x: Tensor) -> Tensor:
    """Turn pairs of channels by the frame's index (rotary positions, base 10000, interleaved pairs).

    Args:
        x: (..., F, P); the first min(32, P) channels turn.
    """
    width = min(ROTATED, x.shape[-1]) // 2 * 2
    pairs = torch.arange(width // 2, device=x.device, dtype=torch.float32)
    frames = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)
    angle = frames[:, None] * 10000.0 ** (-2 * pairs / width)  # (F, pairs)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :width].unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    return torch.cat([turned, x[..., width:]], dim=-1)


class _Heads(MixingMatrix, nn.Module):
    """Projection to queries, keys and values of all heads, and back."""

    def __init__(self, dim: int, *, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * heads * head_width, bias=False)
        self.to_out = nn.Linear(heads * head_width, dim, bias=False)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, F, ..., C) -> q, k, v, each (B, places, E, F, P)."""
        q, k, v = self.to_qkv(x.flatten(2, -2)).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 2, 4, 1, 5)
        return q, k, v

    def join(self, y: Tensor, shape: torch.Size) -> Tensor:
        """(B, places, E, F, P) -> (B, F, ..., C)."""
        return self.to_out(y.permute(0, 3, 1, 2, 4).flatten(3)).reshape(shape)


class TemporalAttention(_Heads):
    """Softmax attention over the frames with rotary positions and a bias by distance.

    Args:
        dim: C.
        heads: E.
        head_width: P.
    """

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """(B, F, ..., C) and the bias (E, F, F) of `FramePositionBias` -> (B, F, ..., C)."""
        shape = x.shape
        x = x if x.ndim > 3 else x.unsqueeze(2)
        q, k, v = self.split(x)
        # fused attention wants one batch axis
        q, k, v = (t.flatten(0, 1) for t in (rotate(q), rotate(k), v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return self.join(y.unflatten(0, (x.shape[0], -1)), shape)


class TemporalLinearAttention(_Heads):
    """Attention with a cost linear in the frames: queries and keys are normalised each by itself.

    Args:
        dim: C.
        heads: E.
        head_width: P.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, ..., C) -> (B, F, ..., C)."""
        shape = x.shape
        x = x if x.ndim > 3 else x.unsqueeze(2)
        q, k, v = self.split(x)
        q = rotate(q).softmax(-1) * q.shape[-1] ** -0.5
        k = rotate(k).softmax(-2)
        y = q @ (k.transpose(-1, -2) @ v)
        announce("attention", y, q, k, v)
        return self.join(y, shape)
