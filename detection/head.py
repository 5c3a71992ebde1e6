"""The decoupled detection head of Mamba-YOLO (that of YOLOv8) and the decoding of its maps into boxes."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detection.blocks import ConvNormAct

# Shapes: B batch, A anchors (cells of all levels, P3 first, row-major), nc classes.

STRIDES = (8, 16, 32)
REG_MAX = 16  # bins of the distribution over each side's distance (distribution focal loss, GFL section 3.2)
BOX_CHANNELS = 4 * REG_MAX


class DetectionHead(nn.Module):
    """Per level a box branch (4 sides x 16 bins) and a class branch (one logit per class).

    Args:
        channels: Widths of P3, P4, P5.
        num_classes: nc.
    """

    def __init__(self, channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        box = max(REG_MAX, channels[0] // 4, BOX_CHANNELS)
        cls = max(channels[0], min(num_classes, 100))
        self.box = nn.ModuleList(_branch(c, box, BOX_CHANNELS, bias=1.0) for c in channels)
        self.cls = nn.ModuleList(
            # so that at first about 5 objects are found in an image of 640 pixels
            _branch(c, cls, num_classes, bias=math.log(5 / num_classes / (640 / stride) ** 2))
            for c, stride in zip(channels, STRIDES, strict=True)
        )
        # The values of the bins. Never trained; a parameter because published weights hold and count it as one.
        self.bins = nn.Parameter(torch.arange(REG_MAX, dtype=torch.float32), requires_grad=False)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Widths of P3, P4, P5 -> three maps (B, 64 + nc, H, W): bins of left, top, right, bottom, then classes."""
        return [torch.cat((box(x), cls(x)), dim=1) for x, box, cls in zip(maps, self.box, self.cls, strict=True)]


def _branch(in_channels: int, hidden: int, out_channels: int, *, bias: float) -> nn.Sequential:
    output = nn.Conv2d(hidden, out_channels, 1, bias=True)
    nn.init.constant_(output.get_parameter("bias"), bias)
    return nn.Sequential(ConvNormAct(in_channels, hidden, 3), ConvNormAct(hidden, hidden, 3), output)


def anchor_grid(raw: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Centres (A, 2) of all cells as x, y in cells of their own level, and their strides (A, 1) in pixels; float32."""
    centres, strides = [], []
    for level, stride in zip(raw, STRIDES, strict=True):
        height, width = level.shape[-2:]
        y, x = torch.meshgrid(
            torch.arange(height, device=level.device, dtype=torch.float32) + 0.5,
            torch.arange(width, device=level.device, dtype=torch.float32) + 0.5,
            indexing="ij",
        )
        cells = torch.stack((x, y), dim=-1).flatten(0, 1)
        centres.append(cells)
        strides.append(torch.full_like(cells[:, :1], stride))
    return torch.cat(centres), torch.cat(strides)


def flatten_maps(raw: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Three raw maps -> box logits (B, A, 64) and class logits (B, A, nc)."""
    cells = torch.cat([level.permute(0, 2, 3, 1).flatten(1, 2) for level in raw], dim=1)
    return cells[..., :BOX_CHANNELS], cells[..., BOX_CHANNELS:]


def distances_to_boxes(logits: Tensor, centres: Tensor) -> Tensor:
    """Box logits (..., 64) at centres (..., 2) -> corners (..., 4) x1, y1, x2, y2, in the unit of the centres."""
    bins = torch.arange(REG_MAX, device=logits.device, dtype=logits.dtype)
    # A sum and not a matrix product, which autocast would round to bfloat16.
    sides = (logits.unflatten(-1, (4, REG_MAX)).softmax(dim=-1) * bins).sum(dim=-1)
    left_top, right_bottom = sides.split(2, dim=-1)
    return torch.cat((centres - left_top, centres + right_bottom), dim=-1)


def decode(raw: Sequence[Tensor]) -> Tensor:
    """Turn the three raw maps of a model into boxes and scores.

    Args:
        raw: P3, P4, P5 maps (B, 64 + nc, H/8, W/8), (.., H/16, W/16), (.., H/32, W/32).

    Returns:
        (B, 4 + nc, A): centre x, centre y, width, height in pixels of the input, then a score in [0, 1] per class.
        Coordinates are worked out in float32 and returned so.
    """
    centres, strides = anchor_grid(raw)
    box_logits, class_logits = flatten_maps(raw)
    left_top, right_bottom = distances_to_boxes(box_logits.float(), centres).split(2, dim=-1)
    boxes = torch.cat(((left_top + right_bottom) / 2, right_bottom - left_top), dim=-1) * strides
    return torch.cat((boxes, class_logits.float().sigmoid()), dim=-1).transpose(1, 2)
