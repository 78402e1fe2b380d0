"""What becomes of one batch: its size, a loss or gradients that are not finite, when a run gives up."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.transforms import FILL
from engine.run import Run
from utils.distributed import all_true, unused_parameters
from utils.errors import UserError
from utils.logger import get_logger
from utils.optim import clip_gradients, gradient_norms
from utils.structures import Targets

MOST_SKIPPED = 10  # batches, or steps, in a row that are not finite before the run gives up
NAMED = 3  # parameters
ADVICE = "Lower lr0 in the recipe, or train with --amp off."


def resize_randomly(
    images: Tensor, targets: Targets, stride: int, seed: int
) -> tuple[Tensor, Targets]:
    """`--multi-scale`: another size for this batch, from half to one and a half; nothing is stretched.

    The longer side becomes a multiple of the stride, the other one follows and is padded to one with the grey of
    letterboxes, below and to the right.
    """
    factor = 0.5 + torch.rand((), generator=torch.Generator().manual_seed(seed)).item()
    height, width = images.shape[2:]
    longer = max(height, width)
    share = max(round(longer * factor / stride), 1) * stride / longer
    size = [max(round(side * share), 1) for side in (height, width)]
    scale = torch.tensor([size[1] / width, size[0] / height] * 2, device=images.device)
    resized = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
    padded = F.pad(resized, (0, -size[1] % stride, 0, -size[0] % stride), value=FILL / 255)
    return padded, targets._replace(boxes=targets.boxes * scale)


def use_batch(run: Run, total: Tensor, losses: Mapping[str, Tensor]) -> bool:
    """Whether to use this batch; a loss that is not finite is told with every term and left out.

    Whether any process was told to stop is exchanged here too, so that all of them stop after the same step.

    Raises:
        UserError: too many in a row.
    """
    is_stopping = run.stop.number is not None
    is_finite, goes_on = all_true(torch.isfinite(total.detach()), not is_stopping)
    run.stop.is_agreed = not goes_on
    if is_finite:
        run.place.skipped = 0
        return True
    run.place.skipped += 1
    _mend_buffers(run)
    terms = ", ".join(f"{name} {value.item():.4g}" for name, value in losses.items())
    get_logger().warning(f"{_told(run)}: loss is not finite ({terms}), the batch is left out")
    if run.place.skipped >= MOST_SKIPPED:
        raise UserError(
            f"{_told(run)}: {MOST_SKIPPED} losses in a row were not finite ({terms}). {ADVICE}"
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
        run.place.skipped_steps = 0
        return True
    run.place.skipped_steps += 1
    bad = [name for name, norm in norms.items() if not torch.isfinite(norm)] or ["their sum"]
    more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    told = f"gradients are not finite ({', '.join(bad[:NAMED])}{more})"
    get_logger().warning(f"{_told(run)}: {told} though the loss is; the optimiser step is left out")
    if run.place.skipped_steps >= MOST_SKIPPED:
        raise UserError(f"{_told(run)}: {MOST_SKIPPED} steps in a row: {told}. {ADVICE}")
    return False


def warn_of_unused(model: nn.Module) -> None:
    """Name parameters that got no gradient: DistributedDataParallel would stop there with a number."""
    unused = unused_parameters(model)
    if unused:
        get_logger().warning(f"{len(unused)} parameters get no gradient: {', '.join(unused[:5])}")


def _told(run: Run) -> str:
    return f"epoch {run.place.epoch + 1} step {run.place.within.step + 1}"


def _mend_buffers(run: Run) -> None:
    """Take statistics that an overflow has reached already, in the forward pass, from the averaged model."""
    for own, average in zip(run.model.buffers(), run.ema.model.buffers(), strict=True):
        if own.is_floating_point() and not own.isfinite().all():
            own.copy_(average)
