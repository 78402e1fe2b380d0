"""What the box losses are made of: how far two boxes overlap, penalties, a factor.

    loss = factor * (1 - overlap + sum of penalties)

Each part is a function of a `BoxPair` (predicted first, target second), the recipe's numbers and the
size of the image; what is not said is the IoU, no penalty and a factor of 1. Boxes that agree have
overlap 1, penalties 0 and factor 1: loss 0, the least there is.

To add a loss, write its functions and give it an entry of `BOX_LOSSES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from utils.boxes import BoxPair

Numbers = Mapping[str, float]
Size = tuple[Any, Any]  # (height, width) in pixels: numbers, or tensors of no dimension
Part = Callable[[BoxPair, Numbers, Size], Tensor]
Penalties = Callable[[BoxPair, Numbers, Size], tuple[Tensor, ...]]


def plain_overlap(pair: BoxPair, numbers: Numbers, size: Size) -> Tensor:
    """IoU."""
    return pair.iou


def no_penalty(pair: BoxPair, numbers: Numbers, size: Size) -> tuple[Tensor, ...]:
    """None."""
    return ()


def empty_hull(pair: BoxPair, numbers: Numbers, size: Size) -> tuple[Tensor, ...]:
    """GIoU (Rezatofighi et al., CVPR 2019, arXiv 1902.09630): empty share of the hull."""
    return (pair.empty_share,)


def centres(pair: BoxPair, numbers: Numbers, size: Size) -> tuple[Tensor, ...]:
    """DIoU (Zheng et al., AAAI 2020, arXiv 1911.08287, eq. 6): distance of the centres."""
    return (pair.centre_distance,)


def centres_and_aspect(pair: BoxPair, numbers: Numbers, size: Size) -> tuple[Tensor, ...]:
    """CIoU (the same paper, eq. 8-11): difference of the aspect ratios too."""
    return pair.centre_distance, pair.aspect_difference


def centres_and_sides(pair: BoxPair, numbers: Numbers, size: Size) -> tuple[Tensor, ...]:
    """EIoU (Zhang et al., arXiv 2101.08158): differences of the sides in those of the hull too."""
    predicted, target = pair.sizes
    sides = (predicted - target).square() / (pair.hull.square() + pair.eps)
    return (pair.centre_distance, *sides.unbind(-1))


def angle_distance_and_shape(pair: BoxPair, numbers: Numbers, size: Size) -> tuple[Tensor, ...]:
    """SIoU (Gevorgyan, arXiv 2205.12740): half of the distance cost, half of the shape cost.

    The paper's angle cost 1 - 2 sin^2(arcsin(x) - pi / 4), with x the sine of the angle between the
    line of the centres and an axis, is sin(2 arcsin(x)) = 2 |dx| |dy| / (dx^2 + dy^2), which
    has a gradient everywhere.
    """
    dx, dy = pair.offset.abs().unbind(-1)
    angle = 2 * dx * dy / (dx.square() + dy.square() + pair.eps)
    apart = pair.offset.square() / (pair.hull.square() + pair.eps)
    distance = 1 - torch.exp((angle - 2)[..., None] * apart)
    shape = _shape_cost(_side_difference(pair), numbers)
    return distance.sum(-1) / 2, shape / 2


def corners(pair: BoxPair, numbers: Numbers, size: Size) -> tuple[Tensor, ...]:
    """MPDIoU (Ma and Xu, arXiv 2307.07662): distances of two corners in image diagonals."""
    height, width = size
    apart = (pair.first - pair.second).square() / (height * height + width * width)
    return apart[..., :2].sum(-1), apart[..., 2:].sum(-1)


def weighed_by_shape(pair: BoxPair, numbers: Numbers, size: Size) -> tuple[Tensor, ...]:
    """Shape-IoU (Zhang and Zhang, arXiv 2312.17663): along the target's short side errors count more.

    `shape_scale` 0 weighs both sides alike.
    """
    sides = pair.sizes[1].clamp(min=pair.eps)
    powers = (sides / sides.amax(-1, keepdim=True)) ** numbers[
        "shape_scale"
    ]  # of parts: no overflow
    weights = 2 * powers.flip(-1) / powers.sum(-1, keepdim=True)  # of x, from the height, and of y
    distance = (weights * pair.offset.square()).sum(-1) / pair.diagonal_squared
    return distance, _shape_cost(weights * _side_difference(pair), numbers) / 2


def _side_difference(pair: BoxPair) -> Tensor:
    """Differences of width and height as parts of the longer one, (..., 2)."""
    predicted, target = pair.sizes
    return (predicted - target).abs() / torch.maximum(predicted, target).clamp(min=pair.eps)


def _shape_cost(difference: Tensor, numbers: Numbers) -> Tensor:
    """Sum of (1 - e^-difference)^theta over both sides, (..., 2) to (...)."""
    return ((1 - torch.exp(-difference)) ** numbers["shape_theta"]).sum(-1)


def attention(pair: BoxPair, numbers: Numbers, size: Size) -> Tensor:
    """WIoU v1's factor in [1, e) (Tong et al., arXiv 2301.10051): the hull takes no gradient.

    It would otherwise pay to make the hull larger.
    """
    return torch.exp(pair.offset.square().sum(-1) / pair.diagonal_squared.detach())


def gaussian_overlap(pair: BoxPair, numbers: Numbers, size: Size) -> Tensor:
    """NWD (Wang et al., arXiv 2110.13389): boxes as Gaussians, their Wasserstein distance.

    Never 0, also of boxes that lie apart; falls by e for every `nwd_constant` pixels.
    """
    predicted, target = pair.sizes
    apart = torch.cat((pair.offset, (predicted - target) / 2), -1)
    # The norm's gradient is 0 where both boxes are the same; that of a root would be infinite.
    return torch.exp(-torch.linalg.vector_norm(apart, dim=-1) / numbers["nwd_constant"])


@dataclass(frozen=True)
class Measure:
    """How a box loss compares two boxes.

    Attributes:
        penalties: what is added for boxes that differ.
        overlap: 1 where they agree.
        factor: what all is multiplied by.
        numbers: keys of the recipe that these read.
        unit: in which units of length the value is the same: any, also one for x and another for y;
            square ones; or pixels alone.
        is_focused: whether pairs are weighed by how far they lie from the mean (WIoU v3).
    """

    penalties: Penalties = no_penalty
    overlap: Part = plain_overlap
    factor: Part | None = None
    numbers: tuple[str, ...] = ()
    unit: Literal["any", "square", "pixels"] = "square"
    is_focused: bool = False


BOX_LOSSES: dict[str, Measure] = {
    "iou": Measure(unit="any"),
    "giou": Measure(empty_hull, unit="any"),
    "diou": Measure(centres),
    "ciou": Measure(centres_and_aspect),
    "eiou": Measure(centres_and_sides),
    "siou": Measure(angle_distance_and_shape, numbers=("shape_theta",)),
    "wiou": Measure(factor=attention),
    "wiou-v3": Measure(
        factor=attention, numbers=("wiou_alpha", "wiou_delta", "wiou_steps"), is_focused=True
    ),
    "mpdiou": Measure(corners, unit="pixels"),
    "shape-iou": Measure(weighed_by_shape, numbers=("shape_theta", "shape_scale")),
    "nwd": Measure(overlap=gaussian_overlap, numbers=("nwd_constant",), unit="pixels"),
}
