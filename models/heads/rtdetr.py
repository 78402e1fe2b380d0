"""RT-DETR's head: the best encoder tokens become queries, decoder layers refine them into a set.

Sources: RT-DETR (arXiv 2304.08069); from DINO (arXiv 2203.03605, section 3.5) "look
forward twice": the gradient of a box reaches the layer before it.

Letters: B batch, C classes, D width, L levels, N tokens of all maps, Q queries, K denoising queries,
S decoder stages.
Boxes are cxcywh, normalised to [0, 1] by the image size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from models.common import batch_norm
from models.head import Head
from models.heads.denoising import Denoising, NoisyQueries, allowed_pairs, noisy_queries
from models.registry import Plan, Scaling, first_argument, register, single
from models.transformer import (
    MLP,
    Decoder,
    DecoderLayer,
    LayerNorm,
    MapSize,
    inverse_sigmoid,
)
from utils.boxes import cxcywh_to_xyxy, widen
from utils.logger import get_logger
from utils.structures import Decoded, Targets

PRIOR = 0.01  # probability that a fresh classifier gives every class
CELL_BOX = 0.05  # side of the box a token of the finest map starts from; it doubles from map to map
BORDER = 0.01  # start boxes whose numbers come nearer than this to 0 or 1 are not used
SATURATED = 1e4  # stands in for the infinite logit of an unused start box; finite in half precision


class RTDETRRaw(NamedTuple):
    """Raw predictions.

    Attributes:
        logits: class logits, (S, B, Q, C); in eval mode the last stage alone, S = 1.
        boxes: cxcywh in [0, 1], (S, B, Q, 4).
        encoder_logits: class logits of the tokens that became queries, (B, Q, C).
        encoder_boxes: their boxes, (B, Q, 4).
        denoising: None outside training, and in a batch without objects.
        image_size: (height, width) in pixels; symbolic while a graph is exported.
    """

    logits: Tensor
    boxes: Tensor
    encoder_logits: Tensor
    encoder_boxes: Tensor
    denoising: Denoising | None
    image_size: tuple[int, int]


class Selected(NamedTuple):
    """The encoder's best tokens: features (B, Q, D), class logits (B, Q, C), boxes (B, Q, 4)."""

    features: Tensor
    logits: Tensor
    boxes: Tensor


def _decoder_rule(in_channels: Sequence[Any], args: Sequence[Any], scaling: Scaling) -> Plan:
    """`[nc, ...]` becomes `(nc, [channels of each level], ...)`."""
    levels = [single([channels]) for channels in in_channels]
    return Plan([first_argument(args), levels, *args[1:]], levels)


@register(_decoder_rule)
class RTDETRDecoder(Head[RTDETRRaw]):
    """The head of RT-DETR.

    Args:
        num_classes: C.
        channels: of each feature map, finest first.
        hidden: D, a multiple of `num_heads`.
        num_queries: Q; fewer where the maps have fewer cells.
        num_points: sampling points per head and level.
        num_heads: attention heads.
        num_layers: decoder layers.
        feedforward: width of the decoder's feed-forward parts.
        num_denoising: about how many noisy copies of objects, right and wrong ones each, an image
            trains with; also the most objects of one image that are copied. 0 switches denoising
            off, here for good; the attribute may be set to 0 and back at any time.
        label_noise: twice the probability that a copy gets a random class.
        box_noise: how far a copy's corners move, in half sides (wrong copies: up to twice as far).
    """

    family = "rtdetr"
    postprocess = "topk"
    layout = "queries"
    class_outputs = ("enc_score_head.*", "dec_score_head.*", "denoising_class_embed.*")

    def __init__(
        self,
        num_classes: int,
        channels: Sequence[int],
        hidden: int = 256,
        num_queries: int = 300,
        num_points: int = 4,
        num_heads: int = 8,
        num_layers: int = 6,
        feedforward: int = 1024,
        num_denoising: int = 100,
        label_noise: float = 0.5,
        box_noise: float = 1.0,
    ) -> None:
        super().__init__(num_classes, len(channels))
        self.num_queries = num_queries
        self.num_denoising, self.label_noise, self.box_noise = num_denoising, label_noise, box_noise
        self.strides = tuple(8 * 2**level for level in range(len(channels)))
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, hidden, 1, bias=False), batch_norm(hidden)) for c in channels
        )
        self.decoder = Decoder(
            [
                DecoderLayer(hidden, num_heads, feedforward, len(channels), num_points)
                for _ in range(num_layers)
            ]
        )
        if num_denoising:
            self.denoising_class_embed = nn.Embedding(num_classes, hidden)
        self.query_pos_head = MLP(4, 2 * hidden, hidden, num_layers=2)
        self.enc_output = nn.Sequential(nn.Linear(hidden, hidden), LayerNorm(hidden))
        self.enc_score_head = nn.Linear(hidden, num_classes)
        self.enc_bbox_head = MLP(hidden, hidden, 4, num_layers=3)
        self.dec_score_head = nn.ModuleList(
            nn.Linear(hidden, num_classes) for _ in range(num_layers)
        )
        self.dec_bbox_head = nn.ModuleList(
            MLP(hidden, hidden, 4, num_layers=3) for _ in range(num_layers)
        )
        self._initialize_weights()

    def _initialize_weights(self) -> None:
        """Classifiers start at `PRIOR`, boxes where their anchors or the layer before put them."""
        for classifier in (self.enc_score_head, *self.dec_score_head):
            nn.init.constant_(classifier.bias, -math.log((1 - PRIOR) / PRIOR))
        for regressor in (self.enc_bbox_head, *self.dec_bbox_head):
            nn.init.zeros_(regressor.layers[-1].weight)
            nn.init.zeros_(regressor.layers[-1].bias)
        for layer in (self.enc_output[0], *self.query_pos_head.layers):
            nn.init.xavier_uniform_(layer.weight)

    def initialize(self, strides: Sequence[int]) -> None:
        """Learn the strides of the feature maps."""
        self.strides = tuple(strides)

    def take_recipe(self, hyp: Mapping[str, Any]) -> None:
        """Numbers of denoising; what the YAML switched off with a 0 stays off."""
        for name in ("num_denoising", "label_noise", "box_noise"):
            if getattr(self, name):
                setattr(self, name, hyp[name])

    def tell_limits(self, sizes: np.ndarray, per_image: np.ndarray) -> None:
        """Objects beyond the queries."""
        beyond = int(np.maximum(per_image - self.num_queries, 0).sum())
        if beyond:
            get_logger().warning(
                f"objects beyond the head's {self.num_queries} queries an image, not learned: {beyond} of {len(sizes)}"
            )

    def forward(self, features: Sequence[Tensor], targets: Targets | None = None) -> RTDETRRaw:
        """Predict from one map (B, C_l, H_l, W_l) a level, finest first.

        In training, `targets` add denoising queries.
        """
        sizes = [MapSize(*feature.shape[-2:]) for feature in features]
        image_size = (sizes[0].height * self.strides[0], sizes[0].width * self.strides[0])
        projected = [proj(feature) for proj, feature in zip(self.input_proj, features, strict=True)]
        memory = torch.cat([feature.flatten(2).transpose(1, 2) for feature in projected], 1)
        selected = self._select(memory, sizes)
        content, boxes = selected.features.detach(), selected.boxes.detach()
        noisy, allowed = None, None
        if self.training and hasattr(self, "denoising_class_embed"):
            noisy = self._noisy_queries(targets, content, image_size)
            noisy_content, noisy_boxes = self._embed(noisy, content)
            if noisy is not None:
                allowed = allowed_pairs(noisy, content.shape[1])
            content = torch.cat((noisy_content, content), 1)
            boxes = torch.cat((noisy_boxes, boxes), 1)
        logits, boxes = self._refine(content, boxes, memory, sizes, allowed)
        count = 0 if noisy is None else noisy.labels.shape[1]
        denoising = None
        if noisy is not None:
            denoising = Denoising(
                logits[:, :, :count], boxes[:, :, :count], noisy.object_index, noisy.groups
            )
        return RTDETRRaw(
            logits[:, :, count:],
            boxes[:, :, count:],
            selected.logits,
            selected.boxes,
            denoising,
            image_size,
        )

    def _select(self, memory: Tensor, sizes: Sequence[MapSize]) -> Selected:
        """The `num_queries` tokens of `memory` (B, N, D) with the best class scores, best first."""
        anchors, is_used = start_boxes(sizes, memory)
        features = self.enc_output(memory * is_used.to(memory.dtype))
        logits = self.enc_score_head(features)
        best = logits.amax(-1).topk(self._query_count(sizes), 1).indices
        chosen, chosen_logits = (
            t.gather(1, best[..., None].expand(-1, -1, t.shape[-1])) for t in (features, logits)
        )
        boxes = (widen(self.enc_bbox_head(chosen)) + anchors[best]).sigmoid()
        return Selected(chosen, chosen_logits, boxes)

    def _query_count(self, sizes: Sequence[MapSize]) -> int:
        """Q, or the number of cells where there are fewer.

        A graph exported with dynamic sizes is for maps that have Q cells or more.
        """
        cells = sum(size.height * size.width for size in sizes)
        return min(self.num_queries, cells) if isinstance(cells, int) else self.num_queries

    def _refine(
        self,
        content: Tensor,
        boxes: Tensor,
        memory: Tensor,
        sizes: Sequence[MapSize],
        allowed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Logits (S, B, Q, C) and boxes (S, B, Q, 4) of all stages; in eval mode of the last."""
        stage_logits, stage_boxes = [], []
        before = boxes  # with the gradient of the previous layer; `boxes` has none
        for number, layer in enumerate(self.decoder.layers):
            position = self.query_pos_head(boxes.to(content.dtype))
            content = layer(content, position, boxes, memory, sizes, allowed)
            shift = widen(self.dec_bbox_head[number](content))
            if self.training or number == len(self.decoder.layers) - 1:
                stage_logits.append(self.dec_score_head[number](content))
                stage_boxes.append((shift + inverse_sigmoid(before)).sigmoid())
            before = (shift + inverse_sigmoid(boxes)).sigmoid()
            boxes = before.detach()
        return torch.stack(stage_logits), torch.stack(stage_boxes)

    def _noisy_queries(
        self, targets: Targets | None, content: Tensor, image_size: tuple[int, int]
    ) -> NoisyQueries | None:
        if targets is None or not self.num_denoising:
            return None
        return noisy_queries(
            targets,
            content.shape[0],
            image_size,
            self.num_classes,
            count=self.num_denoising,
            label_noise=self.label_noise,
            box_noise=self.box_noise,
        )

    def _embed(self, noisy: NoisyQueries | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """Content (B, K, D) and boxes (B, K, 4) of the noisy queries.

        Without any, K is 0; the empty content still hangs on the embedding, so that every parameter
        has a gradient in every step, which DistributedDataParallel counts on.
        """
        weight = self.denoising_class_embed.weight
        if noisy is None:
            nothing = weight[:0].expand(like.shape[0], -1, -1).to(like.dtype)
            return nothing, widen(nothing[..., :4].detach())
        content = self.denoising_class_embed(noisy.labels) * noisy.is_real[..., None]
        return content.to(like.dtype), noisy.boxes

    def decode(self, raw: RTDETRRaw) -> Decoded:
        """Boxes in xyxy pixels and class probabilities of the last stage."""
        height, width = raw.image_size
        left, top, right, bottom = cxcywh_to_xyxy(widen(raw.boxes[-1])).unbind(-1)
        boxes = torch.stack((left * width, top * height, right * width, bottom * height), -1)
        return Decoded(boxes, widen(raw.logits[-1]).sigmoid())

    def export_layout(self, raw: RTDETRRaw) -> Tensor:
        """(B, Q, 4 + C): cxcywh in [0, 1], then class probabilities."""
        return torch.cat((widen(raw.boxes[-1]), widen(raw.logits[-1]).sigmoid()), -1)


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
