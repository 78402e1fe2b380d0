"""Fitting anchor boxes to a data set: k-means on the objects' sizes, then small random improvements."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class AnchorFit(NamedTuple):
    """How well anchors cover objects.

    Attributes:
        recall: best possible recall, the part of objects that some anchor is within the ratio of.
        per_object: anchors within the ratio, mean over objects.
    """

    recall: float
    per_object: float


def _closeness(sizes: Array, anchors: Array) -> Array:
    """Smallest ratio of sides of object and anchor, in (0, 1], (N, K)."""
    ratio = sizes[:, None] / anchors[None]
    return np.minimum(ratio, 1 / ratio).min(-1)


def anchor_fit(sizes: Array, anchors: Array, threshold: float) -> AnchorFit:
    """Measure anchors (K, 2) on object sizes (N, 2), both in pixels; `threshold` is the largest ratio."""
    close = _closeness(sizes, anchors)
    fits = close > 1 / threshold
    return AnchorFit(float(fits.any(1).mean()), float(fits.sum(1).mean()))


def _fitness(sizes: Array, anchors: Array, threshold: float) -> float:
    best = _closeness(sizes, anchors).max(1)
    return float((best * (best > 1 / threshold)).mean())


def fit_anchors(
    sizes: Array, count: int, threshold: float, *, seed: int = 0, generations: int = 500
) -> Array:
    """`count` anchors (count, 2), smallest area first, for object sizes (N, 2) in pixels.

    Raises:
        ValueError: fewer distinct sizes than anchors.
    """
    from scipy.cluster.vq import kmeans

    sizes = sizes[(sizes >= 2).all(1)]
    if len(np.unique(sizes, axis=0)) < count:
        raise ValueError(
            f"got {len(np.unique(sizes, axis=0))} distinct object sizes, expected at least {count}"
        )
    rng = np.random.default_rng(seed)
    spread = sizes.std(0)
    centres = kmeans(sizes / spread, count, iter=30, rng=seed)[0] * spread
    while len(centres) < count:  # k-means drops empty clusters
        centres = np.vstack((centres, sizes[rng.integers(len(sizes))]))
    best, best_fitness = centres, _fitness(sizes, centres, threshold)
    for _ in range(generations):
        step = 0.1 * rng.random()  # small steps too: after k-means large ones seldom help
        moves = rng.normal(1, step, best.shape).clip(0.3, 3)
        change = np.where(rng.random(best.shape) < 0.9, moves, 1)
        candidate = (best * change).clip(min=2)
        fitness = _fitness(sizes, candidate, threshold)
        if fitness > best_fitness:
            best, best_fitness = candidate, fitness
    return best[np.argsort(best.prod(1))]
