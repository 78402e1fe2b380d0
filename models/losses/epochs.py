"""What a criterion has from the course of a training."""

from __future__ import annotations


class SameEveryEpoch:
    """A criterion whose terms weigh the same from the first epoch to the last."""

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Nothing changes.

        Args:
            epoch: the one that begins, 0 the first.
            epochs: of the whole training.
        """
