"""One matching for the boxes of all stages: the union of what each of them was matched to.

Source: D-FINE (arXiv 2410.13842).

Letters: P pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.assigners.hungarian import Match


def union_of_stages(match: Match) -> Match:
    """Every (image, query) that some stage matched, once, with the object it was matched to most often.

    Of objects that come equally often the first is taken. The pairs are ordered by image and query; `stage` is 0.

    Stages 0, 1 and 2 of an image match query 3 to the objects 5, 4, 5 and query 7 to none, none, 4: the union
    is 3 -> 5, 7 -> 4.
    """
    rows = torch.stack((match.image, match.query, match.object), 1)
    pairs, times = rows.unique(dim=0, return_counts=True)  # ordered by image, query, object
    order = times.argsort(descending=True, stable=True)
    place = pairs[:, :2].unique(dim=0, return_inverse=True)[1]
    order = order[place[order].argsort(stable=True)]
    chosen = pairs[order[_is_first(place[order])]]
    image, query, objects = chosen.unbind(1)
    return Match(torch.zeros_like(image), image, query, objects)


def _is_first(sorted_values: Tensor) -> Tensor:
    """Where a value differs from the one before it."""
    is_new = torch.ones_like(sorted_values, dtype=torch.bool)
    is_new[1:] = sorted_values[1:] != sorted_values[:-1]
    return is_new
