"""Which class is taken for which: counts over a data set at one confidence and one overlap."""

import numpy as np
from pycocotools import mask

from detection.coco_results import to_xywh
from detection.formats import DetectionSet, ImageRecord
from detection.metrics import Detections


def confusion_matrix(
    dataset: DetectionSet, detections: Detections, *, conf: float = 0.25, iou: float = 0.45
) -> np.ndarray:
    """Counts of predicted against true classes.

    In each picture boxes and detections are paired one to one by falling IoU, whatever their classes. A box without a
    partner was taken for background, a detection without one was seen in the background; those that lie on a crowd or
    difficult box count as nothing.

    Args:
        dataset: the ground truth.
        detections: in native pixels.
        conf: detections below this are left out.
        iou: a pair needs more overlap than this.

    Returns:
        (classes + 1, classes + 1) int64, rows predicted, columns true, the last of each is background.
    """
    background = len(dataset.names)
    matrix = np.zeros((background + 1, background + 1), dtype=np.int64)
    confident = detections.scores > conf
    order = np.argsort(detections.image_ids[confident], kind="stable")
    ids = detections.image_ids[confident][order]
    boxes, labels = detections.boxes[confident][order], detections.labels[confident][order]
    for record in dataset.records:
        mine = slice(*np.searchsorted(ids, (record.image_id, record.image_id + 1)))
        _count(matrix, record, boxes[mine], labels[mine], iou)
    return matrix


def _count(matrix: np.ndarray, record: ImageRecord, boxes: np.ndarray, labels: np.ndarray, iou: float) -> None:
    background = len(matrix) - 1
    truth = record.labels[~record.ignore]
    overlap = _overlap(boxes, record.boxes[~record.ignore], crowd=False)
    free_box, free_detection = np.ones(len(truth), bool), np.ones(len(boxes), bool)
    rows, columns = np.nonzero(overlap > iou)
    for i in np.argsort(-overlap[rows, columns], kind="stable"):
        row, column = rows[i], columns[i]
        if free_detection[row] and free_box[column]:
            free_detection[row] = free_box[column] = False
            matrix[labels[row], truth[column]] += 1
    on_ignored = (_overlap(boxes, record.boxes[record.ignore], crowd=True) > iou).any(axis=1)
    matrix[background] += np.bincount(truth[free_box], minlength=len(matrix))
    matrix[:, background] += np.bincount(labels[free_detection & ~on_ignored], minlength=len(matrix))


def _overlap(detected: np.ndarray, boxes: np.ndarray, crowd: bool) -> np.ndarray:
    """(detections, boxes) IoU; with `crowd` the share of the detection that the box covers."""
    if len(detected) == 0 or len(boxes) == 0:
        return np.zeros((len(detected), len(boxes)))
    found, truth = to_xywh(detected), to_xywh(boxes)
    return np.asarray(mask.iou(found, truth, [int(crowd)] * len(boxes)))  # type: ignore[arg-type]
