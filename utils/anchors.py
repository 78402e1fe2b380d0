"""Anchor boxes for a data set: k-means on the sizes of its objects, nearness being overlap.

Source: YOLO9000 (arXiv 1612.08242, section 2, "Dimension Clusters"): d(box, centroid) = 1 - IoU(box, centroid), since with
Euclidean distance large boxes would count for more than small ones. Starts are drawn as by k-means++ (Arthur and
Vassilvitskii, 2007) with that distance; the best of several counts.

Letters: N objects, K anchors. Sizes are (width, height) in pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LEAST_SIDE = 2.0  # pixels: what is thinner is lost when the image is halved for the first time
STARTS = 24  # with nine anchors on BCCD and the built-in shapes the best of 24 overlaps within 0.002 of the best of 100
MOST_SIZES = 20_000  # drawn from larger sets: the mean overlap of so many is known to 0.001
MOST_ROUNDS = 100  # k-means settles far earlier


class AnchorFit(NamedTuple):
    """How well anchors cover objects.

    Attributes:
        recall: best possible recall, the part of objects that some anchor is within the ratio of.
        per_object: anchors within the ratio, mean over objects.
    """

    recall: float
    per_object: float


def anchor_fit(sizes: Array, anchors: Array, threshold: float) -> AnchorFit:
    """Measure anchors (K, 2) on object sizes (N, 2); `threshold` is the largest ratio of sides, exclusive."""
    apart = np.abs(np.log(sizes[:, None] / anchors[None])).max(-1)
    fits = apart < np.log(threshold)
    return AnchorFit(float(fits.any(1).mean()), float(fits.sum(1).mean()))


def overlaps(sizes: Array, anchors: Array) -> Array:
    """IoU of objects and anchors that share a corner, (N, K)."""
    shared = np.minimum(sizes[:, None], anchors[None]).prod(-1)
    return shared / (sizes.prod(-1)[:, None] + anchors.prod(-1)[None] - shared)


def mean_best_overlap(sizes: Array, anchors: Array) -> float:
    """The measure of YOLO9000's table 1: IoU of each object with its best anchor, mean."""
    return float(overlaps(sizes, anchors).max(1).mean())


def fit_anchors(sizes: Array, count: int, *, seed: int = 0) -> Array:
    """`count` anchors (count, 2), smallest area first, for object sizes (N, 2).

    Raises:
        ValueError: fewer distinct sizes than anchors.
    """
    sizes = sizes[(sizes >= LEAST_SIDE).all(1)]
    distinct = len(np.unique(sizes, axis=0))
    if distinct < count:
        raise ValueError(f"got {distinct} distinct object sizes, expected at least {count}")
    rng = np.random.default_rng(seed)
    if len(sizes) > MOST_SIZES:
        sizes = sizes[rng.choice(len(sizes), MOST_SIZES, replace=False)]
    fits = [_settled(sizes, _spread_start(sizes, count, rng)) for _ in range(STARTS)]
    best = max(fits, key=lambda anchors: mean_best_overlap(sizes, anchors))
    return best[np.argsort(best.prod(1))]


def _spread_start(sizes: Array, count: int, rng: np.random.Generator) -> Array:
    """Objects as first centroids, each drawn the likelier the less those before it overlap it."""
    chosen = sizes[rng.integers(len(sizes))][None]
    while len(chosen) < count:
        far = 1 - overlaps(sizes, chosen).max(1)
        chosen = np.vstack((chosen, sizes[rng.choice(len(sizes), p=far / far.sum())]))
    return chosen


def _settled(sizes: Array, centroids: Array) -> Array:
    """Lloyd's rounds until no object changes its centroid; the best round counts, as means need not raise the overlap."""
    best, best_overlap, before = centroids, 0.0, None
    for _ in range(MOST_ROUNDS):
        near = overlaps(sizes, centroids)
        nearest, overlap = near.argmax(1), float(near.max(1).mean())
        if overlap > best_overlap:
            best, best_overlap = centroids, overlap
        if before is not None and np.array_equal(nearest, before):
            break
        before = nearest
        centroids = np.array(
            [
                sizes[nearest == k].mean(0) if (nearest == k).any() else centroids[k]
                for k in range(len(centroids))
            ]
        )
    return best
