"""Options of prediction, the same for the command line, files and Python. Imports no torch."""

from dataclasses import dataclass

from vision_ssm.errors import UserError


@dataclass(frozen=True)
class PredictOptions:
    """What is looked for in a picture, and how it goes through the network.

    Attributes:
        conf: Least score.
        iou: Of boxes of one class that overlap more than this, only the best is kept.
        image_size: Long side in pixels of the picture (or tile) that the network sees; None for that of the training.
        batch_size: Pictures (or tiles) that go through the network together, where they have the same shape.
        max_det: Most detections in a picture (or tile).
        tile: Side in pixels of square tiles, for pictures with objects that would get too small; None for whole
            pictures. See `detection.tiles`.
        overlap: Share of a tile's side that neighbours have in common; make it at least an object wide.

    Raises:
        UserError: A number out of range.
    """

    conf: float = 0.25
    iou: float = 0.7
    image_size: int | None = None
    batch_size: int = 8
    max_det: int = 300
    tile: int | None = None
    overlap: float = 0.25

    def __post_init__(self) -> None:
        for name in ("conf", "iou"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        for name in ("batch_size", "max_det"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("image_size", "tile"):
            value = getattr(self, name)
            if value is not None and value < 32:
                raise UserError(f"{name} must be at least 32 pixels, got {value}")
        if not 0 <= self.overlap <= 0.9:
            raise UserError(f"overlap must lie between 0 and 0.9, got {self.overlap}")
