"""Any network of timm as a detector's backbone, students of `vssm distill` among them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from detection.blocks import SPPF, ConvNormAct
from detection.head import STRIDES
from vision_ssm.classify.config import NetworkConfig, Statistics
from vision_ssm.classify.model import STATISTICS, build_network, normalized
from vision_ssm.errors import UserError


class TimmBackbone(nn.Module):
    """(B, 3, H, W) in [0, 1] -> maps at strides 8, 16, 32 of the given widths.

    Maps of a network that has these strides are projected. Of one with a single stride, as vision transformers, the
    last map is made larger by transposed convolutions and smaller by pooling (simple feature pyramid of ViTDet, Li et
    al. 2022, section 3).

    Args:
        name: timm's name of the network, or one of ours.
        widths: Channels of the three maps.
        options: Arguments of timm.create_model.
        statistics: What the network's pixels are normalised by.

    Raises:
        UserError: No such network, or its maps do not give the three strides.
    """

    def __init__(
        self,
        name: str,
        widths: Sequence[int],
        *,
        options: Mapping[str, Any] | None = None,
        statistics: Statistics = "plain",
    ) -> None:
        super().__init__()
        if statistics not in STATISTICS:
            raise UserError(f"statistics must be {' or '.join(STATISTICS)}, got {statistics!r}")
        self.statistics: Statistics = statistics
        self.network = _network(name, dict(options or {}))
        info = getattr(self.network, "feature_info", None)
        if not isinstance(info, list) or not hasattr(self.network, "forward_intermediates"):
            raise UserError(f"{name} gives no maps: take a network of timm that has forward_intermediates")
        strides = [stage["reduction"] for stage in info]
        if set(STRIDES) <= set(strides):
            self.taken = [strides.index(stride) for stride in STRIDES]
            self.pyramid = nn.ModuleList(nn.Identity() for _ in STRIDES)
        elif len(set(strides)) == 1 and strides[0] in (2, 4, 8, 16, 32):
            self.taken = [len(info) - 1]
            self.pyramid = nn.ModuleList(_resized(info[-1]["num_chs"], strides[0], stride) for stride in STRIDES)
        else:
            found = ", ".join(map(str, sorted(set(strides))))
            raise UserError(
                f"{name} has maps at strides {found}; a detector needs 8, 16 and 32, or one stride that is a power of "
                "two from 2 to 32"
            )
        if hasattr(self.network, "prune_intermediate_layers"):
            self.network.prune_intermediate_layers(self.taken, prune_head=True)  # pyright: ignore[reportCallIssue]
        channels = [info[i]["num_chs"] for i in self.taken] * (len(STRIDES) // len(self.taken))
        self.project = nn.ModuleList(ConvNormAct(c, width) for c, width in zip(channels, widths, strict=True))
        self.sppf = SPPF(widths[-1])
        self._try(name)

    @torch.no_grad()
    def _try(self, name: str) -> None:
        """Refuse a network that is bound to one size of pictures."""
        if next(self.parameters()).is_meta:
            return
        training = self.training
        try:
            self.eval()(torch.zeros(1, 3, 64, 96))
        except (RuntimeError, AssertionError) as error:  # timm asserts the size of some networks
            raise UserError(f"{name} takes no pictures of any size: {error}") from None
        self.train(training)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See the class."""
        maps = self.network.forward_intermediates(  # pyright: ignore[reportCallIssue]
            normalized(images, self.statistics), indices=self.taken, intermediates_only=True, output_fmt="NCHW"
        )
        maps = maps if len(maps) > 1 else maps * len(STRIDES)
        c3, c4, c5 = (
            project(resize(one)) for one, resize, project in zip(maps, self.pyramid, self.project, strict=True)
        )
        return c3, c4, self.sppf(c5)


def _network(name: str, options: dict[str, Any]) -> nn.Module:
    """The network without a classifier; vision transformers take pictures of any size."""
    network = build_network(NetworkConfig(name, options), 0)
    if isinstance(network, VisionTransformer):
        network = build_network(NetworkConfig(name, options | {"dynamic_img_size": True}), 0)
    return network


def _resized(channels: int, stride: int, wanted: int) -> nn.Module:
    """From one stride to another, powers of two both."""
    if stride <= wanted:
        return nn.MaxPool2d(wanted // stride) if stride < wanted else nn.Identity()
    doublings = round(math.log2(stride // wanted))
    return nn.Sequential(*(nn.ConvTranspose2d(channels, channels, 2, stride=2) for _ in range(doublings)))
