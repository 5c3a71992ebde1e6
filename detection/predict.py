"""Finding objects in pictures and videos with trained weights."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from detection.head import decode
from detection.letterbox import letterbox
from detection.postprocess import postprocess, to_native
from detection.predict_options import PredictOptions
from detection.prediction import Prediction
from detection.pretrained import load_model
from detection.sources import Frame, OnError, Source, read_source
from detection.tiles import merge_tiles, tile_boxes
from vision_ssm.device import choose_device
from vision_ssm.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class _View:
    """A part of a picture that goes through the network in one piece; `box` is x1, y1, x2, y2 in the picture."""

    frame: Frame
    box: tuple[int, int, int, int]

    def pixels(self) -> np.ndarray:
        x1, y1, x2, y2 = self.box
        return self.frame.image[y1:y2, x1:x2]


class Detector:
    """A trained detector with its class names.

    Args:
        model: returns raw maps, as MambaYOLO does; moved to `device` and set to eval mode.
        names: class names in label order.
        image_size: long side of the pictures that the network sees, unless another is asked for.
        category_ids: number of each class in COCO results; by default 1, 2, ...
        device: "auto" (CUDA, else Apple's GPU, else the CPU) or any torch device.

    Raises:
        UserError: the device is not there, or `image_size` is too small.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        *,
        image_size: int = 640,
        category_ids: Sequence[int] | None = None,
        device: str | torch.device = "auto",
    ) -> None:
        PredictOptions(image_size=image_size)  # refuses what no picture can be resized to
        self.device = choose_device(device)
        self.model = model.to(self.device).eval()
        self.names = tuple(names)
        self.image_size = image_size
        self.category_ids = tuple(category_ids) if category_ids else tuple(range(1, len(self.names) + 1))

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str | torch.device = "auto") -> "Detector":
        """Load a checkpoint folder, a published .pt file or weights shipped with the package, by name.

        Raises:
            UserError: no such weights, of another task, or not fitting their config.
        """
        model, config = load_model(path)
        size, ids = config["image_size"], config.get("category_ids")
        return cls(model, config["names"], image_size=size, category_ids=ids, device=device)

    def predict(
        self,
        source: Source,
        *,
        conf: float = PredictOptions.conf,
        iou: float = PredictOptions.iou,
        image_size: int | None = PredictOptions.image_size,
        batch_size: int = PredictOptions.batch_size,
        max_det: int = PredictOptions.max_det,
        tile: int | None = PredictOptions.tile,
        overlap: float = PredictOptions.overlap,
    ) -> list[Prediction]:
        """Find objects; one result for each picture or video frame, in order.

        The pixels of files are not kept: `Prediction.image` reads them again. For long videos use `stream`.

        Args:
            source: a picture, folder (to any depth), glob pattern or video; an (H, W, 3) uint8 RGB array; a Pillow
                picture; a (3, H, W) or (B, 3, H, W) tensor, uint8 or float in [0, 1]; a list of these.
            conf: least score; this and the options that follow are explained at `PredictOptions`.

        Raises:
            UserError: a source that cannot be read, an option out of range, or too little GPU memory.
        """
        options = PredictOptions(conf, iou, image_size, batch_size, max_det, tile, overlap)
        found = self.stream(source, options)
        return [one if one.path is None else dataclasses.replace(one, pixels=None) for one in found]

    def stream(
        self, source: Source, options: PredictOptions | None = None, *, on_error: OnError | None = None
    ) -> Iterator[Prediction]:
        """As `predict`, one result at a time and in bounded memory; each holds the pixels of its picture.

        Args:
            source: see `predict`.
            options: the usual ones if not given.
            on_error: called for each file that cannot be read, which is then left out; without it the error is raised.
        """
        options = options or PredictOptions()
        # A picture in tiles fills batches by itself.
        together = 1 if options.tile else options.batch_size
        return self._stream(read_source(source, on_error), options, together)

    def _stream(self, frames: Iterable[Frame], options: PredictOptions, together: int) -> Iterator[Prediction]:
        for chunk in _chunks(frames, together):
            views = [[_View(frame, box) for box in _parts(frame, options)] for frame in chunk]
            found = iter(self._detect([view for of_frame in views for view in of_frame], options))
            for frame, of_frame in zip(chunk, views, strict=True):
                yield self._prediction(frame, of_frame, list(islice(found, len(of_frame))), options)

    def _prediction(
        self, frame: Frame, views: list[_View], found: list[dict[str, Tensor]], options: PredictOptions
    ) -> Prediction:
        height, width = frame.image.shape[:2]
        whole = found[0]
        if len(found) > 1:
            whole = merge_tiles(found, [view.box for view in views], (height, width), options.iou)
        boxes, scores, labels = (whole[key].numpy() for key in ("boxes", "scores", "labels"))
        return Prediction(boxes, scores, labels, self.names, width, height, frame.path, frame.index, frame.image)

    def _detect(self, views: list[_View], options: PredictOptions) -> list[dict[str, Tensor]]:
        """Detections of each view in the pixels of its picture, on the CPU."""
        found: list[dict[str, Tensor]] = []
        for batch in _chunks(views, options.batch_size):
            boxed = [letterbox(view.pixels(), options.image_size or self.image_size) for view in batch]
            of_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
            for k, (picture, _) in enumerate(boxed):
                of_shape[picture.shape].append(k)
            done: dict[int, dict[str, Tensor]] = {}
            for members in of_shape.values():
                detections = self._forward(np.stack([boxed[k][0] for k in members]), options)
                done |= {k: _to_picture(one, boxed[k][1], batch[k]) for k, one in zip(members, detections, strict=True)}
            found += [done[k] for k in range(len(batch))]
        return found

    @torch.inference_mode()
    def _forward(self, pictures: np.ndarray, options: PredictOptions) -> list[dict[str, Tensor]]:
        """Detections in letterboxed pixels of (B, H, W, 3) uint8 pictures."""
        images = torch.from_numpy(pictures).to(self.device).permute(0, 3, 1, 2).float() / 255
        try:
            decoded = decode(self.model(images))
            return postprocess(decoded, conf=options.conf, iou=options.iou, max_det=options.max_det)
        except torch.OutOfMemoryError as error:
            count, height, width = pictures.shape[:3]
            raise UserError(
                f"out of GPU memory with {count} pictures of {width}x{height}: take a smaller batch_size or image_size"
            ) from error


def _to_picture(found: dict[str, Tensor], geometry: tuple[float, float, float], view: _View) -> dict[str, Tensor]:
    """Detections of a letterboxed view in the pixels of its picture, on the CPU."""
    x1, y1, x2, y2 = view.box
    boxes = to_native(found["boxes"].cpu(), torch.tensor(geometry), (y2 - y1, x2 - x1))
    shifted = boxes + boxes.new_tensor([x1, y1, x1, y1])
    return {"boxes": shifted, "scores": found["scores"].cpu(), "labels": found["labels"].cpu()}


def _parts(frame: Frame, options: PredictOptions) -> list[tuple[int, int, int, int]]:
    height, width = frame.image.shape[:2]
    if options.tile is None:
        return [(0, 0, width, height)]
    return tile_boxes(height, width, options.tile, options.overlap)


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    remaining = iter(items)
    while chunk := list(islice(remaining, size)):
        yield chunk
