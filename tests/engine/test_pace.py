"""What follows the number of optimiser steps, and that long runs keep the published numbers."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from engine.pace import Length, accumulated, plan_of, quicken_norms, settle_pace, tell_plan
from models.family import RECIPES
from utils.config import load_hyp

PUBLISHED: dict[str, Any] = {
    "nbs": 64, "least_steps": 3000, "warmup_epochs": 3.0, "warmup_share": 0.1, "ema_decay": 0.9999, "ema_tau": 2000,
    "ema_share": 0.1, "lr0": 0.01,
}  # fmt: skip


def test_a_run_as_long_as_the_published_ones_keeps_their_numbers(capsys):
    """COCO: 117,266 images, 500 epochs, batch 16."""
    assert settle_pace(PUBLISHED, Length(7330, 500, 16)) == PUBLISHED
    assert "916250 optimiser steps; as the recipe says" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("length", "expected"),
    # batches x epochs: iterations // 3000 batches a step at most; warm-up between 100 iterations and a tenth of the run
    [
        (Length(13, 100, 16), (16, 100 / 13, 1 - 1 / 130, 130)),  # 1300 steps
        (Length(25, 30, 16), (16, 3.0, 1 - 1 / 75, 75)),  # 750 steps, warm-up 75
        (Length(25, 10, 16), (16, 1.0, 1 - 1 / 25, 25)),
        (Length(60, 100, 16), (32, 3.0, 1 - 1 / 300, 300)),  # two batches a step, 3000 steps
        (Length(7330, 1, 16), (32, 0.1, 1 - 1 / 366.5, 366.5)),
        (Length(13, 100, 128), (64, 100 / 13, 1 - 1 / 130, 130)),  # a batch above nbs
        (Length(1, 1, 4), (4, 0.1, 0.0, 1.0)),  # one step: the average is the model
    ],
)
def test_a_short_run_is_paced_by_its_steps(length: Length, expected: tuple[float, ...]):
    settled = settle_pace(PUBLISHED, length)
    keys = ("nbs", "warmup_epochs", "ema_decay", "ema_tau")
    assert [settled[key] for key in keys] == pytest.approx(list(expected))
    assert settled["lr0"] == 0.01
    assert settle_pace(settled, length) == settled, "settled once is settled"


def test_what_changes_is_said(capsys):
    settle_pace(PUBLISHED, Length(25, 30, 16))
    told = "pace: 750 batches, 750 optimiser steps; nbs 16 (not 64), ema_decay 0.9867 (not 0.9999), ema_tau 75 (not 2000)"
    assert told in capsys.readouterr().err


def test_no_warm_up_stays_none():
    assert (
        settle_pace({**PUBLISHED, "warmup_epochs": 0.0}, Length(25, 30, 16))["warmup_epochs"] == 0
    )


def test_what_the_user_wrote_stays():
    settled = settle_pace(PUBLISHED, Length(25, 30, 16), kept={"nbs", "ema_tau", "mosaic"})
    assert (settled["nbs"], settled["ema_tau"]) == (64, 2000)
    assert settled["ema_decay"] == pytest.approx(
        1 - 1 / (0.1 * 750 / 4)
    )  # of the steps that are left


@pytest.mark.parametrize(
    ("epochs", "strong", "dense_end"),
    # 4 + E / 2 epochs with mosaic and mixup, as published; 132 epochs of which 12 are plain, 120 of which 11 are
    [
        (132, range(4, 120), 70),
        (120, range(4, 109), 64),
        (12, range(11), 6),
        (1, range(1), 1),
    ],
)
def test_the_plan_of_deim_in_epochs(epochs: int, strong: range, dense_end: int):
    hyp = load_hyp(RECIPES / "deim.yaml", RECIPES / "dfine.yaml")
    assert plan_of(hyp, epochs) == (strong, dense_end)


@pytest.mark.parametrize("family", ["rtdetr", "dfine", "yolo11"])
def test_without_a_plan_all_epochs_are_alike_but_for_close_mosaic(family: str, capsys):
    hyp = load_hyp(None, RECIPES / f"{family}.yaml")
    plan = plan_of({**hyp, "close_mosaic": 10}, 50)
    assert plan == (range(50), 40)
    tell_plan(plan, 50)
    assert not capsys.readouterr().err
    tell_plan(plan._replace(strong=range(2, 45)), 50)
    assert (
        "plan: flips alone until epoch 2, mosaic and mixup until 40, warp and colours until 45, then on from the best "
        "weights with flips alone" in capsys.readouterr().err
    )


def test_deims_numbers_are_for_the_detr_families(capsys):
    """What of them another family has no use for is told; its own class loss stays."""
    deim = RECIPES / "deim.yaml"
    assert load_hyp(deim, RECIPES / "rtdetr.yaml")["cls_loss"] == "mal"
    assert load_hyp(deim, RECIPES / "yolo11.yaml")["cls_loss"] == "bce"
    assert (
        "without effect for yolo11: warmup_power, mosaic_scale, augment_from"
        in capsys.readouterr().err
    )


def test_batches_of_a_step():
    assert accumulated(PUBLISHED, Length(1, 1, 16)) == 4
    assert accumulated(PUBLISHED, Length(1, 1, 100)) == 1


@pytest.mark.parametrize(
    ("ema_decay", "expected"),
    [(0.9999, [0.03, 0.1]), (0.995, [0.05, 0.1]), (0.95, [0.5, 0.5]), (0.0, [1.0, 1.0])],
)
def test_statistics_of_norms_follow_the_average_where_they_are_slower(ema_decay, expected):
    model = nn.Sequential(nn.BatchNorm2d(4, momentum=0.03), nn.BatchNorm2d(4))
    model.append(nn.BatchNorm2d(4, momentum=None))
    quicken_norms(model, {"ema_decay": ema_decay, "norm_share": 0.1})
    assert [norm.momentum for norm in model[:2]] == pytest.approx(expected)
    assert model[2].momentum is None, "a mean over all batches stays one"
