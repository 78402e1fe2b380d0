"""Class losses by name: elementwise, (logits, what they aim at) -> one value per logit.

`bce` and `focal` aim at the labels, as the assigner gives them; `varifocal` and `quality` at how well the
box of a positive fits, so that the score of a class tells that too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from utils.errors import ConfigError, nearest


class ClassTargets(NamedTuple):
    """What class logits aim at; each of the shape of the logits, in [0, 1].

    Attributes:
        labels: 1 for the class of a positive, or what stands for it: smoothed, or an alignment.
        quality: for the class of a positive the overlap of its box, 0 elsewhere.
        is_positive: 1 for the class of a positive, 0 elsewhere; None: wherever the quality is above 0.
    """

    labels: Tensor
    quality: Tensor
    is_positive: Tensor | None = None


Numbers = Mapping[str, Any]
ClassLoss = Callable[[Tensor, ClassTargets, Numbers], Tensor]


def binary_cross_entropy(logits: Tensor, targets: ClassTargets, numbers: Numbers) -> Tensor:
    """-(y log p + (1 - y) log(1 - p)), with `cls_pw` times as much of y log p where the recipe has it."""
    return _entropy(logits, targets.labels, numbers)


def focal(logits: Tensor, targets: ClassTargets, numbers: Numbers) -> Tensor:
    """Focal loss (Lin et al., arXiv 1708.02002, eq. 5) of the labels; see `focal_loss`."""
    positive_weight = numbers.get("cls_pw", 1.0)
    return focal_loss(
        logits, targets.labels, numbers["focal_alpha"], numbers["focal_gamma"], positive_weight
    )


def focal_loss(
    logits: Tensor, wanted: Tensor, alpha: float, gamma: float, positive_weight: float = 1.0
) -> Tensor:
    """-alpha (1 - p)^gamma log p where the answer is yes, -(1 - alpha) p^gamma log(1 - p) where it is no.

    The paper (arXiv 1708.02002, eq. 5) knows yes and no alone. A target between counts as that share
    of one and the rest of the other.

    Args:
        logits: any shape.
        wanted: of the same shape, in [0, 1].
        alpha: weight of yes, 1 - alpha of no.
        gamma: how strongly what is right already is held back.
        positive_weight: a further weight of yes.
    """
    log_yes, log_no = F.logsigmoid(logits), F.logsigmoid(-logits)
    # Powers through the exponential: they have a gradient also where a probability is 0.
    yes = -positive_weight * alpha * torch.exp(gamma * log_no) * log_yes
    no = (alpha - 1) * torch.exp(gamma * log_yes) * log_no
    return wanted * yes + (1 - wanted) * no


def varifocal(logits: Tensor, targets: ClassTargets, numbers: Numbers) -> Tensor:
    """Varifocal loss (Zhang et al., arXiv 2008.13367, eq. 2): positives weigh their quality.

    The weight of the negatives takes gradient too, which about doubles theirs, unless the recipe says
    `vfl_gradient: false`.
    """
    probability = logits.sigmoid()
    if not numbers.get("vfl_gradient", True):
        probability = probability.detach()
    weight = numbers["vfl_alpha"] * probability ** numbers["vfl_gamma"]
    weight = weight * (1 - _positives(logits, targets)) + targets.quality
    return weight * _entropy(logits, targets.quality, numbers)


def matchability(logits: Tensor, targets: ClassTargets, numbers: Numbers) -> Tensor:
    """Matchability-aware loss (Huang et al., DEIM, arXiv 2412.04234): a match of a bad box is pushed down in full.

    Positives aim at quality^gamma and weigh 1, negatives weigh p^gamma, without gradient of the weight.
    """
    gamma, positive = numbers["mal_gamma"], _positives(logits, targets)
    weight = logits.sigmoid().detach() ** gamma * (1 - positive) + positive
    return weight * _entropy(logits, targets.quality**gamma, numbers)


def _positives(logits: Tensor, targets: ClassTargets) -> Tensor:
    """1 for the class of a positive, 0 elsewhere."""
    if targets.is_positive is not None:
        return targets.is_positive
    return (targets.quality > 0).to(logits.dtype)


def quality_focal(logits: Tensor, targets: ClassTargets, numbers: Numbers) -> Tensor:
    """Quality focal loss (Li et al., arXiv 2006.04388, eq. 5): |q - p|^beta times the cross entropy."""
    away = (targets.quality - logits.sigmoid()).abs()
    return away ** numbers["qfl_beta"] * _entropy(logits, targets.quality, numbers)


def _entropy(logits: Tensor, wanted: Tensor, numbers: Numbers) -> Tensor:
    weight = logits.new_tensor(numbers["cls_pw"]) if "cls_pw" in numbers else None
    return F.binary_cross_entropy_with_logits(logits, wanted, pos_weight=weight, reduction="none")


CLASS_LOSSES: dict[str, ClassLoss] = {
    "bce": binary_cross_entropy,
    "focal": focal,
    "varifocal": varifocal,
    "mal": matchability,
    "quality": quality_focal,
}
NUMBERS = {
    "focal": ("focal_alpha", "focal_gamma"),
    "varifocal": ("vfl_alpha", "vfl_gamma"),
    "mal": ("mal_gamma",),
    "quality": ("qfl_beta",),
}
"""Numbers of the recipe that a loss reads."""


def choose_class_loss(name: str, hyp: Numbers) -> ClassLoss:
    """The loss called `name`, whose numbers stand in the recipe `hyp`.

    Raises:
        ConfigError: there is none of that name.
        KeyError: a number is missing.
    """
    if problem := class_loss_problem(name):
        raise ConfigError(f"cls_loss: {problem}")
    for key in NUMBERS.get(name, ()):
        hyp[key]
    return CLASS_LOSSES[name]


def class_loss_problem(name: str) -> str:
    """What is wrong with the name of a class loss, as a sentence; empty if nothing."""
    if name in CLASS_LOSSES:
        return ""
    return f"got {name!r}, expected one of {', '.join(CLASS_LOSSES)}.{nearest(name, CLASS_LOSSES)}"
