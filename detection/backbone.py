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
from torch import Tensor

from detection.model import SCALES, STAGE_CHANNELS, STAGE_REPEATS, Backbone, SizeName
from vision_ssm.backbones.timm_interface import MapClassifier, untrained
from vision_ssm.errors import UserError
from vision_ssm.mixer_config import MapPattern, MixerName, MixerStack, ScanOptions
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
        lsblock, stage_repeats, init, mixer, mixer_pattern, polar, smr: As those of ``detection.MambaYOLO``.
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
        mixer: MixerName = "s6",
        mixer_pattern: MapPattern = "same",
        polar: Sequence[int] = (0, 0),
        smr: int = 0,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        scale = SCALES[size]
        widths = [scale.channels(c) for c in STAGE_CHANNELS]
        repeats = [scale.repeats(n) for n in stage_repeats]
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = widths[-1]
        stack = MixerStack(mixer, mixer_pattern, ScanOptions(polar, smr), maps=True)
        self.backbone = Backbone(widths, repeats, lsblock=lsblock, init=init, in_channels=in_chans, stack=stack)
        self.head = ClassifierHead(widths[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.feature_info: list[dict[str, Any]] = [
            {"module": f"backbone.stages.{i}", "num_chs": width, "reduction": reduction}
            for i, (width, reduction) in enumerate(zip(widths, REDUCTIONS, strict=True))
        ]

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

    def maps(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """At strides 4, 8, 16 and 32, the last after the pyramid pooling."""
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
