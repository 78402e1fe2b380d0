"""Whether scores are what they say: of detections of score 0.8, eight in ten should be right.

Sources: the error is the detection expected calibration error over confidence (Kueppers et al., Multivariate Confidence
Calibration for Object Detection, CVPR workshops 2020); the temperature is that of Guo et al., On Calibration of Modern
Neural Networks, ICML 2017. K detections.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

BINS = 10
LEAST_SCORE = 0.05
"""Detections below are nearly all wrong, and would outnumber the rest."""


class Tenths(NamedTuple):
    """Detections by tenths of their score: how many, their mean score, and the share of right ones, (BINS,) each."""

    counts: Array
    mean: Array
    share: Array


def reliability(scores: Array, is_right: NDArray[np.bool_]) -> Tenths:
    """Detections sorted into tenths.

    Args:
        scores: in [0, 1], (K,).
        is_right: whether each found an object, (K,).
    """
    places = np.minimum((scores * BINS).astype(np.int64), BINS - 1)
    counts = np.bincount(places, minlength=BINS).astype(np.float64)
    sums = (np.bincount(places, weights, BINS) for weights in (scores, is_right))
    mean, share = (total / np.maximum(counts, 1) for total in sums)
    return Tenths(counts, mean, share)


def calibration_error(scores: Array, is_right: NDArray[np.bool_]) -> float:
    """Mean distance of score and share of right ones over the tenths, 0 at best; 0 of no detection."""
    counts, mean, share = reliability(scores, is_right)
    return float((counts * np.abs(mean - share)).sum() / max(len(scores), 1))


def fit_temperature(scores: Array, is_right: NDArray[np.bool_]) -> float:
    """What logits are divided by so that the scores are most likely; above 1 the detector was too sure."""
    from scipy.optimize import minimize_scalar

    logits = _logits(scores)

    def surprise(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        return float(np.logaddexp(0, np.where(is_right, -scaled, scaled)).mean())

    if is_right.all() or not is_right.any():
        return 1.0  # no finite temperature is best, or there is no detection
    return float(np.exp(minimize_scalar(surprise, bounds=(-3, 3), method="bounded").x))


def at_temperature(scores: Array, temperature: float) -> Array:
    """Scores whose logits are divided by a temperature, (K,)."""
    result: Array = 1 / (1 + np.exp(-_logits(scores) / temperature))
    return result


def _logits(scores: Array) -> Array:
    inside = np.clip(scores, 1e-6, 1 - 1e-6)
    result: Array = np.log(inside / (1 - inside))
    return result
