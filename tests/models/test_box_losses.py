"""Box losses: three values of each by hand, their gradients, their least value, odd boxes, units."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.losses.box import FORMS, BoxLoss, Frame, RunningMean, name_problem, take_apart
from models.losses.measures import BOX_LOSSES
from utils.config import load_hyp
from utils.errors import ConfigError

HYP = {
    "box_gamma": 0.5, "box_alpha": 3.0, "inner_ratio": 0.5, "shape_theta": 4.0, "shape_scale": 1.0,
    "nwd_constant": 2.0, "wiou_alpha": 1.9, "wiou_delta": 3.0, "wiou_steps": 7000,
}  # fmt: skip
FRAME = Frame((6, 8))  # squared diagonal 36 + 64 = 100
HYPS = Path(__file__).parents[2] / "data" / "hyps"
NAMES = [*BOX_LOSSES, *(f"{form}-{name}" for form in FORMS for name in BOX_LOSSES)]

# Three pairs, predicted and target, that the values below are worked out for:
#          overlap  union  hull  empty share  centres apart  diagonal^2  sides, predicted and target
# crossed     1       7    3x3      2/9          (1, 1)          18      2x2, 2x2
# inside      8      16    4x4       0           (1, 0)          32      2x4, 4x4
# apart       0      12    8x2     4/16          (5, 0)          68      2x2, 4x2
PAIRS = (
    ((0.0, 0, 2, 2), (1.0, 1, 3, 3)),
    ((0.0, 0, 2, 4), (0.0, 0, 4, 4)),
    ((0.0, 0, 2, 2), (4.0, 0, 8, 2)),
)
PREDICTED, TARGET = (torch.tensor(boxes, dtype=torch.float64) for boxes in zip(*PAIRS))
# The diagonals of 2x4 and 4x4, as those of 2x2 and 4x2, differ by pi / 4 - atan(1 / 2), so
# 1 - IoU = 1 / 2 and 1 give the trade-offs v / (1 / 2 + v) and v / (1 + v).
V = 4 / math.pi**2 * (math.pi / 4 - math.atan(1 / 2)) ** 2
HALF = (1 - math.exp(-1 / 2)) ** 4  # shape cost of sides 2 and 4
ROOT = math.sqrt(2)


def focused(beta: float) -> float:
    """WIoU v3's weight of a pair whose 1 - IoU is `beta` times the mean."""
    return beta / (3 * 1.9 ** (beta - 3))


VALUES = {
    "iou": (6 / 7, 1 / 2, 1),
    "giou": (6 / 7 + 2 / 9, 1 / 2, 5 / 4),
    "diou": (6 / 7 + 1 / 9, 17 / 32, 93 / 68),
    "ciou": (6 / 7 + 1 / 9, 17 / 32 + V * V / (1 / 2 + V), 93 / 68 + V * V / (1 + V)),
    "eiou": (6 / 7 + 1 / 9, 17 / 32 + (2 / 4) ** 2, 93 / 68 + (2 / 8) ** 2),
    # At 45 degrees the angle cost is 1, so 2 - 1 stands before (1/3)^2 of x and of y; along an
    # axis it is 0, so 2 before (1/4)^2 and (5/8)^2.
    "siou": (
        6 / 7 + 2 * (1 - math.exp(-1 / 9)) / 2,
        1 / 2 + (1 - math.exp(-2 / 16) + HALF) / 2,
        1 + (1 - math.exp(-2 * 25 / 64) + HALF) / 2,
    ),
    "wiou": (math.exp(2 / 18) * 6 / 7, math.exp(1 / 32) / 2, math.exp(25 / 68)),
    "wiou-v3": (
        focused(6 / 7) * math.exp(2 / 18) * 6 / 7,  # the mean starts at 1
        focused(1 / 2) * math.exp(1 / 32) / 2,
        focused(1) * math.exp(25 / 68),
    ),
    # upper left corners (1, 1), (0, 0), (4, 0) apart, lower right ones (1, 1), (2, 0), (6, 0)
    "mpdiou": (6 / 7 + 4 / 100, 1 / 2 + 4 / 100, 1 + (16 + 36) / 100),
    # scale 1: a target 4x2 weighs x by 2 * 2 / 6 and y by 2 * 4 / 6, square ones both by 1
    "shape-iou": (
        6 / 7 + 1 / 9,
        17 / 32 + HALF / 2,
        1 + 2 / 3 * 25 / 68 + (1 - math.exp(-2 / 3 / 2)) ** 4 / 2,
    ),
    # (dx, dy, half of dw, half of dh): (1, 1, 0, 0), (1, 0, 1, 0), (5, 0, 1, 0)
    "nwd": (1 - math.exp(-ROOT / 2), 1 - math.exp(-ROOT / 2), 1 - math.exp(-math.sqrt(26) / 2)),
    "alpha-iou": (1 - 1 / 343, 7 / 8, 1),
    "alpha-giou": (1 - 1 / 343 + (2 / 9) ** 3, 7 / 8, 1 + 1 / 64),
    "alpha-ciou": (
        1 - 1 / 343 + 1 / 729,
        7 / 8 + 1 / 32**3 + (V * V / (1 / 2 + V)) ** 3,
        1 + (25 / 68) ** 3 + (V * V / (1 + V)) ** 3,
    ),
    # Halved boxes: two that touch; 1x2 at (0.5, 1) and 2x2 at (1, 1), overlap 1 of 5; two apart.
    # A loss changes by IoU less this overlap.
    "inner-iou": (1, 4 / 5, 1),
    "inner-ciou": (1 + 1 / 9, 4 / 5 + 1 / 32 + V * V / (1 / 2 + V), 93 / 68 + V * V / (1 + V)),
    "inner-giou": (1 + 2 / 9, 4 / 5, 5 / 4),
    # Half of (1, 1, 0, 0) and so on in the sizes alone: (1, 0, 1/2, 0), (5, 0, 1/2, 0)
    "inner-nwd": (
        1 - math.exp(-ROOT / 2),
        1 - math.exp(-math.sqrt(1.25) / 2),
        1 - math.exp(-math.sqrt(25.25) / 2),
    ),
    "focal-eiou": (math.sqrt(1 / 7) * (6 / 7 + 1 / 9), math.sqrt(1 / 2) * 25 / 32, 0),
    "focal-giou": (math.sqrt(1 / 7) * (6 / 7 + 2 / 9), math.sqrt(1 / 2) / 2, 0),
    "alpha-inner-iou": (1, 1 - 1 / 125, 1),
    "focal-inner-alpha-iou": (math.sqrt(1 / 7), math.sqrt(1 / 2) * 124 / 125, 0),
}  # fmt: skip


def loss_of(name: str, predicted: Tensor = PREDICTED, target: Tensor = TARGET) -> Tensor:
    return BoxLoss(name, HYP)(predicted, target, FRAME)


@pytest.mark.parametrize("name", VALUES)
def test_three_values_by_hand(name: str):
    assert loss_of(name).tolist() == pytest.approx(VALUES[name], rel=1e-6, abs=1e-9)


def test_every_measure_is_among_them():
    assert set(BOX_LOSSES) <= set(VALUES)


def test_a_mean_other_than_one_moves_what_counts_most():
    loss = BoxLoss("wiou-v3", HYP)
    assert loss.mean is not None
    loss.mean.value = 0.5
    found = loss(PREDICTED, TARGET, FRAME).tolist()
    assert found[1] == pytest.approx(focused(1) * math.exp(1 / 32) / 2, rel=1e-6)
    assert found[2] == pytest.approx(focused(2) * math.exp(25 / 68), rel=1e-6)


# --- gradients -------------------------------------------------------------------------------------

GENERIC = torch.tensor(
    [[1.3, 2.1, 7.2, 5.9], [0.4, 0.2, 3.1, 6.7], [2.2, 1.1, 3.0, 2.3], [9.1, 8.3, 12.4, 11.2]],
    dtype=torch.float64,
)
NEAR = torch.tensor(
    [[2.0, 1.0, 6.0, 8.0], [0.9, 1.0, 4.2, 5.1], [1.0, 0.5, 5.0, 4.5], [1.0, 2.0, 4.0, 3.5]],
    dtype=torch.float64,
)
WEIGHTED = ("ciou", "wiou", "wiou-v3")  # with a part that takes no gradient
FREE = [n for n in NAMES if take_apart(n).base not in WEIGHTED and not n.startswith("focal-")]


@pytest.mark.parametrize("name", FREE)
def test_gradients_agree_with_finite_differences(name: str):
    boxes = GENERIC.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda predicted: loss_of(name, predicted, NEAR), boxes)
    if not name.startswith(("inner-iou", "alpha-iou", "iou")):  # far apart too, where IoU has none
        (gradient,) = torch.autograd.grad(loss_of(name, boxes, NEAR)[3], boxes)
        assert gradient[3].any()


def frozen(name: str, at: Tensor) -> Callable[[Tensor], Tensor]:
    """A loss whose weights are numbers, worked out where the boxes are now."""
    if name == "ciou":

        def angle(boxes: Tensor) -> Tensor:
            return torch.atan((boxes[:, 2] - boxes[:, 0]) / (boxes[:, 3] - boxes[:, 1]))

        def aspect(boxes: Tensor) -> Tensor:
            return 4 / math.pi**2 * (angle(boxes) - angle(NEAR)) ** 2

        trade_off = aspect(at) / (loss_of("iou", at, NEAR) + aspect(at))
        return lambda boxes: loss_of("diou", boxes, NEAR) + trade_off * aspect(boxes)
    if name == "wiou":
        low, high = torch.minimum(at, NEAR)[:, :2], torch.maximum(at, NEAR)[:, 2:]
        diagonal = (high - low).square().sum(1)

        def apart(boxes: Tensor) -> Tensor:
            return ((boxes[:, :2] + boxes[:, 2:] - NEAR[:, :2] - NEAR[:, 2:]) / 2).square().sum(1)

        return lambda boxes: torch.exp(apart(boxes) / diagonal) * loss_of("iou", boxes, NEAR)
    if name == "wiou-v3":
        weight = torch.tensor([focused(beta) for beta in loss_of("iou", at, NEAR).tolist()])
        return lambda boxes: weight * frozen("wiou", at)(boxes)
    weight = (1 - loss_of("iou", at, NEAR)).sqrt()
    return lambda boxes: weight * loss_of(name.removeprefix("focal-"), boxes, NEAR)


@pytest.mark.parametrize("name", [*WEIGHTED, "focal-eiou", "focal-giou", "focal-siou"])
def test_weights_of_a_pair_take_no_gradient_and_the_rest_agrees_with_finite_differences(name: str):
    boxes = GENERIC.clone().requires_grad_()
    function = frozen(name, GENERIC)
    assert torch.autograd.gradcheck(function, boxes)
    (expected,) = torch.autograd.grad(function(boxes).sum(), boxes)
    (found,) = torch.autograd.grad(loss_of(name, boxes, NEAR).sum(), boxes)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


# --- the least value -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES, "focal-alpha-inner-ciou"])
def test_boxes_that_agree_cost_nothing_and_every_step_away_costs(name: str):
    box = torch.tensor([10.0, 20.0, 40.0, 36.0], dtype=torch.float64)
    assert loss_of(name, box, box).abs().item() < 1e-8
    for side, step in itertools.product(range(4), (-3.0, -0.5, 0.5, 3.0)):
        moved = box.clone()
        moved[side] += step
        assert loss_of(name, moved, box) > 1e-6, (side, step)


@pytest.mark.parametrize("name", NAMES)
def test_a_few_steps_downhill_bring_boxes_closer(name: str):
    target = torch.tensor([[10.0, 10.0, 34.0, 30.0]])
    boxes = torch.tensor([[6.0, 12.0, 28.0, 38.0]], requires_grad=True)
    optimizer = torch.optim.Adam([boxes], lr=0.2)
    first = (boxes - target).abs().sum().item()
    loss = BoxLoss(name, {**HYP, "nwd_constant": 12.8, "inner_ratio": 0.75})
    for _ in range(60):
        optimizer.zero_grad()
        loss(boxes, target, Frame((64, 64))).sum().backward()
        optimizer.step()
    assert (boxes - target).abs().sum().item() < first / 2


# --- odd boxes -------------------------------------------------------------------------------------

ODD = [
    [0.0, 0, 0, 0], [5, 5, 5, 9], [5, 5, 9, 5], [5, 5, 9, 9], [9, 5, 13, 9], [9, 9, 5, 5],
    [1000, 3, 2, 8], [0, 0, 1e-4, 1e-4], [6e4, 6e4, 6.2e4, 6.2e4], [-300, -300, 300, 300], [5, 5, 9, 1e4],
]  # fmt: skip


@pytest.mark.parametrize("name", [*NAMES, "focal-alpha-inner-siou"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_whatever_the_boxes_values_and_gradients_are_finite(name: str, dtype: torch.dtype):
    """No extent, touching, far apart, inside out, tiny, huge, against each other and themselves."""
    every = torch.tensor(ODD).to(dtype)
    predicted = every[:, None].expand(-1, len(ODD), 4).clone().requires_grad_()
    loss = loss_of(name, predicted, every)
    assert loss.dtype == torch.float32 and loss.shape == (len(ODD), len(ODD))
    assert loss.isfinite().all() and (loss >= -1e-6).all()
    (gradient,) = torch.autograd.grad(loss.clamp(max=1e4).sum(), predicted)
    assert gradient.isfinite().all()


def test_alpha_and_shape_hold_for_powers_that_are_not_whole_or_large():
    numbers = {**HYP, "box_alpha": 1.5, "shape_theta": 2.5, "shape_scale": 300.0}
    boxes = PREDICTED.clone().requires_grad_()
    for name in ("alpha-giou", "alpha-siou", "alpha-shape-iou"):
        loss = BoxLoss(name, numbers)(boxes, boxes.detach(), FRAME)
        (gradient,) = torch.autograd.grad(loss.sum(), boxes)
        assert loss.isfinite().all() and gradient.isfinite().all()


# --- units -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_cells_pixels_and_parts_of_the_image_give_one_value(name: str):
    size = (96, 160)
    scale = torch.tensor([160.0, 96.0, 160.0, 96.0], dtype=torch.float64)
    predicted, target = GENERIC * 5, NEAR * 5
    loss = BoxLoss(name, {**HYP, "nwd_constant": 12.8})
    expected = loss(predicted, target, Frame(size))
    cells = loss(predicted / 8, target / 8, Frame(size, unit=8.0))
    parts = loss(predicted / scale, target / scale, Frame(size, unit=scale))
    torch.testing.assert_close(cells, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(parts, expected, rtol=1e-5, atol=1e-7)


# --- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "base", "forms"),
    [
        ("ciou", "ciou", ()),
        ("shape-iou", "shape-iou", ()),
        ("inner-shape-iou", "shape-iou", ("inner",)),
        ("alpha-inner-wiou-v3", "wiou-v3", ("alpha", "inner")),
        ("inner-inner-iou", "inner-iou", ("inner",)),  # unknown: no form stands twice
    ],
)
def test_a_name_is_taken_apart(name: str, base: str, forms: tuple[str, ...]):
    assert take_apart(name) == (base, forms)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("ciuo", "Did you mean 'ciou'?"),
        ("CIoU", "Did you mean 'ciou'?"),
        ("inner-cioux", "Did you mean 'inner-ciou'?"),
        ("innerciou", "Did you mean 'inner-ciou'?"),
        ("focal-focal-eiou", "expected one of iou, giou, diou, ciou, eiou, siou, wiou, wiou-v3, mpdiou"),
        ("", "got ''"),
        ("losses.txt:f", "expected a Python file and a function in it"),
        ("losses.py:", "expected a Python file and a function in it"),
    ],
)  # fmt: skip
def test_a_name_that_is_not_known_is_one_line_with_the_nearest(name: str, told: str):
    with pytest.raises(ConfigError) as caught:
        BoxLoss(name, HYP)
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value) == f"box_loss: {name_problem(name)}"


def test_only_the_numbers_that_a_loss_reads_must_be_there():
    assert BoxLoss("giou", {}).numbers == {}
    with pytest.raises(KeyError, match="nwd_constant"):
        BoxLoss("nwd", {})
    with pytest.raises(KeyError, match="box_alpha"):
        BoxLoss("alpha-iou", {})


@pytest.mark.parametrize("family", ["yolov5", "yolov9", "yolo11", "rtdetr", "dfine"])
def test_the_recipe_of_a_family_names_its_loss_and_holds_every_number(family: str):
    hyp = load_hyp(None, HYPS / f"{family}.yaml")
    assert hyp["box_loss"] == ("giou" if family in ("rtdetr", "dfine") else "ciou")
    assert hyp["cls_loss"] == ("varifocal" if family in ("rtdetr", "dfine") else "bce")
    for name in NAMES:
        assert BoxLoss(name, hyp)(PREDICTED, TARGET, FRAME).isfinite().all()


# --- the running mean ------------------------------------------------------------------------------


def test_the_mean_moves_a_little_with_every_step_and_ignores_what_is_no_number():
    mean = RunningMean(steps=10)
    for _ in range(10):
        mean.add(torch.tensor([0.0, 0.4]))
        mean.add(torch.tensor([0.2]))
        mean.update()  # 0.2 on average
    assert mean.value == pytest.approx(0.2 + 0.05 * 0.8)  # of the first value 5 % are left
    before = mean.value
    mean.update()  # nothing seen
    mean.add(torch.tensor([torch.nan]))
    mean.update()
    assert mean.value == before


def test_a_mean_that_went_to_nothing_divides_nothing():
    loss = BoxLoss("wiou-v3", HYP)
    assert loss.mean is not None
    loss.mean.value = 0.0
    assert loss(PREDICTED, TARGET, FRAME).isfinite().all()
    assert loss(TARGET, TARGET, FRAME).tolist() == pytest.approx([0, 0, 0], abs=1e-6)


def test_processes_share_one_mean_also_those_that_saw_nothing(monkeypatch: pytest.MonkeyPatch):
    others = torch.tensor([1.8, 3.0])  # three pairs of 0.6 on the other process

    def add_others(seen: Tensor) -> None:
        seen += others

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
    monkeypatch.setattr(torch.distributed, "all_reduce", add_others)
    mean, idle = RunningMean(steps=1), RunningMean(steps=1)  # 95 % of a step's mean, 5 % of 1
    mean.add(torch.tensor([0.2]))
    mean.update()
    idle.update()
    assert mean.value == pytest.approx(0.95 * (0.2 + 1.8) / 4 + 0.05)
    assert idle.value == pytest.approx(0.95 * 0.6 + 0.05)


def test_only_training_moves_the_mean_and_is_weighed_by_it():
    loss = BoxLoss("wiou-v3", HYP)
    assert loss.mean is not None
    with torch.no_grad():
        unweighted = loss(PREDICTED, TARGET, FRAME)
        loss.end_step()
    assert loss.mean.value == 1
    torch.testing.assert_close(unweighted, loss_of("wiou"))
    loss(PREDICTED, TARGET, FRAME)
    loss.end_step()
    momentum = 1 - 0.05 ** (1 / 7000)
    assert loss.mean.value == pytest.approx(1 + momentum * ((6 / 7 + 1 / 2 + 1) / 3 - 1))
