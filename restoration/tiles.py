"""Large pictures in independent tiles, blended over their overlap: quick, but not the result of the whole picture.

Every scan ends at the edge of its tile, so tiles see less of the picture than the network could; `restoration.stream`
gives the exact result. The weights of neighbouring tiles are a raised cosine and add up to one, so there is no seam.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from restoration.strips import Tick


def restore_tiled(
    restore: Callable[[Tensor], Tensor],
    image: Tensor,
    *,
    tile: int,
    overlap: int,
    scale: int = 1,
    tick: Tick = lambda share: None,
) -> Tensor:
    """Restore a picture tile by tile.

    Args:
        restore: (1, C, h, w) -> (1, C_out, scale * h, scale * w), for one tile.
        image: (C, H, W) float.
        tile: side of a tile in pixels of `image`.
        overlap: pixels that neighbours have in common, less than a tile's side.
        scale: how many times larger the result is.
        tick: gets the shares of the work that are done, 1 in all.

    Returns:
        (C_out, scale * H, scale * W) float32 on the CPU.
    """
    height, width = image.shape[1:]
    places = [(y, x) for y in origins(height, tile, overlap) for x in origins(width, tile, overlap)]
    total, weights = torch.zeros(0), torch.zeros(1, scale * height, scale * width)
    for y, x in places:
        part = restore(image[None, :, y : y + tile, x : x + tile])[0].float().cpu()
        if not total.numel():
            total = torch.zeros(part.shape[0], scale * height, scale * width)
        bottom, right = y * scale + part.shape[1], x * scale + part.shape[2]
        across = _ramp(part.shape[2], scale * overlap, x > 0, right < scale * width)
        weight = _ramp(part.shape[1], scale * overlap, y > 0, bottom < scale * height)[:, None] * across
        total[:, y * scale : bottom, x * scale : right] += part * weight
        weights[:, y * scale : bottom, x * scale : right] += weight
        tick(1 / len(places))
    return total / weights


def origins(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin, evenly spread from end to end, with at least `overlap` pixels in common."""
    if length <= tile:
        return [0]
    count = math.ceil((length - tile) / max(tile - overlap, 1)) + 1
    return [round(k * (length - tile) / (count - 1)) for k in range(count)]


def _ramp(length: int, overlap: int, before: bool, after: bool) -> Tensor:
    """(length,) one in the middle, falling as a raised cosine towards the sides where another tile follows."""
    weight = torch.ones(length)
    size = min(overlap, length)
    rise = 0.5 - 0.5 * torch.cos(torch.pi * (torch.arange(size) + 0.5) / max(size, 1))
    if before:
        weight[:size] *= rise
    if after:
        weight[length - size :] *= rise.flip(0)
    return weight
