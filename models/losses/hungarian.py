"""RT-DETR's set loss: a class loss, L1 and a box loss for every decoder layer, the encoder and denoising.

Sources: RT-DETR (arXiv 2304.08069, eq. 3) with varifocal loss and GIoU, DETR (arXiv 2005.12872).
The terms of the box loss are called `giou` whatever `box_loss` says, as their weight in the recipe is.

Letters: S stages, B batch, Q queries, C classes, N objects, P matched pairs.
Boxes are cxcywh, normalised.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.assigners.hungarian import HungarianAssigner, Match
from models.heads.rtdetr import RTDETRDecoder, RTDETRRaw
from models.losses.box import BoxLoss, Frame
from models.losses.classification import ClassLoss, ClassTargets, choose_class_loss
from models.losses.epochs import SameEveryEpoch
from utils.boxes import cxcywh_to_xyxy, elementwise_iou, xyxy_to_cxcywh
from utils.structures import Targets


class StageLosses(NamedTuple):
    """Unweighted sums of each stage, (S,) each."""

    giou: Tensor
    cls: Tensor
    l1: Tensor


class HungarianLoss(SameEveryEpoch):
    """Raw predictions of `RTDETRDecoder` and targets to named losses.

    Args:
        head: the head whose raw predictions come in.
        hyp: weights `cls`, `l1`, `giou`; `box_loss` (GIoU if it has none), `cls_loss` (`varifocal`) and
            the numbers that these read, for batches without objects `vfl_gamma_empty` in place of
            `vfl_gamma`; matching costs `cost_class`, `cost_l1`, `cost_giou`, `cost_alpha`, `cost_gamma`.
        allow_code: whether `box_loss` may be a user's file.
    """

    times_batch = False

    def __init__(
        self, head: RTDETRDecoder, hyp: Mapping[str, Any], *, allow_code: bool = False
    ) -> None:
        self.weights = {name: hyp[name] for name in StageLosses._fields}
        self.box_loss = BoxLoss(hyp.get("box_loss", "giou"), hyp, allow_code=allow_code)
        self.class_loss = choose_class_loss(hyp.get("cls_loss", "varifocal"), hyp)
        self.hyp = hyp
        self.hyp_empty = {**hyp, "vfl_gamma": hyp["vfl_gamma_empty"]}
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
        targets, frame = in_shares(targets, raw.image_size)
        logits = torch.cat((raw.encoder_logits[None], raw.logits)).float()
        boxes = torch.cat((raw.encoder_boxes[None], raw.boxes)).float()
        match = self.assigner(
            logits, boxes, targets.image_index, targets.labels, targets.boxes,
            lambda queries, objects: self.box_loss.similarity(queries, objects, frame),
        )  # fmt: skip
        count = mean_count(targets.labels)
        stages = self._stage_losses(logits, boxes, targets, match, frame)
        terms = {
            name: self.weights[name] * loss[-1] / count for name, loss in stages._asdict().items()
        }
        for name, loss in stages._asdict().items():
            terms[f"{name}_aux"] = self.weights[name] * loss[:-1].sum() / count
        terms.update(self._denoising_losses(raw, targets, count, frame))
        self.box_loss.end_step()
        return terms

    def _denoising_losses(
        self, raw: RTDETRRaw, targets: Targets, count: Tensor, frame: Frame
    ) -> dict[str, Tensor]:
        """Losses of queries whose objects are known: no matching."""
        if raw.denoising is None:
            return {f"{name}_dn": raw.boxes.new_zeros(()) for name in StageLosses._fields}
        logits, boxes, object_index, groups = raw.denoising
        match = for_each_stage(match_of_copies(object_index), len(logits))
        stages = self._stage_losses(logits.float(), boxes.float(), targets, match, frame)
        return {
            f"{name}_dn": self.weights[name] * loss.sum() / (count * groups)
            for name, loss in stages._asdict().items()
        }

    def _stage_losses(
        self, logits: Tensor, boxes: Tensor, targets: Targets, match: Match, frame: Frame
    ) -> StageLosses:
        """Sums per stage, from logits (S, B, Q, C) and boxes (S, B, Q, 4)."""
        giou, l1 = box_sums(self.box_loss, boxes, targets, match, frame)
        numbers = self.hyp if len(targets.labels) else self.hyp_empty
        cls = class_sums(self.class_loss, numbers, logits, boxes, targets, match)
        return StageLosses(giou, cls, l1)


def in_shares(targets: Targets, image_size: tuple[int, int]) -> tuple[Targets, Frame]:
    """Targets whose boxes are cxcywh, shares of the image (height, width) in pixels, and the frame of such boxes."""
    height, width = image_size
    scale = targets.boxes.new_tensor([width, height, width, height])
    boxes = xyxy_to_cxcywh(targets.boxes.float() / scale)
    return targets._replace(boxes=boxes), Frame((height, width), unit=scale)


def match_of_copies(object_index: Tensor) -> Match:
    """Denoising queries (B, K) and the objects they were made from, as pairs of stage 0."""
    image, query = (object_index >= 0).nonzero(as_tuple=True)
    return Match(torch.zeros_like(image), image, query, object_index[image, query])


def for_each_stage(match: Match, count: int) -> Match:
    """Pairs of one stage for stages 0 to `count` - 1, stage by stage."""
    stage = torch.arange(count, device=match.image.device).repeat_interleave(len(match.image))
    return Match(stage, *(part.repeat(count) for part in match[1:]))


def box_sums(
    box_loss: BoxLoss, boxes: Tensor, targets: Targets, match: Match, frame: Frame
) -> tuple[Tensor, Tensor]:
    """Box loss and L1 of the matched pairs, a sum a stage, (S,) each, from boxes (S, B, Q, 4).

    Without pairs they are 0, but still hang on the boxes, so that every parameter has a gradient.
    """
    chosen, wanted = boxes[match.stage, match.image, match.query], targets.boxes[match.object]
    overlaps = box_loss(cxcywh_to_xyxy(chosen), cxcywh_to_xyxy(wanted), frame)
    none = boxes.new_zeros(len(boxes))
    l1 = (chosen - wanted).abs().sum(-1)
    return none.index_add(0, match.stage, overlaps), none.index_add(0, match.stage, l1)


def class_sums(
    class_loss: ClassLoss,
    numbers: Mapping[str, Any],
    logits: Tensor,
    boxes: Tensor,
    targets: Targets,
    match: Match,
) -> Tensor:
    """Class loss of all queries, a sum a stage, (S,), from logits (S, B, Q, C) and boxes (S, B, Q, 4)."""
    place = (match.stage, match.image, match.query)
    labels = targets.labels[match.object]
    with torch.no_grad():
        quality, is_class = torch.zeros_like(logits), torch.zeros_like(logits)
        corners = cxcywh_to_xyxy(boxes[place]), cxcywh_to_xyxy(targets.boxes[match.object])
        quality[(*place, labels)] = elementwise_iou(*corners)
        is_class[(*place, labels)] = 1
    aims = ClassTargets(is_class, quality, is_class)
    return class_loss(logits, aims, numbers).sum((1, 2, 3))


def mean_count(things: Tensor) -> Tensor:
    """How many things (N, ...) a process has, at least 1: what the sums over them are divided by.

    In distributed training the mean over all processes is taken, so that they weigh the same
    wherever they are.
    """
    count = torch.tensor(float(len(things)), device=things.device)
    distributed = torch.distributed
    if torch.is_grad_enabled() and distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(count)
        count = count / distributed.get_world_size()
    return count.clamp(min=1)
