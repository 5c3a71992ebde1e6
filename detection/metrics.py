"""What scoring takes and gives: detections on a data set, and the numbers with their table."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from detection.coco_results import coco_results


@dataclass(frozen=True, eq=False)
class Detections:
    """Detections on many pictures, in native pixels; row i of every array is one detection.

    Attributes:
        image_ids: (n,) int64, the `image_id` of the record.
        boxes: (n, 4) float32 xyxy.
        scores: (n,) float32.
        labels: (n,) int64.
    """

    image_ids: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray

    def to_coco_results(self, category_ids: tuple[int, ...]) -> list[dict[str, Any]]:
        """Rows of a COCO results file; `category_ids[label]` is the id written."""
        return coco_results(self.image_ids.tolist(), self.boxes, self.scores, self.labels, category_ids)


@dataclass(frozen=True)
class ClassMetrics:
    """Numbers of one class. AP and AR lie in [0, 1]; nan where the data set has no box of the class.

    Attributes:
        name: class name.
        images: pictures with at least one box that counts.
        boxes: boxes that count.
        ap: COCO AP, IoU 0.50:0.95.
        ap50: COCO AP at IoU 0.50.
        ap75: COCO AP at IoU 0.75.
        ar: COCO recall at 100 detections, mean over IoU 0.50:0.95.
        voc_ap50: VOC AP at IoU 0.5, area under the curve (2010 and later).
        voc_ap50_11: VOC AP at IoU 0.5, 11 points (2007).
    """

    name: str
    images: int
    boxes: int
    ap: float
    ap50: float
    ap75: float
    ar: float
    voc_ap50: float
    voc_ap50_11: float


@dataclass(frozen=True, eq=False)
class Metrics:
    """Scores of a detector on a data set. AP and AR lie in [0, 1]; nan where the data set has no such box.

    Attributes:
        ap: COCO AP, IoU 0.50:0.95; `ap50`, `ap75` at one IoU; `ap_small`, `ap_medium`, `ap_large` by box area
            (below 32^2, to 96^2, above, in native pixels).
        ar1: COCO recall at 1, 10, 100 detections for each picture, and at 100 by box area.
        voc_ap50: VOC AP at IoU 0.5, area under the curve; `voc_ap50_11` by 11 points; means over classes.
        images: pictures scored.
        boxes: boxes that count.
        per_class: the same class by class, in label order.
        precision: (classes, 101) precision at IoU 0.5 at recall 0, 0.01, ..., 1; nan rows for absent classes.
        confusion: (classes + 1, classes + 1) counts, rows predicted, columns true, last one background.
    """

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar1: float
    ar10: float
    ar100: float
    ar_small: float
    ar_medium: float
    ar_large: float
    voc_ap50: float
    voc_ap50_11: float
    images: int
    boxes: int
    per_class: tuple[ClassMetrics, ...]
    precision: np.ndarray
    confusion: np.ndarray

    @property
    def fitness(self) -> float:
        """What the best checkpoint is chosen by: 0.1 AP50 + 0.9 AP; 0 where no box counts."""
        return 0.0 if math.isnan(self.ap) else 0.1 * self.ap50 + 0.9 * self.ap

    def scalars(self) -> dict[str, float]:
        """The numbers over all classes by their usual names, for logs."""
        return {
            "AP": self.ap,
            "AP50": self.ap50,
            "AP75": self.ap75,
            "APs": self.ap_small,
            "APm": self.ap_medium,
            "APl": self.ap_large,
            "AR1": self.ar1,
            "AR10": self.ar10,
            "AR100": self.ar100,
            "ARs": self.ar_small,
            "ARm": self.ar_medium,
            "ARl": self.ar_large,
            "VOC_AP50": self.voc_ap50,
            "VOC_AP50_11": self.voc_ap50_11,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain containers for JSON: scalars, counts, `per_class`, `confusion`; None for what is not defined."""
        defined = {name: _or_none(value) for name, value in self.scalars().items()}
        classes = [{key: _or_none(value) for key, value in asdict(c).items()} for c in self.per_class]
        counts = {"images": self.images, "boxes": self.boxes}
        return defined | counts | {"per_class": classes, "confusion": self.confusion.tolist()}

    def table(self) -> str:
        """One row for each class below one row for all, in per cent, then the COCO numbers by size."""
        width = max([len("all"), *(len(c.name) for c in self.per_class)])
        lines = [f"{'class':<{width}}  images   boxes     AP   AP50   AP75     AR  VOC AP50  (11 pt)"]
        whole = (self.ap, self.ap50, self.ap75, self.ar100, self.voc_ap50, self.voc_ap50_11)
        lines.append(_row("all", width, self.images, self.boxes, whole))
        for c in self.per_class if len(self.per_class) > 1 else ():
            lines.append(
                _row(c.name, width, c.images, c.boxes, (c.ap, c.ap50, c.ap75, c.ar, c.voc_ap50, c.voc_ap50_11))
            )
        sizes = zip(("small", "medium", "large"), (self.ap_small, self.ap_medium, self.ap_large), strict=True)
        lines.append("AP by size: " + ", ".join(f"{name} {_percent(value).strip()}" for name, value in sizes))
        return "\n".join(lines)


def _row(name: str, width: int, images: int, boxes: int, values: tuple[float, ...]) -> str:
    ap, ap50, ap75, ar, voc, voc11 = map(_percent, values)
    return f"{name:<{width}}  {images:>6}  {boxes:>6}  {ap}  {ap50}  {ap75}  {ar}     {voc}    {voc11}"


def _percent(value: float) -> str:
    return "    -" if math.isnan(value) else f"{100 * value:5.1f}"


def _or_none(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
