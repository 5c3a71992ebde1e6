"""Vim, Vision Mamba (arXiv 2401.09417): a plain stack of bidirectional Mamba blocks over the tokens of an image.

Top to bottom: patches to tokens, learned positions, a class token put in the middle of the sequence, blocks
``x + mixer(norm(x))``, a last norm, a linear layer on the class token. Values are those of the released models
("bimambav2", class token in the middle, halved sum); these differences in form change none:

- the class token's own position is part of the class token, so that positions can be resized to any grid;
- the released blocks hand on mixer output and residual apart and add them in the next block; here a block adds;
- ``forward_features`` moves the class token to the front, where timm expects it.
"""

import math
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from timm.layers import DropPath, lecun_normal_, resample_abs_pos_embed, trunc_normal_
from timm.layers.pool1d import global_pool_nlc
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vision_ssm.backbones.timm_interface import scan_constants, untrained
from vision_ssm.mamba import BidirectionalMamba

# Shapes: B batch, H/W height and width, h/w those of the grid of patches, L = h * w tokens, C width.

Pool = Literal["token", "avg", "max", "avgmax", ""]
NORM_EPS = 1e-5


class PatchEmbed(nn.Module):
    """Patches to maps, (B, c, H, W) -> (B, C, h, w); right and bottom are padded with zeros to whole patches."""

    def __init__(self, patch_size: int, stride: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.patch_size, self.stride = patch_size, stride
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride)

    def missing(self, side: int) -> int:
        """Pixels to add to a side of that many."""
        return max(self.patch_size - side, (self.patch_size - side) % self.stride)

    def patches(self, side: int) -> int:
        """Patches along a side of that many pixels."""
        return (side + self.missing(side) - self.patch_size) // self.stride + 1

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        height, width = images.shape[-2:]
        return self.proj(F.pad(images, (0, self.missing(width), 0, self.missing(height))))


class VimBlock(nn.Module):
    """``x + mixer(norm(x))``, (B, L, C) kept."""

    def __init__(self, dim: int, *, state_size: int, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=NORM_EPS)
        self.mixer = BidirectionalMamba(dim, state_size=state_size)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return x + self.drop_path(self.mixer(self.norm(x)))


class Vim(nn.Module):
    """Vision Mamba; a picture may have any size.

    Shape: (B, in_chans, H, W) -> (B, num_classes)

    Args:
        img_size: Side, or height and width, that the learned positions are made for; at another they are resized.
        patch_size: Side of a patch in pixels.
        patch_stride: Step from patch to patch; ``patch_size`` if not given, half of it in the finer-grained models.
        in_chans: Channels of the images.
        num_classes: Classes; 0 for no classifier.
        global_pool: What the classifier sees: the class token (published), or the patches' mean, maximum or both.
        embed_dim: C.
        depth: Blocks.
        state_size: States per channel of a scan.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Share of the last block's updates that training leaves out; it grows linearly from 0.
    """

    num_prefix_tokens = 1

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        patch_stride: int | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Pool = "token",
        embed_dim: int = 192,
        depth: int = 24,
        state_size: int = 16,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if global_pool not in get_args(Pool):
            raise ValueError(
                f"global_pool must be {', '.join(filter(None, get_args(Pool)))} or empty, got {global_pool!r}"
            )
        self.num_classes, self.global_pool, self.grad_checkpointing = num_classes, global_pool, False
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.patch_embed = PatchEmbed(patch_size, patch_stride or patch_size, in_chans, embed_dim)
        sides = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.grid = [self.patch_embed.patches(side) for side in sides]
        self.pos_embed = nn.Parameter(torch.empty(1, math.prod(self.grid), embed_dim))
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.blocks = nn.ModuleList(
            VimBlock(embed_dim, state_size=state_size, drop_path=drop_path_rate * i / max(depth - 1, 1))
            for i in range(depth)
        )
        self.norm: nn.Module = nn.RMSNorm(embed_dim, eps=NORM_EPS)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = _classifier(embed_dim, num_classes)
        self.feature_info: list[dict[str, Any]] = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": self.patch_embed.stride} for i in range(depth)
        ]
        self._init_weights()

    def _init_weights(self) -> None:
        """As released: positions, class token and classifier 0.02, output projections smaller the deeper the stack."""
        trunc_normal_(self.pos_embed, std=0.02)
        trunc_normal_(self.cls_token, std=0.02)
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(self.patch_embed.proj.bias)  # pyright: ignore[reportArgumentType]
        for block in self.blocks:
            with torch.no_grad():
                block.mixer.out_proj.weight /= math.sqrt(len(self.blocks))  # pyright: ignore

    def tokens(self, images: Tensor) -> Tensor:
        """Patches with their positions and the class token in the middle, (B, 1 + L, C)."""
        maps = self.patch_embed(images)
        x = maps.flatten(2).transpose(1, 2)
        x = x + resample_abs_pos_embed(self.pos_embed, list(maps.shape[-2:]), self.grid, num_prefix_tokens=0)
        before, after = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
        return torch.cat((before, self.cls_token.expand(len(x), -1, -1), after), dim=1)

    def forward_features(self, images: Tensor) -> Tensor:
        """Class token, then patches, after the last norm: (B, 1 + L, C)."""
        x = self.tokens(images)
        for block in self.blocks:
            x = self._run(block, x)
        return torch.cat(_split_class(self.norm(x)), dim=1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify what ``forward_features`` gave, or only pool it."""
        x = self.head_drop(global_pool_nlc(x, self.global_pool, self.num_prefix_tokens))
        return x if pre_logits else self.head(x)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        return self.forward_head(self.forward_features(images))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps after chosen blocks, as timm's feature extractor asks for them.

        Args:
            x: (B, in_chans, H, W) images.
            indices: Blocks; a number is that many of the last, None all.
            norm: Apply the last norm to each.
            stop_early: Leave out the blocks after the last chosen one.
            output_fmt: NCHW, no other.
            intermediates_only: Leave out the final features.

        Returns:
            (B, C, h, w) maps without the class token, before them the final features as of ``forward_features``.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be NCHW, got {output_fmt!r}")
        take, last = feature_take_indices(len(self.blocks), indices)
        height, width = (self.patch_embed.patches(side) for side in x.shape[-2:])
        x, maps = self.tokens(x), []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = self._run(block, x)
            if i in take:
                _, patches = _split_class(self.norm(x) if norm else x)
                maps.append(patches.transpose(1, 2).unflatten(-1, (height, width)))
        return maps if intermediates_only else (torch.cat(_split_class(self.norm(x)), dim=1), maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the chosen blocks do not need; returns their places."""
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Pool | None = None) -> None:
        """Put an untrained classifier, or none (0), in place of the present one."""
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        self.head = _classifier(self.num_features, num_classes).to(self.pos_embed)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each block again in the backward pass instead of storing what it did."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay must not touch."""
        return {"pos_embed", "cls_token"} | scan_constants(self)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups of parameters, for rates that fall with depth."""
        blocks = [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^cls_token|pos_embed|patch_embed", "blocks": blocks}

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)  # pyright: ignore[reportReturnType]
        return block(x)


def _split_class(x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 1 + L, C) with the class token in the middle -> class token (B, 1, C) and patches (B, L, C)."""
    middle = (x.shape[1] - 1) // 2
    return x[:, middle : middle + 1], torch.cat((x[:, :middle], x[:, middle + 1 :]), dim=1)


def _classifier(features: int, classes: int) -> nn.Module:
    if classes == 0:
        return nn.Identity()
    layer = nn.Linear(features, classes)
    trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


default_cfgs = generate_default_cfgs(
    {
        name: untrained("patch_embed.proj", "head", grid=(14, 14))
        for name in ("vssm_vim_tiny", "vssm_vim_small", "vssm_vim_base")
    }
)


def _build(name: str, pretrained: bool, **arguments: Any) -> Vim:
    """timm's way to a network: `features_only` gives the last three blocks' maps unless `out_indices` says others."""
    features = {"out_indices": arguments.pop("out_indices", 3), "feature_cls": "getter"}
    return build_model_with_cfg(Vim, name, pretrained, feature_cfg=features, **arguments)


@register_model
def vssm_vim_tiny(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti."""
    return _build("vssm_vim_tiny", pretrained, **{"embed_dim": 192, **kwargs})


@register_model
def vssm_vim_small(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S."""
    return _build("vssm_vim_small", pretrained, **{"embed_dim": 384, **kwargs})


@register_model
def vssm_vim_base(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-B."""
    return _build("vssm_vim_base", pretrained, **{"embed_dim": 768, **kwargs})
