"""What a detector does well and badly on a split, in numbers: the material of `val.py --report`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from utils.bootstrap import Interval, interval, resample
from utils.calibration import (
    LEAST_SCORE,
    Tenths,
    at_temperature,
    calibration_error,
    fit_temperature,
    reliability,
)
from utils.curves import best_thresholds
from utils.metrics import CocoEvaluator, Metrics
from utils.tide import KINDS, RIGHT, Errors, costs


class Calibration(NamedTuple):
    """How far scores are from shares of right detections, see `utils.calibration`.

    Attributes:
        error: of all detections that count.
        temperature: fitted to all of them.
        held_out: error of every second image.
        held_out_scaled: the same at the temperature of the other images.
        tenths: detections by score, as they are and at the temperature.
    """

    error: float
    temperature: float
    held_out: float
    held_out_scaled: float
    tenths: tuple[Tenths, Tenths]


class Assessment(NamedTuple):
    """One model on one split.

    Attributes:
        evaluator: with the detections in it.
        metrics: of them.
        errors: every detection and object judged.
        costs: what errors cost, see `utils.tide.costs`.
        thresholds: lowest score of a detection of each class that is best for its F1, (C,); their mean where a class has
            no object, or none is found.
        interval: of mAP50-95.
        interval50: of mAP50.
        calibration: of the scores.
    """

    evaluator: CocoEvaluator
    metrics: Metrics
    errors: Errors
    costs: Mapping[str, float]
    thresholds: NDArray[np.float64]
    interval: Interval
    interval50: Interval
    calibration: Calibration

    def record(self) -> dict[str, object]:
        """The numbers as plain data."""
        calibration = self.calibration._asdict()
        del calibration["tenths"]
        return {
            "map50_95": self.metrics.map50_95,
            "map50_95_interval": list(self.interval),
            "map50": self.metrics.map50,
            "map50_interval": list(self.interval50),
            "errors": {kind: self.errors.counts()[kind] for kind in KINDS},
            "costs": dict(self.costs),
            "thresholds": dict(zip(self.evaluator.names, self.thresholds.tolist())),
            "threshold_of_all": self.metrics.confidence,
            "calibration": calibration,
        }


def assess(evaluator: CocoEvaluator, metrics: Metrics) -> Assessment:
    """Work out everything from the detections that an evaluator has and the metrics that it gave."""
    errors, samples = evaluator.errors(), resample(evaluator.outcomes())
    present = np.array([k for k, row in enumerate(metrics.per_class) if row.instances], np.int64)
    is_found = metrics.curves.f1.max(1, initial=0) > 0
    best = best_thresholds(metrics.curves)[is_found]
    others = float(best.mean()) if best.size else metrics.confidence
    thresholds = np.full(len(evaluator.names), others)
    thresholds[present[is_found]] = best
    return Assessment(
        evaluator,
        metrics,
        errors,
        costs(errors, len(evaluator.names)),
        thresholds,
        interval(metrics.map50_95, samples.map50_95),
        interval(metrics.map50, samples.map50),
        calibrate(errors),
    )


def calibrate(errors: Errors) -> Calibration:
    """The calibration of all detections from LEAST_SCORE on."""
    found = errors.detections
    chosen = found.counts & (found.scores >= LEAST_SCORE)
    scores, right = found.scores[chosen], found.kind[chosen] == RIGHT
    is_even = found.image[chosen] % 2 == 0
    temperature = fit_temperature(scores, right)
    other = fit_temperature(scores[is_even], right[is_even])
    rest, rest_right = scores[~is_even], right[~is_even]
    return Calibration(
        calibration_error(scores, right),
        temperature,
        calibration_error(rest, rest_right),
        calibration_error(at_temperature(rest, other), rest_right),
        (reliability(scores, right), reliability(at_temperature(scores, temperature), right)),
    )
