"""`--multi-scale`: batches of another size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from data.transforms import FILL
from engine.run import Run
from utils.structures import Targets


def resize_randomly(
    images: Tensor, targets: Targets, run: Run, iteration: int
) -> tuple[Tensor, Targets]:
    """Another size for this batch, from half to one and a half; nothing is stretched.

    The longer side becomes a multiple of the stride, the other one follows and is padded to one with the grey of
    letterboxes, below and to the right.
    """
    stride = run.model.max_stride
    generator = torch.Generator().manual_seed(run.options.seed * 1_000_003 + iteration)
    factor = 0.5 + torch.rand((), generator=generator).item()
    height, width = images.shape[2:]
    longer = max(height, width)
    share = max(round(longer * factor / stride), 1) * stride / longer
    size = [max(round(side * share), 1) for side in (height, width)]
    scale = torch.tensor([size[1] / width, size[0] / height] * 2, device=images.device)
    resized = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
    padded = F.pad(resized, (0, -size[1] % stride, 0, -size[0] % stride), value=FILL / 255)
    return padded, targets._replace(boxes=targets.boxes * scale)
