"""Suppression against a plain greedy loop, and its rules one by one."""

import pytest
import torch
from torchvision.ops import box_iou

from detection import postprocess as module
from detection.postprocess import class_aware_nms, postprocess, to_native


def decoded_from(boxes: list[list[float]], scores: list[list[float]]) -> torch.Tensor:
    """(1, 4 + classes, n) from cxcywh boxes and one score row for each box."""
    return torch.cat((torch.tensor(boxes), torch.tensor(scores)), dim=1).T[None]


def greedy(boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, iou: float) -> list[int]:
    overlap = box_iou(boxes, boxes)
    kept: list[int] = []
    for i in scores.argsort(descending=True).tolist():
        if all(labels[i] != labels[j] or overlap[i, j] <= iou for j in kept):
            kept.append(i)
    return kept


def test_equals_a_greedy_loop_also_with_negative_coordinates() -> None:
    torch.manual_seed(0)
    corner = torch.rand(400, 2) * 200 - 100
    boxes = torch.cat((corner, corner + 20 + torch.rand(400, 2) * 60), dim=1)
    scores, labels = torch.rand(400), torch.randint(0, 4, (400,))
    assert class_aware_nms(boxes, scores, labels, 0.5).tolist() == greedy(boxes, scores, labels, 0.5)


def test_other_class_is_kept_same_class_is_dropped() -> None:
    decoded = decoded_from([[50, 50, 40, 40], [51, 50, 40, 40], [50, 51, 40, 40]], [[0.9, 0.0], [0.8, 0.0], [0.0, 0.7]])
    (found,) = postprocess(decoded)
    assert found["labels"].tolist() == [0, 1]
    torch.testing.assert_close(found["scores"], torch.tensor([0.9, 0.7]))
    torch.testing.assert_close(found["boxes"][0], torch.tensor([30.0, 30.0, 70.0, 70.0]))


def test_multi_label_gives_each_class_above_conf() -> None:
    decoded = decoded_from([[50, 50, 40, 40]], [[0.9, 0.6, 0.1]])
    assert postprocess(decoded, multi_label=True)[0]["labels"].tolist() == [0, 1]
    assert postprocess(decoded, multi_label=False)[0]["labels"].tolist() == [0]


def test_conf_is_exclusive_and_max_det_keeps_the_best() -> None:
    boxes = [[20.0 + 50 * i, 20, 10, 10] for i in range(6)]
    decoded = decoded_from(boxes, [[0.25], [0.3], [0.9], [0.5], [0.8], [0.1]])
    assert len(postprocess(decoded)[0]["scores"]) == 4
    torch.testing.assert_close(postprocess(decoded, max_det=2)[0]["scores"], torch.tensor([0.9, 0.8]))


def test_only_the_best_candidates_enter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CANDIDATES", 3)
    decoded = decoded_from([[20.0 + 50 * i, 20, 10, 10] for i in range(5)], [[0.3], [0.9], [0.4], [0.5], [0.8]])
    torch.testing.assert_close(postprocess(decoded)[0]["scores"], torch.tensor([0.9, 0.8, 0.5]))


def test_nothing_found_keeps_shapes_and_low_precision_enters_as_float32() -> None:
    found = postprocess(torch.zeros(2, 7, 9, dtype=torch.bfloat16))
    assert [tuple(f["boxes"].shape) for f in found] == [(0, 4), (0, 4)]
    assert found[0]["labels"].dtype == torch.int64
    assert found[0]["scores"].dtype == torch.float32


def test_wrong_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"classes >= 1, got \(1, 4, 9\)"):
        postprocess(torch.zeros(1, 4, 9))


def test_to_native_undoes_the_letterbox_and_clips() -> None:
    native = torch.tensor([[10.0, 20.0, 90.0, 45.0]])
    letterboxed = native * 1.6 + torch.tensor([7.0, 3.0, 7.0, 3.0])
    geometry = torch.tensor([1.6, 7.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(to_native(letterboxed, geometry, (50, 100)), native)
    assert to_native(letterboxed, geometry, (30, 60)).tolist() == [[10.0, 20.0, 60.0, 30.0]]
