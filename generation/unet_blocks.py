"""Parts of the video U-Net; all activations are (B, F, H, W, C), channels last.

Frames are convolved one by one, so that convolutions see (B * F, C, H, W) views in channels-last memory, and attention
and temporal layers see tokens, with no copy between them.

Shapes: B batch, F frames, H, W height and width, C channels, T width of the time embedding.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.observe import announce
from vision_ssm.mixing import MixingMatrix

HEAD_WIDTH = 32
"""Of both spatial attentions, whatever the temporal heads are."""
NORM_EPS = 1e-5


def per_frame(layer: nn.Module, x: Tensor) -> Tensor:
    """A 2-D convolution over every frame: (B, F, H, W, C) -> (B, F, H', W', C')."""
    y = layer(x.flatten(0, 1).permute(0, 3, 1, 2))
    return y.permute(0, 2, 3, 1).contiguous().unflatten(0, (x.shape[0], -1))


class TimeEmbedding(nn.Module):
    """Sinusoids of the timestep, then an MLP of constant width.

    Args:
        dim: Width of the sinusoids, even.
        width: T.
        depth: Linear layers, 2 or more.
    """

    def __init__(self, dim: int, width: int, *, depth: int = 2) -> None:
        super().__init__()
        self.frequencies = dim // 2
        widths = [dim] + [width] * depth
        layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.GELU())]
        self.mlp = nn.Sequential(*layers[:-1])

    def forward(self, time: Tensor) -> Tensor:
        """(B,) timesteps -> (B, T)."""
        weight = next(self.mlp.parameters())
        wide = torch.promote_types(weight.dtype, torch.float32)
        rate = math.log(10000) / (self.frequencies - 1)
        frequencies = torch.exp(-rate * torch.arange(self.frequencies, device=time.device, dtype=wide))
        angle = time.to(wide)[:, None] * frequencies
        return self.mlp(torch.cat([angle.sin(), angle.cos()], dim=-1).to(weight.dtype))


class ResBlock(nn.Module):
    """Two convolutions of every frame with norms over frames and pixels, scaled and shifted by the time.

    Shape: (B, F, H, W, C) -> (B, F, H, W, C')

    Args:
        dim: C.
        out: C'.
        groups: Of the group norms.
        time_width: T, or None for a block without time.
    """

    def __init__(self, dim: int, out: int, *, groups: int, time_width: int | None) -> None:
        super().__init__()
        self.time = None if time_width is None else nn.Linear(time_width, 2 * out)
        self.conv1, self.norm1 = nn.Conv2d(dim, out, 3, padding=1), nn.GroupNorm(groups, out, eps=NORM_EPS)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, padding=1), nn.GroupNorm(groups, out, eps=NORM_EPS)
        self.shortcut = nn.Identity() if dim == out else nn.Linear(dim, out)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """See the class; `time` is (B, T)."""
        h = _normed(self.norm1, per_frame(self.conv1, x))
        if self.time is not None and time is not None:
            scale, shift = self.time(F.silu(time))[:, None, None, None].chunk(2, dim=-1)
            h = h * (scale + 1) + shift
        h = _normed(self.norm2, per_frame(self.conv2, F.silu(h)))
        return F.silu(h) + self.shortcut(x)


def _normed(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return norm(x.movedim(-1, 1)).movedim(1, -1)


class PreNorm(nn.Module):
    """x + layer(norm(x)), with a norm over the channels that has a gain and no bias.

    Args:
        dim: C.
        layer: Keeps the shape.
    """

    def __init__(self, dim: int, layer: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS, bias=False)
        self.layer = layer

    def forward(self, x: Tensor, *extra: Tensor) -> Tensor:
        """(B, F, H, W, C) -> the same; `extra` goes to the layer."""
        return x + self.layer(self.norm(x), *extra)


class SpatialAttention(MixingMatrix, nn.Module):
    """Softmax attention over the places of every frame.

    Shape: (B, F, H, W, C) -> (B, F, H, W, C)

    Args:
        dim: C.
        heads: Number of heads, each 32 wide.
    """

    def __init__(self, dim: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * heads * HEAD_WIDTH, bias=False)
        self.to_out = nn.Linear(heads * HEAD_WIDTH, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        q, k, v = _places(self.to_qkv(x), self.heads)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.to_out(y).reshape(x.shape)


class SpatialLinearAttention(MixingMatrix, nn.Module):
    """Attention over the places of every frame with a cost linear in their number.

    Shape: (B, F, H, W, C) -> (B, F, H, W, C)

    Args:
        dim: C.
        heads: Number of heads, each 32 wide.
    """

    def __init__(self, dim: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * heads * HEAD_WIDTH, bias=False)
        self.to_out = nn.Linear(heads * HEAD_WIDTH, dim)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        q, k, v = _places(self.to_qkv(x), self.heads)
        q, k = q.softmax(-1) * HEAD_WIDTH**-0.5, k.softmax(-2)
        y = q @ (k.transpose(-1, -2) @ v)
        announce("attention", y, q, k, v)
        return self.to_out(y.transpose(1, 2).flatten(2)).reshape(x.shape)


def _places(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, F, H, W, 3 heads 32) -> q, k, v, each (B * F, heads, H * W, 32)."""
    q, k, v = qkv.flatten(2, 3).flatten(0, 1).unflatten(-1, (3, heads, HEAD_WIDTH)).permute(2, 0, 3, 1, 4)
    return q, k, v
