"""The training loss of Mamba-YOLO (that of YOLOv8): class, box and distance-distribution terms."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detection.assign import assign, complete_iou
from detection.head import BOX_CHANNELS, REG_MAX, STRIDES, anchor_grid, distances_to_boxes, flatten_maps

# Shapes: B images, A anchors, nc classes, n ground-truth boxes of the whole batch, P = n * k candidates of the boxes.

BOX_GAIN, CLASS_GAIN, DFL_GAIN = 7.5, 0.5, 1.5


class DetectionLoss(nn.Module):
    """Class loss over all anchors, CIoU and distribution focal loss over those that were given a box.

    Always computed in float32, also under autocast; on the GPU nothing in it waits for the host.

    Args:
        num_classes: nc.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def forward(self, raw: Sequence[Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Loss of one batch.

        Args:
            raw: Three raw maps of the model, (B, 64 + nc, H/8, W/8) and so on.
            targets: ``batch_index`` (n,) int64, image of each box; ``labels`` (n,) int64; ``boxes`` (n, 4) centre x,
                centre y, width, height as fractions of the image. Images without boxes have no rows. Boxes that are
                to be ignored (crowds, difficult ones) must not be among them.

        Returns:
            ``loss``: scalar for backward, the sum of the three times B; ``box``, ``cls``, ``dfl``: the weighted terms,
            detached.

        Raises:
            ValueError: The maps are not those of a model with nc classes, or the targets are no (n,), (n,), (n, 4).
        """
        self._check(raw, targets)
        with torch.autocast(raw[0].device.type, enabled=False):
            box, cls, dfl = self._terms([level.float() for level in raw], targets)
        total = (box + cls + dfl) * len(raw[0])
        return {"loss": total, "box": box.detach(), "cls": cls.detach(), "dfl": dfl.detach()}

    def _terms(self, raw: Sequence[Tensor], targets: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        image, labels = targets["batch_index"], targets["labels"]
        centres, strides = anchor_grid(raw)
        box_logits, class_logits = flatten_maps(raw)
        target_boxes = _to_pixels(targets["boxes"], raw[0])
        with torch.no_grad():
            predicted = distances_to_boxes(box_logits, centres) * strides
            assigned = assign(class_logits.sigmoid(), predicted, centres * strides, image, labels, target_boxes)
            target_scores = _target_scores(assigned.box, assigned.weight, labels, self.num_classes)
            normaliser = assigned.weight.sum().clamp(min=1)
            anchor = assigned.candidates.flatten()  # (P,)
            image = image[:, None].expand_as(assigned.candidates).flatten()
            weight = assigned.weight[image, anchor] / _times_listed(image, anchor, assigned.box)
            wanted = target_boxes[assigned.box[image, anchor].clamp(min=0)] / strides[anchor]
        cls = F.binary_cross_entropy_with_logits(class_logits, target_scores, reduction="sum")
        logits = box_logits[image, anchor]  # (P, 64)
        iou = complete_iou(distances_to_boxes(logits, centres[anchor]), wanted)
        sides = torch.cat((centres[anchor] - wanted[:, :2], wanted[:, 2:] - centres[anchor]), dim=-1)
        box = ((1 - iou) * weight).sum()
        dfl = (distribution_focal_loss(logits, sides) * weight).sum()
        return BOX_GAIN * box / normaliser, CLASS_GAIN * cls / normaliser, DFL_GAIN * dfl / normaliser

    def _check(self, raw: Sequence[Tensor], targets: Mapping[str, Tensor]) -> None:
        if len(raw) != len(STRIDES) or raw[0].shape[1] != BOX_CHANNELS + self.num_classes:
            raise ValueError(
                f"raw: expected 3 maps with {BOX_CHANNELS} + {self.num_classes} channels, "
                f"got {[tuple(level.shape) for level in raw]}"
            )
        shapes = {name: tuple(targets[name].shape) for name in ("batch_index", "labels", "boxes")}
        n = len(targets["boxes"])
        if shapes != {"batch_index": (n,), "labels": (n,), "boxes": (n, 4)}:
            raise ValueError(f"targets: expected batch_index (n,), labels (n,), boxes (n, 4), got {shapes}")


def distribution_focal_loss(logits: Tensor, sides: Tensor) -> Tensor:
    """Cross-entropy of the bins against the two next to each distance, mean over the sides (GFL, equation 6).

    Args:
        logits: (P, 64), 16 bins of each side.
        sides: (P, 4) distances to left, top, right, bottom in strides; clamped to what the bins can say.

    Returns:
        (P,) loss.
    """
    sides = sides.clamp(0, REG_MAX - 1 - 0.01)
    lower = sides.floor()
    upper_share = sides - lower
    log_p = logits.unflatten(-1, (4, REG_MAX)).log_softmax(dim=-1)
    bins = torch.stack((lower, lower + 1), dim=-1).long()
    shares = torch.stack((1 - upper_share, upper_share), dim=-1)
    return -(log_p.gather(-1, bins) * shares).sum(-1).mean(-1)


def _to_pixels(boxes: Tensor, finest: Tensor) -> Tensor:
    """Fractions (n, 4) centre, size -> corners in pixels, float32."""
    height, width = (side * STRIDES[0] for side in finest.shape[-2:])
    x, y, w, h = boxes.float().unbind(-1)  # times plain numbers: a tensor of the sizes would wait for the GPU
    x, w, y, h = x * width, w * width, y * height, h * height
    return torch.stack((x - w / 2, y - h / 2, x + w / 2, y + h / 2), dim=-1)


def _target_scores(box: Tensor, weight: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """(B, A) boxes and soft targets -> (B, A, nc): the soft target at the class of the box, else 0."""
    # One label more, so that the list is never empty; background has weight 0 whatever its label.
    label = F.pad(labels, (0, 1))[box]
    return torch.zeros(*box.shape, num_classes, device=box.device).scatter_(-1, label[..., None], weight[..., None])


def _times_listed(image: Tensor, anchor: Tensor, like: Tensor) -> Tensor:
    """(P,) how often each candidate's (image, anchor) stands among the candidates."""
    count = torch.zeros(like.shape, device=like.device)
    count.index_put_((image, anchor), torch.ones((), device=like.device).expand(anchor.shape), accumulate=True)
    return count[image, anchor]
