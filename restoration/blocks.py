"""Building blocks that the restorers share. All maps are (B, C, H, W) and run fastest in channels-last memory."""

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vision_ssm.mixer_config import NO_OPTIONS, MixerName, ScanOptions
from vision_ssm.mixers import AttentionMixer
from vision_ssm.mixers2d import build_mixer2d
from vision_ssm.ss2d import GatedMap

NORM_EPS = 1e-5


class SerpentBlock(nn.Module):
    """x + SS2D(LN(x)): the gated four-direction scan is the whole block, there is no feed-forward half.

    This is the form of the first VMamba blocks of early 2024. Shape kept. Autocast makes the norm's result float32; it
    goes back to the type of the maps once, for both projections that read it. Another mixer takes SS2D's place and its
    name, which the weights have.

    Args:
        channels: of the map.
        mixer: see `vision_ssm.mixers2d`.
        options: of scans.
    """

    def __init__(self, channels: int, *, mixer: MixerName = "s6", options: ScanOptions = NO_OPTIONS) -> None:
        super().__init__()
        self.norm = LayerNorm2d(channels, eps=NORM_EPS)
        self.ss2d = build_mixer2d(mixer, channels, init="vmamba", act="silu", options=options)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return x + scan_maps(self.ss2d, self.norm(x).to(x.dtype))


class ConvBlock(nn.Module):
    """x + conv3x3(ReLU(conv3x3(x))), the residual block of EDSR (Lim et al. 2017, section 3.1). Shape kept.

    The second convolution starts at zero and the block as the identity.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return x + self.conv2(F.relu(self.conv1(x)))


def scan_maps(ss2d: nn.Module, x: Tensor) -> Tensor:
    """Apply a mixer, which takes pixels, to maps: (B, C, H, W) -> (B, C, H, W)."""
    return ss2d(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Blocks(nn.Sequential):
    """Blocks one after the other, each recomputed in the backward pass where `checkpointing` is set."""

    checkpointing: bool = False

    def forward(self, x: Tensor) -> Tensor:
        """Maps whose shape every block keeps."""
        for block in self:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


def checkpoint_blocks(net: nn.Module, enable: bool = True) -> None:
    """Keep only each block's input for the backward pass of `net` and compute its inside again, or stop doing so.

    Costs a second forward pass; saves the tensors inside the scans, the largest of a training step.
    """
    for module in net.modules():
        if isinstance(module, Blocks):
            module.checkpointing = enable


def init_projections(net: nn.Module) -> None:
    """Draw the projections into and out of every mixer from a normal distribution of 0.02, cut off at two sigma."""
    for module in net.modules():
        if isinstance(module, AttentionMixer):
            for projection in (module.qkv, module.proj):
                trunc_normal_(projection.weight, std=0.02)
        if isinstance(module, GatedMap):
            for projection in (module.in_proj, module.gate_proj, module.out_proj):
                trunc_normal_(projection.weight, std=0.02)
