"""Average precision of Pascal VOC, computed from the matches that pycocotools made at IoU 0.5.

pycocotools gives a detection the best box that is still free, where the VOC development kit looks only at the box of
largest overlap; at IoU 0.5 the two differ in crowded pictures alone. Boxes are continuous here, the kit counts pixels
inclusively (+1). At most 100 detections of a class count in one picture, as everywhere in the COCO protocol.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval


def voc_average_precision(evaluator: COCOeval) -> tuple[np.ndarray, np.ndarray]:
    """VOC AP at IoU 0.5 for each class.

    Args:
        evaluator: after `evaluate()`, with the first IoU threshold 0.5 and the first area range "all" (the defaults).

    Returns:
        Area under the interpolated curve (VOC 2010 and later) and the mean of 11 points (VOC 2007), each (classes,)
        in [0, 1]; nan for a class without boxes.
    """
    params = evaluator.params
    images, areas = len(params.imgIds), len(params.areaRng)
    curves = []
    for k in range(len(params.catIds)):
        first = k * areas * images
        curves.append(_precision_recall([e for e in evaluator.evalImgs[first : first + images] if e is not None]))
    area = [np.nan if curve is None else area_ap(*curve) for curve in curves]
    eleven = [np.nan if curve is None else eleven_point_ap(*curve) for curve in curves]
    return np.array(area), np.array(eleven)


def _precision_recall(images: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray] | None:
    """Precision and recall after each detection by falling score, of one class; None without boxes to find."""
    wanted = sum(int(np.count_nonzero(np.asarray(e["gtIgnore"]) == 0)) for e in images)
    if wanted == 0:
        return None
    order = np.argsort(-np.concatenate([e["dtScores"] for e in images]), kind="stable")
    ignored = np.concatenate([e["dtIgnore"][0] for e in images])[order].astype(bool)
    matched = np.concatenate([e["dtMatches"][0] for e in images])[order][~ignored] > 0
    true, false = np.cumsum(matched), np.cumsum(~matched)
    return true / np.maximum(true + false, 1), true / wanted


def area_ap(precision: np.ndarray, recall: np.ndarray) -> float:
    """Area under the precision envelope over every change of recall (VOC 2010 and later)."""
    recall = np.concatenate(([0.0], recall))
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall) * envelope))


def eleven_point_ap(precision: np.ndarray, recall: np.ndarray) -> float:
    """Mean over recall 0, 0.1, ..., 1 of the best precision at that recall or beyond (VOC 2007)."""
    reached = [precision[recall >= point - 1e-9] for point in np.linspace(0, 1, 11)]
    return float(np.mean([values.max(initial=0.0) for values in reached]))
