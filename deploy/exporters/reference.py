"""What the network itself makes of the images that an artifact is tried on.

Letters: B batch, A anchor points or queries, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deploy.exporters.network import blobs, floating_tensors
from models.yolo import DetectionModel
from utils.structures import Decoded

CLEAR_LEAD = 1e-5
"""A share of the largest logit: at least so far the last chosen query must be ahead of the first left
out, ten times what float32 usually rounds off."""
ROUNDINGS_AHEAD = 4
"""And by so many times what it rounds off in this very network and image: either of two faithful runs
may be off by one."""
ROUNDS = 8
"""So often images are drawn until there are enough with a clear lead."""


class Reference(NamedTuple):
    """Images and what the network gives for them.

    Attributes:
        images: RGB in [0, 1], (B, 3, H, W).
        decoded: boxes (B, A, 4) in xyxy pixels and scores (B, A, C).
        raw: floating tensors of the head's own output, in its order.
    """

    images: Tensor
    decoded: Decoded
    raw: list[Tensor]

    def tensors(self, is_raw: bool) -> list[Tensor]:
        """What an artifact is compared with: the raw output, or boxes and scores."""
        return self.raw if is_raw else list(self.decoded)

    @property
    def imgsz(self) -> tuple[int, int]:
        """(height, width) of the images."""
        return self.images.shape[-2], self.images.shape[-1]


@torch.no_grad()
def take_reference(
    model: DetectionModel,
    batch: int,
    imgsz: tuple[int, int],
    *,
    seed: int,
    device: torch.device | str = "cpu",
) -> Reference:
    """Run the network on `batch` images of `imgsz` (height, width); the same ones for one seed.

    A head that ranks gets images of which it is clear, however sums are rounded, which queries it
    chooses: nearly equal scores at the last rank would let two faithful runs choose differently.
    """
    device = torch.device(device)
    if model.head.postprocess == "topk":
        images = _clear_images(model, batch, imgsz, seed, device)
    else:
        images = blobs(batch, imgsz, seed).to(device)
    return _run(model, images)


@torch.no_grad()
def widen_reference(model: DetectionModel, reference: Reference) -> Reference | None:
    """The same in float64: what both PyTorch's float32 and an artifact come near to.

    None where a user's code makes tensors of its own in float32, which do not mix with others.
    """
    try:
        return _run(copy.deepcopy(model).double(), reference.images.double())
    except (RuntimeError, TypeError):
        return None


def _run(model: DetectionModel, images: Tensor) -> Reference:
    raw = model(images)
    return Reference(images, model.decode(raw), floating_tensors(raw))


def _clear_images(
    model: DetectionModel, batch: int, imgsz: tuple[int, int], seed: int, device: torch.device
) -> Tensor:
    """The first images with a clear lead; where they are too few, those with the widest one."""
    probe = copy.deepcopy(model)
    probe.head.num_queries += 1
    precise = probe if device.type == "mps" else copy.deepcopy(probe).double()
    drawn: list[tuple[float, Tensor]] = []
    for number in range(ROUNDS):
        images = blobs(batch, imgsz, seed + 1000 * number).to(device)
        logits = probe(images).encoder_logits
        exact = _exact_logits(precise, images, logits)
        needed = (max(CLEAR_LEAD, ROUNDINGS_AHEAD * own) for own in roundings(logits, exact))
        ahead = leads(logits, probe.head.num_queries)
        drawn += [(lead / need, image) for lead, need, image in zip(ahead, needed, images)]
        clear = [image for lead, image in drawn if lead > 1]
        if len(clear) >= batch:
            return torch.stack(clear[:batch])
    drawn.sort(key=lambda pair: pair[0], reverse=True)
    return torch.stack([image for _, image in drawn[:batch]])


def _exact_logits(precise: DetectionModel, images: Tensor, logits: Tensor) -> Tensor:
    """Of the network in float64, or `logits` where a user's code insists on float32."""
    try:
        return precise(images.to(next(precise.parameters()).dtype)).encoder_logits
    except (RuntimeError, TypeError):
        return logits


def leads(logits: Tensor, ranks: int) -> Sequence[float]:
    """How far the last rank but one is ahead of the last, of each image.

    Args:
        logits: class logits of the best tokens, best first, (B, Q, C).
        ranks: how many were asked for; infinitely far where there are fewer.

    Returns:
        B shares of the largest logit.
    """
    if logits.shape[1] < ranks:
        return [float("inf")] * len(logits)
    best = logits.amax(-1)
    share = (best[:, -2] - best[:, -1]) / logits.abs().amax((1, 2)).clamp(min=1e-12)
    return list(share.tolist())


def roundings(logits: Tensor, exact: Tensor) -> Sequence[float]:
    """How far logits are from their exact values, rank by rank, at most.

    Args:
        logits: class logits of the best tokens, best first, (B, Q, C).
        exact: the same in float64.

    Returns:
        B shares of the largest logit.
    """
    off = (logits.double().amax(-1) - exact.double().amax(-1)).abs().amax(1)
    return list((off / exact.double().abs().amax((1, 2)).clamp(min=1e-12)).tolist())
