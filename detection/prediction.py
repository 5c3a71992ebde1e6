"""What a detector found in one picture, and its forms for people and for files."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from detection.coco_results import coco_results
from vision_ssm.data.images import read_image
from vision_ssm.data.video import read_frame
from vision_ssm.viz import draw_boxes, save_picture


@dataclass(frozen=True, eq=False)
class Prediction:
    """What was found in one picture, best first.

    Attributes:
        boxes: (n, 4) float32 xyxy in pixels of the picture.
        scores: (n,) float32 in [0, 1].
        labels: (n,) int64 classes.
        names: names of all classes; `names[label]` is that of a detection.
        width: columns of the picture.
        height: rows of the picture.
        path: the file; None for a picture from memory.
        frame: position in a video, from 0; None for a single picture.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    width: int
    height: int
    path: Path | None = None
    frame: int | None = None
    pixels: np.ndarray | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def image(self) -> np.ndarray:
        """The picture, (H, W, 3) uint8 RGB; read from its file again where it is not in memory."""
        if self.pixels is not None:
            return self.pixels
        assert self.path is not None
        return read_image(self.path) if self.frame is None else read_frame(self.path, self.frame)

    def draw(self) -> np.ndarray:
        """The picture with boxes, names and scores, (H, W, 3) uint8 RGB, on a copy."""
        named = zip(self.labels, self.scores, strict=True)
        captions = [f"{self.names[label]} {score:.2f}" for label, score in named]
        return draw_boxes(self.image, self.boxes, self.labels, captions)

    def save(self, path: str | Path) -> None:
        """Write the drawn picture; the ending of `path` decides the format.

        Raises:
            UserError: unknown ending, or the file cannot be written.
        """
        save_picture(path, self.draw())

    def to_dict(self) -> dict[str, Any]:
        """Plain containers: path, frame, width, height, and `detections` with box, score, label, name."""
        rows = zip(self.boxes.tolist(), self.scores.tolist(), self.labels.tolist(), strict=True)
        detections = [
            {"box": [round(v, 2) for v in box], "score": round(score, 5), "label": label, "name": self.names[label]}
            for box, score, label in rows
        ]
        path = None if self.path is None else str(self.path)
        size = {"width": self.width, "height": self.height}
        return {"path": path, "frame": self.frame} | size | {"detections": detections}

    def to_json(self) -> str:
        """`to_dict` as a JSON object in one line."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    def to_coco(self, image_id: int | str, category_ids: Sequence[int]) -> list[dict[str, Any]]:
        """Rows of a COCO results file: image_id, category_id, bbox (x, y, width, height in pixels), score.

        Args:
            image_id: number or name of this picture.
            category_ids: `category_ids[label]` is written for a class.
        """
        return coco_results([image_id] * len(self), self.boxes, self.scores, self.labels, category_ids)

    def to_yolo(self) -> str:
        """A YOLO label file: a line `class cx cy w h` for each box, as shares of the picture's width and height."""
        low, high = self.boxes[:, :2], self.boxes[:, 2:]
        rows = np.concatenate(((low + high) / 2, high - low), axis=1) / ([self.width, self.height] * 2)
        lines = zip(self.labels.tolist(), rows.tolist(), strict=True)
        return "".join(f"{label} {' '.join(f'{v:.6f}' for v in row)}\n" for label, row in lines)
