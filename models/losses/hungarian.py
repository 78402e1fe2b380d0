"""RT-DETR's set loss: varifocal, L1 and GIoU for every decoder layer, the encoder and denoising.

Sources: RT-DETR (arXiv 2304.08069, eq. 3), varifocal loss (arXiv 2008.13367, eq. 2),
DETR (arXiv 2005.12872).

Letters: S stages, B batch, Q queries, C classes, N objects, P matched pairs.
Boxes are cxcywh, normalised.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from models.assigners.hungarian import HungarianAssigner, Match
from models.heads.rtdetr import RTDETRDecoder, RTDETRRaw
from utils.boxes import cxcywh_to_xyxy, elementwise_iou, generalized_iou, xyxy_to_cxcywh
from utils.structures import Targets


class StageLosses(NamedTuple):
    """Unweighted sums of each stage, (S,) each."""

    giou: Tensor
    cls: Tensor
    l1: Tensor


class HungarianLoss:
    """Raw predictions of `RTDETRDecoder` and targets to named losses.

    Args:
        head: the head whose raw predictions come in.
        hyp: weights `cls`, `l1`, `giou`; `vfl_alpha`, `vfl_gamma` and, for batches without objects,
            `vfl_gamma_empty`; matching costs `cost_class`, `cost_l1`, `cost_giou`, `cost_alpha`,
            `cost_gamma`.
    """

    times_batch = False

    def __init__(self, head: RTDETRDecoder, hyp: Mapping[str, Any]) -> None:
        self.weights = {name: hyp[name] for name in StageLosses._fields}
        self.alpha, self.gamma = hyp["vfl_alpha"], hyp["vfl_gamma"]
        self.gamma_empty = hyp["vfl_gamma_empty"]
        self.assigner = HungarianAssigner(
            hyp["cost_class"],
            hyp["cost_l1"],
            hyp["cost_giou"],
            hyp["cost_alpha"],
            hyp["cost_gamma"],
        )

    def __call__(self, raw: RTDETRRaw, targets: Targets) -> dict[str, Tensor]:
        """Weighted losses per object.

        `giou`, `cls` and `l1` are those of the last stage, `giou_aux` and so on the sums over all
        other stages and the encoder, `giou_dn` and so on the sums over the denoising queries of
        all stages (0 without any).
        """
        height, width = raw.image_size
        scale = targets.boxes.new_tensor([width, height, width, height])
        targets = targets._replace(boxes=xyxy_to_cxcywh(targets.boxes.float() / scale))
        logits = torch.cat((raw.encoder_logits[None], raw.logits)).float()
        boxes = torch.cat((raw.encoder_boxes[None], raw.boxes)).float()
        match = self.assigner(logits, boxes, targets.image_index, targets.labels, targets.boxes)
        count = mean_object_count(targets)
        stages = self._stage_losses(logits, boxes, targets, match)
        terms = {
            name: self.weights[name] * loss[-1] / count for name, loss in stages._asdict().items()
        }
        for name, loss in stages._asdict().items():
            terms[f"{name}_aux"] = self.weights[name] * loss[:-1].sum() / count
        terms.update(self._denoising_losses(raw, targets, count))
        return terms

    def _denoising_losses(
        self, raw: RTDETRRaw, targets: Targets, count: Tensor
    ) -> dict[str, Tensor]:
        """Losses of queries whose objects are known: no matching."""
        if raw.denoising is None:
            return {f"{name}_dn": raw.boxes.new_zeros(()) for name in StageLosses._fields}
        logits, boxes, object_index, groups = raw.denoising
        image, query = (object_index >= 0).nonzero(as_tuple=True)
        objects = object_index[image, query]
        stage = torch.arange(len(logits), device=image.device).repeat_interleave(len(image))
        match = Match(stage, *(t.repeat(len(logits)) for t in (image, query, objects)))
        stages = self._stage_losses(logits.float(), boxes.float(), targets, match)
        return {
            f"{name}_dn": self.weights[name] * loss.sum() / (count * groups)
            for name, loss in stages._asdict().items()
        }

    def _stage_losses(
        self, logits: Tensor, boxes: Tensor, targets: Targets, match: Match
    ) -> StageLosses:
        """Sums per stage, from logits (S, B, Q, C) and boxes (S, B, Q, 4).

        Without pairs the box losses are 0, but still hang on the boxes, so that every parameter
        has a gradient.
        """
        place = (match.stage, match.image, match.query)
        chosen, wanted = boxes[place], targets.boxes[match.object]
        corners, wanted_corners = cxcywh_to_xyxy(chosen), cxcywh_to_xyxy(wanted)
        giou = 1 - generalized_iou(corners, wanted_corners)
        l1 = (chosen - wanted).abs().sum(-1)
        with torch.no_grad():
            quality = torch.zeros_like(logits)
            is_class = torch.zeros_like(logits)
            labels = targets.labels[match.object]
            quality[(*place, labels)] = elementwise_iou(corners, wanted_corners)
            is_class[(*place, labels)] = 1
        none = logits.new_zeros(len(logits))
        gamma = self.gamma if len(targets.labels) else self.gamma_empty
        return StageLosses(
            none.index_add(0, match.stage, giou),
            self._varifocal(logits, quality, is_class, gamma).sum((1, 2, 3)),
            none.index_add(0, match.stage, l1),
        )

    def _varifocal(self, logits: Tensor, quality: Tensor, is_class: Tensor, gamma: float) -> Tensor:
        """Elementwise varifocal loss; the target of a matched query's class is its box's overlap.

        The weight of the negatives takes gradient too, which about doubles theirs.
        """
        weight = self.alpha * logits.sigmoid() ** gamma * (1 - is_class) + quality
        return weight * functional.binary_cross_entropy_with_logits(
            logits, quality, reduction="none"
        )


def mean_object_count(targets: Targets) -> Tensor:
    """Objects per process, at least 1: what the sums are divided by.

    In distributed training the mean over all processes is taken, so that objects weigh the same
    wherever they are.
    """
    count = torch.tensor(float(len(targets.labels)), device=targets.boxes.device)
    distributed = torch.distributed
    if torch.is_grad_enabled() and distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(count)
        count = count / distributed.get_world_size()
    return count.clamp(min=1)
