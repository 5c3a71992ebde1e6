"""How close a restored image is to the clean one: PSNR, SSIM and LPIPS, by torchmetrics."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from vision_ssm.checkpoint import load_checkpoint
from vision_ssm.errors import UserError

Channel = Literal["rgb", "y"]

_TO_Y = (65.481, 128.553, 24.966)
"""ITU-R BT.601 as MATLAB's rgb2ycbcr, plus 16; for RGB in [0, 1] and Y in 255ths."""

_ALEXNET_LEAST = 31
_SSIM_EDGE = 5
"""Half of SSIM's window: torchmetrics mirrors the image there, the field leaves these pixels out."""


@dataclass(frozen=True)
class Measure:
    """How images are compared. The field's habit: rgb without border for denoising and deblurring, y with border =
    scale for enlarging.

    Images are clipped to [0, 1] and not rounded. SSIM has a Gaussian window of 11 x 11, sigma 1.5, and leaves out
    those 5 pixels at the borders where the window does not fit.
    """

    channel: Channel = "rgb"
    border: int = 0
    """Pixels at each side that are left out."""

    def __post_init__(self) -> None:
        if self.channel not in ("rgb", "y") or self.border < 0:
            raise UserError(f"channel must be rgb or y and border 0 or more, got {self.channel!r} and {self.border}")

    def __call__(self, restored: Tensor, clean: Tensor) -> dict[str, float]:
        """``psnr`` in dB (100 at most) and ``ssim`` of two (3, H, W) images; no ssim where a side is below 11 pixels.

        Raises:
            UserError: The images differ in size, or nothing is left inside of the border.
        """
        restored, clean = self._prepared(restored, clean)
        # torchmetrics takes seconds to import, and training asks for it only when it scores
        from torchmetrics.functional.image import (
            peak_signal_noise_ratio,
            structural_similarity_index_measure,
        )

        psnr = peak_signal_noise_ratio(restored, clean, data_range=1.0)
        found = {"psnr": min(float(psnr), 100.0)}
        if min(restored.shape[2:]) > 2 * _SSIM_EDGE:
            _, at_pixels = structural_similarity_index_measure(
                restored, clean, sigma=1.5, data_range=1.0, return_full_image=True
            )
            found["ssim"] = float(at_pixels[..., _SSIM_EDGE:-_SSIM_EDGE, _SSIM_EDGE:-_SSIM_EDGE].mean())
        return found

    def _prepared(self, restored: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
        if restored.shape != clean.shape:
            raise UserError(f"the result is {_size(restored)} pixels large and the clean image {_size(clean)}")
        edge = self.border
        pair = [x[..., edge : x.shape[-2] - edge, edge : x.shape[-1] - edge][None] for x in (restored, clean)]
        if not pair[0].numel():
            raise UserError(f"nothing is left of {_size(clean)} pixels inside of a border of {edge}")
        pair = [x.float().clamp(0, 1) for x in pair]
        return (luma(pair[0]), luma(pair[1])) if self.channel == "y" else (pair[0], pair[1])


def luma(images: Tensor) -> Tensor:
    """Y of (B, 3, H, W) RGB images in [0, 1], as (B, 1, H, W), black 16 / 255 and white 235 / 255."""
    weights = images.new_tensor(_TO_Y)[:, None, None]
    return ((images * weights).sum(1, keepdim=True) + 16) / 255


class Lpips(nn.Module):
    """LPIPS (arXiv 1801.03924) on AlexNet, smaller is closer; its trunk is read from a file, nothing is downloaded.

    Args:
        weights: torchvision's AlexNet for ImageNet (``alexnet-owt-7be5be79.pth``); what LPIPS itself has learned comes
            with torchmetrics.

    Raises:
        UserError: No such file, or no AlexNet.
    """

    def __init__(self, weights: str | Path) -> None:
        super().__init__()
        from torchmetrics.functional.image.lpips import _LPIPS  # its public form would download the trunk

        state, _ = load_checkpoint(weights)
        self.net = _LPIPS(pretrained=True, net="alex", pnet_rand=True)
        trunk = self.net.net.state_dict()
        found = {name: state.get(f"features.{name.partition('.')[2]}") for name in trunk}
        given = {name: tensor for name, tensor in found.items() if tensor is not None}
        if {name: tensor.shape for name, tensor in given.items()} != {name: own.shape for name, own in trunk.items()}:
            raise UserError(f"{weights} is not torchvision's AlexNet (alexnet-owt-7be5be79.pth), which LPIPS needs")
        self.net.net.load_state_dict(given)

    @torch.no_grad()
    def forward(self, restored: Tensor, clean: Tensor) -> float | None:
        """LPIPS of two (3, H, W) images in [0, 1]; None where a side is below 31 pixels, too small for AlexNet."""
        if min(restored.shape[1:]) < _ALEXNET_LEAST:
            return None
        pair = [x[None].float().clamp(0, 1).cpu() * 2 - 1 for x in (restored, clean)]
        return float(self.net(*pair))


def _size(image: Tensor) -> str:
    return f"{image.shape[-1]}x{image.shape[-2]}"
