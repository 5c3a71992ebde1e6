"""Detections in the form of COCO results files."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


def to_xywh(boxes: np.ndarray) -> np.ndarray:
    """(n, 4) xyxy -> (n, 4) left, top, width, height in float64, as pycocotools wants them."""
    corners = boxes.astype(np.float64)
    return np.concatenate((corners[:, :2], corners[:, 2:] - corners[:, :2]), axis=1)


def coco_results(
    image_ids: Iterable[int | str],
    boxes: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    category_ids: Sequence[int],
) -> list[dict[str, Any]]:
    """Rows of a COCO results file: image_id, category_id, bbox (x, y, width, height in pixels), score.

    Args:
        image_ids: the picture of each detection.
        boxes: (n, 4) xyxy in pixels of the picture.
        scores: (n,) scores.
        labels: (n,) classes.
        category_ids: `category_ids[label]` is written for a class.
    """
    rows = zip(image_ids, labels.tolist(), to_xywh(boxes).round(3).tolist(), scores.tolist(), strict=True)
    return [
        {"image_id": image, "category_id": category_ids[label], "bbox": box, "score": round(score, 5)}
        for image, label, box, score in rows
    ]
