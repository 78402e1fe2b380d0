"""Which anchors and cells answer for which objects, worked out by hand."""

from __future__ import annotations

import pytest
import torch

from models.assigners.anchor_ratio import assign_level, match_sizes


def test_sizes_match_within_the_ratio_on_both_sides():
    """Largest ratio of sides, worked out for 3 anchors and 4 objects, threshold 4:

    objects:           (10,10)  (40,10)  (10,39)  (80,80)
    anchor (10,10)       1        4        3.9      8
    anchor (20,10)       2        2        3.9      8
    anchor (40,80)       8        8        4        2
    """
    sizes = torch.tensor([[10.0, 10.0], [40.0, 10.0], [10.0, 39.0], [80.0, 80.0]])
    anchors = torch.tensor([[10.0, 10.0], [20.0, 10.0], [40.0, 80.0]])
    expected = [
        [True, False, True, False],  # 4 is no longer within
        [True, True, True, False],
        [False, False, False, True],
    ]
    assert match_sizes(sizes, anchors, 4.0).tolist() == expected


def matches_of(boxes: list[list[float]], anchors: list[list[float]], grid: tuple[int, int]) -> set:
    """(object, anchor, row, column) of every match; a cell may be named twice at a cell's border."""
    found = assign_level(torch.tensor(boxes).view(-1, 4), torch.tensor(anchors), grid, 4.0)
    return set(zip(*(value.tolist() for value in found), strict=True))


@pytest.mark.parametrize(
    ("centre", "cells"),
    [
        # 0.3 < 0.5: also the cell to the left; 0.6 > 0.5: also the one below (rows grow downwards)
        ((2.3, 4.6), {(4, 2), (4, 1), (5, 2)}),
        ((2.7, 4.2), {(4, 2), (4, 3), (3, 2)}),
        ((2.48, 4.52), {(4, 2), (4, 1), (5, 2)}),
        # exactly in the middle of its cell: no neighbour
        ((2.5, 4.5), {(4, 2)}),
        # on the line between two cells: its own and the one before
        ((3.0, 4.5), {(4, 3), (4, 2)}),
        # at the border there is no cell to the left, nor above
        ((0.3, 0.3), {(0, 0)}),
        ((0.9, 0.9), {(0, 0), (0, 1), (1, 0)}),
        # nor to the right (6 columns), nor below (8 rows)
        ((5.8, 7.8), {(7, 5)}),
        ((5.2, 7.2), {(7, 5), (7, 4), (6, 5)}),
        # a centre on the very edge of the image stays inside the grid
        ((6.0, 8.0), {(7, 5)}),
    ],
)
def test_an_object_belongs_to_its_cell_and_the_two_nearest(centre, cells):
    found = matches_of([[*centre, 2.0, 2.0]], [[2.0, 2.0]], (8, 6))
    assert {(row, col) for _, _, row, col in found} == cells


def test_three_objects_and_two_anchors_by_hand():
    """On a 4 x 4 grid, anchors 1x1 and 6x6 cells, threshold 4.

    A (1.5, 1.5) 1x1: anchor 0 (ratio 1), not anchor 1 (6). Middle of cell (1, 1): that cell alone.
    B (2.2, 1.5) 3x3: anchor 0 (3) and anchor 1 (2). Cell (1, 2) and (1, 1), the one to the left.
    C (1.5, 3.9) 9x9: anchor 1 (1.5) only. Cell (3, 1); there is no row below, 0.9 is not near above.
    """
    boxes = [[1.5, 1.5, 1, 1], [2.2, 1.5, 3, 3], [1.5, 3.9, 9, 9]]
    assert matches_of(boxes, [[1.0, 1.0], [6.0, 6.0]], (4, 4)) == {
        (0, 0, 1, 1),
        (1, 0, 1, 2),
        (1, 0, 1, 1),
        (1, 1, 1, 2),
        (1, 1, 1, 1),
        (2, 1, 3, 1),
    }


def test_without_objects_nothing_matches():
    found = assign_level(torch.zeros(0, 4), torch.ones(3, 2), (4, 4), 4.0)
    assert [value.shape for value in found] == [(0,)] * 4
    assert all(value.dtype == torch.int64 for value in found)
