"""The video U-Net of Oshima et al. ("SSM Meets Video Diffusion Models", 2024) with state-space temporal layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from generation.frame_attention import FramePositionBias
from generation.temporal import Kind, TemporalConfig, Variant, temporal_layer
from generation.unet_blocks import (
    PreNorm,
    ResBlock,
    SpatialAttention,
    SpatialLinearAttention,
    TimeEmbedding,
    per_frame,
)
from vision_ssm.errors import UserError

TIME_WIDTH = 32
"""Width of the time embedding / base width of the network (in most U-Nets 4)."""


@dataclass
class VideoUNetOutput(BaseOutput):
    """What the network predicts."""

    sample: Tensor
    """(B, C, F, H, W), the shape of the input."""


class Stage(nn.Module):
    """One resolution of the U-Net: two blocks, attention within frames, a temporal layer, then a resampling.

    Shape: (B, F, H, W, C) -> (B, F, H', W', C')

    Args:
        dim: C.
        out: C'.
        temporal: Of the layer across frames.
        groups: Of the group norms.
        time_width: Of the time embedding.
        resample: Convolution that halves or doubles height and width, or None.
    """

    def __init__(
        self, dim: int, out: int, *, temporal: TemporalConfig, groups: int, time_width: int, resample: nn.Module | None
    ) -> None:
        super().__init__()
        self.block1 = ResBlock(dim, out, groups=groups, time_width=time_width)
        self.block2 = ResBlock(out, out, groups=groups, time_width=time_width)
        self.spatial = PreNorm(out, SpatialLinearAttention(out, heads=temporal.heads))
        self.temporal = PreNorm(out, temporal_layer(temporal, out))
        self.resample = resample

    def forward(self, x: Tensor, time: Tensor, *bias: Tensor) -> tuple[Tensor, Tensor]:
        """The result, and what it was before the resampling."""
        x = self.block2(self.block1(x, time), time)
        x = self.temporal(self.spatial(x), *bias)
        return (x if self.resample is None else per_frame(self.resample, x)), x


class SSMVideoUNet(ModelMixin, ConfigMixin):
    """Denoising U-Net over videos: convolutions and attention within frames, a scan (or attention) across them.

    The defaults are the network of the paper's first version. Height and width must be divisible by
    2^(len(dim_mults) - 1); the number of frames is free.

    Args:
        dim: Base width.
        dim_mults: Width of each resolution / `dim`.
        in_channels: Channels of the video.
        heads: Of all attentions; those within frames are 32 wide.
        head_width: Of temporal attention.
        groups: Of the group norms.
        time_layers: Linear layers of the time embedding.
        temporal: The temporal layer: "s4d" and "s6" as published, "ssd" (matrix products; give it `state_size` 64), or
            "attention" and "linear_attention" for comparison.
        variant: How a scan is wrapped, see `generation.temporal.TemporalConfig`.
        bidirectional: Scan from the last frame too.
        state_size: Real states per channel of a scan.
        hidden: Width of the temporal layer's MLP or gates, see the layers.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        dim: int = 64,
        dim_mults: Sequence[int] = (1, 2, 4, 8),
        in_channels: int = 3,
        heads: int = 8,
        head_width: int = 64,
        groups: int = 8,
        time_layers: int = 2,
        temporal: Kind = "s4d",
        variant: Variant = "glu",
        bidirectional: bool = True,
        state_size: int = 512,
        hidden: int | None = 512,
    ) -> None:
        super().__init__()
        config = TemporalConfig(
            kind=temporal, variant=variant, bidirectional=bidirectional, state_size=state_size, hidden=hidden,
            heads=heads, head_width=head_width,
        )  # fmt: skip
        _check_widths(dim, dim_mults, groups)
        width = TIME_WIDTH * dim
        widths = [dim, *(dim * mult for mult in dim_mults)]
        pairs = list(pairwise(widths))
        self.gradient_checkpointing = False
        self.time_embedding = TimeEmbedding(dim, width, depth=time_layers)
        self.frame_bias = FramePositionBias(heads) if config.takes_bias else None
        self.stem = nn.Conv2d(in_channels, dim, 7, padding=3)
        self.stem_temporal = PreNorm(dim, temporal_layer(config, dim))
        self.downs = nn.ModuleList(
            Stage(
                a, b, temporal=config, groups=groups, time_width=width,
                resample=None if i == len(pairs) - 1 else nn.Conv2d(b, b, 4, stride=2, padding=1),
            )
            for i, (a, b) in enumerate(pairs)
        )  # fmt: skip
        deepest = widths[-1]
        self.middle1 = ResBlock(deepest, deepest, groups=groups, time_width=width)
        self.middle_spatial = PreNorm(deepest, SpatialAttention(deepest, heads=heads))
        self.middle_temporal = PreNorm(deepest, temporal_layer(config, deepest))
        self.middle2 = ResBlock(deepest, deepest, groups=groups, time_width=width)
        self.ups = nn.ModuleList(
            Stage(
                2 * b, a, temporal=config, groups=groups, time_width=width,
                resample=None if i == 0 else nn.ConvTranspose2d(a, a, 4, stride=2, padding=1),
            )
            for i, (a, b) in reversed(list(enumerate(pairs)))
        )  # fmt: skip
        self.head = ResBlock(2 * dim, dim, groups=groups, time_width=None)
        self.out = nn.Linear(dim, in_channels)

    def forward(
        self, sample: Tensor, timestep: Tensor | float, *, return_dict: bool = True
    ) -> VideoUNetOutput | tuple[Tensor]:
        """Predict the noise of a noisy video (or whatever the network was trained for).

        Args:
            sample: (B, C, F, H, W).
            timestep: (B,), or one number for all.
            return_dict: Whether to return the output class, else a tuple of its field.

        Returns:
            `VideoUNetOutput`, its `sample` shaped as the input.

        Raises:
            UserError: The shape does not fit the network.
        """
        self._check_sample(sample)
        time = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        time = self.time_embedding(time)
        bias = () if self.frame_bias is None else (self.frame_bias(sample.shape[2]),)
        x = per_frame(self.stem, sample.permute(0, 2, 3, 4, 1))
        x = first = self.stem_temporal(x, *bias)
        skips = []
        for stage in self.downs:
            x, skip = self._stage(stage, x, time, *bias)
            skips.append(skip)
        x = self.middle_temporal(self.middle_spatial(self.middle1(x, time)), *bias)
        x = self.middle2(x, time)
        for stage in self.ups:
            x, _ = self._stage(stage, torch.cat([x, skips.pop()], dim=-1), time, *bias)
        x = self.out(self.head(torch.cat([x, first], dim=-1))).permute(0, 4, 1, 2, 3)
        return VideoUNetOutput(sample=x) if return_dict else (x,)

    def _stage(self, stage: nn.Module, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(stage, *inputs)  # pyright: ignore[reportOptionalCall]
        return stage(*inputs)

    def _check_sample(self, sample: Tensor) -> None:
        channels, step = self.config["in_channels"], 2 ** (len(self.downs) - 1)
        if sample.ndim != 5 or sample.shape[1] != channels:
            raise UserError(
                f"sample: got shape {tuple(sample.shape)}, expected (batch, channels, frames, height, width) "
                f"with {channels} channels"
            )
        if sample.shape[3] % step or sample.shape[4] % step:
            raise UserError(
                f"sample: got {sample.shape[3]} x {sample.shape[4]} pixels; this network of {len(self.downs)} "
                f"resolutions needs multiples of {step}"
            )


def _check_widths(dim: int, dim_mults: Sequence[int], groups: int) -> None:
    if dim < 4 or dim % 2 or dim % groups:
        raise UserError(f"dim: got {dim}, expected an even number of at least 4, divisible by groups ({groups})")
    if not dim_mults or any(mult < 1 for mult in dim_mults):
        raise UserError(f"dim_mults: got {tuple(dim_mults)}, expected one whole number of at least 1 per resolution")
