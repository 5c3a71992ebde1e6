"""Large pictures in overlapping tiles: where the tiles lie, and one set of boxes from all of them.

An object that a tile's edge cuts is found as a piece there and as a whole in the neighbour, if the overlap is at least
as wide as the object. Pieces that lie inside another tile's box are dropped, and what two tiles both found whole is
reduced to one by non-maximum suppression. Objects larger than a tile are not put together.
"""

import math

import torch
from torch import Tensor
from torchvision.ops import box_area

from detection.postprocess import class_aware_nms

MERGE_IOU = 0.5
"""Whole boxes of neighbouring tiles that overlap more than this are the same object."""

_PIECE_INSIDE = 0.5  # a piece of which another box covers this share belongs to that box
_EDGE = 2.0  # pixels: a box that ends so near a tile's inner edge is taken for cut
_ROWS = 512  # pieces compared at a time, to bound memory


def tile_boxes(height: int, width: int, tile: int, overlap: float) -> list[tuple[int, int, int, int]]:
    """Tiles that cover a picture, evenly spread, as x1, y1, x2, y2.

    Args:
        height: rows of the picture.
        width: columns of the picture.
        tile: side of a tile in pixels; a picture that is smaller gives smaller tiles.
        overlap: neighbours share at least this part of a tile's side.
    """
    rows, columns = _origins(height, tile, overlap), _origins(width, tile, overlap)
    return [(x, y, min(x + tile, width), min(y + tile, height)) for y in rows for x in columns]


def _origins(length: int, tile: int, overlap: float) -> list[int]:
    if length <= tile:
        return [0]
    count = math.ceil((length - tile) / max(math.floor(tile * (1 - overlap)), 1)) + 1
    return [round(k * (length - tile) / (count - 1)) for k in range(count)]


def merge_tiles(
    found: list[dict[str, Tensor]], tiles: list[tuple[int, int, int, int]], size: tuple[int, int], iou: float
) -> dict[str, Tensor]:
    """One set of detections from those of all tiles.

    Args:
        found: for each tile `boxes` xyxy in pixels of the whole picture, `scores`, `labels`.
        tiles: x1, y1, x2, y2 of each tile.
        size: (height, width) of the picture.
        iou: overlap for the suppression; above `MERGE_IOU` that is taken.

    Returns:
        `boxes`, `scores`, `labels`, best first.
    """
    boxes, scores, labels = (torch.cat([one[key] for one in found]) for key in ("boxes", "scores", "labels"))
    counts = torch.tensor([len(one["scores"]) for one in found])
    origin = torch.arange(len(found)).repeat_interleave(counts).to(boxes.device)
    cut = _is_cut(boxes, torch.tensor(tiles).to(boxes)[origin], size)
    whole = ~_is_piece(boxes, labels, origin, cut)
    boxes, scores, labels = boxes[whole], scores[whole], labels[whole]
    keep = class_aware_nms(boxes, scores, labels, min(iou, MERGE_IOU))
    return {"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]}


def _is_cut(boxes: Tensor, tiles: Tensor, size: tuple[int, int]) -> Tensor:
    """(n,) True where a box ends at an edge of its tile that is not an edge of the picture."""
    height, width = size
    inner = torch.cat((tiles[:, :2] > 0, tiles[:, 2:] < torch.tensor([width, height]).to(tiles)), dim=1)
    return (inner & ((boxes - tiles).abs() <= _EDGE)).any(dim=1)


def _is_piece(boxes: Tensor, labels: Tensor, origin: Tensor, cut: Tensor) -> Tensor:
    """(n,) True for a cut box that lies mostly inside a whole or larger box of its class from another tile."""
    area = box_area(boxes)
    piece = torch.zeros_like(cut)
    for rows in cut.nonzero(as_tuple=True)[0].split(_ROWS):
        low = torch.maximum(boxes[rows, None, :2], boxes[None, :, :2])
        high = torch.minimum(boxes[rows, None, 2:], boxes[None, :, 2:])
        inside = (high - low).clamp(min=0).prod(dim=2) >= _PIECE_INSIDE * area[rows, None]
        other = (labels[rows, None] == labels) & (origin[rows, None] != origin) & (~cut | (area > area[rows, None]))
        piece[rows] = (inside & other).any(dim=1)
    return piece
