"""What the heads of the DETR families share: the encoder's best tokens become queries, queries become detections.

Source: RT-DETR (arXiv 2304.08069).

Letters: B batch, C classes, D width, N tokens of all maps, Q queries.
Boxes are cxcywh, normalised to [0, 1] by the image size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from models.registry import Plan, Scaling, first_argument, single
from models.transformer import MapSize
from utils.boxes import cxcywh_to_xyxy, widen
from utils.logger import get_logger
from utils.structures import Decoded

PRIOR = 0.01  # probability that a fresh classifier gives every class
CELL_BOX = 0.05  # side of the box a token of the finest map starts from; it doubles from map to map
BORDER = 0.01  # start boxes whose numbers come nearer than this to 0 or 1 are not used
SATURATED = 1e4  # stands in for the infinite logit of an unused start box; finite in half precision


class Selected(NamedTuple):
    """The encoder's best tokens: features (B, Q, D), class logits (B, Q, C), boxes (B, Q, 4)."""

    features: Tensor
    logits: Tensor
    boxes: Tensor


def decoder_rule(in_channels: Sequence[Any], args: Sequence[Any], scaling: Scaling) -> Plan:
    """`[nc, ...]` becomes `(nc, [channels of each level], ...)`."""
    levels = [single([channels]) for channels in in_channels]
    return Plan([first_argument(args), levels, *args[1:]], levels)


def initialize_weights(
    classifiers: Iterable[nn.Module],
    regressors: Iterable[nn.Module],
    projections: Iterable[nn.Module],
) -> None:
    """Classifiers start at `PRIOR`, boxes where their anchors or the layer before put them.

    Args:
        classifiers: linear layers.
        regressors: whose last linear layer starts at 0.
        projections: linear layers.
    """
    for classifier in classifiers:
        nn.init.constant_(classifier.get_parameter("bias"), -math.log((1 - PRIOR) / PRIOR))
    for regressor in regressors:
        *_, weight, bias = regressor.parameters()
        nn.init.zeros_(weight)
        nn.init.zeros_(bias)
    for layer in projections:
        nn.init.xavier_uniform_(layer.get_parameter("weight"))


def tell_objects_beyond(num_queries: int, per_image: np.ndarray) -> None:
    """Warn of objects beyond the queries, from the number of objects of every image, (n,)."""
    beyond = int(np.maximum(per_image - num_queries, 0).sum())
    if beyond:
        get_logger().warning(
            f"objects beyond the head's {num_queries} queries an image, not learned: {beyond} of {per_image.sum()}"
        )


def project(
    projections: Iterable[nn.Module], features: Sequence[Tensor]
) -> tuple[Tensor, list[MapSize]]:
    """One map (B, C_l, H_l, W_l) a level, finest first, as tokens (B, N, D), and the sizes of the maps."""
    sizes = [MapSize(*feature.shape[-2:]) for feature in features]
    maps = [proj(feature) for proj, feature in zip(projections, features, strict=True)]
    return torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1), sizes


def image_size_of(sizes: Sequence[MapSize], strides: Sequence[int]) -> tuple[int, int]:
    """(height, width) in pixels, from the finest map."""
    return sizes[0].height * strides[0], sizes[0].width * strides[0]


def select_queries(
    memory: Tensor,
    sizes: Sequence[MapSize],
    num_queries: int,
    output: nn.Module,
    classifier: nn.Module,
    regressor: nn.Module,
) -> Selected:
    """The tokens with the best class scores, best first.

    Args:
        memory: all tokens, (B, N, D).
        sizes: of the maps they come from.
        num_queries: Q; fewer where the maps have fewer cells.
        output: tokens to features, (B, N, D).
        classifier: features to class logits.
        regressor: features to what is added to the logits of the start boxes.
    """
    anchors, is_used = start_boxes(sizes, memory)
    features = output(memory * is_used.to(memory.dtype))
    logits = classifier(features)
    best = logits.amax(-1).topk(_query_count(sizes, num_queries), 1).indices
    chosen, chosen_logits = (
        t.gather(1, best[..., None].expand(-1, -1, t.shape[-1])) for t in (features, logits)
    )
    boxes = (widen(regressor(chosen)) + anchors[best]).sigmoid()
    return Selected(chosen, chosen_logits, boxes)


def _query_count(sizes: Sequence[MapSize], num_queries: int) -> int:
    """Q, or the number of cells where there are fewer.

    A graph exported with dynamic sizes is for maps that have Q cells or more.
    """
    cells = sum(size.height * size.width for size in sizes)
    return min(num_queries, cells) if isinstance(cells, int) else num_queries


def start_boxes(sizes: Sequence[MapSize], like: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the boxes that tokens start from, (N, 4), and which of the tokens are used, (N, 1).

    A token's box is centred on its cell; its side is `CELL_BOX` on the first map and doubles from
    map to map.
    """
    per_map = []
    for level, size in enumerate(sizes):
        x = (torch.arange(size.width, device=like.device, dtype=torch.float32) + 0.5) / size.width
        y = (torch.arange(size.height, device=like.device, dtype=torch.float32) + 0.5) / size.height
        y, x = torch.meshgrid(y, x, indexing="ij")
        side = torch.full_like(x, CELL_BOX * 2**level)
        per_map.append(torch.stack((x, y, side, side), -1).flatten(0, 1))
    boxes = torch.cat(per_map)
    is_used = ((boxes > BORDER) & (boxes < 1 - BORDER)).all(-1, keepdim=True)
    return torch.where(is_used, torch.log(boxes / (1 - boxes)), SATURATED), is_used


def decode_set(logits: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> Decoded:
    """Boxes in xyxy pixels and class probabilities, from logits (B, Q, C) and boxes (B, Q, 4)."""
    height, width = image_size
    left, top, right, bottom = cxcywh_to_xyxy(widen(boxes)).unbind(-1)
    pixels = torch.stack((left * width, top * height, right * width, bottom * height), -1)
    return Decoded(pixels, widen(logits).sigmoid())


def queries_layout(logits: Tensor, boxes: Tensor) -> Tensor:
    """The layout "queries", (B, Q, 4 + C): cxcywh in [0, 1], then class probabilities."""
    return torch.cat((widen(boxes), widen(logits).sigmoid()), -1)
