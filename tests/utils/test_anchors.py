"""Fitting anchors: measures by hand, the fit against a known answer."""

from __future__ import annotations

import numpy as np
import pytest

from utils.anchors import anchor_fit, fit_anchors, mean_best_overlap, overlaps


def test_recall_and_anchors_an_object_are_those_worked_out_by_hand():
    """Largest ratio of sides of 3 objects and 2 anchors, threshold 4:

    objects:         (10,10)  (40,20)  (200,10)
    anchor (10,10)      1        4        20
    anchor (30,30)      3        1.5      6.67
    """
    sizes = np.array([[10.0, 10.0], [40.0, 20.0], [200.0, 10.0]])
    anchors = np.array([[10.0, 10.0], [30.0, 30.0]])
    fit = anchor_fit(sizes, anchors, 4.0)
    assert fit.recall == pytest.approx(2 / 3)
    assert fit.per_object == pytest.approx(3 / 3)  # 2 + 1 + 0; a ratio of exactly 4 does not count
    assert anchor_fit(sizes, anchors, 4.01).per_object == pytest.approx(4 / 3)


def clusters(seed: int = 0) -> np.ndarray:
    """300 sizes around three that lie far apart."""
    rng = np.random.default_rng(seed)
    centres = np.array([[10.0, 12.0], [60.0, 30.0], [150.0, 200.0]])
    return centres[np.arange(300) % 3] * rng.uniform(0.9, 1.1, (300, 2))


def test_anchors_find_the_sizes_there_are_smallest_first():
    anchors = fit_anchors(clusters(), 3)
    assert anchors.shape == (3, 2)
    expected = np.array([[10, 12], [60, 30], [150, 200]])
    assert np.abs(anchors / expected - 1).max() < 0.12
    assert (np.diff(anchors.prod(1)) > 0).all()


def test_the_fit_beats_anchors_that_do_not_fit():
    sizes = clusters()
    poor = np.array([[2.0, 40.0], [40.0, 2.0], [500.0, 500.0]])
    assert anchor_fit(sizes, poor, 2.0).recall < 0.05
    assert anchor_fit(sizes, fit_anchors(sizes, 3), 2.0).recall == 1.0


def test_the_same_seed_gives_the_same_anchors():
    first, second = (fit_anchors(clusters(), 4, seed=7) for _ in range(2))
    assert np.array_equal(first, second)


def test_overlaps_and_their_mean_are_those_worked_out_by_hand():
    """10x10 in 20x20 shares 100 of 400; 10x10 with 5x40 shares 50 of 250; 20x20 with 5x40 shares 100 of 500."""
    sizes = np.array([[10.0, 10.0], [20.0, 20.0]])
    anchors = np.array([[20.0, 20.0], [5.0, 40.0]])
    np.testing.assert_allclose(overlaps(sizes, anchors), [[0.25, 0.2], [1.0, 0.2]])
    assert mean_best_overlap(sizes, anchors) == pytest.approx((0.25 + 1) / 2)


def test_of_two_anchors_for_many_small_and_few_large_objects_overlap_decides():
    """Plain distances would split the large ones and leave the small ones one anchor between them."""
    sizes = np.array([[4.0, 16.0]] * 50 + [[16.0, 4.0]] * 50 + [[300.0, 300.0]] * 3)
    anchors = fit_anchors(sizes, 3)
    assert anchors.tolist() in ([[4, 16], [16, 4], [300, 300]], [[16, 4], [4, 16], [300, 300]])


def test_large_sets_are_drawn_from():
    sizes = np.tile(clusters(), (200, 1))
    assert len(sizes) == 60_000
    assert mean_best_overlap(sizes, fit_anchors(sizes, 3)) > 0.9


def test_more_anchors_than_clusters_are_given_all_the_same():
    anchors = fit_anchors(np.repeat(clusters()[:9], 20, axis=0), 9)
    assert anchors.shape == (9, 2) and (anchors >= 2).all()


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        (np.zeros((0, 2)), 0),  # nothing
        (np.full((50, 2), 20.0), 1),  # one size many times
        (np.array([[1.0, 30.0], [30.0, 1.5], [30.0, 30.0]]), 1),  # slivers do not count
    ],
)
def test_too_few_sizes_are_told(sizes: np.ndarray, found: int):
    with pytest.raises(ValueError, match=f"got {found} distinct object sizes, expected at least 2"):
        fit_anchors(sizes, 2)
