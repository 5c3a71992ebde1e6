"""What a restorer minimises."""

import torch
from torch import Tensor, nn

from restoration.config import LossConfig

_EPSILON = 1e-3  # of Charbonnier's loss, as restorers have it


class RestorationLoss(nn.Module):
    """Distance of pixels, and optionally of Fourier coefficients.

    ``charbonnier`` is the mean of sqrt(d^2 + 1e-6). The frequency part is the mean absolute difference of the real
    and imaginary parts of the orthonormal 2-D transforms: for an error without structure it is about as large as the
    distance of the pixels, for any size of crop.
    """

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, restored: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Losses of (B, C, H, W) images: ``loss`` to minimise, its parts, and ``psnr`` of the batch for the log."""
        difference = restored.float() - target
        square = difference.square()
        pixels = difference.abs().mean() if self.config.name == "l1" else (square + _EPSILON**2).sqrt().mean()
        parts = {self.config.name: pixels}
        total = pixels
        if self.config.frequency:
            spectrum = torch.view_as_real(torch.fft.rfft2(difference, norm="ortho"))
            parts["frequency"] = spectrum.abs().mean()
            total = total + self.config.frequency * parts["frequency"]
        psnr = -10 * square.detach().mean(dim=(1, 2, 3)).clamp_min(1e-10).log10().mean()
        return {"loss": total, **parts, "psnr": psnr}
