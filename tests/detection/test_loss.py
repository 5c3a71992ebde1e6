"""Assignment and losses against recorded values of the released code, and the cases no recorded file covers."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from detection.assign import assign, complete_iou
from detection.convert import convert_entry, from_official
from detection.head import anchor_grid, distances_to_boxes, flatten_maps
from detection.loss import DetectionLoss, distribution_focal_loss
from detection.model import MambaYOLO
from tests.detection.test_model import published_weights
from tests.golden import values


def targets_of(*rows: tuple[int, int, float, float, float, float]) -> dict[str, Tensor]:
    """Rows of image, label, centre x, centre y, width, height (fractions)."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return {"batch_index": table[:, 0].long(), "labels": table[:, 1].long(), "boxes": table[:, 2:]}


def random_raw(batch: int, classes: int, height: int = 64, width: int = 96, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, 64 + classes, height // s, width // s, generator=generator).requires_grad_()
        for s in (8, 16, 32)
    ]


def run_assign(raw: Sequence[Tensor], targets: dict[str, Tensor], height: int, width: int):
    """The assignment as the loss calls it; also the target corners in pixels."""
    centres, strides = anchor_grid(raw)
    box_logits, class_logits = flatten_maps(raw)
    centre, size = (targets["boxes"] * torch.tensor([width, height, width, height])).split(2, dim=-1)
    pixels = torch.cat((centre - size / 2, centre + size / 2), dim=-1)
    predicted = distances_to_boxes(box_logits, centres) * strides
    found = assign(
        class_logits.sigmoid(), predicted, centres * strides, targets["batch_index"], targets["labels"], pixels
    )
    return found, pixels


@pytest.fixture(scope="module")
def recorded(shared_root: Path) -> dict[str, Tensor]:
    return values(shared_root / "golden" / "detection", "T_loss_2x3x64x96")


@pytest.fixture(scope="module")
def recorded_targets(recorded: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "batch_index": recorded["batch_idx"].long(),
        "labels": recorded["cls"].flatten().long(),
        "boxes": recorded["bboxes"],
    }


def recorded_raw(recorded: dict[str, Tensor]) -> list[Tensor]:
    return [recorded[f"raw_p{level}"].clone().requires_grad_() for level in (3, 4, 5)]


def test_assignment_matches_the_released_code(recorded: dict[str, Tensor], recorded_targets: dict[str, Tensor]) -> None:
    found, pixels = run_assign(recorded_raw(recorded), recorded_targets, 64, 96)
    positive = found.box >= 0
    assert torch.equal(positive, recorded["assign_fg_mask"].bool())
    assert positive.sum() == 36
    first_of_image = torch.searchsorted(recorded_targets["batch_index"], torch.arange(2))
    index_in_image = found.box - first_of_image[:, None]
    assert torch.equal(index_in_image[positive], recorded["assign_target_gt_idx"].long()[positive])
    labels = recorded_targets["labels"][found.box]
    assert torch.equal(labels[positive], recorded["assign_target_labels"].long()[positive])
    assert (pixels[found.box] - recorded["assign_target_bboxes"])[positive].abs().max() <= 1e-4
    assert (found.weight - recorded["assign_target_scores_sum_per_anchor"]).abs().max() <= 2e-4


def test_loss_of_recorded_maps(recorded: dict[str, Tensor], recorded_targets: dict[str, Tensor]) -> None:
    got = DetectionLoss(80)(recorded_raw(recorded), recorded_targets)
    items = torch.stack([got["box"], got["cls"], got["dfl"]])
    torch.testing.assert_close(items, recorded["loss_items"], rtol=1e-6, atol=0)
    torch.testing.assert_close(got["loss"].reshape(1), recorded["loss_total"], rtol=1e-6, atol=0)


def test_training_step_matches_the_released_code(
    shared_root: Path, recorded: dict[str, Tensor], recorded_targets: dict[str, Tensor]
) -> None:
    """Raw maps with batch statistics, loss, gradients of all parameters and the updated running statistics."""
    model = MambaYOLO("t")
    model.load_state_dict(from_official(published_weights(shared_root / "golden" / "detection", "T")))
    raw = model.train()(recorded["input"])
    for level, name in zip(raw, ("raw_p3", "raw_p4", "raw_p5"), strict=True):
        assert (level - recorded[name]).abs().max() <= 2e-3, name
    got = DetectionLoss(80)(raw, recorded_targets)
    items = torch.stack([got["box"], got["cls"], got["dfl"]])
    torch.testing.assert_close(items, recorded["loss_items"], rtol=3e-4, atol=0)
    got["loss"].backward()

    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    compared = 0
    for key, want in recorded.items():
        kind, _, published = key.partition(".")
        if kind == "grad":
            for name, part in convert_entry(published, want).items():
                assert (gradients[name] - part).norm() <= 2e-3 * part.norm(), published
        elif kind == "grad_norm":
            shape = (4 * 64,) if published.endswith((".Ds", ".A_logs")) else (4, 4, 4, 4)
            names = convert_entry(published, torch.zeros(shape))
            norm = torch.stack([gradients[name].norm() for name in names]).norm()
            torch.testing.assert_close(norm.reshape(1), want, rtol=1e-3, atol=0, msg=published)
        elif kind == "after":
            (name,) = convert_entry(published, want)
            torch.testing.assert_close(model.state_dict()[name], want, rtol=1e-4, atol=1e-5)
        compared += kind in ("grad", "grad_norm", "after")
    assert compared == 19
    total = torch.stack([g.norm() for g in gradients.values()]).norm()
    torch.testing.assert_close(total.reshape(1), recorded["grad_norm_total"], rtol=1e-3, atol=0)


def plain_loss(raw: Sequence[Tensor], targets: dict[str, Tensor], height: int, width: int) -> Tensor:
    """The three terms written box by box from their definitions, given the assignment."""
    found, pixels = run_assign(raw, targets, height, width)
    centres, strides = anchor_grid(raw)
    box_logits, class_logits = flatten_maps(raw)
    box = dfl = torch.zeros(())
    scores = torch.zeros_like(class_logits)
    for b, a in (found.box >= 0).nonzero().tolist():
        j, w = int(found.box[b, a]), found.weight[b, a]
        scores[b, a, targets["labels"][j]] = w
        wanted = pixels[j] / strides[a]
        bins = box_logits[b, a].view(4, 16)
        left, top, right, bottom = bins.softmax(-1) @ torch.arange(16.0)
        x, y = centres[a]
        box = box + w * (1 - complete_iou(torch.stack((x - left, y - top, x + right, y + bottom)), wanted))
        for side, t in enumerate((x - wanted[0], y - wanted[1], wanted[2] - x, wanted[3] - y)):
            t = min(max(float(t), 0.0), 14.99)
            log_p = bins[side].log_softmax(-1)
            k = int(t)
            dfl = dfl - w / 4 * (log_p[k] * (k + 1 - t) + log_p[k + 1] * (t - k))
    cls = -(scores * class_logits.sigmoid().log() + (1 - scores) * (1 - class_logits.sigmoid()).log()).sum()
    total = max(float(scores.sum()), 1.0)
    return torch.stack((7.5 * box, 0.5 * cls, 1.5 * dfl)) / total


CROWDED = targets_of(
    (0, 1, 0.5, 0.5, 0.6, 0.7), (0, 0, 0.5, 0.5, 0.5, 0.6), (0, 2, 0.45, 0.5, 0.6, 0.6),  # fight for the same anchors
    (2, 0, 0.5, 0.5, 1.0, 1.0),  # 12 strides of P3 wide; image 1 is empty
    (2, 1, 0.1, 0.1, 0.02, 0.02),  # smaller than a cell and between the centres
)  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradients_match_the_plain_definition(seed: int) -> None:
    raw = random_raw(3, 3, seed=seed)
    want = plain_loss(raw, CROWDED, 64, 96)
    got = DetectionLoss(3)(raw, CROWDED)
    torch.testing.assert_close(torch.stack([got["box"], got["cls"], got["dfl"]]), want.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got["loss"], want.sum().detach() * 3, rtol=1e-5, atol=0)
    want_grads = torch.autograd.grad(want.sum() * 3, raw)
    for w, g in zip(want_grads, torch.autograd.grad(got["loss"], raw), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6)


def test_batch_without_any_box_trains_the_classes_only() -> None:
    raw = random_raw(2, 3)
    got = DetectionLoss(3)(raw, targets_of())
    assert got["box"] == 0
    assert got["dfl"] == 0
    want = 0.5 * sum(torch.nn.functional.softplus(level[:, 64:]).sum() for level in raw)  # divided by S = 1
    torch.testing.assert_close(got["cls"], torch.as_tensor(want).detach())
    gradients = torch.autograd.grad(got["loss"], raw)
    for gradient in gradients:
        assert (gradient[:, :64] == 0).all()
        assert (gradient[:, 64:] != 0).all()


def test_small_sum_of_targets_is_raised_to_one() -> None:
    """A box that fits badly: S < 1, so the terms are divided by 1 and not by S."""
    raw = random_raw(1, 2)
    targets = targets_of((0, 1, 0.5, 0.5, 0.1, 0.9))
    found, _ = run_assign(raw, targets, 64, 96)
    assert 0 < found.weight.sum() < 1
    got = DetectionLoss(2)(raw, targets)
    want = plain_loss(raw, targets, 64, 96)
    torch.testing.assert_close(torch.stack([got["box"], got["cls"], got["dfl"]]), want.detach(), rtol=1e-5, atol=1e-6)


def test_distances_beyond_the_last_bin_are_clamped() -> None:
    logits = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    log_p = logits.view(4, 16).log_softmax(-1)
    got = distribution_focal_loss(logits, torch.tensor([[40.0, -3.0, 2.25, 15.0]]))
    near_end = 0.01 * log_p[:, 14] + 0.99 * log_p[:, 15]
    want = -(near_end[0] + log_p[1, 0] + 0.75 * log_p[2, 2] + 0.25 * log_p[2, 3] + near_end[3]) / 4
    torch.testing.assert_close(got, want.reshape(1), rtol=1e-4, atol=1e-5)


def test_boxes_wider_than_the_bins_still_give_a_finite_loss() -> None:
    raw = random_raw(1, 2, 320, 320)
    got = DetectionLoss(2)(raw, targets_of((0, 0, 0.5, 0.5, 1.0, 1.0)))  # 40 strides of P3
    gradients = torch.autograd.grad(got["loss"], raw)
    assert got["loss"].isfinite()
    assert all(g.isfinite().all() for g in gradients)


def test_contested_anchor_goes_to_the_largest_iou_even_if_it_did_not_rank_it() -> None:
    """An anchor in two top-10 lists goes to a third box that overlaps it most, as the released code has it."""
    torch.manual_seed(0)
    centres = torch.stack((torch.arange(12.0) + 0.5, torch.full((12,), 5.0)), dim=-1)
    third = torch.tensor([0.0, 0.0, 12.0, 10.0])
    others = torch.tensor([[0.0, 0.0, 12.0, 14.0], [0.0, 0.0, 12.0, 15.0]])
    predicted = third.expand(1, 12, 4).clone()
    scores = torch.full((1, 12, 2), 0.9)
    scores[0, 0, 1] = 1e-6  # so the third box (class 1) ranks anchor 0 last, and anchor 1 last but one
    scores[0, 1, 1] = 1e-5
    labels = torch.tensor([0, 0, 1])
    found = assign(
        scores, predicted, centres, torch.zeros(3, dtype=torch.long), labels, torch.cat((others, third[None]))
    )
    assert 0 not in found.candidates[2].tolist()
    listed = set(found.candidates[0].tolist()) & set(found.candidates[1].tolist())
    assert listed
    assert (found.box[0, sorted(listed)] == 2).all()


def test_perfect_prediction_has_full_weight() -> None:
    centres = torch.tensor([[2.0, 2.0], [6.0, 2.0]])
    box = torch.tensor([[0.0, 0.0, 8.0, 4.0]])
    predicted = torch.stack((box, torch.tensor([[0.0, 0.0, 4.0, 4.0]])), dim=1)
    found = assign(torch.full((1, 2, 1), 0.5), predicted, centres, torch.tensor([0]), torch.tensor([0]), box)
    assert found.box.tolist() == [[0, 0]]
    assert found.weight[0, 0].item() == pytest.approx(1, abs=1e-5)
    assert 0 < found.weight[0, 1].item() < 0.1


def test_centre_on_the_edge_is_outside() -> None:
    centres = torch.tensor([[4.0, 4.0], [4.5, 4.5]])
    box = torch.tensor([[4.0, 2.0, 12.0, 10.0]])
    found = assign(torch.full((1, 2, 1), 0.5), box.expand(1, 2, 4), centres, torch.tensor([0]), torch.tensor([0]), box)
    assert found.box.tolist() == [[-1, 0]]


def test_complete_iou_by_hand() -> None:
    a = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 4.0, 2.0]])
    b = torch.tensor([[0.0, 0.0, 2.0, 2.0], [2.0, 0.0, 4.0, 2.0], [0.0, 0.0, 2.0, 4.0]])
    v = 4 / math.pi**2 * (math.atan(0.5) - math.atan(2)) ** 2
    iou = 4 / 12
    want = [1.0, -4 / 20, iou - (2 / 32 + v * v / (v - iou + 1))]
    torch.testing.assert_close(complete_iou(a, b), torch.tensor(want), rtol=1e-5, atol=1e-6)
    assert complete_iou(torch.zeros(1, 4), torch.zeros(1, 4)).isfinite().all()


def test_loss_is_float32_under_autocast() -> None:
    raw = random_raw(3, 3)
    want = DetectionLoss(3)(raw, CROWDED)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        got = DetectionLoss(3)(raw, CROWDED)["loss"]
    assert got.dtype == torch.float32
    assert torch.equal(got, want)
    halves = [level.bfloat16() for level in raw]
    assert DetectionLoss(3)(halves, CROWDED)["loss"].dtype == torch.float32


def test_order_of_the_boxes_does_not_matter() -> None:
    raw = random_raw(3, 3)
    order = torch.tensor([4, 2, 0, 3, 1])
    shuffled = {name: tensor[order] for name, tensor in CROWDED.items()}
    want, got = DetectionLoss(3)(raw, CROWDED), DetectionLoss(3)(raw, shuffled)
    torch.testing.assert_close(got["loss"], want["loss"])


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"64 \+ 4 channels"):
        DetectionLoss(4)(random_raw(1, 3), targets_of())
    with pytest.raises(ValueError, match=r"boxes \(n, 4\), got"):
        DetectionLoss(3)(random_raw(1, 3), {**targets_of(), "labels": torch.zeros(2, dtype=torch.long)})
