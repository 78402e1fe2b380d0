"""Box losses by name: `ciou`, `focal-eiou`, `alpha-giou`, `inner-ciou`, `my_losses.py:soft_iou`.

A name is one of `BOX_LOSSES`, with forms before it, each once and in any order:

    inner-   the overlap of boxes `inner_ratio` times as large stands for that of the boxes
             (Inner-IoU, Zhang et al., arXiv 2311.02877)
    alpha-   overlap and penalties are raised to the power `box_alpha`
             (alpha-IoU, He et al., NeurIPS 2021, arXiv 2110.13675)
    focal-   a pair weighs overlap^`box_gamma`, so that poor ones count little
             (Focal-EIoU, Zhang et al., arXiv 2101.08158)

or a user's own: a file, a colon and the name of a function in it that takes predicted and target boxes
(N, 4), xyxy in pixels, and gives one loss per pair (N,), least for boxes that agree.

Weights of pairs (`focal-`, and what `wiou-v3` makes of its running mean) take no gradient: the loss
of a pair could else be lowered by moving the boxes apart. They say how much a pair counts, not how well it
fits, so matching costs and validation of `wiou-v3` do without.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.losses.measures import BOX_LOSSES, Measure, Numbers, Size
from models.losses.own import is_own, own_name_problem, own_overlap
from utils.boxes import EPS, BoxPair, cxcywh_to_xyxy, xyxy_to_cxcywh
from utils.errors import ConfigError, nearest

FORMS = {"inner": "inner_ratio", "alpha": "box_alpha", "focal": "box_gamma"}
"""What may stand before a name, and the number of the recipe that it reads."""
INITIAL_SHARE = 0.05  # arXiv 2301.10051: what is left of the mean's first value after `wiou_steps`


class Frame(NamedTuple):
    """Where boxes lie.

    Attributes:
        size: of the image, (height, width) in pixels.
        unit: pixels of one unit of the boxes; (4,) for units that are not alike in x and y, or so
            large that a box is a small part of one.
    """

    size: Size
    unit: float | Tensor = 1.0


class BoxName(NamedTuple):
    """A name taken apart."""

    base: str
    forms: tuple[str, ...]


class BoxLoss:
    """(predicted, target) -> loss of each pair, by the name in the recipe.

    Args:
        name: as the file says.
        hyp: the recipe; the numbers that this loss has no use for may be missing.
        allow_code: whether a user's file may run.

    Raises:
        ConfigError: the name is not known, code is not allowed, or the user's function is not there
            or does not do.
        KeyError: a number is missing.
    """

    def __init__(self, name: str, hyp: Mapping[str, Any], *, allow_code: bool = False) -> None:
        if problem := name_problem(name):
            raise ConfigError(f"box_loss: {problem}")
        base, forms = take_apart(name)
        own = own_overlap(name, allow_code) if is_own(name) else None
        self.measure = Measure(overlap=own, unit="pixels") if own else BOX_LOSSES[base]
        self.numbers: Numbers = {key: float(hyp[key]) for key in self.measure.numbers}
        chosen = {form: float(hyp[key]) for form, key in FORMS.items() if form in forms}
        self.ratio, self.alpha, self.gamma = (chosen.get(form) for form in FORMS)
        self.mean = RunningMean(self.numbers["wiou_steps"]) if self.measure.is_focused else None

    def __call__(self, predicted: Tensor, target: Tensor, frame: Frame) -> Tensor:
        """Loss of each pair, weights of pairs included, (...).

        Args:
            predicted: xyxy, (..., 4).
            target: xyxy, (..., 4).
            frame: where they lie.
        """
        pair = self._pair(predicted, target, frame)
        loss = 1 - self._similarity(pair, frame.size)
        if self.gamma is not None:
            loss = loss * self._overlap(pair, frame.size).detach() ** self.gamma
        if self.mean is not None and torch.is_grad_enabled():
            loss = loss * self._focus(1 - pair.iou.detach())
        return loss

    def similarity(self, predicted: Tensor, target: Tensor, frame: Frame) -> Tensor:
        """1 less the loss of each pair without weights of pairs, (...): what matching goes by."""
        return self._similarity(self._pair(predicted, target, frame), frame.size)

    def end_step(self) -> None:
        """A step's pairs have all been seen. Every process must say so: their means are brought together."""
        if self.mean is not None and torch.is_grad_enabled():
            self.mean.update()

    def _pair(self, predicted: Tensor, target: Tensor, frame: Frame) -> BoxPair:
        pair = BoxPair(predicted, target)
        unit, needs = frame.unit, self.measure.unit
        if needs == "any" or (not isinstance(unit, Tensor) and (needs == "square" or unit == 1)):
            return pair
        return BoxPair(pair.first * unit, pair.second * unit)

    def _overlap(self, pair: BoxPair, size: Size) -> Tensor:
        return self.measure.overlap(pair, self.numbers, size)

    def _similarity(self, pair: BoxPair, size: Size) -> Tensor:
        inner = pair if self.ratio is None else _resized(pair, self.ratio)
        similarity = _power(self._overlap(inner, size), self.alpha)
        for penalty in self.measure.penalties(pair, self.numbers, size):
            similarity = similarity - _power(penalty, self.alpha)
        if self.measure.factor is None:
            return similarity
        return 1 - self.measure.factor(pair, self.numbers, size) * (1 - similarity)

    def _focus(self, missed: Tensor) -> Tensor:
        """WIoU v3's weight (arXiv 2301.10051): largest for pairs somewhat worse than the mean."""
        assert self.mean is not None
        self.mean.add(missed)
        outlier, delta = missed / max(self.mean.value, EPS), self.numbers["wiou_delta"]
        return outlier / (delta * self.numbers["wiou_alpha"] ** (outlier - delta))


def _power(value: Tensor, exponent: float | None) -> Tensor:
    """`value`^`exponent`; rounding may have taken a value below 0, which has no power."""
    return value if exponent is None else value.relu() ** exponent


def _resized(pair: BoxPair, ratio: float) -> BoxPair:
    """Boxes with the same centres and `ratio` times the sides."""
    factors = pair.first.new_tensor([1, 1, ratio, ratio])
    first = cxcywh_to_xyxy(xyxy_to_cxcywh(pair.first) * factors)
    return BoxPair(first, cxcywh_to_xyxy(xyxy_to_cxcywh(pair.second) * factors))


class RunningMean:
    """Mean of 1 - IoU over a training, which outliers are measured by in WIoU v3.

    Args:
        steps: updates after which the first value, 1, weighs 5 %.
    """

    def __init__(self, steps: float) -> None:
        self.value = 1.0
        self.momentum = 1 - INITIAL_SHARE ** (1 / steps)
        self._seen: list[Tensor] = []

    def add(self, values: Tensor) -> None:
        """Take note of values of this step."""
        self._seen.append(torch.stack((values.sum(), values.new_tensor(float(values.numel())))))

    def update(self) -> None:
        """Move towards the mean of all that was seen since the last time, on all processes."""
        seen = torch.stack(self._seen).sum(0).float() if self._seen else torch.zeros(2)
        self._seen = []
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            if distributed.get_backend() == "nccl":
                seen = seen.cuda()
            distributed.all_reduce(seen)
        total, count = seen.tolist()
        if count and math.isfinite(total):  # a batch that broke is left out
            self.value += self.momentum * (total / count - self.value)


def take_apart(name: str) -> BoxName:
    """`alpha-inner-ciou` is `ciou` with the forms alpha and inner; what is left may be unknown."""
    forms: list[str] = []
    while name not in BOX_LOSSES and not is_own(name):
        form, dash, rest = name.partition("-")
        if not dash or form not in FORMS or form in forms:
            break
        forms.append(form)
        name = rest
    return BoxName(name, tuple(forms))


def name_problem(name: str) -> str:
    """What is wrong with the name of a box loss, as a sentence; empty if nothing."""
    base, forms = take_apart(name)
    if is_own(name):
        return own_name_problem(name)
    if base in BOX_LOSSES:
        return ""
    known = [
        "-".join((*forms, known)) for known in (*BOX_LOSSES, *(f"inner-{k}" for k in BOX_LOSSES))
    ]
    return (
        f"got {name!r}, expected one of {', '.join(BOX_LOSSES)}, before it inner-, alpha- or focal-, or a function "
        f"of yours as file.py:name.{nearest(name, known)}"
    )
