"""Task-aligned assignment and its losses: worked by hand, invariants, published numbers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from published import fill, golden, needs_golden, read_json, targets_in_pixels
from torch import Tensor

from models.assigners import task_aligned as module
from models.assigners.task_aligned import (
    Assignment,
    Predictions,
    Small,
    assign,
    best_of_each,
    grow_small,
    points_inside,
    settle,
    weigh,
)
from models.family import build_criterion, total_loss
from models.heads.ddetect import DualRaw
from models.heads.dfl import DFLDetect, DFLRaw, anchor_points
from models.losses.task_aligned import (
    DualTaskAlignedLoss,
    TaskAlignedLoss,
    distribution_focal_loss,
)
from models.yolo import build_model
from utils.config import load_hyp
from utils.structures import Targets

RULE = {"topk": 10, "alpha": 0.5, "beta": 6.0}
HYP = {
    "box": 7.5, "cls": 0.5, "dfl": 1.5, "tal_topk": 10, "tal_alpha": 0.5, "tal_beta": 6.0,
    "aux_weight": 0.25,
}  # fmt: skip
HYPS = Path(__file__).parents[2] / "data" / "hyps"
HEAD = DFLDetect(5, channels=[8, 8, 8])


def test_three_objects_and_four_predictions_by_hand():
    alignment = torch.tensor([[0.8, 0.4, 0.0, 0.2], [0.0, 0.5, 0.6, 0.1], [0.3, 0.0, 0.9, 0.0]])
    overlaps = torch.tensor([[0.9, 0.5, 0.0, 0.4], [0.0, 0.6, 0.7, 0.3], [0.5, 0.0, 0.8, 0.0]])
    # The three best of each: object 0 wants 0, 1, 3; object 1 wants 2, 1, 3; object 2 wants 2, 0
    # (its others have alignment 0).
    candidates = best_of_each(alignment, overlaps, topk=3)
    wanted = list(zip(candidates.objects.tolist(), candidates.predictions.tolist(), strict=True))
    assert wanted == [(0, 0), (0, 1), (0, 3), (1, 2), (1, 1), (1, 3), (2, 2), (2, 0)]
    # Prediction 0 overlaps object 0 (.9) more than 2 (.5); 1 overlaps object 1 (.6) more than
    # 0 (.5); 2 overlaps object 2 (.8) more than 1 (.7); 3 overlaps object 0 (.4) more than 1 (.3).
    # Object 0 keeps 0 and 3: its largest alignment .8 becomes its largest overlap .9, so .2 becomes
    # .2 * .9 / .8 = .225. Object 1 keeps 1: .6. Object 2 keeps 2: .8.
    assignment = weigh(settle(candidates), 3)
    assert assignment.predictions.tolist() == [0, 1, 2, 3]
    assert assignment.objects.tolist() == [0, 1, 2, 0]
    torch.testing.assert_close(assignment.weights, torch.tensor([0.9, 0.6, 0.8, 0.225]))


def test_each_object_takes_no_more_than_it_may():
    alignment = torch.tensor([[0.1, 0.4, 0.3, 0.2]])
    found = best_of_each(alignment, alignment, topk=2)
    assert found.predictions.tolist() == [1, 2]


def test_short_sides_of_small_objects_count_as_longer_each_by_itself():
    boxes = torch.tensor([[2.0, 5, 8, 25], [0, 0, 8, 9]])
    grown = grow_small(boxes, Small(8, 16))
    assert grown.tolist() == [[-3, 5, 13, 25], [0, 0, 8, 9]]
    assert torch.equal(grow_small(boxes, Small()), boxes)


def test_an_object_between_the_points_gets_candidates_when_it_is_grown():
    """6 x 6 pixels around (8, 8), in the middle of four points of a grid of stride 8."""
    points, _ = anchor_points([torch.zeros(1, 1, 4, 4)], (8,))
    targets = Targets(torch.tensor([0]), torch.tensor([0]), torch.tensor([[5.0, 5, 11, 11]]))
    boxes = torch.cat((points - 8, points + 8), 1)[None]
    predictions = Predictions(torch.full((1, 16, 1), 0.5), boxes, points)
    assert len(assign(predictions, targets, **RULE).objects) == 0
    found = assign(predictions, targets, **RULE, small=Small(8, 16))
    assert sorted(found.predictions.tolist()) == [0, 1, 4, 5]


def test_the_recipe_says_how_far_small_objects_grow():
    head = DFLDetect(5, channels=[8, 8])
    head.initialize((8, 16))
    assert TaskAlignedLoss(head, HYP).small == Small()
    assert TaskAlignedLoss(head, {**HYP, "stal": 2.0}).small == Small(8, 16)


def test_points_on_the_edge_are_outside():
    points = torch.tensor([[4.0, 4], [12, 4], [4, 12], [12, 12]])
    boxes = torch.tensor([[0.0, 0, 12, 8], [4, 4, 20, 20]])
    expected = [[True, False, False, False], [False, False, False, True]]
    assert points_inside(points, boxes).tolist() == expected


def test_a_prediction_outside_the_object_does_not_serve_it_however_good():
    # Two points, both predicting the object exactly; only the first lies inside it.
    truth = torch.tensor([[0.0, 0, 10, 10]])
    predictions = Predictions(torch.full((1, 2, 1), 0.25), truth.expand(1, 2, 4), torch.tensor(
        [[5.0, 5], [15, 5]]))  # fmt: skip
    targets = Targets(torch.tensor([0]), torch.tensor([0]), truth)
    found = assign(predictions, targets, **RULE)
    assert found.predictions.tolist() == [0] and found.objects.tolist() == [0]
    torch.testing.assert_close(found.weights, torch.ones(1))


def scene(images: int = 2, objects: int = 12, size: int = 96) -> tuple[Predictions, Targets]:
    """Predictions near the truth, crowded enough that objects compete, some of them twins."""
    generator = torch.Generator().manual_seed(3)
    points, strides = anchor_points(
        [torch.empty(1, 1, size // s, size // s) for s in (8, 16)], (8, 16)
    )
    reach = torch.rand(images, len(points), 4, generator=generator) * 3 * strides
    low, high = points - reach[..., :2], points + reach[..., 2:]
    scores = torch.rand(images, len(points), 5, generator=generator)
    scores[..., 4] = scores[..., 3]
    corner = torch.rand(objects, 2, generator=generator) * size * 0.6
    extent = 8 + torch.rand(objects, 2, generator=generator) * size * 0.4
    boxes = torch.cat((corner, corner + extent), 1)
    labels = torch.randint(0, 5, (objects,), generator=generator)
    boxes[1], labels[0], labels[1] = boxes[0], 3, 4  # the same box with two equally scored labels
    boxes[3], labels[3] = boxes[2], labels[2]  # the same object twice
    image_index = torch.arange(objects) * images // objects
    return Predictions(scores, torch.cat((low, high), -1), points), Targets(
        image_index, labels, boxes
    )


def facts(assignment: Assignment, targets: Targets) -> list[tuple]:
    """What was decided, without object numbers: prediction, its label, box and weight."""
    rows = zip(
        assignment.predictions.tolist(),
        targets.labels[assignment.objects].tolist(),
        targets.boxes[assignment.objects].tolist(),
        assignment.weights.tolist(),
        strict=True,
    )
    return sorted((p, label, tuple(box), weight) for p, label, box, weight in rows)


def assert_same(found: list[tuple], expected: list[tuple]) -> None:
    """The same pairs; weights to rounding, which depends on where a value stands in a vector."""
    assert [row[:3] for row in found] == [row[:3] for row in expected]
    assert [row[3] for row in found] == pytest.approx([row[3] for row in expected], rel=1e-6)


def test_objects_do_compete_in_the_scene():
    predictions, targets = scene()
    alignment, overlaps = module.align(predictions, targets, 0.5, 6.0)
    wanted = best_of_each(alignment, overlaps, 10)
    numbers = wanted.predictions + targets.image_index[wanted.objects] * len(predictions.points)
    assert numbers.unique().numel() < numbers.numel()
    assert len(assign(predictions, targets, **RULE).weights) == numbers.unique().numel()


def test_the_order_of_the_objects_changes_nothing():
    predictions, targets = scene()
    expected = facts(assign(predictions, targets, **RULE), targets)
    for seed in range(5):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
        order = order[targets.image_index[order].argsort(stable=True)]
        shuffled = Targets(*(values[order] for values in targets))
        assert facts(assign(predictions, shuffled, **RULE), shuffled) == expected
    assert len(expected) > 20


def test_a_batch_of_two_is_two_batches():
    predictions, targets = scene()
    together = facts(assign(predictions, targets, **RULE), targets)
    apart = []
    for image in range(2):
        labels, boxes = targets.of_image(image)
        alone = Targets(torch.zeros_like(labels), labels, boxes)
        one = Predictions(
            predictions.scores[image, None], predictions.boxes[image, None], predictions.points
        )
        offset = image * len(predictions.points)
        apart += [(p + offset, *rest) for p, *rest in facts(assign(one, alone, **RULE), alone)]
    assert_same(together, sorted(apart))


def test_working_in_chunks_changes_nothing_and_bounds_the_pairs(monkeypatch):
    predictions, targets = scene(objects=60)
    whole = facts(assign(predictions, targets, **RULE), targets)
    sizes = []

    def counting(*args: Tensor) -> Tensor:
        sizes.append(len(args[0]))
        return complete_iou(*args)

    complete_iou = module.complete_iou
    monkeypatch.setattr(module, "complete_iou", counting)
    monkeypatch.setattr(module, "PAIRS_AT_ONCE", 7 * len(predictions.points))
    assert_same(facts(assign(predictions, targets, **RULE), targets), whole)
    assert len(sizes) == 9 and max(sizes) <= 7 * len(predictions.points)  # ceil(60 / 7) chunks


@pytest.mark.parametrize(
    ("distance", "expected"),
    [
        (1.0, -math.log(0.2)),  # exactly on a bin
        (1.25, -0.75 * math.log(0.2) - 0.25 * math.log(0.3)),
        (2.5, -0.5 * math.log(0.3) - 0.5 * math.log(0.4)),
        (-7.0, -math.log(0.1)),  # cut to bin 0
        (99.0, -0.01 * math.log(0.3) - 0.99 * math.log(0.4)),  # cut to 2.99
    ],
)
def test_distribution_focal_loss_by_hand(distance, expected):
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log() + 5
    found = distribution_focal_loss(logits, torch.tensor(distance))
    assert found.item() == pytest.approx(expected, rel=1e-5)


def raw_predictions(seed: int = 0, images: int = 2, size: int = 64) -> DFLRaw:
    generator = torch.Generator().manual_seed(seed)
    points, strides = anchor_points(
        [torch.empty(1, 1, size // s, size // s) for s in (8, 16)], (8, 16)
    )
    distances = torch.randn(images, len(points), 64, generator=generator)
    logits = torch.randn(images, len(points), 5, generator=generator)
    return DFLRaw(distances.requires_grad_(), logits.requires_grad_(), points, strides)


TWO_IMAGES = Targets(
    torch.tensor([0, 0, 1]),
    torch.tensor([1, 4, 2]),
    torch.tensor([[4.0, 4, 30, 40], [20, 10, 60, 50], [0, 0, 64, 64]]),
)
ONE_IMAGE = Targets(*(values[:2] for values in TWO_IMAGES))


def test_one_certain_prediction_by_hand():
    # One point at (8, 8) of stride 8; its object reaches 8 left, 8 up, 16 right, 8 down of it:
    # (0, 0, 24, 16). Distances are certain of bins 1, 1, 2, 1: the box is exact, CIoU 1, so
    # box = dfl = 0 and the target score is 1. Class logits (0, 0): each class costs log 2.
    distances = torch.full((1, 1, 4, 16), -1e4)
    for side, bin_ in enumerate((1, 1, 2, 1)):
        distances[0, 0, side, bin_] = 0
    raw = DFLRaw(
        distances.flatten(2), torch.zeros(1, 1, 2), torch.tensor([[8.0, 8]]), torch.tensor([[8.0]])
    )
    targets = Targets(torch.tensor([0]), torch.tensor([1]), torch.tensor([[0.0, 0, 24, 16]]))
    terms = TaskAlignedLoss(HEAD, HYP)(raw, targets)
    assert {name: round(value.item(), 5) for name, value in terms.items()} == {
        "box": 0.0,
        "cls": round(0.5 * 2 * math.log(2), 5),
        "dfl": 0.0,
    }


@pytest.mark.parametrize(
    ("targets", "has_objects"),
    [(TWO_IMAGES, True), (ONE_IMAGE, True), (Targets.empty(), False)],
    ids=["objects in both", "an empty image", "no objects"],
)
def test_any_batch_gives_finite_terms_and_gradients(targets, has_objects):
    raw = raw_predictions()
    terms = TaskAlignedLoss(HEAD, HYP)(raw, targets)
    sum(terms.values()).backward()
    assert all(value.isfinite() for value in terms.values())
    assert raw.distances.grad.isfinite().all() and raw.logits.grad.isfinite().all()
    assert bool(raw.distances.grad.any()) == has_objects == (terms["box"].item() > 0)
    assert raw.logits.grad.any()


def test_only_image_with_objects_gets_gradients_of_distances():
    raw = raw_predictions()
    sum(TaskAlignedLoss(HEAD, HYP)(raw, ONE_IMAGE).values()).backward()
    assert raw.distances.grad[0].any() and not raw.distances.grad[1].any()


def test_the_dual_loss_is_main_plus_a_part_of_the_auxiliary():
    main, aux = raw_predictions(1), raw_predictions(2)
    single, dual = TaskAlignedLoss(HEAD, HYP), DualTaskAlignedLoss(HEAD, HYP)
    found = dual(DualRaw(main, aux), TWO_IMAGES)
    first, second = single(main, TWO_IMAGES), single(aux, TWO_IMAGES)
    assert list(found) == ["box", "cls", "dfl"]
    for name, value in found.items():
        torch.testing.assert_close(value, first[name] + 0.25 * second[name])


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_predictions_are_summed_in_float32(autocast):
    raw = raw_predictions()
    coarse = raw._replace(distances=raw.distances.bfloat16(), logits=raw.logits.bfloat16())
    wide = coarse._replace(distances=coarse.distances.float(), logits=coarse.logits.float())
    expected = TaskAlignedLoss(HEAD, HYP)(wide, TWO_IMAGES)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = TaskAlignedLoss(HEAD, HYP)(coarse, TWO_IMAGES)
    for name, value in found.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("family", ["yolov9", "yolo11"])
def test_the_recipe_of_the_family_holds_the_numbers_of_its_loss(family):
    hyp = load_hyp(None, HYPS / f"{family}.yaml")
    expected = dict(HYP) if family == "yolov9" else {k: HYP[k] for k in HYP if k != "aux_weight"}
    assert {key: hyp[key] for key in expected} == expected


@needs_golden
@pytest.mark.parametrize("name", ["gelan-t", "yolov9-t", "yolo11n"])
def test_losses_and_gradients_are_the_published_ones(name):
    numbers, published = golden(), read_json("losses.json")
    model = fill(build_model(name, imgsz=(64, 64))).train().double()  # float32 depends on the CPU
    criterion = build_criterion(model.head, HYP, (256, 320))
    raw = model(numbers.image(256, 320, 2).double())
    totals = {}
    for objects, rows in numbers.TARGET_SETS.items():
        terms = criterion(raw, targets_in_pixels(rows, 256, 320))
        totals[objects] = total_loss(criterion, terms, 2)
        found = {"total": totals[objects], **terms}
        found = {key: value.item() for key, value in found.items()}
        assert found == pytest.approx(published[f"{name}.{objects}"], rel=1e-4)
    totals["both"].backward()
    trained = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None and grad.isfinite().all() for grad in trained.values())
    expected = published[f"{name}.grad"]
    norms = {key: trained[key].norm().item() for key in expected}
    assert norms == pytest.approx(expected, rel=1e-3)
