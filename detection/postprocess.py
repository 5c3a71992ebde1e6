"""From decoded maps to detections: candidate selection, non-maximum suppression, mapping back to the picture.

None of this is part of an exported graph; exported models return the decoded maps and are followed by the same code.
"""

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_convert, clip_boxes_to_image

MAX_CANDIDATES = 30_000
"""Only so many best candidates of a picture enter the suppression, so that its time is bounded."""


def postprocess(
    decoded: Tensor, *, conf: float = 0.25, iou: float = 0.7, max_det: int = 300, multi_label: bool = False
) -> list[dict[str, Tensor]]:
    """Class-aware non-maximum suppression of decoded maps.

    Args:
        decoded: (B, 4 + classes, anchors): cx, cy, w, h in pixels, then scores in [0, 1]; any float dtype.
        conf: candidates need a score above this.
        iou: a box is dropped if it overlaps a better one of its class by more than this.
        max_det: at most so many detections for each picture, the best ones.
        multi_label: every class above `conf` makes a candidate (validation), not only the best class (prediction).

    Returns:
        For each picture `boxes` (n, 4) float32 xyxy pixels, `scores` (n,) float32, `labels` (n,) int64, best first.

    Raises:
        ValueError: `decoded` is not three-dimensional, or holds no class.
    """
    if decoded.ndim != 3 or decoded.shape[1] < 5:
        raise ValueError(f"decoded must be (B, 4 + classes, anchors) with classes >= 1, got {tuple(decoded.shape)}")
    detections = []
    for image in decoded.float():
        boxes, scores, labels = _candidates(image, conf, multi_label)
        if len(scores) > MAX_CANDIDATES:
            scores, best = scores.topk(MAX_CANDIDATES)
            boxes, labels = boxes[best], labels[best]
        keep = class_aware_nms(boxes, scores, labels, iou)[:max_det]
        detections.append({"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]})
    return detections


def _candidates(image: Tensor, conf: float, multi_label: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes xyxy, scores and labels above `conf` of one decoded picture (4 + classes, anchors)."""
    boxes, scores = image[:4].T, image[4:]
    if multi_label:
        labels, anchors = (scores > conf).nonzero(as_tuple=True)
        scores = scores[labels, anchors]
    else:
        scores, labels = scores.max(dim=0)
        anchors = (scores > conf).nonzero(as_tuple=True)[0]
        scores, labels = scores[anchors], labels[anchors]
    return box_convert(boxes[anchors], "cxcywh", "xyxy"), scores, labels


def class_aware_nms(boxes: Tensor, scores: Tensor, labels: Tensor, iou: float) -> Tensor:
    """Indices kept by non-maximum suppression inside each class, best first.

    Args:
        boxes: (n, 4) xyxy pixels; may reach outside the picture.
        scores: (n,) scores.
        labels: (n,) classes.
        iou: overlap above which the worse box is dropped.
    """
    if len(boxes) == 0:
        return labels
    # batched_nms keeps classes apart by an offset of the largest coordinate, which negative coordinates would defeat.
    return batched_nms(boxes - boxes.min(), scores, labels, iou)


def to_native(boxes: Tensor, geometry: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes of a letterboxed picture in the pixels of the picture it was made from, clipped to it.

    Args:
        boxes: (n, 4) xyxy in letterboxed pixels.
        geometry: (3,) resize ratio, left padding, top padding.
        size: (height, width) of the original picture.
    """
    ratio, left, top = geometry.to(boxes)
    shift = torch.stack((left, top, left, top))
    return clip_boxes_to_image((boxes - shift) / ratio, size)
