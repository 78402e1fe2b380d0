"""Class losses: values by hand, gradients, extreme logits, and what each family aims at."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from models.losses.classification import (
    CLASS_LOSSES,
    ClassTargets,
    choose_class_loss,
    class_loss_problem,
    focal_loss,
)
from utils.errors import ConfigError

HYP: dict[str, Any] = {
    "focal_alpha": 0.25, "focal_gamma": 2.0, "vfl_alpha": 0.75, "vfl_gamma": 2.0, "mal_gamma": 2.0, "qfl_beta": 2.0,
}  # fmt: skip
LOG2, LOG4, LOG5 = math.log(2), math.log(4), math.log(5)  # of logits: LOG4 means p = 0.8
CROSS = {0.8: math.log(5 / 4), 0.2: LOG5}  # -log p


def value_of(name: str, logit: float, label: float, quality: float, **numbers: float) -> float:
    """Loss of one class; `label` above 0 means it is that of a positive."""
    one = [torch.tensor([float(v)]) for v in (label, quality, label > 0)]
    loss = choose_class_loss(name, HYP)(torch.tensor([logit]), ClassTargets(*one), HYP | numbers)
    return loss.item()


@pytest.mark.parametrize(
    ("name", "logit", "label", "quality", "expected"),
    [
        ("bce", 0.0, 1, 0.5, LOG2),
        ("bce", LOG4, 0, 0.0, LOG5),
        ("bce", LOG4, 0.5, 0.5, (CROSS[0.8] + LOG5) / 2),
        ("focal", 0.0, 1, 0.5, 1 / 4 * 1 / 4 * LOG2),
        ("focal", LOG4, 0, 0.0, 3 / 4 * 0.8**2 * LOG5),
        ("focal", LOG4, 1, 0.9, 1 / 4 * 0.2**2 * CROSS[0.8]),
        ("focal", 0.0, 0.5, 0.5, (1 / 16 + 3 / 16) / 2 * LOG2),  # half of a yes, half of a no
        ("varifocal", 0.0, 1, 0.5, 0.5 * LOG2),
        ("varifocal", LOG4, 1, 1.0, CROSS[0.8]),
        ("varifocal", LOG4, 0, 0.0, 3 / 4 * 0.8**2 * LOG5),
        ("varifocal", 3.0, 1, 0.0, 0.0),  # a positive whose box misses weighs nothing
        ("mal", 0.0, 1, 0.5, LOG2),
        ("mal", LOG4, 1, 0.5, CROSS[0.8] / 4 + LOG5 * 3 / 4),  # aims at 0.5^2
        ("mal", LOG4, 1, 0.0, LOG5),  # a positive whose box misses weighs 1
        ("mal", LOG4, 0, 0.0, 0.8**2 * LOG5),
        ("quality", 0.0, 1, 0.5, 0.0),  # the score is right
        ("quality", 0.0, 1, 1.0, 1 / 4 * LOG2),
        ("quality", LOG4, 0, 0.0, 0.8**2 * LOG5),
        ("quality", LOG4, 1, 0.5, 0.3**2 * (CROSS[0.8] + LOG5) / 2),
    ],
)
def test_values_by_hand(name: str, logit: float, label: float, quality: float, expected: float):
    assert value_of(name, logit, label, quality) == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("bce", 3 * LOG2), ("focal", 3 / 16 * LOG2), ("varifocal", 3 * LOG2), ("mal", 3 * LOG2), ("quality", 3 / 4 * LOG2)],
)  # fmt: skip
def test_positives_may_weigh_more(name: str, expected: float):
    assert value_of(name, 0.0, 1, 1.0, cls_pw=3.0) == pytest.approx(expected)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.5, 2.0])
def test_focal_loss_is_the_papers_formula_of_yes_and_no(gamma: float):
    """-alpha_t (1 - p_t)^gamma log p_t, with p_t = p of a yes and 1 - p of a no."""
    logits = torch.linspace(-5, 5, 21, dtype=torch.float64)
    for answer, alpha in ((1.0, 0.25), (0.0, 0.75)):
        p = logits.sigmoid() if answer else 1 - logits.sigmoid()
        expected = -alpha * (1 - p) ** gamma * p.log()
        torch.testing.assert_close(
            focal_loss(logits, torch.full_like(logits, answer), 0.25, gamma), expected
        )


def test_of_a_focal_loss_without_power_half_of_the_cross_entropy_is_left():
    logits, wanted = torch.randn(50), torch.rand(50)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, wanted, reduction="none"
    )
    torch.testing.assert_close(focal_loss(logits, wanted, 0.5, 0.0), expected / 2)


@pytest.mark.parametrize("name", CLASS_LOSSES)
def test_gradients_agree_with_finite_differences(name: str):
    logits = torch.tensor([-2.0, -0.3, 0.4, 1.7], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0.0, 1, 0, 1], dtype=torch.float64)
    targets = ClassTargets(labels, labels * 0.7, labels)
    if name == "mal":  # its weight is a number: only where it has no weight of negatives
        targets, logits = ClassTargets(*(t[1::2] for t in targets)), logits[1::2]
    assert torch.autograd.gradcheck(lambda x: CLASS_LOSSES[name](x, targets, HYP), logits)


@pytest.mark.parametrize("name", CLASS_LOSSES)
@pytest.mark.parametrize("power", [0.5, 2.0])
def test_extreme_logits_have_finite_values_and_gradients(name: str, power: float):
    numbers = HYP | {"focal_gamma": power}
    logits = torch.tensor([-200.0, -90, 0, 90, 200] * 2, requires_grad=True)
    labels = torch.tensor([0.0] * 5 + [1.0] * 5)
    loss = CLASS_LOSSES[name](logits, ClassTargets(labels, labels * 0.5, labels), numbers)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.isfinite().all() and gradient.isfinite().all()


def test_without_a_mask_a_positive_is_where_the_quality_is_above_nothing():
    logits, quality = torch.randn(3, 4), torch.tensor([0.0, 0.2, 0.9, 0.0]).expand(3, 4)
    given = ClassTargets(quality, quality, (quality > 0).float())
    found = CLASS_LOSSES["varifocal"](logits, ClassTargets(quality, quality), HYP)
    torch.testing.assert_close(found, CLASS_LOSSES["varifocal"](logits, given, HYP))


@pytest.mark.parametrize(
    ("name", "told"),
    [("varifokal", "Did you mean 'varifocal'?"), ("ce", "expected one of bce, focal, varifocal, mal, quality.")],
)  # fmt: skip
def test_a_name_that_is_not_known_is_one_line(name: str, told: str):
    with pytest.raises(ConfigError) as caught:
        choose_class_loss(name, HYP)
    assert str(caught.value) == f"cls_loss: {class_loss_problem(name)}" and told in str(
        caught.value
    )


def test_a_number_that_is_missing_is_noticed_when_the_loss_is_chosen():
    assert callable(choose_class_loss("bce", {}))
    with pytest.raises(KeyError, match="qfl_beta"):
        choose_class_loss("quality", {})
