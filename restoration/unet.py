"""The U-Net around the blocks: encoder, middle and decoder with skips, padding to whole cells, global residual."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restoration.blocks import Blocks
from vision_ssm.errors import UserError

# Shapes: B batch, C_in image channels, H/W image size in pixels, C width of a level, h/w its size in cells.


class EncoderLevel(nn.Module):
    """Blocks at one resolution, then the way down: (B, C, h, w) -> skip of that shape and (B, C', h/2, w/2)."""

    def __init__(self, blocks: Blocks, down: nn.Module) -> None:
        super().__init__()
        self.blocks = blocks
        self.down = down

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        skip = self.blocks(x)
        return skip, self.down(skip)


class DecoderLevel(nn.Module):
    """The way up, joined with the encoder's skip, and blocks: (B, C', h/2, w/2), (B, C, h, w) -> (B, C'', h, w)."""

    def __init__(self, up: nn.Module, merge: nn.Module, blocks: Blocks) -> None:
        super().__init__()
        self.up = up
        self.merge = merge
        self.blocks = blocks

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """See the class."""
        x = self.up(x).contiguous(memory_format=torch.channels_last)
        return self.blocks(self.merge(torch.cat((x, skip), dim=1)))


class RestorationUNet(nn.Module):
    """image + head(decoder(middle(encoder(stem(image))))): the parts are given, this joins them.

    Shape: (B, C_in, H, W) -> (B, C_out, H, W), any H, W >= 1, float32 with 1.0 for white; under autocast too, the image
    and the result stay float32. The residual runs over the first C_out channels of the image, so that what follows
    them (a mask) is read and not restored.

    Args:
        stem: (B, C_in, H, W) -> (B, C, H/p, W/p).
        encoder: Levels from fine to coarse.
        middle: Blocks at the coarsest resolution.
        decoder: Levels from coarse to fine, as many as the encoder's.
        head: Maps of the finest level -> (B, C_out, H, W).
        in_channels: C_in.
        out_channels: C_out, at most C_in.
        multiple: The height and width that the parts accept are multiples of this; images are padded to them.
    """

    scale = 1
    """The network itself does not enlarge; for super-resolution it is given an image that already has the new size."""

    def __init__(
        self,
        *,
        stem: nn.Module,
        encoder: list[EncoderLevel],
        middle: Blocks,
        decoder: list[DecoderLevel],
        head: nn.Module,
        in_channels: int,
        out_channels: int,
        multiple: int,
    ) -> None:
        super().__init__()
        if not 1 <= out_channels <= in_channels:
            raise UserError(
                f"out_channels must lie between 1 and in_channels, got in_channels={in_channels} and "
                f"out_channels={out_channels}: the result is the image's first channels plus a correction"
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.multiple = multiple
        self.stem = stem
        self.encoder = nn.ModuleList(encoder)
        self.middle = middle
        self.decoder = nn.ModuleList(decoder)
        self.head = head

    def forward(self, image: Tensor) -> Tensor:
        """Restore images; see the class.

        Raises:
            UserError: The image has another number of axes or channels, or no pixels.
        """
        check_image(image, self.in_channels)
        height, width = image.shape[2:]
        x = pad_to_multiple(image, self.multiple).contiguous(memory_format=torch.channels_last)
        x = self.stem(x)
        skips = []
        for level in self.encoder:
            skip, x = level(x)
            skips.append(skip)
        x = self.middle(x)
        for level in self.decoder:
            x = level(x, skips.pop())
        return image[:, : self.out_channels] + self.head(x)[..., :height, :width]


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Extend (B, C, H, W) below and on the right until both sides are multiples.

    The image is reflected there; a side too short for that repeats its last line.
    """
    for axis in (2, 3):
        side = image.shape[axis]
        missing = -side % multiple
        if missing:
            edges = (0, 0, 0, missing) if axis == 2 else (0, missing, 0, 0)
            image = F.pad(image, edges, mode="reflect" if missing < side else "replicate")
    return image


def check_image(image: Tensor, channels: int) -> None:
    """Refuse what is no batch of images with that many channels.

    Raises:
        UserError: Another number of axes or channels, no pixels, or whole numbers.
    """
    shape = tuple(image.shape)
    if image.ndim != 4 or shape[1] != channels:
        raise UserError(f"the image must be (batch, {channels}, height, width), got {shape}")
    if min(shape[2:]) < 1:
        raise UserError(f"the image must have at least one pixel, got {shape[2]}x{shape[3]}")
    if not image.is_floating_point():
        raise UserError(f"the image must hold floats with 1.0 for white, got {image.dtype}; divide by the white value")
