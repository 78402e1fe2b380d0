"""Every family with every box and class loss: a step, the matching cost, what scores aim at."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from loss_cases import FAMILIES, HYPS, SIZE, TARGETS, case, criterion_of

from models.assigners import hungarian
from models.assigners.hungarian import HungarianAssigner
from models.family import criterion_state, restore_criterion
from models.heads.anchor import AnchorDetect, AnchorRaw
from models.heads.dfl import DFLDetect, DFLRaw
from models.heads.rtdetr import RTDETRDecoder, RTDETRRaw
from models.losses.box import BoxLoss, Frame
from models.losses.classification import CLASS_LOSSES
from models.losses.measures import BOX_LOSSES
from utils.boxes import complete_iou, generalized_iou
from utils.config import load_hyp
from utils.structures import Targets

NAMES = [*BOX_LOSSES, "inner-ciou", "alpha-giou", "focal-eiou"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("key", "name"),
    [*(("box_loss", name) for name in NAMES), *(("cls_loss", name) for name in CLASS_LOSSES)],
)
def test_every_family_takes_a_step_with_every_loss(family: str, key: str, name: str):
    head, raw, leaves = case(family)
    criterion = criterion_of(family, head, **{key: name})
    for targets in (Targets.empty(), TARGETS):
        total = sum(criterion(raw, targets).values())
        gradients = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
        assert torch.isfinite(total)
        assert all(g is None or g.isfinite().all() for g in gradients)
    assert all(g is not None and g.any() for g in gradients)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_box_loss_changes_the_term_of_the_boxes_alone(family: str):
    is_set = family in ("rtdetr", "dfine")
    term = "giou" if is_set else "box"
    head, raw, _ = case(family)
    own = "giou" if is_set else "ciou"
    usual, same = criterion_of(family, head), criterion_of(family, head, box_loss=own)
    other = criterion_of(family, head, box_loss="nwd")
    if is_set:  # another cost would match other queries
        other.assigner = HungarianAssigner(2.0, 5.0, 0.0, 0.25, 2.0)
        usual.assigner = same.assigner = other.assigner
    expected, found = usual(raw, TARGETS), other(raw, TARGETS)
    assert all(torch.equal(value, expected[key]) for key, value in same(raw, TARGETS).items())
    changed = {key for key in found if not torch.equal(found[key], expected[key])}
    assert changed == {key for key in expected if key.startswith(term) and not key.endswith("_dn")}


# --- matching --------------------------------------------------------------------------------------


def test_matching_goes_by_the_box_loss():
    """Query 0 has the object's centre, query 1 its size; images of 100 x 100.

    Object (50, 50, 40, 40). Query 0 (50, 50, 20, 20): IoU 400 / 1600 = 1 / 4, DIoU the same.
    Query 1 (75, 50, 40, 40): overlap 15 x 40 = 600 of 2600, 3 / 13; 25 apart in a hull of 65 x 40:
    DIoU 3 / 13 - 625 / 5825.
    """
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.75, 0.5, 0.4, 0.4]])
    wanted = torch.tensor([[0.5, 0.5, 0.4, 0.4]])
    frame = Frame((100, 100), unit=torch.tensor([100.0] * 4))
    assigner = HungarianAssigner(0.0, 0.0, 1.0, 0.25, 2.0)
    expected = {
        "iou": (-1 / 4, -3 / 13), "diou": (-1 / 4, 625 / 5825 - 3 / 13), "alpha-iou": (-1 / 64, -27 / 2197),
        "nwd": (-math.exp(-math.sqrt(200) / 12.8), -math.exp(-25 / 12.8)),
    }  # fmt: skip
    hyp = load_hyp(None, HYPS / "rtdetr.yaml")
    for name, costs in expected.items():
        loss = BoxLoss(name, hyp)
        found = assigner.costs(
            torch.zeros(2, 1), boxes, torch.tensor([0]), wanted,
            lambda queries, objects, loss=loss: loss.similarity(queries, objects, frame),
        )  # fmt: skip
        assert found.flatten().tolist() == pytest.approx(costs, rel=1e-5), name


def test_weights_of_pairs_do_not_make_a_poor_match_cheap():
    """focal-iou trains a pair that does not overlap with weight 0; as a cost that would be the best of all."""
    frame = Frame((100, 100), unit=torch.tensor([100.0] * 4))
    loss = BoxLoss("focal-giou", load_hyp(None, HYPS / "rtdetr.yaml"))
    near, far = torch.tensor([0.1, 0.1, 0.3, 0.3]), torch.tensor([0.8, 0.8, 0.9, 0.9])
    target = torch.tensor([0.1, 0.1, 0.35, 0.3])
    assert loss(far, target, frame) == 0 < loss(near, target, frame)
    found = [loss.similarity(box, target, frame) for box in (near, far)]
    assert found[0] > found[1]
    torch.testing.assert_close(found[1], generalized_iou(far, target))


def test_costs_are_worked_out_for_a_bounded_number_of_pairs_at_a_time(monkeypatch):
    torch.manual_seed(0)
    logits, boxes = torch.randn(2, 5, 3), torch.rand(2, 5, 4) * 0.5 + 0.2
    labels, objects = torch.randint(3, (11,)), torch.rand(11, 4) * 0.5 + 0.2
    assigner = HungarianAssigner(2.0, 5.0, 2.0, 0.25, 2.0)
    whole, sizes = assigner.costs(logits, boxes, labels, objects), []

    def counting(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        result = complete_iou(first, second)
        sizes.append(result.numel())
        return result

    monkeypatch.setattr(hungarian, "PAIRS_AT_ONCE", 30)
    torch.testing.assert_close(assigner.costs(logits, boxes, labels, objects), whole)
    assigner.costs(logits, boxes, labels, objects, counting)
    assert sizes == [30, 30, 30, 20]  # 3 objects with 10 queries at a time
    assert assigner.costs(logits, boxes, labels[:0], objects[:0], counting).shape == (2, 5, 0)


# --- what scores aim at ----------------------------------------------------------------------------


def one_certain_point(logits: list[float]) -> tuple[Any, Targets]:
    """One point of stride 8 at (8, 8) whose box is exactly its object, (0, 0, 24, 16) of class 1."""
    distances = torch.full((1, 1, 4, 16), -1e4)
    for side, bin_ in enumerate((1, 1, 2, 1)):
        distances[0, 0, side, bin_] = 0
    point = torch.tensor([[8.0, 8.0]])
    raw = DFLRaw(distances.flatten(2), torch.tensor([[logits]]), point, torch.tensor([[8.0]]))
    return raw, Targets(torch.tensor([0]), torch.tensor([1]), torch.tensor([[0.0, 0, 24, 16]]))


@pytest.mark.parametrize(
    ("name", "expected"),
    # logits 0: cross entropy log 2 of each class; the alignment of the exact box is 1
    [("bce", 2), ("focal", 3 / 16 + 1 / 16), ("varifocal", 3 / 16 + 1), ("quality", 1 / 4 + 1 / 4)],
)
def test_task_aligned_scores_aim_at_the_alignment(name: str, expected: float):
    raw, targets = one_certain_point([0.0, 0.0])
    head = DFLDetect(2, channels=[8])
    found = criterion_of("yolo11", head, cls_loss=name)(raw, targets)["cls"].item()
    assert found == pytest.approx(0.5 * expected * math.log(2), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "expected"),
    # of the mean over two classes; the predicted box 8x8 covers half of the object 8x16
    [("bce", 2), ("focal", 1 / 16 + 3 / 16), ("varifocal", 1 / 2 + 3 / 16), ("quality", 0 + 1 / 4)],
)
def test_anchor_scores_aim_at_the_class_or_at_its_overlap(name: str, expected: float):
    head = AnchorDetect(2, [[8.0, 8.0]], [4])
    head.initialize((8,))
    level = torch.zeros(1, 1, 4, 4, 7)  # centres in the middle of their cells, anchors as they are
    targets = Targets(torch.tensor([0]), torch.tensor([1]), torch.tensor([[8.0, 4.0, 16.0, 20.0]]))
    criterion = criterion_of("yolov5", head, cls_loss=name, cls=80 / 2 / 3)  # a gain of 1
    # The centre (12, 12) lies in the middle of cell (1, 1), so no neighbour answers too.
    found = criterion(AnchorRaw((level,)), targets)["cls"].item()
    assert found == pytest.approx(expected / 2 * math.log(2), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "expected"),
    # one query, logits 0 of two classes; its box covers half of the object
    [("bce", 2), ("focal", 1 / 16 + 3 / 16), ("varifocal", 1 / 2 + 3 / 16), ("quality", 0 + 1 / 4)],
)
def test_scores_of_queries_aim_at_the_class_or_at_its_overlap(name: str, expected: float):
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2]]])
    raw = RTDETRRaw(torch.zeros(1, 1, 1, 2), boxes[None], torch.zeros(1, 1, 2), boxes, None, SIZE)
    targets = Targets(torch.tensor([0]), torch.tensor([1]), torch.tensor([[0.4, 0.4, 0.6, 0.8]]))
    targets = targets._replace(boxes=targets.boxes * torch.tensor([96.0, 64, 96, 64]))
    head = RTDETRDecoder(2, [8], 8, num_heads=2, num_layers=1)
    found = criterion_of("rtdetr", head, cls_loss=name)(raw, targets)["cls"].item()
    assert found == pytest.approx(expected * math.log(2), rel=1e-4)


def test_objectness_aims_at_the_overlap_whatever_the_box_loss_is():
    head, raw, _ = case("yolov5")
    expected = criterion_of("yolov5", head)(raw, TARGETS)["obj"]
    for name in ("nwd", "alpha-giou", "wiou-v3"):
        assert torch.equal(
            criterion_of("yolov5", head, box_loss=name)(raw, TARGETS)["obj"], expected
        )


# --- what a criterion learns -----------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_restored_criterion_goes_on_with_the_mean_that_it_had(family: str):
    head, raw, _ = case(family)
    first = criterion_of(family, head, box_loss="wiou-v3", wiou_steps=5)
    for _ in range(3):
        first(raw, TARGETS)
    state = criterion_state(first)
    assert list(state) == ["box_loss_mean"] and 0 < state["box_loss_mean"] < 1
    second = criterion_of(family, head, box_loss="wiou-v3", wiou_steps=5)
    restore_criterion(second, state)
    expected, found = first(raw, TARGETS), second(raw, TARGETS)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    usual = criterion_of(family, head)
    assert criterion_state(usual) == {}
    restore_criterion(usual, {})
