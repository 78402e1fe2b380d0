"""Scores against shares of right detections, by hand and on scores of a known temperature."""

from __future__ import annotations

import numpy as np
import pytest

from utils.calibration import at_temperature, calibration_error, fit_temperature, reliability
from utils.curves import Curves, best_thresholds


def test_the_error_by_hand():
    scores, right = np.array([0.92, 0.98, 0.11]), np.array([True, False, False])
    # The last tenth: mean 0.95, half are right; the second: mean 0.11, none is.
    assert calibration_error(scores, right) == pytest.approx((2 * 0.45 + 0.11) / 3)
    tenths = reliability(scores, right)
    assert tenths.counts.tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 0, 2]
    assert tenths.share[9] == 0.5


def test_a_temperature_is_found_again_and_lowers_the_error_of_other_detections():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, 20_000)
    right = rng.random(20_000) < 1 / (1 + np.exp(-logits))
    scores = 1 / (1 + np.exp(-logits * 2))  # twice too sure
    found = fit_temperature(scores[::2], right[::2])
    assert found == pytest.approx(2, rel=0.05)
    before = calibration_error(scores[1::2], right[1::2])
    assert calibration_error(at_temperature(scores[1::2], found), right[1::2]) < before / 5


@pytest.mark.parametrize("right", [[True, True], [False, False], []])
def test_without_both_outcomes_scores_stay(right):
    assert fit_temperature(np.full(len(right), 0.7), np.array(right, np.bool_)) == 1.0


def test_the_best_threshold_is_on_the_plateau_and_not_on_a_spike():
    axis = np.linspace(0, 1, 1000)
    f1 = np.where(np.abs(axis - 0.6) < 0.1, 0.8, 0.3)
    f1[200] = 0.9
    flat = np.zeros((1, 1000))
    curves = Curves(("cat",), np.linspace(0, 1, 101), flat[:, :101], axis, flat, flat, f1[None])
    assert best_thresholds(curves)[0] == pytest.approx(0.6, abs=0.01)
