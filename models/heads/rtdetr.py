"""RT-DETR's head: the best encoder tokens become queries, decoder layers refine them into a set.

Sources: RT-DETR (arXiv 2304.08069); from DINO (arXiv 2203.03605, section 3.5) "look
forward twice": the gradient of a box reaches the layer before it.

Letters: B batch, C classes, D width, L levels, N tokens of all maps, Q queries, K denoising queries,
S decoder stages.
Boxes are cxcywh, normalised to [0, 1] by the image size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from models.common import batch_norm
from models.head import Head
from models.heads.denoising import Denoising, WithNoise, add_noisy_queries, take_noise
from models.heads.queries import (
    decode_set,
    decoder_rule,
    image_size_of,
    initialize_weights,
    project,
    queries_layout,
    select_queries,
    tell_objects_beyond,
)
from models.registry import register
from models.transformer import (
    MLP,
    Decoder,
    DecoderLayer,
    LayerNorm,
    MapSize,
    inverse_sigmoid,
)
from utils.boxes import widen
from utils.structures import Decoded, Targets


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


@register(decoder_rule)
class RTDETRDecoder(Head[RTDETRRaw]):
    """The head of RT-DETR.

    Args:
        num_classes: C.
        channels: of each feature map, finest first.
        hidden: D, a multiple of `num_heads`.
        num_queries: Q; fewer where the maps have fewer cells.
        num_points: sampling points per head and level; or one number a level.
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
        num_points: int | Sequence[int] = 4,
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
        self.denoising_class_embed = nn.Embedding(num_classes, hidden) if num_denoising else None
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
        initialize_weights(
            (self.enc_score_head, *self.dec_score_head),
            (self.enc_bbox_head, *self.dec_bbox_head),
            (self.enc_output[0], *self.query_pos_head.layers),
        )

    def initialize(self, strides: Sequence[int]) -> None:
        """Learn the strides of the feature maps."""
        self.strides = tuple(strides)

    def take_recipe(self, hyp: Mapping[str, Any]) -> None:
        """Numbers of denoising; what the YAML switched off with a 0 stays off."""
        take_noise(self, hyp)

    def tell_limits(self, sizes: np.ndarray, per_image: np.ndarray) -> None:
        """Objects beyond the queries."""
        tell_objects_beyond(self.num_queries, per_image)

    def forward(self, features: Sequence[Tensor], targets: Targets | None = None) -> RTDETRRaw:
        """Predict from one map (B, C_l, H_l, W_l) a level, finest first.

        In training, `targets` add denoising queries.
        """
        memory, sizes = project(self.input_proj, features)
        image_size = image_size_of(sizes, self.strides)
        selected = select_queries(
            memory,
            sizes,
            self.num_queries,
            self.enc_output,
            self.enc_score_head,
            self.enc_bbox_head,
        )
        content, boxes = selected.features.detach(), selected.boxes.detach()
        queries = WithNoise(content, boxes, None, None)
        if self.training and self.denoising_class_embed is not None:
            queries = add_noisy_queries(
                self, self.denoising_class_embed, content, boxes, targets, image_size
            )
        logits, boxes = self._refine(*queries[:2], memory, sizes, queries.allowed)
        count, denoising = queries.num_noisy, None
        if (noisy := queries.noisy) is not None:
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

    def decode(self, raw: RTDETRRaw) -> Decoded:
        """Boxes in xyxy pixels and class probabilities of the last stage."""
        return decode_set(raw.logits[-1], raw.boxes[-1], raw.image_size)

    def export_layout(self, raw: RTDETRRaw) -> Tensor:
        """(B, Q, 4 + C): cxcywh in [0, 1], then class probabilities."""
        return queries_layout(raw.logits[-1], raw.boxes[-1])
