"""Mamba-YOLO's backbone for timm: importing this module registers `mamba_yolo_t`, `mamba_yolo_b`, `mamba_yolo_l`.

    import timm, detection.backbone
    model = timm.create_model("mamba_yolo_t", features_only=True)

The parameters of the backbone have the detector's names, so weights go from a classifier to a detector and back.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor

from detection.model import SCALES, STAGE_CHANNELS, STAGE_REPEATS, Backbone, SizeName
from vision_ssm.backbones.timm_interface import MapClassifier, untrained
from vision_ssm.errors import UserError
from vision_ssm.scan_parameters import Init

REDUCTIONS = (4, 8, 16, 32)


class MambaYOLOClassifier(MapClassifier):
    """The backbone of a detector with mean and linear layer on its last map; a picture may have any size from 32 up.

    Shape: (B, in_chans, H, W) -> (B, num_classes)

    Raises:
        UserError: An image has fewer pixels than 32 along a side.

    Args:
        size: ``t``, ``b`` or ``l``.
        in_chans: Channels of the images.
        num_classes: Classes; 0 for no classifier.
        global_pool: timm's name of the pooling before the classifier.
        lsblock, stage_repeats, init: As those of ``detection.MambaYOLO``.
        drop_rate: Dropout before the classifier.
    """

    def __init__(
        self,
        size: SizeName = "t",
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        lsblock: bool = True,
        stage_repeats: Sequence[int] = STAGE_REPEATS,
        init: Init = "official",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        scale = SCALES[size]
        widths = [scale.channels(c) for c in STAGE_CHANNELS]
        repeats = [scale.repeats(n) for n in stage_repeats]
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = widths[-1]
        self.backbone = Backbone(widths, repeats, lsblock=lsblock, init=init, in_channels=in_chans)
        self.head = ClassifierHead(widths[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.feature_info: list[dict[str, Any]] = [
            {"module": f"backbone.stages.{i}", "num_chs": width, "reduction": reduction}
            for i, (width, reduction) in enumerate(zip(widths, REDUCTIONS, strict=True))
        ]

    def forward_features(self, images: Tensor) -> Tensor:
        """The map at stride 32, after the pyramid pooling."""
        return self._maps(images)[-1]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps at chosen ones of the strides 4, 8, 16, 32, as timm's feature extractor asks for them.

        Args:
            x: (B, in_chans, H, W) images.
            indices: Places in the strides; a number is that many of the last, None all.
            norm, stop_early: Without effect: there is no last norm, and the whole backbone is run.
            output_fmt: NCHW, no other.
            intermediates_only: Leave out the final features.

        Returns:
            The maps, before them the final features as of ``forward_features``.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be NCHW, got {output_fmt!r}")
        take, _ = feature_take_indices(len(REDUCTIONS), indices)
        maps = self._maps(x)
        chosen = [maps[i] for i in take]
        return chosen if intermediates_only else (maps[-1], chosen)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the classifier; returns the places of the chosen maps."""
        if prune_head:
            self.reset_classifier(0, "")
        return feature_take_indices(len(REDUCTIONS), indices)[0]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each block again in the backward pass instead of storing what it did.

        The running statistics of the batch norms then move twice a step, as in all networks that have them.
        """
        self.backbone.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups of parameters, for rates that fall with depth."""
        fine = [
            (r"^backbone\.stages\.(\d+)\.(\d+)", None),
            (r"^backbone\.merges\.(\d+)", (99,)),  # after all blocks of its stage
            (r"^backbone\.sppf", (99999,)),
        ]
        coarse_blocks = r"^backbone\.(?:stages|merges)\.(\d+)"
        return {"stem": r"^backbone\.stem", "blocks": coarse_blocks if coarse else fine}

    def _maps(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        height, width = images.shape[-2:]
        if min(height, width) < REDUCTIONS[-1]:
            raise UserError(f"Mamba-YOLO needs images of {REDUCTIONS[-1]} pixels and more, got {height}x{width}")
        return self.backbone.maps(images.contiguous(memory_format=torch.channels_last))


default_cfgs = generate_default_cfgs(
    {name: untrained("backbone.stem.0.0", "head.fc") for name in ("mamba_yolo_t", "mamba_yolo_b", "mamba_yolo_l")}
)


def _build(name: str, pretrained: bool, **arguments: Any) -> MambaYOLOClassifier:
    """timm's way to a network: `features_only` gives all four maps unless `out_indices` says which."""
    features = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}
    return build_model_with_cfg(MambaYOLOClassifier, name, pretrained, feature_cfg=features, **arguments)


@register_model
def mamba_yolo_t(pretrained: bool = False, **kwargs: Any) -> MambaYOLOClassifier:
    """Backbone of Mamba-YOLO-T."""
    return _build("mamba_yolo_t", pretrained, **{**kwargs, "size": "t"})


@register_model
def mamba_yolo_b(pretrained: bool = False, **kwargs: Any) -> MambaYOLOClassifier:
    """Backbone of Mamba-YOLO-B."""
    return _build("mamba_yolo_b", pretrained, **{**kwargs, "size": "b"})


@register_model
def mamba_yolo_l(pretrained: bool = False, **kwargs: Any) -> MambaYOLOClassifier:
    """Backbone of Mamba-YOLO-L."""
    return _build("mamba_yolo_l", pretrained, **{**kwargs, "size": "l"})
