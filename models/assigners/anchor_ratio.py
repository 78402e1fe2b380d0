"""YOLOv5's assigner: an anchor answers for an object whose width and height are within a ratio of its own, in the cell that
holds the centre and in the two neighbouring cells that the centre is nearest to.

Letters: N objects, K anchors, P matches, H, W cells of the level.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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
    ratio = sizes[None] / anchors[:, None]
    return torch.maximum(ratio, 1 / ratio).amax(-1) < threshold


@torch.no_grad()
def assign_level(
    boxes: Tensor, anchors: Tensor, grid: tuple[int, int], threshold: float
) -> AnchorMatches:
    """Match the objects of a batch to the predictions of one level.

    Example: a box centred at (2.3, 4.6) on a 10 x 10 grid belongs to the cell in column 2, row 4, and to its
    neighbours to the left (0.3 < 0.5) and below (0.6 > 0.5).

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
    own = torch.ones(len(centre), dtype=torch.bool, device=centre.device)
    near_low = (centre % 1 < 0.5) & (centre > 1)
    near_high = ((limit - centre) % 1 < 0.5) & (limit - centre > 1)
    chosen = torch.stack((own, near_low[:, 0], near_low[:, 1], near_high[:, 0], near_high[:, 1]))
    steps = centre.new_tensor([[0, 0], [-0.5, 0], [0, -0.5], [0.5, 0], [0, 0.5]])
    step_index, match_index = chosen.nonzero(as_tuple=True)
    cell = (centre[match_index] + steps[step_index]).floor()
    cols, rows = torch.minimum(cell.clamp(min=0), limit - 1).long().unbind(-1)
    return AnchorMatches(object_index[match_index], anchor_index[match_index], rows, cols)
