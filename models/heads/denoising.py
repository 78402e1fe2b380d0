"""Contrastive denoising: noisy copies of the objects are queries whose answers are known.

Source: DINO (arXiv 2203.03605, section 3.3).

Letters: S stages, B batch, C classes, K denoising queries, Q other queries, G denoising groups, M most objects of an image.
Boxes are cxcywh, normalised to [0, 1] by the image size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils.boxes import xyxy_to_cxcywh
from utils.structures import Targets

BOX_EPS = 1e-5


class Denoising(NamedTuple):
    """What became of the denoising queries.

    Attributes:
        logits: per stage, (S, B, K, C).
        boxes: per stage, (S, B, K, 4).
        object_index: the object of the targets that each query must restore, (B, K); -1 for none.
        groups: how many times each object occurs.
    """

    logits: Tensor
    boxes: Tensor
    object_index: Tensor
    groups: int


class NoisyQueries(NamedTuple):
    """Objects with noise added, as queries.

    Attributes:
        labels: class indices, some wrong, (B, K).
        boxes: cxcywh in (0, 1), (B, K, 4).
        is_real: false where an image has fewer objects than the fullest one, (B, K).
        object_index: as in `Denoising`, (B, K).
        groups: G.
    """

    labels: Tensor
    boxes: Tensor
    is_real: Tensor
    object_index: Tensor
    groups: int


def noisy_queries(
    targets: Targets,
    batch: int,
    image_size: tuple[int, int],
    num_classes: int,
    *,
    count: int,
    label_noise: float,
    box_noise: float,
    generator: torch.Generator | None = None,
) -> NoisyQueries | None:
    """Copies of the objects with noisy classes and corners, in groups of M right and M wrong ones.

    A right copy's corners stay within half a side of the object's, a wrong one's move further and
    must be rejected. Random numbers come from the CPU generator, torch's global one by default: the
    noise is the same on every device, follows the run's seed and is restored with it from a
    checkpoint.

    Args:
        targets: objects of the batch; of an image with more than `count`, a random choice of
            `count` is taken.
        batch: B.
        image_size: (height, width) in pixels.
        num_classes: C.
        count: upper limit of G * M, reached as nearly as whole groups allow.
        label_noise: twice the probability of a random class.
        box_noise: scale of the shifts.
        generator: source of randomness, on the CPU.

    Returns:
        The queries, on the device of the targets, or None in a batch without objects.
    """
    device = targets.boxes.device
    targets = targets.to("cpu")
    table = _object_table(targets.image_index, batch, count, generator)
    most = table.shape[1]
    if most == 0:
        return None
    groups = max(count // most, 1)
    table = table.repeat(1, 2 * groups)
    is_wrong = (torch.arange(table.shape[1]) // most) % 2 == 1
    is_real, objects = table >= 0, table.clamp(min=0)
    flipped = torch.rand(table.shape, generator=generator) < label_noise / 2
    random_labels = torch.randint(num_classes, table.shape, generator=generator)
    labels = torch.where(flipped, random_labels, targets.labels[objects])
    height, width = image_size
    corners = (targets.boxes / torch.tensor([width, height, width, height]))[objects]
    half = (corners[..., 2:] - corners[..., :2]).repeat(1, 1, 2) / 2
    sign = torch.randint(2, corners.shape, generator=generator) * 2 - 1
    amount = torch.rand(corners.shape, generator=generator) + is_wrong[:, None]
    corners = (corners + sign * amount * half * box_noise).clamp(0, 1)
    boxes = xyxy_to_cxcywh(corners).clamp(BOX_EPS, 1 - BOX_EPS)
    restored = torch.where(is_wrong, -1, table)
    return NoisyQueries(
        labels.to(device), boxes.to(device), is_real.to(device), restored.to(device), groups
    )


def _object_table(
    image_index: Tensor, batch: int, limit: int, generator: torch.Generator | None
) -> Tensor:
    """Indices of each image's objects, at most `limit`, (B, M), filled up with -1."""
    rows = []
    for image in range(batch):
        objects = (image_index == image).nonzero().squeeze(1)
        if len(objects) > limit:
            objects = objects[torch.randperm(len(objects), generator=generator)[:limit]]
        rows.append(objects)
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def allowed_pairs(noisy: NoisyQueries, num_queries: int) -> Tensor:
    """Which query (row) may look at which (column), (K + Q, K + Q).

    All look at the Q ordinary queries; noisy ones look at their own group besides, nobody else
    looks at them, since they carry the answers.
    """
    device, total = noisy.labels.device, noisy.labels.shape[1]
    group = torch.arange(total, device=device) // (total // noisy.groups)
    group = torch.cat((group, group.new_full((num_queries,), -1)))
    return (group[:, None] == group) | (group == -1)
