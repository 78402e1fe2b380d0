"""The families of detectors: which head is trained by which criterion. Adding one is its files and one entry of `FAMILIES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from models.head import Head
from models.heads.anchor import AnchorDetect
from models.heads.ddetect import DDetect, DualDDetect
from models.heads.dfine import DFINEDecoder
from models.heads.dfl import DFLDetect
from models.heads.one_to_one import OneToOneDDetect, OneToOneDetect
from models.heads.rtdetr import RTDETRDecoder
from models.losses.anchor import AnchorLoss, scaled_gains
from models.losses.box import BoxLoss
from models.losses.dfine import DFINELoss
from models.losses.hungarian import HungarianLoss
from models.losses.one_to_one import OneToOneLoss
from models.losses.task_aligned import DualTaskAlignedLoss, TaskAlignedLoss
from utils.errors import ConfigError
from utils.structures import Targets

RECIPES = Path(__file__).resolve().parent.parent / "data" / "hyps"
Recipe = Mapping[str, Any]


class Criterion(Protocol):
    """(raw predictions, targets) -> named, weighted terms.

    Attributes:
        times_batch: the terms are means over the batch whose sum is multiplied by the batch size; else they
            are summed over the objects, divided by their number.
        box_loss: what it learns by, with what that has learnt so far.
    """

    times_batch: bool
    box_loss: BoxLoss

    def __call__(self, raw: Any, targets: Targets) -> dict[str, Tensor]:
        """Terms for what the head gave for a batch; a scalar in float32 each, by the names that logs show."""

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Epoch `epoch` of `epochs` begins, 0 the first; also where a run that was stopped goes on within it."""


@dataclass(frozen=True)
class Family:
    """One kind of head and how it is trained.

    Attributes:
        head: its class.
        criterion: (head, recipe, allow_code=) -> the criterion.
        gains: (recipe, head, imgsz) -> the recipe for this model at `imgsz` (height, width).
        recipe: the file of its numbers; None means `data/hyps/<family>.yaml`.
    """

    head: type[Head[Any]]
    criterion: Callable[..., Criterion]
    gains: Callable[[dict[str, Any], Any, tuple[int, int]], Recipe] = lambda hyp, head, imgsz: hyp
    recipe: Path | None = None

    @property
    def recipe_file(self) -> Path:
        """Where its numbers stand."""
        return self.recipe or RECIPES / f"{self.head.family}.yaml"


FAMILIES = [
    Family(AnchorDetect, AnchorLoss, scaled_gains),
    Family(DDetect, TaskAlignedLoss),
    Family(DualDDetect, DualTaskAlignedLoss),
    Family(DFLDetect, TaskAlignedLoss),
    Family(OneToOneDDetect, OneToOneLoss),
    Family(OneToOneDetect, OneToOneLoss),
    Family(RTDETRDecoder, HungarianLoss),
    Family(DFINEDecoder, DFINELoss),
]


def family_of(head: Head[Any]) -> Family:
    """The entry of a head's class, or of the nearest class above it.

    Raises:
        ConfigError: there is none.
    """
    for kind in type(head).__mro__:
        for family in FAMILIES:
            if family.head is kind:
                return family
    raise ConfigError(
        f"{type(head).__name__}: is a head that no criterion trains, expected one of "
        f"{', '.join(family.head.__name__ for family in FAMILIES)}. Give it an entry in models/family.py."
    )


def recipe_file(family: str) -> Path:
    """Where the numbers of the heads of `family` stand."""
    return next(f.recipe_file for f in FAMILIES if f.head.family == family)


def build_criterion(
    head: Head[Any], hyp: Recipe, imgsz: tuple[int, int], *, allow_code: bool = False
) -> Criterion:
    """The criterion that `head` trains with at `imgsz` (height, width), with the numbers of `hyp`.

    Raises:
        ConfigError: the recipe lacks a number, a loss of it is not known, or is a user's file and `allow_code` is false.
    """
    family = family_of(head)
    hyp = family.gains(_Numbers(hyp, family.recipe_file), head, imgsz)
    return family.criterion(head, hyp, allow_code=allow_code)


class _Numbers(dict[str, Any]):
    """A recipe that says in one line which key it lacks."""

    def __init__(self, hyp: Recipe, expected: Path) -> None:
        super().__init__(hyp)
        self.expected = expected

    def __missing__(self, key: str) -> Any:
        raise ConfigError(f"recipe: lacks {key!r} - expected the keys of {self.expected}.")

    def __or__(self, other: Mapping[str, Any]) -> _Numbers:  # type: ignore[override]
        return _Numbers({**self, **other}, self.expected)


def total_loss(
    criterion: Criterion, losses: Mapping[str, Tensor], batch_size: int, batches: int = 1
) -> Tensor:
    """What is back-propagated: the sum of the terms, times the batch size where the family's recipe counts that way.

    Args:
        criterion: of the family.
        losses: its terms for one batch.
        batch_size: images of the batch, over all processes.
        batches: whose gradients one step gathers; a loss that is a mean stays one over all of them.
    """
    total = torch.stack(tuple(losses.values())).sum()
    return total * batch_size if criterion.times_batch else total / batches


def criterion_state(criterion: Criterion) -> dict[str, float]:
    """What a criterion has learnt so far, as plain data; most learn nothing."""
    mean = criterion.box_loss.mean
    return {"box_loss_mean": mean.value} if mean is not None else {}


def restore_criterion(criterion: Criterion, state: Mapping[str, float]) -> None:
    """Bring a criterion to what it had learnt; one that learns nothing stays as it is."""
    mean = criterion.box_loss.mean
    if mean is not None:
        mean.value = float(state.get("box_loss_mean", mean.value))
