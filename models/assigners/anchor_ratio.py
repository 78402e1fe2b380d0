"""YOLOv5's assigner: an anchor answers for an object whose width and height are within a ratio of its own, in the cell that
holds the centre and in the two neighbouring cells that the centre is nearest to.

Letters: N objects, K anchors, P matches, H, W cells of the level.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BESIDE = (
    (-0.5, 0.0),
    (0.0, -0.5),
    (0.5, 0.0),
    (0.0, 0.5),
)  # half a cell to the left, up, right, down


class AnchorMatches(NamedTuple):
    """Which predictions of one level answer for which objects; all (P,), int64."""

    objects: Tensor
    anchors: Tensor
    rows: Tensor
    cols: Tensor


def match_sizes(sizes: Tensor, anchors: Tensor, threshold: float) -> Tensor:
    """Whether each side of object and anchor differ by less than `threshold` times.

    Args:
        sizes: object widths and heights, (N, 2).
        anchors: anchor widths and heights in the same unit, (K, 2).
        threshold: largest ratio, exclusive.

    Returns:
        (K, N), bool.
    """
    larger = torch.maximum(sizes[None], anchors[:, None])
    smaller = torch.minimum(sizes[None], anchors[:, None])
    return (larger < threshold * smaller).all(-1)


@torch.no_grad()
def assign_level(
    boxes: Tensor, anchors: Tensor, grid: tuple[int, int], threshold: float
) -> AnchorMatches:
    """Match the objects of a batch to the predictions of one level.

    A decoded centre lies between -0.5 and 1.5 cells of its cell's corner (2 x sigmoid - 0.5), so beside the cell that holds it
    the neighbours answer whose line is less than half a cell away. A centre on a line is 0 away from it on both sides: it has
    the neighbour before the line, and its own cell once more for the side behind, as the published losses count it.

    Example: a box centred at (2.3, 4.6) on a 10 x 10 grid belongs to the cell in column 2, row 4, and to its
    neighbours to the left (the line at 2 is 0.3 away) and below (the line at 5 is 0.4 away).

    Args:
        boxes: cxcywh in cells of this level, (N, 4).
        anchors: widths and heights in cells, (K, 2).
        grid: cells (H, W).
        threshold: largest ratio of sides, `anchor_t`.
    """
    anchor_index, object_index = match_sizes(boxes[:, 2:], anchors, threshold).nonzero(
        as_tuple=True
    )
    centre = boxes[object_index, :2]
    limit = centre.new_tensor([grid[1], grid[0]])
    is_before = (centre - centre.floor() < 0.5) & (
        centre > 1
    )  # the line at the left, above; not that of the image
    is_behind = (centre.ceil() - centre < 0.5) & (limit - centre > 1)
    own = torch.ones_like(is_before[:, :1])
    answers = torch.cat((own, is_before, is_behind), 1).T
    moved = centre + torch.cat((centre.new_zeros(1, 2), centre.new_tensor(BESIDE)))[:, None]
    _, pair = answers.nonzero(as_tuple=True)
    cells = torch.minimum(moved[answers].floor().clamp(min=0), limit - 1)
    cols, rows = cells.long().unbind(-1)
    return AnchorMatches(object_index[pair], anchor_index[pair], rows, cols)
