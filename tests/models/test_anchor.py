"""YOLOv5's head and loss: by hand, against published numbers, and what must not matter."""

from __future__ import annotations

import math
from typing import Any

import golden_weights
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.assigners.anchor_ratio import assign_level
from models.family import build_criterion, total_loss
from models.heads.anchor import AnchorDetect, AnchorRaw
from models.losses.anchor import AnchorLoss, scaled_gains
from models.yolo import build_model
from utils.boxes import complete_iou
from utils.structures import Targets

HYP: dict[str, Any] = {
    "box": 0.05,
    "cls": 0.5,
    "cls_pw": 1.0,
    "obj": 1.0,
    "obj_pw": 1.0,
    "anchor_t": 4.0,
    "fl_gamma": 0.0,
    "label_smoothing": 0.0,
}


def head_of(classes: int = 2, strides: tuple[int, ...] = (8, 16)) -> AnchorDetect:
    """A head of two anchors a level, on maps of 4 channels."""
    pixels = [[stride, stride, 4.0 * stride, 2.0 * stride] for stride in strides]
    head = AnchorDetect(classes, pixels, [4] * len(strides))
    head.initialize(strides)
    return head


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_one_cell_is_decoded_as_worked_out_by_hand():
    """Stride 8, cell in row 1, column 2, anchor 1 of 32 x 16 pixels.

    s = (0.75, 0.25, 0.5, 0.75): centre x = (2 * 0.75 - 0.5 + 2) * 8 = 24,
    y = (2 * 0.25 - 0.5 + 1) * 8 = 8; width (2 * 0.5) ** 2 * 32 = 32, height 1.5 ** 2 * 16 = 36.
    Objectness 0.5, classes 0.8 and 0.4: scores 0.4 and 0.2.
    """
    head = head_of(strides=(8,))
    level = torch.full((1, 2, 3, 4, 7), -50.0)
    probabilities = (0.75, 0.25, 0.5, 0.75, 0.5, 0.8, 0.4)
    level[0, 1, 1, 2] = torch.tensor([logit(p) for p in probabilities])
    decoded = head.decode(AnchorRaw((level,)))
    place = 1 * 12 + 1 * 4 + 2  # anchor, row, column
    assert decoded.boxes.shape == (1, 24, 4) and decoded.scores.shape == (1, 24, 2)
    torch.testing.assert_close(decoded.boxes[0, place], torch.tensor([8.0, -10.0, 40.0, 26.0]))
    torch.testing.assert_close(decoded.scores[0, place], torch.tensor([0.4, 0.2]))
    assert decoded.scores[0].argmax().item() // 2 == place
    exported = head.export_layout(AnchorRaw((level,)))[0, place]
    torch.testing.assert_close(exported, torch.tensor([24.0, 8.0, 32.0, 36.0, 0.5, 0.8, 0.4]))


def test_anchors_are_kept_in_strides_and_biases_start_at_the_prior():
    head = head_of(classes=2, strides=(8, 16))
    assert head.anchors.tolist() == [[[1, 1], [4, 2]], [[1, 1], [4, 2]]]
    torch.manual_seed(0)
    plain = AnchorDetect(2, [[8, 8]], [4])
    before = plain.m[0].bias.detach().clone()
    plain.initialize((8,))
    change = (plain.m[0].bias - before).tolist()
    # 7.7 objects in an image of 640 x 640 cut into 80 x 80 cells; each of two classes has an even chance
    assert change == pytest.approx([0, 0, 0, 0, math.log(7.7 / (6400 - 7.7)), 0, 0], abs=1e-6)
    assert plain.m[0].bias.requires_grad


@pytest.mark.parametrize(("classes", "probability"), [(5, 0.2), (80, 1 / 80), (1, 1.0)])
def test_every_class_starts_as_likely_as_another_and_a_single_one_is_certain(classes, probability):
    head = AnchorDetect(classes, [[8, 8]], [4])
    torch.nn.init.zeros_(head.m[0].bias)
    head.initialize((8,))
    assert head.m[0].bias[5:].sigmoid().tolist() == pytest.approx([probability] * classes)


@pytest.mark.parametrize(
    ("part", "expected"),
    # published state dict and image; total is what is back-propagated
    [
        ((0, 1), (11.079761505126953, 0.12011223286390305, 4.260062217712402, 1.1597062349319458)),
        ((0,), (11.144651412963867, 0.12058980762958527, 4.260151386260986, 1.191584825515747)),
        ((), (8.520584106445312, 0.0, 4.260292053222656, 0.0)),
    ],
    ids=["both images", "first image", "no objects"],
)
def test_the_loss_of_yolov5n_is_the_published_one(part, expected, yolov5n):
    model, raw = yolov5n
    criterion = AnchorLoss(model.head, HYP)
    losses = criterion(raw, golden_weights.targets(256, 320, images=part))
    total = total_loss(criterion, losses, 2)
    found = (total, losses["box"], losses["obj"], losses["cls"])
    assert [value.item() for value in found] == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_the_gradients_of_yolov5n_are_the_published_ones(yolov5n):
    model, raw = yolov5n
    criterion = AnchorLoss(model.head, HYP)
    total = total_loss(criterion, criterion(raw, golden_weights.targets(256, 320)), 2)
    expected = {
        "model.0.conv.weight": 7.99452965714234,
        "model.9.cv2.conv.weight": 1.748154347986997,
        "model.24.m.0.weight": 4.382799678888109,
    }
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(total, [parameters[name] for name in expected], retain_graph=True)
    norms = [gradient.norm().item() for gradient in found]
    assert norms == pytest.approx(list(expected.values()), rel=1e-3)


@pytest.fixture(scope="module")
def yolov5n() -> tuple[Any, AnchorRaw]:
    """The model with the weights of the published numbers, and its predictions in training mode."""
    model = golden_weights.fill(build_model("yolov5n", imgsz=(256, 320))).train()
    return model, model(golden_weights.image(256, 320, 2))


def raw_of(head: AnchorDetect, batch: int = 2, seed: int = 0) -> AnchorRaw:
    """Random predictions for images of 64 x 96."""
    generator = torch.Generator().manual_seed(seed)
    levels = []
    for stride in head.strides:
        shape = (batch, head.num_anchors, 64 // stride, 96 // stride, 5 + head.num_classes)
        levels.append(torch.randn(shape, generator=generator).requires_grad_())
    return AnchorRaw(tuple(levels))


def objects(batch: int = 2, count: int = 12, classes: int = 2, seed: int = 1) -> Targets:
    """Random objects of a batch of images of 64 x 96."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor([96.0, 64.0])
    centre = torch.rand(count, 2, generator=generator) * size
    half = (4 + 20 * torch.rand(count, 2, generator=generator)) / 2
    index = torch.arange(count) % batch
    order = index.argsort(stable=True)
    labels = torch.randint(0, classes, (count,), generator=generator)
    boxes = torch.cat((centre - half, centre + half), 1)
    return Targets(index[order], labels[order], boxes[order])


def losses_of(head: AnchorDetect, raw: AnchorRaw, targets: Targets, **changes: Any) -> dict:
    return AnchorLoss(head, {**HYP, **changes})(raw, targets)


def test_a_single_match_has_the_loss_worked_out_from_its_definition():
    """One 8 x 8 object in the middle of cell (1, 1) of one level: only anchor 0 fits (1 and 4)."""
    head = head_of(strides=(8,))
    raw = raw_of(head, batch=1)
    targets = Targets(torch.tensor([0]), torch.tensor([1]), torch.tensor([[8.0, 8.0, 16.0, 16.0]]))
    losses = losses_of(head, raw, targets, anchor_t=3.9)
    predicted = raw.levels[0][0, 0, 1, 1]
    x, y, w, h = predicted[:4].sigmoid().unbind()
    centre, size = torch.stack((2 * x - 0.5, 2 * y - 0.5)), (2 * torch.stack((w, h))) ** 2
    box = torch.cat((centre - size / 2, centre + size / 2))
    iou = complete_iou(box[None], torch.tensor([[0.0, 0.0, 1.0, 1.0]]))[0]
    wanted = torch.zeros(1, 2, 8, 12)
    wanted[0, 0, 1, 1] = iou.detach().clamp(min=0)
    objectness = F.binary_cross_entropy_with_logits(raw.levels[0][..., 4], wanted)
    classes = F.binary_cross_entropy_with_logits(predicted[5:], torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(losses["box"], 0.05 * (1 - iou))
    torch.testing.assert_close(losses["obj"], objectness)  # one level: balance 1
    torch.testing.assert_close(losses["cls"], 0.5 * classes)


def test_smoothing_takes_half_of_it_from_the_positive_class():
    head = head_of(strides=(8,))
    raw = raw_of(head, batch=1)
    targets = Targets(torch.tensor([0]), torch.tensor([1]), torch.tensor([[8.0, 8.0, 16.0, 16.0]]))
    losses = losses_of(head, raw, targets, anchor_t=3.9, label_smoothing=0.1)
    wanted = torch.tensor([0.05, 0.95])
    expected = F.binary_cross_entropy_with_logits(raw.levels[0][0, 0, 1, 1, 5:], wanted)
    torch.testing.assert_close(losses["cls"], 0.5 * expected)


def test_focal_loss_weighs_easy_places_less():
    head, targets = head_of(), objects()
    raw = raw_of(head)
    plain, focal = losses_of(head, raw, targets), losses_of(head, raw, targets, fl_gamma=1.5)
    assert focal["obj"] < 0.5 * plain["obj"]
    assert torch.equal(focal["box"], plain["box"])


def test_the_order_of_the_objects_does_not_matter():
    head, targets = head_of(), objects(count=40)  # so many that several claim one prediction
    raw = raw_of(head)
    expected = losses_of(head, raw, targets)
    for seed in range(3):
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
        found = losses_of(head, raw, Targets(*(value[order] for value in targets)))
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)


def test_of_objects_that_claim_one_prediction_the_best_fitting_counts():
    head = head_of(strides=(8,))
    level = torch.zeros(1, 2, 8, 12, 7, requires_grad=True)  # boxes of the anchor's size, centred
    near, far = [8.0, 8.0, 16.0, 16.0], [6.0, 6.0, 18.0, 18.0]
    index, labels = torch.tensor([0, 0]), torch.tensor([1, 1])
    both = Targets(index, labels, torch.tensor([far, near]))
    alone = Targets(index[:1], labels[:1], torch.tensor([near]))
    raw = AnchorRaw((level,))
    found = losses_of(head, raw, both, anchor_t=1.6)["obj"]
    torch.testing.assert_close(found, losses_of(head, raw, alone, anchor_t=1.6)["obj"])


def test_a_batch_of_two_is_two_batches():
    """Matches are averaged over the batch, objectness over its cells."""
    head = head_of()
    raw, targets = raw_of(head), objects(count=10)
    both = losses_of(head, raw, targets)
    parts, weights = [], []
    for image in range(2):
        labels, boxes = targets.of_image(image)
        own = Targets(torch.zeros(len(labels), dtype=torch.int64), labels, boxes)
        one = AnchorRaw(tuple(level[image : image + 1] for level in raw.levels))
        parts.append(losses_of(head, one, own))
        weights.append([matches_on(head, own, i) for i in range(2)])
    torch.testing.assert_close(both["obj"], (parts[0]["obj"] + parts[1]["obj"]) / 2)
    assert all(count > 0 for row in weights for count in row)


def matches_on(head: AnchorDetect, targets: Targets, level: int) -> int:
    stride = head.strides[level]
    low, high = targets.boxes[:, :2], targets.boxes[:, 2:]
    boxes = torch.cat(((low + high) / 2, high - low), 1) / stride
    return len(assign_level(boxes, head.anchors[level], (64 // stride, 96 // stride), 4.0).rows)


def test_box_and_class_terms_of_a_batch_are_means_over_its_matches():
    head = head_of(strides=(8,))
    raw, targets = raw_of(head), objects(count=10)
    both = losses_of(head, raw, targets)
    sums, count = {"box": torch.zeros(()), "cls": torch.zeros(())}, 0
    for image in range(2):
        labels, boxes = targets.of_image(image)
        own = Targets(torch.zeros(len(labels), dtype=torch.int64), labels, boxes)
        part = losses_of(head, AnchorRaw((raw.levels[0][image : image + 1],)), own)
        matched = matches_on(head, own, 0)
        count += matched
        sums = {name: value + matched * part[name] for name, value in sums.items()}
    for name, value in sums.items():
        torch.testing.assert_close(both[name], value / count)


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("kind", ["none", "one empty image", "all"])
def test_whatever_is_in_a_batch_the_loss_is_finite_and_reaches_every_output(kind, classes):
    head = head_of(classes=classes)
    features = [torch.rand(2, 4, 64 // s, 96 // s) for s in head.strides]
    targets = {
        "none": Targets.empty(),
        "one empty image": Targets(*(v[:6] for v in objects(classes=classes))),
        "all": objects(classes=classes),
    }[kind]
    losses = losses_of(head, head(features), targets)
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert head.m[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "box",
    [
        [8.0, 8.0, 8.0, 8.0],  # no extent
        [8.0, 8.0, 20.0, 8.0],  # no height
        [-5.0, -5.0, 3.0, 3.0],  # centre outside, to the left and above
        [90.0, 60.0, 102.0, 68.0],  # centre on the lower right corner
        [0.0, 0.0, 96.0, 64.0],  # the whole image
    ],
)
def test_odd_boxes_do_no_harm(box: list[float]):
    head = head_of()
    targets = Targets(torch.tensor([1]), torch.tensor([0]), torch.tensor([box]))
    losses = losses_of(head, raw_of(head), targets)
    assert all(value.isfinite() for value in losses.values())


def test_a_perfect_prediction_costs_next_to_nothing():
    head = head_of(strides=(8,))
    level = torch.full((1, 2, 8, 12, 7), -20.0)
    level[0, 0, 1, 1] = torch.tensor([0.0, 0.0, 0.0, 0.0, 20.0, -20.0, 20.0])
    targets = Targets(torch.tensor([0]), torch.tensor([1]), torch.tensor([[8.0, 8.0, 16.0, 16.0]]))
    losses = losses_of(head, AnchorRaw((level,)), targets, anchor_t=3.9)
    assert sum(losses.values()) < 1e-5


def test_gains_follow_classes_levels_and_size():
    gains = scaled_gains(HYP, head_of(20, (8, 16, 32, 64)), (320, 1280))
    assert gains["box"] == pytest.approx(0.05 * 3 / 4)
    assert gains["cls"] == pytest.approx(0.5 * 20 / 80 * 3 / 4)
    assert gains["obj"] == pytest.approx(1.0 * (640 / 640) ** 2 * 3 / 4)
    assert scaled_gains(HYP, head_of(80, (8, 16, 32)), (640, 640)) == pytest.approx(HYP)


@pytest.mark.parametrize(
    ("levels", "balance"),
    [(2, (1.0, 1.0)), (3, (4.0, 1.0, 0.4)), (4, (4.0, 1.0, 0.25, 0.06))],
)
def test_finer_levels_count_more(levels: int, balance: tuple[float, ...]):
    head = head_of(strides=tuple(8 * 2**k for k in range(levels)))
    assert AnchorLoss(head, HYP).balance == balance
    own = AnchorLoss(head, {**HYP, "balance": [2.0] * levels})
    assert own.balance == (2.0,) * levels


def test_the_criterion_of_the_head_is_the_anchor_loss_with_its_gains():
    head = head_of()
    criterion = build_criterion(head, HYP, (320, 320))
    assert isinstance(criterion, AnchorLoss) and criterion.times_batch
    assert criterion.hyp["obj"] == pytest.approx(0.25 * 3 / 2)
    total = total_loss(criterion, {"a": torch.tensor(2.0), "b": torch.tensor(1.0)}, 4)
    assert total.item() == 12


def test_mixed_precision_predictions_are_measured_in_float32():
    head, targets = head_of(), objects()
    raw = AnchorRaw(tuple(level.detach().bfloat16() for level in raw_of(head).levels))
    losses = losses_of(head, raw, targets)
    widened = losses_of(head, AnchorRaw(tuple(level.float() for level in raw.levels)), targets)
    assert all(value.dtype == torch.float32 for value in losses.values())
    assert all(torch.equal(value, widened[name]) for name, value in losses.items())


def test_decoding_takes_the_shape_from_the_tensors():
    head = head_of()
    small = head.decode(raw_of(head, batch=1))
    features: list[Tensor] = [torch.rand(3, 4, 4, 4), torch.rand(3, 4, 2, 2)]
    assert head.decode(head(features)).boxes.shape == (3, 2 * (16 + 4), 4)
    assert small.boxes.shape == (1, 2 * (8 * 12 + 4 * 6), 4)
