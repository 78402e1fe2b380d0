"""Losses and gradients that are not finite: what is left out, what is said, when a run gives up."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.run import Run
from utils.distributed import all_true
from utils.errors import UserError
from utils.logger import get_logger
from utils.optim import clip_gradients, gradient_norms

MOST_SKIPPED = 10  # batches, or steps, in a row that are not finite before the run gives up
NAMED = 3  # parameters
ADVICE = "Lower lr0 in the recipe, or train with --amp off."


def use_batch(run: Run, total: Tensor, losses: dict[str, Tensor], epoch: int, step: int) -> bool:
    """Whether to use this batch; a loss that is not finite is told with every term and left out.

    Whether any process was told to stop is exchanged here too, so that all of them stop after the same step.

    Raises:
        UserError: too many in a row.
    """
    is_stopping = run.stop.number is not None
    is_finite, goes_on = all_true(torch.isfinite(total.detach()), not is_stopping)
    run.is_stopping = not goes_on
    if is_finite:
        run.skipped = 0
        return True
    run.skipped += 1
    _mend_buffers(run)
    terms = ", ".join(f"{name} {value.item():.4g}" for name, value in losses.items())
    place = f"epoch {epoch + 1} step {step + 1}"
    get_logger().warning(f"{place}: loss is not finite ({terms}), the batch is left out")
    if run.skipped >= MOST_SKIPPED:
        raise UserError(
            f"{place}: {MOST_SKIPPED} losses in a row were not finite ({terms}). {ADVICE}"
        )
    return False


def use_gradients(run: Run) -> bool:
    """Clip the gradients, or say which of them are not finite: then the step is to be left out.

    Overflows of float16 are left to the scaler, which lowers its scale and leaves out the step by itself.

    Raises:
        UserError: too many in a row.
    """
    norms = gradient_norms(run.model)
    total = torch.linalg.vector_norm(torch.stack(list(norms.values()))) if norms else torch.ones(())
    if torch.isfinite(total) or run.scaler.get_scale() > 1:
        if run.hyp["clip_norm"] > 0:
            clip_gradients(run.model, run.hyp["clip_norm"])
        run.skipped_steps = 0
        return True
    run.skipped_steps += 1
    bad = [name for name, norm in norms.items() if not torch.isfinite(norm)] or ["their sum"]
    more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    told = f"gradients are not finite ({', '.join(bad[:NAMED])}{more})"
    place = f"epoch {run.epoch + 1} step {run.progress.step + 1}"
    get_logger().warning(f"{place}: {told} though the loss is; the optimiser step is left out")
    if run.skipped_steps >= MOST_SKIPPED:
        raise UserError(f"{place}: {MOST_SKIPPED} steps in a row: {told}. {ADVICE}")
    return False


def _mend_buffers(run: Run) -> None:
    """Take statistics that an overflow has reached already, in the forward pass, from the averaged model."""
    for own, average in zip(run.model.buffers(), run.ema.model.buffers(), strict=True):
        if own.is_floating_point() and not own.isfinite().all():
            own.copy_(average)
