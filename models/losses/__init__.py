"""Losses: (raw predictions, targets) -> named, weighted terms. Each head says by name which one it trains with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.losses.anchor import AnchorLoss, scaled_gains
from models.losses.hungarian import HungarianLoss
from models.losses.task_aligned import DualTaskAlignedLoss, TaskAlignedLoss
from utils.errors import ConfigError

CRITERIA = {
    "anchor": AnchorLoss,
    "task_aligned": TaskAlignedLoss,
    "dual_task_aligned": DualTaskAlignedLoss,
    "hungarian": HungarianLoss,
}


def build_criterion(
    head: Any, hyp: Mapping[str, Any], imgsz: tuple[int, int], *, allow_code: bool = False
) -> Any:
    """The criterion that `head` trains with at `imgsz` (height, width), with the numbers of `hyp`.

    Raises:
        ConfigError: a loss of the recipe is not known, or is a user's file and `allow_code` is false.
    """
    if head.loss not in CRITERIA:
        raise ConfigError(
            f"{type(head).__name__}.loss: got {head.loss!r}, expected one of {', '.join(CRITERIA)}."
        )
    try:
        if head.loss == "anchor":
            hyp = scaled_gains(hyp, head.num_classes, len(head.strides), imgsz)
        return CRITERIA[head.loss](head, hyp, allow_code=allow_code)
    except KeyError as error:
        raise ConfigError(
            f"recipe: lacks {error}, which {head.loss!r} reads - expected the keys of data/hyps/{head.family}.yaml."
        ) from error


def total_loss(
    criterion: Any, losses: Mapping[str, Tensor], batch_size: int, batches: int = 1
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


def criterion_state(criterion: Any) -> dict[str, float]:
    """What a criterion has learnt so far, as plain data; most learn nothing."""
    mean = criterion.box_loss.mean
    return {"box_loss_mean": mean.value} if mean is not None else {}


def restore_criterion(criterion: Any, state: Mapping[str, float]) -> None:
    """Bring a criterion to what it had learnt; one that learns nothing stays as it is."""
    mean = criterion.box_loss.mean
    if mean is not None:
        mean.value = float(state.get("box_loss_mean", mean.value))
