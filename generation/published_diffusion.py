"""The published diffusion process of the video U-Net: noise prediction on a cosine schedule, ancestral sampling.

Oshima et al. (2024) train and sample with T = 256 steps; Nichol and Dhariwal (2021, section 3.2) give the schedule,
Ho et al. (2020, algorithms 1 and 2) the process. Videos are in [0, 1] outside and in [-1, 1] inside.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from vision_ssm.errors import UserError

OFFSET, MAX_BETA = 0.008, 0.9999
MIN_VARIANCE = 1e-20


class Denoiser(Protocol):
    """Predicts the noise in a video: `SSMVideoUNet`, or any module called as it."""

    def __call__(self, sample: Tensor, timestep: Tensor, *, return_dict: bool) -> tuple[Tensor]:
        """(B, C, F, H, W) and (B,) -> a tuple of (B, C, F, H, W)."""
        ...


@dataclass(frozen=True)
class CosineSchedule:
    """The twelve tables of the process, each (T,) float32; computed in float64 and rounded once."""

    betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    log_one_minus_alphas_cumprod: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor

    @classmethod
    def of(cls, timesteps: int) -> "CosineSchedule":
        """The schedule with T = `timesteps`.

        Raises:
            UserError: Fewer than one timestep.
        """
        if timesteps < 1:
            raise UserError(f"timesteps: got {timesteps}, expected 1 or more (the paper has 256)")
        share = torch.linspace(0, timesteps, timesteps + 1, dtype=torch.float64) / timesteps
        signal = torch.cos((share + OFFSET) / (1 + OFFSET) * math.pi * 0.5) ** 2
        signal = signal / signal[0]
        betas = torch.clip(1 - signal[1:] / signal[:-1], 0, MAX_BETA)
        kept = torch.cumprod(1 - betas, dim=0)
        before = F.pad(kept[:-1], (1, 0), value=1.0)
        variance = betas * (1 - before) / (1 - kept)
        tables = cls(
            betas=betas,
            alphas_cumprod=kept,
            alphas_cumprod_prev=before,
            sqrt_alphas_cumprod=kept.sqrt(),
            sqrt_one_minus_alphas_cumprod=(1 - kept).sqrt(),
            log_one_minus_alphas_cumprod=(1 - kept).log(),
            sqrt_recip_alphas_cumprod=(1 / kept).sqrt(),
            sqrt_recipm1_alphas_cumprod=(1 / kept - 1).sqrt(),
            posterior_variance=variance,
            posterior_log_variance_clipped=variance.clamp(min=MIN_VARIANCE).log(),
            posterior_mean_coef1=betas * before.sqrt() / (1 - kept),
            posterior_mean_coef2=(1 - before) * (1 - betas).sqrt() / (1 - kept),
        )
        return tables.to(torch.float32)

    def to(self, *args: torch.dtype | torch.device | str) -> "CosineSchedule":
        """All tables in another type or on another device, as `Tensor.to`."""
        return replace(self, **{f.name: getattr(self, f.name).to(*args) for f in fields(self)})


class PublishedDiffusion:
    """Training loss and sampling as published.

    Args:
        timesteps: T.
        device: Where the videos are.
    """

    def __init__(self, timesteps: int = 256, *, device: torch.device | str = "cpu") -> None:
        self.timesteps = timesteps
        self.schedule = CosineSchedule.of(timesteps).to(device)
        self.device = torch.device(device)

    def add_noise(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """The noisy video at `timestep` (B,), for a clean one in [-1, 1] and unit noise, all (B, C, F, H, W)."""
        signal = _at(self.schedule.sqrt_alphas_cumprod, timestep)
        return signal * clean + _at(self.schedule.sqrt_one_minus_alphas_cumprod, timestep) * noise

    def loss(
        self,
        model: Denoiser,
        video: Tensor,
        *,
        kind: Literal["l1", "l2"] = "l2",
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Mean error of the predicted noise at random timesteps.

        Args:
            model: Predicts noise.
            video: (B, C, F, H, W) in [0, 1].
            kind: Absolute or squared error.
            generator: Of timesteps and noise.
        """
        clean = 2 * video - 1
        timestep = torch.randint(self.timesteps, (len(video),), device=video.device, generator=generator)
        noise = torch.randn(video.shape, device=video.device, dtype=video.dtype, generator=generator)
        predicted = model(self.add_noise(clean, noise, timestep), timestep, return_dict=False)[0]
        return F.l1_loss(predicted, noise) if kind == "l1" else F.mse_loss(predicted, noise)

    @torch.no_grad()
    def sample(
        self,
        model: Denoiser,
        shape: tuple[int, int, int, int, int],
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        percentile: float | None = None,
    ) -> Tensor:
        """Draw videos by all T steps, from noise.

        Args:
            model: Predicts noise.
            shape: (B, C, F, H, W).
            generator: One for all, or one for each video: then a video does not depend on those drawn with it.
            percentile: Dynamic thresholding at this quantile of |x0| (0.9 as published); None clips x0 to [-1, 1].

        Returns:
            (B, C, F, H, W) in [0, 1].
        """
        if percentile is not None and not 0 < percentile <= 1:
            raise UserError(f"percentile: got {percentile}, expected above 0 to 1 (0.9 is usual), or None to clip")
        x = randn_tensor(shape, generator=generator, device=self.device)
        for t in reversed(range(self.timesteps)):
            timestep = torch.full((shape[0],), t, device=self.device)
            predicted = model(x, timestep, return_dict=False)[0]
            x = self.step(x, predicted, t, percentile=percentile)
            if t > 0:
                scale = (0.5 * self.schedule.posterior_log_variance_clipped[t]).exp()
                x = x + scale * randn_tensor(shape, generator=generator, device=self.device)
        return (x + 1) / 2

    def step(self, x: Tensor, noise: Tensor, t: int, *, percentile: float | None = None) -> Tensor:
        """Mean of the video one step cleaner than `x`, for the noise predicted in it; see `sample`."""
        s = self.schedule
        clean = s.sqrt_recip_alphas_cumprod[t] * x - s.sqrt_recipm1_alphas_cumprod[t] * noise
        if percentile is None:
            clean = clean.clamp(-1, 1)
        else:
            size = clean.abs().flatten(1).quantile(percentile, dim=1).clamp(min=1).view(-1, 1, 1, 1, 1)
            clean = clean.clamp(-size, size) / size
        return s.posterior_mean_coef1[t] * clean + s.posterior_mean_coef2[t] * x


def _at(table: Tensor, timestep: Tensor) -> Tensor:
    """Entries (B,) of a table, to be multiplied with videos."""
    return table[timestep].view(-1, 1, 1, 1, 1)
