"""VMamba (arXiv 2401.10166), the released second version: four stages of blocks that scan the map in four directions.

Top to bottom: two strided convolutions, stages at strides 4, 8, 16 and 32 of blocks ``x + ss2d(norm(x))``,
``x + mlp(norm(x))``, a strided convolution before each stage but the first, a last norm, mean and linear layer. The
registered sizes are the released "s1l8" (tiny) and "s1l20" (small, base): one state per channel, as many inner channels
as outer ones, no gate, no bias in the depthwise convolution.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, DropPath, LayerNorm2d, Mlp, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from vision_ssm.backbones.timm_interface import MapClassifier, untrained
from vision_ssm.ss2d import SS2D

# Shapes: B batch, H/W height and width of the map at hand, C its channels.

NORM_EPS = 1e-5
MLP_RATIO = 4


class Stem(nn.Sequential):
    """Two strided convolutions, (B, c, H, W) -> (B, C, H/4, W/4), rounded up."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1),
            LayerNorm2d(dim // 2, eps=NORM_EPS),
            nn.GELU(),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
            LayerNorm2d(dim, eps=NORM_EPS),
        )


class Downsample(nn.Sequential):
    """One strided convolution, (B, C, H, W) -> (B, C', H/2, W/2), rounded up."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__(nn.Conv2d(dim, out_dim, 3, stride=2, padding=1), LayerNorm2d(out_dim, eps=NORM_EPS))


class VSSBlock(nn.Module):
    """Scan and feed-forward, each after a norm and with a residual. (B, H, W, C) kept."""

    def __init__(self, dim: int, *, ssm_ratio: float, state_size: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.ss2d = SS2D(
            dim,
            state_size=state_size,
            expand=ssm_ratio,
            init="vmamba",
            norm_eps=NORM_EPS,
            act="silu",
            gate=False,
            conv_bias=False,
        )
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, MLP_RATIO * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = x + self.drop_path(self.ss2d(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """Blocks of one width after a convolution to their width and size. (B, C, H, W) -> (B, C', H/2, W/2)."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[VSSBlock]) -> None:
        super().__init__()
        self.downsample, self.blocks, self.grad_checkpointing = downsample, nn.Sequential(*blocks), False

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.downsample(x).permute(0, 2, 3, 1).contiguous()
        checkpointed = self.grad_checkpointing and torch.is_grad_enabled()
        x = checkpoint_seq(self.blocks, x) if checkpointed else self.blocks(x)
        return x.permute(0, 3, 1, 2)


class VMamba(MapClassifier):
    """VMamba; a picture may have any size.

    Shape: (B, in_chans, H, W) -> (B, num_classes)

    Args:
        in_chans: Channels of the images.
        num_classes: Classes; 0 for no classifier.
        global_pool: timm's name of the pooling before the classifier; the published one is the mean.
        depths: Blocks of each stage.
        embed_dim: Channels of the first stage; each stage has twice those of the one before.
        ssm_ratio: Channels of a scan over those of its map; 2 in the released "s2" models.
        state_size: States per channel of a scan.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Share of the last block's updates that training leaves out; it grows linearly from 0.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 2, 8, 2),
        embed_dim: int = 96,
        ssm_ratio: float = 1.0,
        state_size: int = 1,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        dims = [embed_dim * 2**i for i in range(len(depths))]
        rates = iter([drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))])
        self.stem = Stem(in_chans, embed_dim)
        self.stages = nn.Sequential(
            *(
                Stage(
                    Downsample(dim // 2, dim) if i else nn.Identity(),
                    [
                        VSSBlock(dim, ssm_ratio=ssm_ratio, state_size=state_size, drop_path=next(rates))
                        for _ in range(depth)
                    ],
                )
                for i, (dim, depth) in enumerate(zip(dims, depths, strict=True))
            )
        )
        self.norm = LayerNorm2d(dims[-1], eps=NORM_EPS)
        self.num_features = self.head_hidden_size = dims[-1]
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.feature_info: list[dict[str, Any]] = [
            {"module": f"stages.{i}", "num_chs": dim, "reduction": 4 * 2**i} for i, dim in enumerate(dims)
        ]
        self.apply(_init_weights)

    def maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """See ``MapClassifier``."""
        found = [self.stem(images)]
        for stage in self.stages:
            found.append(stage(found[-1]))
        return tuple(found[1:])

    def last(self, maps: tuple[Tensor, ...]) -> Tensor:
        """The last map after the last norm."""
        return self.norm(maps[-1])

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each block again in the backward pass instead of storing what it did."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # pyright: ignore[reportArgumentType]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups of parameters, for rates that fall with depth."""
        fine = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}


def _init_weights(module: nn.Module) -> None:
    """As released: linear layers, and the projections into and out of a scan, truncated normal with 0.02."""
    if isinstance(module, SS2D):
        for projection in (module.in_proj, module.out_proj):
            trunc_normal_(projection.weight, std=0.02)
    elif isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


default_cfgs = generate_default_cfgs(
    {name: untrained("stem.0", "head.fc") for name in ("vssm_vmamba_tiny", "vssm_vmamba_small", "vssm_vmamba_base")}
)


def _build(name: str, pretrained: bool, **arguments: Any) -> VMamba:
    """timm's way to a network: `features_only` gives the maps of all stages unless `out_indices` says which."""
    features = {"out_indices": tuple(range(len(arguments["depths"]))), "flatten_sequential": True}
    return build_model_with_cfg(VMamba, name, pretrained, feature_cfg=features, **arguments)


@register_model
def vssm_vmamba_tiny(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T, s1l8."""
    return _build("vssm_vmamba_tiny", pretrained, **{"depths": (2, 2, 8, 2), "embed_dim": 96, **kwargs})


@register_model
def vssm_vmamba_small(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S, s1l20."""
    return _build("vssm_vmamba_small", pretrained, **{"depths": (2, 2, 20, 2), "embed_dim": 96, **kwargs})


@register_model
def vssm_vmamba_base(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B, s1l20."""
    return _build("vssm_vmamba_base", pretrained, **{"depths": (2, 2, 20, 2), "embed_dim": 128, **kwargs})
