"""D-FINE's head: queries as in RT-DETR, boxes as four distributions that every layer refines.

Sources: D-FINE (arXiv 2410.13842): fine-grained distribution refinement, gated fusion, points by level; DEIMv2
(arXiv 2509.20787) for the leaner layers that `deimv2` and `small` build.

Letters: B batch, C classes, D width, N bins of an edge less one, Q queries, K denoising queries, L decoder layers,
S stages: before the first layer's refinement, and the layers.
Boxes are cxcywh, normalised to [0, 1] by the image size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.common import batch_norm
from models.head import Head
from models.heads.denoising import WithNoise, add_noisy_queries, take_noise
from models.heads.distributions import bin_distances, boxes_from_distances, mean_distances
from models.heads.gated_layers import GatedDecoderLayer
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
from models.registry import LayerError, register
from models.transformer import (
    MLP,
    Decoder,
    LayerNorm,
    MapSize,
    inverse_sigmoid,
)
from utils.boxes import widen
from utils.structures import Decoded, Targets

HALF_RANGE = 0.5  # a: the finest bins reach this share of the side beyond an edge
LARGEST_POSITION = 10.0  # of a query's positional embedding
LIKELIEST = 4  # bins of each edge whose probabilities tell how sure the edge is


class Refined(NamedTuple):
    """What the decoder makes of queries.

    Attributes:
        logits: class logits, (S, B, Q, C); in eval mode of the last layer alone, S = 1.
        boxes: cxcywh in [0, 1], (S, B, Q, 4).
        edges: logits of the distributions, (L, B, Q, 4, N + 1); in eval mode of the last layer alone.
        reference: boxes that the distributions refine, without gradient, (B, Q, 4).
    """

    logits: Tensor
    boxes: Tensor
    edges: Tensor
    reference: Tensor

    def part(self, queries: slice) -> Refined:
        """The same of some queries."""
        logits, boxes, edges = (tensor[:, :, queries] for tensor in self[:3])
        return Refined(logits, boxes, edges, self.reference[:, queries])


class RefinedNoise(NamedTuple):
    """What became of the denoising queries.

    Attributes:
        refined: as for other queries.
        object_index: the object of the targets that each query must restore, (B, K); -1 for none.
        groups: how many times each object occurs.
    """

    refined: Refined
    object_index: Tensor
    groups: int


class DFINERaw(NamedTuple):
    """Raw predictions.

    Attributes:
        refined: of the ordinary queries.
        encoder_logits: class logits of the tokens that became queries, (B, Q, C).
        encoder_boxes: their boxes, (B, Q, 4).
        denoising: None outside training, and in a batch without objects.
        image_size: (height, width) in pixels; symbolic while a graph is exported.
    """

    refined: Refined
    encoder_logits: Tensor
    encoder_boxes: Tensor
    denoising: RefinedNoise | None
    image_size: tuple[int, int]


class EdgeQuality(nn.Module):
    """What the shape of the four distributions adds to all class logits of a query: sharp ones are sure of their edge."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.reg_conf = MLP(4 * (LIKELIEST + 1), hidden, 1, num_layers=2)
        for parameter in self.reg_conf.layers[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, logits: Tensor, edges: Tensor) -> Tensor:
        """Class logits (B, Q, C) and edges (B, Q, 4, N + 1) to class logits."""
        best = edges.softmax(-1).topk(LIKELIEST, -1).values
        statistics = torch.cat((best, best.mean(-1, keepdim=True)), -1).flatten(-2)
        return logits + self.reg_conf(statistics.to(logits.dtype))


@register(decoder_rule)
class DFINEDecoder(Head[DFINERaw]):
    """The head of D-FINE.

    Args:
        num_classes: C.
        channels: of each feature map, finest first.
        hidden: D, a multiple of `num_heads`.
        num_queries: Q; fewer where the maps have fewer cells.
        num_points: sampling points per head, one number or one a level.
        num_heads: attention heads.
        num_layers: L.
        feedforward: width of the decoder's feed-forward parts.
        reg_max: N, even, 4 or more.
        reg_scale: c; the larger, the finer the bins near an edge are, in sides of the box.
        num_denoising, label_noise, box_noise: as in `RTDETRDecoder`.
        deimv2: DEIMv2's form: layers as `GatedDecoderLayer` says, one positional embedding of the first boxes for all of
            them, SiLU between linear layers, tokens ranked as they are.
        small: as in DEIMv2's smallest sizes: no gates, one box head for all layers.
    """

    family = "dfine"
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
        reg_max: int = 32,
        reg_scale: float = 4.0,
        num_denoising: int = 100,
        label_noise: float = 0.5,
        box_noise: float = 1.0,
        deimv2: bool = False,
        small: bool = False,
    ) -> None:
        super().__init__(num_classes, len(channels))
        if reg_max < 4 or reg_max % 2:
            raise LayerError(f"got reg_max {reg_max}, expected an even number from 4")
        self.num_queries, self.reg_max, self.deimv2 = num_queries, reg_max, deimv2
        self.num_denoising, self.label_noise, self.box_noise = num_denoising, label_noise, box_noise
        self.strides = tuple(8 * 2**level for level in range(len(channels)))
        self.input_proj = nn.ModuleList(
            nn.Identity()
            if c == hidden
            else nn.Sequential(nn.Conv2d(c, hidden, 1, bias=False), batch_norm(hidden))
            for c in channels
        )
        points = [num_points] * len(channels) if isinstance(num_points, int) else num_points
        if len(points) != len(channels):
            raise LayerError(
                f"got num_points {points}, expected one for each of {len(channels)} maps"
            )
        self.decoder = Decoder(
            GatedDecoderLayer(hidden, num_heads, feedforward, points, deimv2, not small)
            for _ in range(num_layers)
        )
        # Constants that come with the weights.
        self.up = nn.Parameter(torch.tensor([HALF_RANGE]), requires_grad=False)
        self.reg_scale = nn.Parameter(torch.tensor([float(reg_scale)]), requires_grad=False)
        self._add_predictors(hidden, num_layers, 1 if small else num_layers)

    def _add_predictors(self, hidden: int, num_layers: int, box_heads: int) -> None:
        """What makes queries of tokens, and classes and boxes of queries."""
        count = self.num_classes
        self.denoising_class_embed = (
            nn.Embedding(count + 1, hidden, padding_idx=count) if self.num_denoising else None
        )
        act = functional.silu if self.deimv2 else functional.relu
        if self.deimv2:
            self.query_pos_head = MLP(4, hidden, hidden, 3, act)
            self.enc_output: nn.Module = nn.Identity()
        else:
            self.query_pos_head = MLP(4, 2 * hidden, hidden, 2, act)
            self.enc_output = nn.Sequential(nn.Linear(hidden, hidden), LayerNorm(hidden))
        self.enc_score_head = nn.Linear(hidden, count)
        self.enc_bbox_head = MLP(hidden, hidden, 4, 3, act)
        self.pre_bbox_head = MLP(hidden, hidden, 4, 3, act)
        self.dec_score_head = nn.ModuleList(nn.Linear(hidden, count) for _ in range(num_layers))
        self.dec_bbox_head = nn.ModuleList(
            MLP(hidden, hidden, 4 * (self.reg_max + 1), 3, act) for _ in range(box_heads)
        )
        self.quality = nn.ModuleList(EdgeQuality() for _ in range(num_layers))
        initialize_weights(
            (self.enc_score_head, *self.dec_score_head),
            (self.enc_bbox_head, self.pre_bbox_head, *self.dec_bbox_head),
            (
                m
                for m in (*self.enc_output.modules(), *self.query_pos_head.layers)
                if isinstance(m, nn.Linear)
            ),
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

    @property
    def bin_distances(self) -> Tensor:
        """W, in the unit of `models.heads.distributions`, (N + 1,)."""
        return bin_distances(self.reg_max, widen(self.up), widen(self.reg_scale))

    def forward(self, features: Sequence[Tensor], targets: Targets | None = None) -> DFINERaw:
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
        refined, denoising = self._refine(queries, memory, sizes), None
        if (noisy := queries.noisy) is not None:
            copies = refined.part(slice(queries.num_noisy))
            denoising = RefinedNoise(copies, noisy.object_index, noisy.groups)
            refined = refined.part(slice(queries.num_noisy, None))
        return DFINERaw(refined, selected.logits, selected.boxes, denoising, image_size)

    def _refine(self, queries: WithNoise, memory: Tensor, sizes: Sequence[MapSize]) -> Refined:
        """What the layers make of the queries; in eval mode the last one's alone.

        Layers add to the logits of the distributions, with gradient to those before; what they attend around, and what
        they take over of the layer before, has none.
        """
        content, boxes, allowed, _ = queries
        distances, scale = self.bin_distances, widen(self.reg_scale)
        logits, all_boxes, all_edges = [], [], []
        reference, edges, known = boxes, content.new_zeros(()), torch.zeros_like(content)
        for number, layer in enumerate(self.decoder.layers):
            if number == 0 or not self.deimv2:
                position = self.query_pos_head(boxes.to(content.dtype))
                position = position.clamp(-LARGEST_POSITION, LARGEST_POSITION)
            content = layer(content, position, boxes, memory, sizes, allowed)
            if number == 0:
                start = (widen(self.pre_bbox_head(content)) + inverse_sigmoid(boxes)).sigmoid()
                reference = start.detach()
                if self.training:
                    logits.append(self.dec_score_head[0](content))
                    all_boxes.append(start)
            box_head = self.dec_bbox_head[number % len(self.dec_bbox_head)]
            added = widen(box_head(content + known))
            edges = added.unflatten(-1, (4, self.reg_max + 1)) + edges
            refined = boxes_from_distances(reference, mean_distances(edges, distances), scale)
            if self.training or number == len(self.decoder.layers) - 1:
                scores = self.dec_score_head[number](content)
                logits.append(self.quality[number](scores, edges))
                all_boxes.append(refined)
                all_edges.append(edges)
            boxes, known = refined.detach(), content.detach()
        return Refined(
            torch.stack(logits), torch.stack(all_boxes), torch.stack(all_edges), reference
        )

    def decode(self, raw: DFINERaw) -> Decoded:
        """Boxes in xyxy pixels and class probabilities of the last layer."""
        return decode_set(raw.refined.logits[-1], raw.refined.boxes[-1], raw.image_size)

    def export_layout(self, raw: DFINERaw) -> Tensor:
        """(B, Q, 4 + C): cxcywh in [0, 1], then class probabilities."""
        return queries_layout(raw.refined.logits[-1], raw.refined.boxes[-1])
