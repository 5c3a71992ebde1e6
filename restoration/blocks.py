"""Building blocks that the restorers share. All maps are (B, C, H, W) and run fastest in channels-last memory."""

import torch
from timm.layers import LayerNorm2d, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vision_ssm.ss2d import SS2D

NORM_EPS = 1e-5


class SerpentBlock(nn.Module):
    """x + SS2D(LN(x)): the gated four-direction scan is the whole block, there is no feed-forward half.

    This is the form of the first VMamba blocks of early 2024. Shape kept. Autocast makes the norm's result float32; it
    goes back to the type of the maps once, for both projections that read it.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = LayerNorm2d(channels, eps=NORM_EPS)
        self.ss2d = SS2D(channels, init="vmamba", act="silu")

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return x + scan_maps(self.ss2d, self.norm(x).to(x.dtype))


def scan_maps(ss2d: SS2D, x: Tensor) -> Tensor:
    """Apply a scan module, which takes pixels, to maps: (B, C, H, W) -> (B, C, H, W)."""
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
    """Draw the projections into and out of every scan from a normal distribution of 0.02, cut off at two sigma."""
    for module in net.modules():
        if isinstance(module, SS2D):
            for projection in (module.in_proj, module.gate_proj, module.out_proj):
                trunc_normal_(projection.weight, std=0.02)
