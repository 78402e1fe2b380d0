"""Contrastive denoising: noisy copies of the objects are queries whose answers are known.

Source: DINO (arXiv 2203.03605, section 3.3).

Letters: S stages, B batch, C classes, D width, K denoising queries, Q other queries, G denoising groups,
M most objects of an image.
Boxes are cxcywh, normalised to [0, 1] by the image size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from utils.boxes import widen, xyxy_to_cxcywh
from utils.structures import Targets

BOX_EPS = 1e-5


class Denoises(Protocol):
    """A head with the numbers of denoising.

    Attributes:
        num_classes: C.
        num_denoising: about how many copies of objects, right and wrong ones each, an image trains with; 0 for none.
        label_noise: twice the probability that a copy gets a random class.
        box_noise: how far a copy's corners move, in half sides (wrong copies: up to twice as far).
    """

    num_classes: int
    num_denoising: int
    label_noise: float
    box_noise: float


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


class WithNoise(NamedTuple):
    """Denoising queries and, behind them, the others.

    Attributes:
        content: (B, K + Q, D).
        boxes: cxcywh, (B, K + Q, 4).
        allowed: as `allowed_pairs` says; None without noisy queries.
        noisy: None without targets, without objects and where denoising is off; K is then 0.
    """

    content: Tensor
    boxes: Tensor
    allowed: Tensor | None
    noisy: NoisyQueries | None

    @property
    def num_noisy(self) -> int:
        """K."""
        return 0 if self.noisy is None else self.noisy.labels.shape[1]


def add_noisy_queries(
    head: Denoises,
    embedding: nn.Embedding,
    content: Tensor,
    boxes: Tensor,
    targets: Targets | None,
    image_size: tuple[int, int],
) -> WithNoise:
    """Put noisy copies of the objects before the queries.

    Args:
        head: says how many and how noisy.
        embedding: content of a copy by its class.
        content: of the queries, (B, Q, D).
        boxes: of the queries, (B, Q, 4).
        targets: the objects.
        image_size: (height, width) in pixels.
    """
    noisy = None
    if targets is not None and head.num_denoising:
        noisy = noisy_queries(
            targets, content.shape[0], image_size, head.num_classes,
            count=head.num_denoising, label_noise=head.label_noise, box_noise=head.box_noise,
        )  # fmt: skip
    allowed = None if noisy is None else allowed_pairs(noisy, content.shape[1])
    own_content, own_boxes = _embed(embedding, noisy, content)
    return WithNoise(
        torch.cat((own_content, content), 1), torch.cat((own_boxes, boxes), 1), allowed, noisy
    )


def _embed(
    embedding: nn.Embedding, noisy: NoisyQueries | None, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Content (B, K, D) and boxes (B, K, 4) of the noisy queries.

    Without any, K is 0; the empty content still hangs on the embedding, so that every parameter
    has a gradient in every step, which DistributedDataParallel counts on.
    """
    if noisy is None:
        nothing = embedding.weight[:0].expand(like.shape[0], -1, -1).to(like.dtype)
        return nothing, widen(nothing[..., :4].detach())
    content = embedding(noisy.labels) * noisy.is_real[..., None]
    return content.to(like.dtype), noisy.boxes


def take_noise(head: Denoises, hyp: Mapping[str, Any]) -> None:
    """Give `head` the recipe's numbers; what its row switched off with a 0 stays off."""
    head.num_denoising = head.num_denoising and hyp["num_denoising"]
    head.label_noise = head.label_noise and hyp["label_noise"]
    head.box_noise = head.box_noise and hyp["box_noise"]
