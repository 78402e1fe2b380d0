"""Box edges as distributions: each edge is the mean of a few fixed distances under a softmax.

Source: D-FINE (arXiv 2410.13842).

Letters: B batch, Q queries, N bins less one (`reg_max`), a half range, c scale, W(n) distance of bin n.
Boxes are cxcywh, normalised to [0, 1]; edges are left, top, right, bottom. The unit of a distance is the side of the
reference box (its width for left and right) divided by c, from where the reference has this edge, outwards positive.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST = 1e-16  # side of a reference that distances may still be measured in


class Bins(NamedTuple):
    """A distance between two neighbouring bins.

    Attributes:
        left: index of the lower one, 0 to N - 1, int64.
        right_share: weight of the upper one, in [0, 1].
    """

    left: Tensor
    right_share: Tensor


def bin_distances(reg_max: int, half_range: Tensor, scale: Tensor) -> Tensor:
    """W(0) to W(N), rising, (N + 1,): close together around 0, far apart outside.

    With s = (ac + 1)^(2 / (N - 2)): W(N / 2 + k) = s^k - 1 = -W(N / 2 - k) for k below N / 2, and W(N) = -W(0) = 2ac.

    Args:
        reg_max: N, even, 4 or more.
        half_range: a, one number.
        scale: c, one number.
    """
    limit = (half_range * scale).reshape(1)
    half = reg_max // 2
    steps = torch.arange(1 - half, half, device=limit.device, dtype=limit.dtype)
    inner = steps.sign() * ((limit + 1) ** (steps.abs() / (half - 1)) - 1)
    return torch.cat((-2 * limit, inner, 2 * limit))


def mean_distances(logits: Tensor, distances: Tensor) -> Tensor:
    """Mean distance of each edge, (..., 4), from logits (..., 4, N + 1) and W (N + 1,)."""
    return (logits.softmax(-1) * distances).sum(-1)


def boxes_from_distances(reference: Tensor, distances: Tensor, scale: Tensor) -> Tensor:
    """The boxes whose edges lie at `distances` (..., 4) from those of `reference` (..., 4), cxcywh."""
    centre, side = reference.chunk(2, -1)
    low, high = distances.chunk(2, -1)
    return torch.cat(
        (centre + (high - low) * side / (2 * scale), side * (scale + low + high) / scale), -1
    )


def distances_to_boxes(reference: Tensor, boxes_xyxy: Tensor, scale: Tensor) -> Tensor:
    """How far the edges of `boxes_xyxy` (..., 4) lie from those of `reference` (..., 4): undoes `boxes_from_distances`."""
    centre, side = reference.chunk(2, -1)
    low, high = boxes_xyxy.chunk(2, -1)
    unit = side / scale + SMALLEST
    return torch.cat(((centre - low) / unit, (high - centre) / unit), -1) - scale / 2


def bins_of(wanted: Tensor, distances: Tensor) -> Bins:
    """Where `wanted` distances lie among W (N + 1,), shared out linearly; beyond the ends, at the end."""
    last = len(distances) - 1
    inside = wanted.clamp(distances[0], distances[-1])
    left = (torch.searchsorted(distances, inside, right=True) - 1).clamp(0, last - 1)
    low, high = distances[left], distances[left + 1]
    return Bins(left, (inside - low) / (high - low))
