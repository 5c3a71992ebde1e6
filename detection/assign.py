"""Task-aligned assignment of anchors to ground-truth boxes (TOOD, section 3.2, with the constants of YOLOv8).

Boxes of all images of a batch stand in one list, so nothing is padded, no image is looped over and nothing waits for
the GPU.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Shapes: B images, A anchors, n ground-truth boxes of the whole batch, k = 10 candidates of a box.

TOPK = 10
ALPHA, BETA = 0.5, 6.0  # exponents of the score and of the IoU in the alignment metric
EPS = 1e-9


class Assignment(NamedTuple):
    """What every anchor is trained to be.

    Attributes:
        box: (B, A) index into the list of ground-truth boxes, -1 for background.
        weight: (B, A) soft target of the box's class, 0 for background.
        candidates: (n, k) the anchors that each box ranked highest; every anchor with a box is among them, an anchor
            that several boxes ranked stands there several times.
    """

    box: Tensor
    weight: Tensor
    candidates: Tensor


def complete_iou(a: Tensor, b: Tensor) -> Tensor:
    """Complete IoU (CIoU; Zheng et al., 2020, equations 6 to 11) of corner boxes, element by element.

    torchvision's has another epsilon, and its aspect-ratio term is nan for boxes without height.

    Args:
        a: (..., 4) x1, y1, x2, y2.
        b: (..., 4), broadcast against a.

    Returns:
        (...) values in (-1.5, 1]; the weight of the aspect-ratio term is treated as a constant in backward.
    """
    eps = 1e-7
    ax1, ay1, ax2, ay2 = a.unbind(-1)
    bx1, by1, bx2, by2 = b.unbind(-1)
    aw, ah, bw, bh = ax2 - ax1, ay2 - ay1 + eps, bx2 - bx1, by2 - by1 + eps
    overlap_w = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    overlap_h = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    overlap = overlap_w * overlap_h
    iou = overlap / (aw * ah + bw * bh - overlap + eps)
    hull_w = torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)
    hull_h = torch.maximum(ay2, by2) - torch.minimum(ay1, by1)
    diagonal = hull_w.square() + hull_h.square() + eps
    distance = ((bx1 + bx2 - ax1 - ax2).square() + (by1 + by2 - ay1 - ay2).square()) / 4
    aspect = (4 / math.pi**2) * (torch.atan(bw / bh) - torch.atan(aw / ah)).square()
    with torch.no_grad():
        aspect_weight = aspect / (aspect - iou + (1 + eps))
    return iou - (distance / diagonal + aspect * aspect_weight)


@torch.no_grad()
def assign(
    scores: Tensor, boxes: Tensor, centres: Tensor, image: Tensor, labels: Tensor, target_boxes: Tensor
) -> Assignment:
    """Give each anchor at most one ground-truth box, and each box at most its 10 best anchors.

    Args:
        scores: (B, A, nc) predicted scores in [0, 1].
        boxes: (B, A, 4) predicted corners in pixels.
        centres: (A, 2) cell centres in pixels.
        image: (n,) image of each ground-truth box.
        labels: (n,) its class.
        target_boxes: (n, 4) its corners in pixels.

    Returns:
        The assignment; float32 throughout.
    """
    metric, iou = _alignment(scores, boxes, centres, image, labels, target_boxes)
    best, candidates = metric.topk(min(TOPK, metric.shape[1]), dim=1)
    chosen = torch.zeros_like(metric, dtype=torch.bool).scatter_(1, candidates, best > 0)
    chosen = _resolve_conflicts(chosen, iou, image, len(scores))

    metric = metric * chosen
    ratio = (iou * chosen).amax(1, keepdim=True) / (metric.amax(1, keepdim=True) + EPS)
    of_image = image[:, None].expand_as(metric)
    weight = torch.zeros(scores.shape[:2], device=scores.device).scatter_reduce_(0, of_image, metric * ratio, "amax")
    index = torch.arange(len(image), device=image.device)[:, None]
    box = torch.full(scores.shape[:2], -1, device=scores.device)
    box.scatter_reduce_(0, of_image, torch.where(chosen, index, -1), "amax")
    return Assignment(box, weight, candidates)


def _alignment(
    scores: Tensor, boxes: Tensor, centres: Tensor, image: Tensor, labels: Tensor, target_boxes: Tensor
) -> tuple[Tensor, Tensor]:
    """Alignment metric and IoU (n, A) of each box with the anchors of its image; 0 where the centre is outside."""
    left_top, right_bottom = target_boxes[:, None].split(2, dim=-1)
    inside = torch.cat((centres - left_top, right_bottom - centres), dim=-1).amin(-1) > EPS
    iou = complete_iou(target_boxes[:, None], boxes[image]).clamp(min=0) * inside
    return scores[image, :, labels].pow(ALPHA) * iou.pow(BETA), iou


def _resolve_conflicts(chosen: Tensor, iou: Tensor, image: Tensor, images: int) -> Tensor:
    """An anchor chosen by several boxes of its image goes to the box with the largest IoU, the first of equal ones."""
    boxes, anchors = chosen.shape
    of_image = image[:, None].expand_as(chosen)
    count = torch.zeros(images, anchors, dtype=torch.int32, device=image.device)
    count.scatter_add_(0, of_image, chosen.int())
    largest = torch.zeros(images, anchors, device=image.device).scatter_reduce_(0, of_image, iou, "amax")
    index = torch.arange(boxes, device=image.device)[:, None].expand_as(chosen)
    first = torch.full((images, anchors), boxes, device=image.device)
    first.scatter_reduce_(0, of_image, torch.where(iou == largest[image], index, boxes), "amin")
    return torch.where(count[image] > 1, first[image] == index, chosen)
