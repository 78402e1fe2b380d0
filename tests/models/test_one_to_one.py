"""Heads with a one-to-one branch: assignment, weights of the branches, what is deployed, what is learnt."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from test_overfit import IMGSZ, one_batch
from torch import Tensor, nn
from torchvision.ops import box_iou

from models.assigners.task_aligned import (
    Candidates,
    Predictions,
    assign,
    best_left,
    best_of_each,
    settle,
    weigh,
)
from models.family import RECIPES, build_criterion, family_of, total_loss
from models.heads.ddetect import DDetect
from models.heads.dfl import DFLDetect, DFLRaw
from models.heads.one_to_one import OneToOne, OneToOneDDetect, OneToOneDetect, use_nms
from models.losses.one_to_one import OneToOneLoss, share_of_many
from models.losses.task_aligned import TaskAlignedLoss
from models.parser.rows import read_model_config
from models.postprocess import postprocess
from models.reparam import fuse
from models.yolo import DetectionModel, build_model, model_from_checkpoint
from utils.config import load_hyp
from utils.errors import ConfigError
from utils.structures import Targets

BACKBONE = [[-1, 1, "Conv", [16, 3, 2]], *([[-1, 1, "Conv", [32, 3, 2]]] * 3)]
DEEPER = [
    [-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [32, 3, 2]], [-1, 1, "Conv", [64, 3, 2]],
    [-1, 1, "C3k2", [64, True, 0.5]], [-1, 1, "Conv", [96, 3, 2]], [-1, 1, "C3k2", [96, True, 0.5]],
]  # fmt: skip
HEADS = {"Detect": (OneToOneDetect, DFLDetect), "DDetect": (OneToOneDDetect, DDetect)}
SIZE = (64, 64)
TARGETS = Targets(
    torch.tensor([0, 0, 1]),
    torch.tensor([1, 0, 1]),
    torch.tensor([[4.0, 4, 30, 40], [20, 10, 60, 50], [0, 0, 64, 64]]),
)


def config(head: str = "Detect", **keys: object) -> dict[str, object]:
    return {"nc": 2, "backbone": BACKBONE, "head": [[[2, 3], 1, head, ["nc"]]], **keys}


def build(head: str = "Detect", **keys: object) -> DetectionModel:
    """A small end-to-end model whose norms have statistics of their own, so that folding them is seen."""
    torch.manual_seed(0)
    model = build_model(config(head, **{"end2end": True, **keys}), imgsz=SIZE)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.weight, 0.5, 2)
    return model


def images(count: int = 2) -> Tensor:
    return torch.rand(count, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def recipe_of(model: DetectionModel, **changes: object) -> dict[str, object]:
    return {**load_hyp(None, RECIPES / f"{model.head.family}.yaml"), **changes}


def parted(model: DetectionModel, seed: int = 3) -> DetectionModel:
    """The one-to-one branch moved away from the other, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "one2one" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


# --- assignment -----------------------------------------------------------------------------------


def test_an_object_whose_best_prediction_was_taken_falls_back_to_its_next_one():
    """Prediction 1 is the best of both objects; object 0 overlaps it more and keeps it, object 1 takes prediction 3."""
    alignment = torch.tensor([[0.5, 0.9, 0.0, 0.1], [0.0, 0.8, 0.2, 0.6]])
    overlaps = torch.tensor([[0.6, 0.95, 0.0, 0.3], [0.0, 0.9, 0.4, 0.7]])
    settled = settle(best_of_each(alignment, overlaps, topk=3))
    assert settled.predictions.tolist() == [0, 1, 2, 3] and settled.objects.tolist() == [0, 0, 1, 1]
    left = best_left(settled)
    assert list(zip(left.objects.tolist(), left.predictions.tolist())) == [(0, 1), (1, 3)]
    # An object's alignment is scaled so that the largest, which is its only one, is its overlap.
    torch.testing.assert_close(weigh(left, 2).weights, torch.tensor([0.95, 0.7]))


def test_an_object_that_won_nothing_has_no_prediction():
    """With one candidate each there is nothing to fall back to: why candidates are settled before they are reduced."""
    alignment = torch.tensor([[0.5, 0.9], [0.4, 0.8]])
    left = best_left(settle(best_of_each(alignment, alignment, topk=1)))
    assert left.objects.tolist() == [0] and left.predictions.tolist() == [1]
    left = best_left(
        settle(best_of_each(alignment, torch.tensor([[0.5, 0.9], [0.6, 0.8]]), topk=2))
    )
    assert list(zip(left.objects.tolist(), left.predictions.tolist())) == [(0, 1), (1, 0)]


def test_of_equals_the_first_prediction_is_kept():
    same = Candidates(torch.tensor([0, 0]), torch.tensor([4, 7]), *torch.full((2, 2), 0.5))
    assert best_left(same).predictions.tolist() == [4]


def test_two_objects_at_one_point_get_a_prediction_each_through_assign():
    points = torch.tensor([[8.0, 8], [24, 8]])
    truths = torch.tensor([[0.0, 0, 30, 16], [0, 0, 32, 18]])
    targets = Targets(torch.tensor([0, 0]), torch.tensor([0, 0]), truths)
    # The first prediction is the best for both and is object 0 itself; the second is worse for both.
    boxes = torch.stack((truths[0], torch.tensor([6.0, 0, 32, 18])))[None]
    predictions = Predictions(torch.tensor([[[0.9], [0.3]]]), boxes, points)
    rule = {"alpha": 0.5, "beta": 6.0, "only_best": True}
    found = assign(predictions, targets, topk=7, **rule)
    assert dict(zip(found.objects.tolist(), found.predictions.tolist())) == {0: 0, 1: 1}
    assert assign(predictions, targets, topk=1, **rule).objects.tolist() == [0]


# --- loss -----------------------------------------------------------------------------------------


def test_the_share_of_the_branches_moves_in_equal_steps():
    shares = [share_of_many(epoch, 5, 0.8, 0.1) for epoch in range(5)]
    assert shares == pytest.approx([0.8, 0.625, 0.45, 0.275, 0.1], abs=1e-12)
    assert share_of_many(0, 1, 0.8, 0.1) == pytest.approx(0.8)
    assert share_of_many(7, 5, 0.8, 0.1) == pytest.approx(0.1)  # a run that is trained on


@pytest.mark.parametrize("reg_max", [16, 1])
def test_the_loss_is_the_weighted_sum_of_both_branches(reg_max: int):
    model = parted(build(reg_max=reg_max)).train()
    hyp, raw = recipe_of(model), model(images())
    criterion = build_criterion(model.head, hyp, SIZE)
    assert isinstance(criterion, OneToOneLoss)
    many = TaskAlignedLoss(model.head, hyp)(raw.many, TARGETS)
    one = TaskAlignedLoss(model.head, {**hyp, "tal_topk": 7}, only_best=True)(raw.one, TARGETS)
    for epoch, share in ((0, 0.8), (4, 0.1), (1, 0.625)):
        criterion.begin_epoch(epoch, 5)
        found = criterion(raw, TARGETS)
        assert list(found) == ["box", "cls", "dfl" if reg_max == 16 else "l1"]
        for name, value in found.items():
            torch.testing.assert_close(value, share * many[name] + (1 - share) * one[name])
            assert many[name] != one[name]


def test_other_criteria_know_no_epochs():
    model = build_model(config(), imgsz=SIZE)
    criterion, raw = build_criterion(model.head, recipe_of(model), SIZE), model(images())
    first = criterion(raw, TARGETS)
    criterion.begin_epoch(3, 4)
    assert criterion(raw, TARGETS) == first


def test_a_distance_without_bins_by_hand():
    """One point at (8, 8) of stride 8. The object reaches 1, 1, 2, 1 strides from it; .5, 1, 2.5, 1 are predicted:
    the sides are off by .5 + .5 strides in sum, times the gain 6. Its only prediction weighs its own overlap w, and the
    normaliser is at least 1."""
    head = DFLDetect(2, 1, [8])
    hyp = {"box": 7.5, "cls": 0.5, "l1": 6.0, "tal_topk": 7, "tal_alpha": 0.5, "tal_beta": 6.0}
    raw = DFLRaw(
        torch.tensor([[[0.5, 1, 2.5, 1]]]), torch.zeros(1, 1, 2), torch.tensor([[8.0, 8]]), torch.tensor([[8.0]])
    )  # fmt: skip
    truth = torch.tensor([[0.0, 0, 24, 16]])
    targets = Targets(torch.tensor([0]), torch.tensor([1]), truth)
    terms = TaskAlignedLoss(head, hyp, only_best=True)(raw, targets)
    # Boxes of 24 x 16 that lie 4 apart: they share 20 x 16 of 28 x 16, centres 4 apart in a hull of 28 x 16.
    ciou = 20 / 28 - 4**2 / (28**2 + 16**2)
    assert terms["l1"].item() == pytest.approx(6.0 * ciou * 1.0, rel=1e-5)
    assert terms["box"].item() == pytest.approx(7.5 * (1 - ciou) * ciou, rel=1e-5)


def test_boxes_turned_inside_out_have_a_finite_loss_and_come_back():
    """Distances without bins may be negative."""
    head = DFLDetect(2, 1, [8])
    distances = torch.tensor([[[-3.0, -2, 1, 1], [1, 1, 2, 1]]], requires_grad=True)
    raw = DFLRaw(
        distances, torch.zeros(1, 2, 2), torch.tensor([[8.0, 8], [16, 8]]), torch.full((2, 1), 8.0)
    )
    targets = Targets(torch.tensor([0]), torch.tensor([1]), torch.tensor([[0.0, 0, 24, 16]]))
    terms = TaskAlignedLoss(head, recipe_of(build()))(raw, targets)
    sum(terms.values()).backward()
    assert all(value.isfinite() for value in terms.values()) and distances.grad.isfinite().all()


def test_a_distance_may_be_negative_but_no_box_is_inside_out():
    """A point left of a small object that serves it (`stal`) has the distance -1 to the left side; -2 to the right
    would put that side before the left one, where the box has no area."""
    head = DFLDetect(2, 1, [8])
    distances = torch.tensor([[[-1.0, 1, 2, 1], [-1, 1, -2, 1]]])
    points, strides = torch.full((2, 2), 8.0), torch.full((2, 1), 8.0)
    boxes = head.decode(DFLRaw(distances, torch.zeros(1, 2, 2), points, strides)).boxes
    assert boxes.tolist() == [[[16, 0, 24, 16], [16, 0, 16, 16]]]


# --- the head -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
def test_the_one_to_one_branch_starts_as_a_copy(name: str):
    model = build_model(config(name, end2end=True), imgsz=SIZE).eval()
    head, raw = model.head, model(images())
    assert type(head) is HEADS[name][0] and family_of(head).head is type(head)
    assert all(map(torch.equal, raw.many, raw.one)) and raw.one.distances.std() > 0
    many, one = ({id(p) for p in part.parameters()} for part in (head.cv2, head.one2one_cv2))
    assert many and not many & one
    raw = parted(model)(images())
    assert not torch.equal(raw.many.logits, raw.one.logits)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("reg_max", [16, 1])
@pytest.mark.parametrize("detach", [0, 1])
def test_every_parameter_learns_and_the_branch_can_leave_the_network_alone(
    name: str, reg_max: int, detach: int
):
    model = parted(build(name, reg_max=reg_max)).train()
    hyp = recipe_of(model, o2o_detach=detach)
    model.head.take_recipe(hyp)
    criterion, parameters = build_criterion(model.head, hyp, SIZE), dict(model.named_parameters())
    learning = {key: p for key, p in parameters.items() if p.requires_grad}
    total_loss(criterion, criterion(model(images()), TARGETS), 2).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learning.values())
    model.zero_grad()
    one = model(images()).one
    (one.distances.square().sum() + one.logits.square().sum()).backward()
    reached = {key for key, p in learning.items() if p.grad is not None and p.grad.any()}
    own = {key for key in learning if "one2one" in key}
    below = {key for key in learning if not key.startswith("model.4.")}
    assert own and below and reached == (own if detach else own | below)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("reg_max", [16, 1])
@pytest.mark.parametrize("nms", [False, True])
def test_fusing_leaves_the_branch_that_inference_reads(name: str, reg_max: int, nms: bool):
    model = parted(build(name, reg_max=reg_max)).eval()
    raw = model(images())
    branch = raw.many if nms else raw.one
    if nms:
        use_nms(model.head)
    expected = model.decode(raw)
    single = build_model(config(name, reg_max=reg_max), imgsz=SIZE)
    assert torch.equal(expected.scores, branch.logits.sigmoid())
    fuse(model)
    fuse(single)
    assert type(model.head) is HEADS[name][1]
    assert model.head.postprocess == ("nms" if nms else "best")
    count, wanted = (sum(p.numel() for p in m.parameters()) for m in (model, single))
    assert count == wanted and model.state_dict().keys() == single.state_dict().keys()
    found = model.decode(model(images()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not fuse(model).folded and model.head.postprocess == ("nms" if nms else "best")


def test_the_many_branch_is_that_of_the_head_without_the_key():
    """Weights of a model without the branch fit where they did; the rest is the branch alone."""
    torch.manual_seed(0)
    plain = build_model(config(), imgsz=SIZE).state_dict()
    torch.manual_seed(0)
    both = build_model(config(end2end=True), imgsz=SIZE)
    own = [key for key in both.state_dict() if key not in plain]
    assert own and all(key.startswith("model.4.one2one_cv") for key in own)
    assert all(torch.equal(value, both.state_dict()[key]) for key, value in plain.items())
    assert not build_model(config(end2end=False), imgsz=SIZE).state_dict().keys() - plain.keys()


def test_a_checkpoint_carries_the_key(tmp_path: Path):
    model = parted(build_model(config(reg_max=1), imgsz=SIZE, end2end=True))
    assert model.config["end2end"] is True and model.config["reg_max"] == 1
    saved = {
        "config": model.config,
        "names": model.names,
        "model": model.state_dict(),
        "imgsz": SIZE,
    }
    torch.save(saved, tmp_path / "x.pt")
    again = model_from_checkpoint(torch.load(tmp_path / "x.pt", weights_only=True))
    assert isinstance(again.head, OneToOne) and again.head.reg_max == 1
    assert all(map(torch.equal, again.eval()(images()).one, model.eval()(images()).one))


def test_published_yamls_take_the_key():
    for name, count in (("yolo11n", 2), ("gelan-t", 2)):
        _, mapping, _ = read_model_config(name, num_classes=3, end2end=True)
        head = build_model({**mapping, "reg_max": 1}, imgsz=SIZE).head
        assert isinstance(head, OneToOne) and len(head.cv2) == len(head.one2one_cv2) == 3
        assert len({id(m) for m in (head.cv2, head.one2one_cv2)}) == count
        assert head.cv2[0][2].out_channels == 4 and not head.dfl.state_dict()


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"head": "DualDDetect", "end2end": True}, "got end2end True and reg_max 16, expected neither"),
        ({"head": "DualDDetect", "reg_max": 1}, "got end2end False and reg_max 1, expected neither"),
        ({"end2end": "yes"}, "end2end: got 'yes', expected true or false"),
        ({"reg_max": 0}, "reg_max: got 0, expected the bins of a distance"),
        ({"reg_max": True}, "reg_max: got True, expected the bins of a distance"),
    ],
)  # fmt: skip
def test_what_a_head_cannot_be_is_told(keys: dict, told: str):
    with pytest.raises(ConfigError) as caught:
        build_model(config(**keys), imgsz=SIZE)
    assert told in str(caught.value)


def test_anchors_have_no_one_to_one_branch():
    rows = [[[2, 3], 1, "Detect", ["nc", [[8, 8], [16, 16]]]]]
    with pytest.raises(
        ConfigError, match=r"head\[0\] Detect: got end2end true for a head that needs NMS"
    ):
        build_model({**config(end2end=True), "head": rows}, imgsz=SIZE)
    plain = build_model(config(), imgsz=SIZE)
    with pytest.raises(ConfigError, match="best.pt: got a head without a one-to-many branch"):
        use_nms(plain.head, "best.pt")


# --- whole ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("reg_max", [16, 1])
def test_a_batch_is_learnt_by_heart_without_duplicates(reg_max: int):
    """Of the boxes above .25 there is one an object, though nothing suppresses any; the other branch has more."""
    torch.manual_seed(0)
    rows = [[[3, 5], 1, "Detect", ["nc"]]]
    model = build_model(
        {**config(end2end=True), "reg_max": reg_max, "backbone": DEEPER, "head": rows}, imgsz=IMGSZ
    )
    model.train()
    batch, targets = one_batch()
    hyp = recipe_of(model, optimizer="AdamW")
    criterion = build_criterion(model.head, hyp, IMGSZ)
    epochs, steps = 5, 45
    optimizer = torch.optim.AdamW(model.parameters(), 0.005, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.005, epochs * steps)
    for step in range(epochs * steps):
        criterion.begin_epoch(step // steps, epochs)
        losses = criterion(model(batch), targets)
        optimizer.zero_grad()
        total_loss(criterion, losses, len(batch)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
    model.eval()
    many = copy.deepcopy(model)
    use_nms(many.head)
    with torch.no_grad():
        fuse(model)
        limits = {"conf_thres": 0.25, "iou_thres": 1.0, "max_det": 300}
        found = postprocess(model.decode(model(batch)), model.head.postprocess, **limits)
        others = postprocess(many.decode(many(batch)), "topk", **limits)
    assert sum(len(d.scores) for d in found) <= 1.02 * len(targets.labels)
    assert sum(len(d.scores) for d in others) > 1.02 * len(targets.labels)
    for number, detections in enumerate(found):
        own = targets.image_index == number
        overlap = box_iou(targets.boxes[own], detections.boxes)
        overlap = overlap * (targets.labels[own][:, None] == detections.labels)
        assert len(detections.scores) and overlap.amax(1).min() > 0.5
