"""Suppression and top-k on boxes small enough to work out by hand."""

from __future__ import annotations

import pytest
import torch

from models import postprocess as module
from models.postprocess import postprocess
from utils.structures import Decoded

OPTIONS = {"conf_thres": 0.25, "iou_thres": 0.5, "max_det": 10}

# Boxes 0 and 1: 10 x 10 each, shifted by 2 columns: intersection 80, union 120, IoU 2/3.
# Boxes 0 and 2: shifted by 5 columns: intersection 50, union 150, IoU 1/3. Box 3 is far away.
BOXES = [[0, 0, 10, 10], [2, 0, 12, 10], [5, 0, 15, 10], [50, 50, 60, 60]]


def decoded(scores: list[list[float]], boxes: list[list[float]] | None = None) -> Decoded:
    """One image, the four boxes above."""
    return Decoded(torch.tensor([boxes or BOXES], dtype=torch.float32), torch.tensor([scores]))


def labels_and_scores(found) -> list[tuple[int, float]]:
    return [(int(k), round(float(s), 4)) for k, s in zip(found.labels, found.scores)]


def test_a_better_box_of_the_same_class_suppresses_what_overlaps_it_enough():
    # Box 1 leads and removes box 0 (IoU 2/3); IoU(1, 2) = 70/130 = 0.538 removes box 2 as well.
    (found,) = postprocess(decoded([[0.8], [0.9], [0.7], [0.6]]), "nms", **OPTIONS)
    assert found.boxes.tolist() == [BOXES[1], BOXES[3]]
    assert labels_and_scores(found) == [(0, 0.9), (0, 0.6)]


def test_a_suppressed_box_suppresses_nothing():
    # Box 0 leads: it removes box 1 (2/3); box 2 overlaps box 1 (0.538) but box 0 only by 1/3.
    (found,) = postprocess(decoded([[0.9], [0.8], [0.7], [0.1]]), "nms", **OPTIONS)
    assert found.boxes.tolist() == [BOXES[0], BOXES[2]]


def test_classes_are_suppressed_apart_unless_agnostic():
    scores = [[0.9, 0.0], [0.0, 0.8], [0.1, 0.1], [0.1, 0.1]]
    (apart,) = postprocess(decoded(scores), "nms", **OPTIONS)
    (together,) = postprocess(decoded(scores), "nms", agnostic=True, **OPTIONS)
    assert labels_and_scores(apart) == [(0, 0.9), (1, 0.8)]
    assert labels_and_scores(together) == [(0, 0.9)]


def test_multi_label_makes_every_class_above_the_threshold_a_candidate():
    scores = [[0.9, 0.5], [0.1, 0.1], [0.1, 0.1], [0.3, 0.2]]
    (single,) = postprocess(decoded(scores), "nms", **OPTIONS)
    (several,) = postprocess(decoded(scores), "nms", multi_label=True, **OPTIONS)
    assert labels_and_scores(single) == [(0, 0.9), (0, 0.3)]
    assert labels_and_scores(several) == [(0, 0.9), (1, 0.5), (0, 0.3)]


def test_only_the_chosen_classes_are_kept():
    scores = [[0.9, 0.0], [0.0, 0.8], [0.1, 0.1], [0.1, 0.6]]
    (found,) = postprocess(decoded(scores), "nms", classes=[1], **OPTIONS)
    assert labels_and_scores(found) == [(1, 0.8), (1, 0.6)]


def test_top_k_keeps_overlapping_boxes_and_the_best_scores():
    scores = [[0.9, 0.4], [0.8, 0.1], [0.1, 0.2], [0.0, 0.7]]
    options = OPTIONS | {"max_det": 3}
    (single,) = postprocess(decoded(scores), "topk", **options)
    (several,) = postprocess(decoded(scores), "topk", multi_label=True, **options | {"max_det": 4})
    assert labels_and_scores(single) == [(0, 0.9), (0, 0.8), (1, 0.7)]
    assert labels_and_scores(several) == [(0, 0.9), (0, 0.8), (1, 0.7), (1, 0.4)]


@pytest.mark.parametrize("kind", ["nms", "topk"])
@pytest.mark.parametrize("multi_label", [False, True])
def test_broken_numbers_and_empty_inputs_give_no_detection(kind: str, multi_label: bool):
    nan, inf = float("nan"), float("inf")
    boxes = [[nan, 0, 1, 1], [0, 0, inf, 1], [0, 0, 1, 1], [0, 0, 2, 2]]
    options = OPTIONS | {"multi_label": multi_label}
    (broken,) = postprocess(decoded([[0.9], [0.9], [nan], [0.1]], boxes), kind, **options)
    (empty,) = postprocess(Decoded(torch.zeros(1, 0, 4), torch.zeros(1, 0, 3)), kind, **options)
    assert len(broken.scores) == len(empty.scores) == 0
    assert broken.boxes.shape == empty.boxes.shape == (0, 4)
    assert broken.labels.dtype == empty.labels.dtype == torch.int64
    assert postprocess(Decoded(torch.zeros(0, 5, 4), torch.zeros(0, 5, 3)), kind, **options) == []


def test_a_class_that_is_not_a_number_does_not_hide_the_other_classes_of_its_box():
    scores = [[float("nan"), 0.6], [0.1, 0.1], [0.1, 0.1], [0.1, 0.1]]
    (found,) = postprocess(decoded(scores), "nms", multi_label=True, **OPTIONS)
    assert labels_and_scores(found) == [(1, 0.6)]


def test_a_batch_of_two_equals_two_batches():
    generator = torch.Generator().manual_seed(3)
    corner = torch.rand(2, 200, 2, generator=generator) * 80
    boxes = torch.cat([corner, corner + 5 + 20 * torch.rand(2, 200, 2, generator=generator)], 2)
    scores = torch.rand(2, 200, 3, generator=generator)
    both = postprocess(Decoded(boxes, scores), "nms", **OPTIONS | {"max_det": 50})
    for i, found in enumerate(both):
        (alone,) = postprocess(
            Decoded(boxes[i : i + 1], scores[i : i + 1]), "nms", **OPTIONS | {"max_det": 50}
        )
        assert 10 < len(found.scores) <= 50
        assert all(torch.equal(a, b) for a, b in zip(found, alone))
        assert (found.scores.diff() <= 0).all()


def test_candidates_are_cut_to_the_best_before_suppression(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_CANDIDATES", 2)
    (found,) = postprocess(decoded([[0.9], [0.8], [0.7], [0.6]]), "nms", **OPTIONS)
    assert labels_and_scores(found) == [(0, 0.9)]


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="'soft'"):
        postprocess(decoded([[0.9]] * 4), "soft", **OPTIONS)


def test_boxes_left_of_the_image_do_not_reach_into_other_classes():
    """By hand: the two lie apart, in classes 0 and 1; moved by class they would lie upon each other."""
    boxes = torch.tensor([[[600.0, 600, 640, 640], [-41, -41, -1, -1]]])
    scores = torch.tensor([[[0.9, 0.0], [0.0, 0.8]]])
    found = postprocess(Decoded(boxes, scores), "nms", conf_thres=0.1, iou_thres=0.5, max_det=10)[0]
    assert found.labels.tolist() == [0, 1]
    assert torch.equal(found.boxes, boxes[0])
