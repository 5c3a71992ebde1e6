"""Scoring: a model's detections on a data set, by pycocotools.

Every AP comes from pycocotools with its COCO settings (IoU 0.50:0.95, 101 recall points, at most 100 detections of a
class in a picture). COCO crowd boxes count as in COCO. VOC `difficult` boxes count as in VOC: detections that match
one, however many, are neither right nor wrong, with the plain IoU as the measure of a match.
"""

import contextlib
import io
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from tqdm import tqdm

from detection.coco_results import to_xywh
from detection.confusion import confusion_matrix
from detection.formats import DetectionSet
from detection.head import decode
from detection.metrics import ClassMetrics, Detections, Metrics
from detection.postprocess import postprocess, to_native
from detection.voc_ap import voc_average_precision


def evaluate(
    model: nn.Module,
    loader: Iterable[dict[str, Any]],
    dataset: DetectionSet,
    *,
    device: torch.device | str,
    amp: bool = False,
    progress: bool = False,
) -> Metrics:
    """Run a model over a validation loader and score what it finds.

    Args:
        model: returns raw maps, as MambaYOLO does; already on `device` and in eval mode.
        loader: batches of `val_loader`, covering `dataset`.
        dataset: the ground truth.
        device: where the pictures go.
        amp: bfloat16 autocast.
        progress: show a progress bar (never where the output is not a terminal).
    """
    return score(dataset, collect_detections(model, loader, device=device, amp=amp, progress=progress))


@torch.inference_mode()
def collect_detections(
    model: nn.Module,
    loader: Iterable[dict[str, Any]],
    *,
    device: torch.device | str,
    conf: float = 0.001,
    iou: float = 0.7,
    max_det: int = 300,
    amp: bool = False,
    progress: bool = False,
) -> Detections:
    """Detections of a model on every picture of a validation loader; pictures are not kept.

    The defaults are the validation rules: every class above `conf` counts, overlap 0.7, 300 for each picture.
    """
    device = torch.device(device)
    columns: list[tuple[np.ndarray, ...]] = []
    for batch in tqdm(loader, desc="val", leave=False, disable=None if progress else True):
        images = batch["images"].to(device, non_blocking=True).float() / 255
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            raw = model(images)
        found = postprocess(decode(raw), conf=conf, iou=iou, max_det=max_det, multi_label=True)
        for record, geometry, one in zip(batch["records"], batch["geometry"], found, strict=True):
            boxes = to_native(one["boxes"], geometry, (record.height, record.width)).cpu().numpy()
            ids = np.full(len(boxes), record.image_id, dtype=np.int64)
            columns.append((ids, boxes, one["scores"].cpu().numpy(), one["labels"].cpu().numpy()))
    if not columns:
        return Detections(np.zeros(0, np.int64), np.zeros((0, 4), np.float32), np.zeros(0), np.zeros(0, np.int64))
    return Detections(*(np.concatenate(column) for column in zip(*columns, strict=True)))


def score(dataset: DetectionSet, detections: Detections) -> Metrics:
    """COCO and VOC numbers, precision-recall curves and confusion matrix of detections on a data set.

    Args:
        dataset: the ground truth; every one of its pictures counts, also those without detections.
        detections: in native pixels.

    Raises:
        ValueError: a detection belongs to no picture of the data set, or to no class.
    """
    _check(dataset, detections)
    truth, found = _ground_truth(dataset), _results(dataset, detections)
    evaluator = (_DifficultEval if dataset.format == "voc" else COCOeval)(truth, found, "bbox")
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return _metrics(dataset, evaluator, confusion_matrix(dataset, detections))


class _DifficultEval(COCOeval):
    """COCOeval in which `iscrowd` boxes are still ignored and matched repeatedly, but by the plain IoU."""

    _gts: Any

    def computeIoU(self, imgId: int, catId: int) -> Any:  # noqa: N802 (pycocotools' name)
        boxes = self._gts[imgId, catId]
        for box in boxes:
            box["iscrowd"] = 0
        overlap = super().computeIoU(imgId, catId)
        for box in boxes:
            box["iscrowd"] = int(box["ignore"])
        return overlap


def _check(dataset: DetectionSet, detections: Detections) -> None:
    strangers = np.setdiff1d(detections.image_ids, [record.image_id for record in dataset.records])
    if len(strangers):
        raise ValueError(f"detections name picture {strangers[0]}, which is not in split '{dataset.split}'")
    if len(detections.labels) and int(detections.labels.max()) >= len(dataset.names):
        raise ValueError(
            f"the model found class {int(detections.labels.max())}, the data set has classes 0 to "
            f"{len(dataset.names) - 1}: the weights belong to other classes"
        )


def _coco(dataset: DetectionSet, annotations: list[dict[str, Any]]) -> COCO:
    """A COCO object in memory; the category id is the label."""
    content: Any = {
        "images": [{"id": r.image_id, "width": r.width, "height": r.height} for r in dataset.records],
        "categories": [{"id": label, "name": name} for label, name in enumerate(dataset.names)],
        "annotations": annotations,
    }
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _ground_truth(dataset: DetectionSet) -> COCO:
    annotations: list[dict[str, Any]] = []
    for record in dataset.records:
        for box, label, ignore, area in zip(record.boxes, record.labels, record.ignore, record.areas, strict=True):
            x1, y1, x2, y2 = map(float, box)
            # pycocotools takes a match with annotation 0 for no match: ids begin at 1.
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": record.image_id,
                    "category_id": int(label),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": float(area),
                    "iscrowd": int(ignore),
                }
            )
    return _coco(dataset, annotations)


def _results(dataset: DetectionSet, detections: Detections) -> COCO:
    # Not COCO.loadRes: it fails on an empty list and writes to the terminal.
    sides = to_xywh(detections.boxes)
    rows = zip(
        detections.image_ids.tolist(),
        detections.labels.tolist(),
        sides.tolist(),
        detections.scores.tolist(),
        (sides[:, 2] * sides[:, 3]).tolist(),
        strict=True,
    )
    annotations = [
        {"id": i, "image_id": image, "category_id": label, "bbox": box, "score": value, "area": area, "iscrowd": 0}
        for i, (image, label, box, value, area) in enumerate(rows, start=1)
    ]
    return _coco(dataset, annotations)


def _metrics(dataset: DetectionSet, evaluator: COCOeval, confusion: np.ndarray) -> Metrics:
    stats = np.where(evaluator.stats < 0, np.nan, evaluator.stats)
    # (IoU, recall, class, area, max detections); area 0 is "all", the last limit is 100
    precision = np.where(evaluator.eval["precision"] < 0, np.nan, evaluator.eval["precision"])[..., 0, -1]
    recall = np.where(evaluator.eval["recall"] < 0, np.nan, evaluator.eval["recall"])[..., 0, -1]
    voc_area, voc_eleven = voc_average_precision(evaluator)
    kept = [record.labels[~record.ignore] for record in dataset.records]
    per_class = tuple(
        ClassMetrics(
            name=name,
            images=sum(bool((labels == k).any()) for labels in kept),
            boxes=sum(int((labels == k).sum()) for labels in kept),
            ap=float(precision[:, :, k].mean()),
            ap50=float(precision[0, :, k].mean()),
            ap75=float(precision[5, :, k].mean()),
            ar=float(recall[:, k].mean()),
            voc_ap50=float(voc_area[k]),
            voc_ap50_11=float(voc_eleven[k]),
        )
        for k, name in enumerate(dataset.names)
    )
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    recalls = ("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large")
    return Metrics(
        **dict(zip(names + recalls, stats.tolist(), strict=True)),
        voc_ap50=_mean(voc_area),
        voc_ap50_11=_mean(voc_eleven),
        images=len(dataset.records),
        boxes=sum(c.boxes for c in per_class),
        per_class=per_class,
        precision=precision[0].T,
        confusion=confusion,
    )


def _mean(values: np.ndarray) -> float:
    """Mean of the defined values; nan where none is."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")
