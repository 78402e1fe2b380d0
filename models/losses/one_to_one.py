"""Loss of a head with a one-to-many and a one-to-one branch: their weights change from epoch to epoch (ProgLoss).

Sources: YOLO26 (arXiv 2606.03748) for ProgLoss and for seven candidates of which one is left, YOLOv10 (arXiv 2405.14458,
section 3.1) for one metric in both branches: both rank by their own scores with the same powers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.heads.one_to_one import OneToOne, TwoBranches
from models.losses.task_aligned import TaskAlignedLoss
from utils.structures import Targets


class OneToOneLoss:
    """a(t) * loss of the one-to-many branch + (1 - a(t)) * loss of the one-to-one branch, term by term.

    Args:
        head: the head whose raw predictions come in.
        hyp: what `TaskAlignedLoss` reads; candidates of the one-to-one branch `o2o_topk`; a(t) of the first and of
            the last epoch, `prog_start` and `prog_end`.
        allow_code: whether `box_loss` may be a user's file.
    """

    times_batch = True

    def __init__(self, head: OneToOne, hyp: Mapping[str, Any], *, allow_code: bool = False) -> None:
        own = {"tal_topk": hyp["o2o_topk"]}
        self.many = TaskAlignedLoss(head, hyp, allow_code=allow_code)
        self.one = TaskAlignedLoss(head, {**hyp, **own}, allow_code=allow_code, only_best=True)
        self.box_loss = self.one.box_loss = self.many.box_loss  # one running mean for both
        self.start, self.end = float(hyp["prog_start"]), float(hyp["prog_end"])
        self.begin_epoch(0, 1)

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Weigh the branches for this epoch; see `share_of_many`."""
        self.share = share_of_many(epoch, epochs, self.start, self.end)

    def __call__(self, raw: TwoBranches, targets: Targets) -> dict[str, Tensor]:
        """Weighted terms `box`, `cls` and `dfl` or `l1`, each a scalar in float32."""
        many, one = self.many(raw.many, targets), self.one(raw.one, targets)
        return {name: self.share * many[name] + (1 - self.share) * one[name] for name in many}


def share_of_many(epoch: int, epochs: int, start: float, end: float) -> float:
    """a(t) of ProgLoss: from `start` in the first epoch (0) to `end` in the last, in equal steps.

    It follows from the epoch alone, so that a run that is resumed, or made longer, goes on as if it had never stopped.
    """
    return max(1 - epoch / max(epochs - 1, 1), 0.0) * (start - end) + end
