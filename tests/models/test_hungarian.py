"""Set matching and the set loss: hand-worked costs and assignments, invariants, empty batches."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.assigners.hungarian import HungarianAssigner, solve_assignment
from models.heads.denoising import Denoising
from models.heads.rtdetr import RTDETRDecoder, RTDETRRaw
from models.losses.hungarian import HungarianLoss
from utils.structures import Targets

HYP = {
    "cls": 1.0, "l1": 5.0, "giou": 2.0, "vfl_alpha": 0.75, "vfl_gamma": 2.0, "vfl_gamma_empty": 1.5,
    "cost_class": 2.0, "cost_l1": 5.0, "cost_giou": 2.0, "cost_alpha": 0.25, "cost_gamma": 2.0,
}  # fmt: skip
ASSIGNER = HungarianAssigner(2.0, 5.0, 2.0, 0.25, 2.0)
IMAGE = (100, 200)
CLASSES = 3


@pytest.fixture
def criterion() -> HungarianLoss:
    return HungarianLoss(RTDETRDecoder(CLASSES, [8], 8, num_heads=2, num_layers=1), HYP)


def make_raw(batch: int, *, stages: int = 2, queries: int = 6, seed: int = 0) -> RTDETRRaw:
    torch.manual_seed(seed)

    def boxes(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, 4).mul(0.4).add(0.2).requires_grad_()

    return RTDETRRaw(
        torch.randn(stages, batch, queries, CLASSES, requires_grad=True),
        boxes(stages, batch, queries),
        torch.randn(batch, queries, CLASSES, requires_grad=True),
        boxes(batch, queries),
        None,
        IMAGE,
    )


def make_targets(*counts: int, seed: int = 1) -> Targets:
    torch.manual_seed(seed)
    total = sum(counts)
    low = torch.rand(total, 2) * torch.tensor([100.0, 50.0])
    boxes = torch.cat((low, low + 5 + torch.rand(total, 2) * torch.tensor([90.0, 40.0])), 1)
    index = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return Targets(index, torch.randint(CLASSES, (total,)), boxes)


def of_one_image(raw: RTDETRRaw, targets: Targets, image: int) -> tuple[RTDETRRaw, Targets]:
    labels, boxes = targets.of_image(image)
    part = slice(image, image + 1)
    one = RTDETRRaw(
        raw.logits[:, part],
        raw.boxes[:, part],
        raw.encoder_logits[part],
        raw.encoder_boxes[part],
        None,
        IMAGE,
    )
    return one, Targets(torch.zeros_like(labels), labels, boxes)


@pytest.mark.parametrize(
    ("cost", "expected", "reason"),
    [
        ([[0, 1], [5, 9], [1, 4]], {0: 2, 1: 0}, "query 0 is best for both; 1 + 1 beats 0 + 4"),
        (
            [[4, 1, 3], [2, 0, 5], [3, 2, 2], [9, 9, 0]],
            {0: 1, 1: 0, 2: 3},
            "4 queries, 3 objects: 2 + 1 + 0 = 3",
        ),
        (
            [[7, 2, 9, 4], [3, 8, 1, 6], [2, 6, 5, 3]],
            {1: 0, 2: 1, 0: 2},
            "3 queries, 4 objects: one is left over",
        ),
        ([[1], [1]], {0: 0}, "a tie takes either, and always the same"),
    ],
)
def test_assignment_has_the_least_total_cost(cost, expected, reason) -> None:
    queries, objects = solve_assignment(torch.tensor(cost, dtype=torch.float32))
    assert dict(zip(objects.tolist(), queries.tolist())) == expected, reason


def test_cost_of_a_pair_is_the_weighted_sum_of_its_three_costs() -> None:
    """Probability 0.5; boxes (0.5, 0.5, 0.4, 0.2) and (0.6, 0.5, 0.2, 0.2): the object lies inside,
    at the right.
    """
    cost = ASSIGNER.costs(
        torch.zeros(1, 2),
        torch.tensor([[0.5, 0.5, 0.4, 0.2]]),
        torch.tensor([1]),
        torch.tensor([[0.6, 0.5, 0.2, 0.2]]),
    )
    focal = (0.25 - 0.75) * 0.5**2 * math.log(2)
    l1 = 0.1 + 0.2
    giou = 0.5  # IoU 0.04 / 0.08, and the hull is the larger box
    assert cost.item() == pytest.approx(2 * focal + 5 * l1 - 2 * giou, abs=1e-5)


def test_a_sure_query_of_the_right_class_costs_less_than_an_unsure_one() -> None:
    box = torch.tensor([[0.5, 0.5, 0.2, 0.2]]).expand(3, 4)
    logits = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]])
    cost = ASSIGNER.costs(logits, box, torch.tensor([0]), box[:1])
    assert cost.flatten().argmin() == 1


def test_costs_that_are_no_numbers_are_matched_last() -> None:
    raw = make_raw(1)
    boxes = raw.boxes.detach().clone()
    boxes[:, :, :3] = torch.nan
    targets = make_targets(3)
    unit = targets.boxes / 200
    match = ASSIGNER(raw.logits.detach(), boxes, targets.image_index, targets.labels, unit)
    assert (match.query >= 3).all() and len(match.query) == 2 * 3


def test_every_stage_and_image_is_matched_on_its_own() -> None:
    raw, targets = make_raw(3), make_targets(2, 0, 4)
    unit = targets.boxes / 200
    match = ASSIGNER(raw.logits, raw.boxes, targets.image_index, targets.labels, unit)
    assert len(match.query) == 2 * 6
    assert (targets.image_index[match.object] == match.image).all()
    pairs = torch.stack((match.stage, match.image, match.query), 1)
    assert len(pairs.unique(dim=0)) == len(pairs)
    for stage in range(2):
        one = ASSIGNER(
            raw.logits[stage : stage + 1],
            raw.boxes[stage : stage + 1],
            targets.image_index,
            targets.labels,
            unit,
        )
        assert torch.equal(one.query, match.query[match.stage == stage])


def test_more_objects_than_queries_match_as_many_as_there_are_queries(criterion) -> None:
    raw, targets = make_raw(1, queries=2), make_targets(5)
    terms = criterion(raw, targets)
    assert all(term.isfinite() for term in terms.values())


def test_no_image_and_no_object_give_empty_matches() -> None:
    nothing = Targets.empty()
    match = ASSIGNER(torch.zeros(1, 2, 3, 4), torch.rand(1, 2, 3, 4), *nothing[:2], nothing.boxes)
    assert all(len(part) == 0 and part.dtype == torch.int64 for part in match)


def test_losses_of_one_pair_are_those_worked_out_by_hand(criterion) -> None:
    """One query, one object of class 2; the boxes of the cost test; in pixels of a 100 x 200
    image.
    """
    raw = make_raw(1, stages=1, queries=1)
    box = torch.tensor([0.5, 0.5, 0.4, 0.2]).expand(1, 1, 1, 4)
    raw = raw._replace(logits=torch.zeros(1, 1, 1, CLASSES), boxes=box)
    targets = Targets(
        torch.tensor([0]), torch.tensor([2]), torch.tensor([[100.0, 40.0, 140.0, 60.0]])
    )
    terms = criterion(raw, targets)
    assert terms["giou"].item() == pytest.approx(2 * (1 - 0.5), abs=1e-5)
    assert terms["l1"].item() == pytest.approx(5 * 0.3, abs=1e-5)
    # the right class: target and weight are the IoU 0.5; the others: weight 0.75 * 0.5 ** 2, target 0
    expected = 0.5 * math.log(2) + 2 * 0.75 * 0.25 * math.log(2)
    assert terms["cls"].item() == pytest.approx(expected, abs=1e-5)


def test_earlier_stages_and_the_encoder_make_up_the_auxiliary_terms(criterion) -> None:
    raw, targets = make_raw(2, stages=2), make_targets(2, 3)
    terms = criterion(raw, targets)
    encoder = raw._replace(logits=raw.encoder_logits[None], boxes=raw.encoder_boxes[None])
    first = raw._replace(logits=raw.logits[:1], boxes=raw.boxes[:1])
    for name in ("giou", "cls", "l1"):
        expected = criterion(encoder, targets)[name] + criterion(first, targets)[name]
        torch.testing.assert_close(terms[f"{name}_aux"], expected)
        assert terms[f"{name}_dn"] == 0


def test_batch_of_two_is_two_batches(criterion) -> None:
    raw, targets = make_raw(2), make_targets(2, 4)
    together = criterion(raw, targets)
    parts = [criterion(*of_one_image(raw, targets, image)) for image in range(2)]
    for name in together:
        torch.testing.assert_close(together[name] * 6, parts[0][name] * 2 + parts[1][name] * 4)


def test_order_of_the_objects_does_not_matter(criterion) -> None:
    raw, targets = make_raw(2), make_targets(3, 4)
    order = torch.tensor([6, 2, 0, 4, 1, 5, 3])
    shuffled = Targets(*(t[order] for t in targets))
    for name, value in criterion(raw, targets).items():
        torch.testing.assert_close(criterion(raw, shuffled)[name], value)


@pytest.mark.parametrize("counts", [(0, 3), (0, 0)])
def test_images_without_objects_give_finite_losses_and_gradients_everywhere(
    criterion, counts
) -> None:
    raw = make_raw(2)
    terms = criterion(raw, make_targets(*counts))
    sum(terms.values()).backward()
    for tensor in raw[:4]:
        assert tensor.grad is not None and tensor.grad.isfinite().all()
    if not any(counts):
        assert terms["giou"] == terms["l1"] == 0 < terms["cls"]


def test_a_batch_without_objects_has_its_own_exponent(criterion) -> None:
    raw = make_raw(1, stages=1)
    p = raw.logits.sigmoid()
    expected = (0.75 * p**1.5 * -torch.log(1 - p)).sum()
    torch.testing.assert_close(criterion(raw, Targets.empty())["cls"], expected)


def test_denoising_queries_answer_for_the_object_they_were_made_from(criterion) -> None:
    targets = make_targets(2, 1)
    raw = make_raw(2)
    size = torch.tensor([200.0, 100, 200, 100])
    corners = targets.boxes / size
    exact = torch.cat(((corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]), 1)
    table = torch.tensor([[0, 1, -1, -1], [2, -1, -1, -1]])
    logits = torch.full((2, 2, 4, CLASSES), -20.0)
    for image, query in ((0, 0), (0, 1), (1, 0)):
        logits[:, image, query, targets.labels[table[image, query]]] = 20.0
    boxes = exact[table.clamp(min=0)].expand(2, -1, -1, -1)
    perfect = criterion(raw._replace(denoising=Denoising(logits, boxes, table, 1)), targets)
    assert all(
        perfect[f"{name}_dn"].item() == pytest.approx(0, abs=1e-4) for name in ("giou", "cls", "l1")
    )
    moved = criterion(raw._replace(denoising=Denoising(logits, boxes + 0.01, table, 1)), targets)
    assert moved["l1_dn"].item() == pytest.approx(
        5 * 2 * 0.04, rel=1e-3
    )  # two stages, four numbers off by 0.01
    five = criterion(raw._replace(denoising=Denoising(logits, boxes + 0.01, table, 5)), targets)
    assert five["l1_dn"].item() == pytest.approx(
        moved["l1_dn"].item() / 5, rel=1e-6
    )  # of each group


class _Largest(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def test_memory_of_matching_does_not_grow_with_the_batch(criterion) -> None:
    """5,000 objects in one image: no tensor beyond two float32 numbers a pair of query and
    object.
    """
    raw, targets = make_raw(4, stages=2, queries=50), make_targets(5000, 1, 0, 2)
    with _Largest() as largest:
        criterion(raw, targets)
    assert largest.bytes <= 3 * 50 * 5003 * 2 * 4
