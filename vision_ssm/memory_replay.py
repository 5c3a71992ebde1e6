"""Memory replay (SMR, arXiv 2405.17534): a scan's input is weighted by a short memory of what came before it."""

import torch
from torch import Tensor, nn

from kernels import causal_conv1d


class MemoryReplay(nn.Module):
    """u <- 2 sigmoid(memory) u, where the memory is a causal depthwise convolution of u in the order of the scan.

    Experimental. Of the paper's section 4 the convolution and the product are known; the sigmoid is ours. The weights
    start at zero, where it changes nothing, bit for bit: it can be added to a trained network.

    Shape: (..., D) -> (..., D), read along any axis but the last.

    Args:
        channels: D.
        taps: of the convolution, the present input included.
        reverse: Read from the end.
    """

    def __init__(self, channels: int, taps: int, *, reverse: bool = False) -> None:
        super().__init__()
        self.reverse = reverse
        self.weight = nn.Parameter(torch.zeros(channels, taps))

    def forward(self, u: Tensor, axis: int = 1, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The weighted input, and the last inputs that the next piece needs (taps - 1 along the axis)."""
        memory, last = causal_conv1d(
            u, self.weight, reverse=self.reverse, dim=axis, initial_state=state, return_final_state=True
        )  # fmt: skip
        return u * (2 * memory.sigmoid()), last
