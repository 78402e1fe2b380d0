"""D-FINE's loss: the set losses of RT-DETR, and two on the distributions of edges.

Source: D-FINE (arXiv 2410.13842): fine-grained localisation, self-distillation from the last layer, one matching for the
boxes of all stages.

Letters: S stages, L decoder layers, B batch, Q queries, K denoising queries, C classes, N bins of an edge less one,
P matched pairs.
Boxes are cxcywh, normalised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from models.assigners.hungarian import HungarianAssigner, Match
from models.assigners.union import union_of_stages
from models.heads.dfine import DFINEDecoder, DFINERaw, Refined
from models.heads.distributions import Bins, bins_of, distances_to_boxes
from models.losses.box import BoxLoss, Frame
from models.losses.classification import choose_class_loss
from models.losses.epochs import SameEveryEpoch
from models.losses.hungarian import (
    box_sums,
    class_sums,
    for_each_stage,
    in_shares,
    match_of_copies,
    mean_count,
)
from utils.boxes import cxcywh_to_xyxy, elementwise_iou
from utils.structures import Targets


class StageLosses(NamedTuple):
    """Weighted losses, one number a stage.

    Attributes:
        giou: (S,).
        cls: (S,).
        l1: (S,).
        fgl: of the layers, (L,).
        ddf: of the layers but the last, (L - 1,).
    """

    giou: Tensor
    cls: Tensor
    l1: Tensor
    fgl: Tensor
    ddf: Tensor


class Shares(NamedTuple):
    """How much matched and unmatched edges weigh in the distillation."""

    matched: float
    unmatched: float


class DFINELoss(SameEveryEpoch):
    """Raw predictions of `DFINEDecoder` and targets to named losses.

    Args:
        head: the head whose raw predictions come in.
        hyp: weights `cls`, `l1`, `giou`, `fgl`, `ddf`; `ddf_temperature`; `union`; `box_loss`, `cls_loss` and the numbers
            that these read; matching costs `cost_class`, `cost_l1`, `cost_giou`, `cost_alpha`, `cost_gamma`.
        allow_code: whether `box_loss` may be a user's file.
    """

    times_batch = False

    def __init__(
        self, head: DFINEDecoder, hyp: Mapping[str, Any], *, allow_code: bool = False
    ) -> None:
        self.head, self.hyp = head, hyp
        self.weights = {name: hyp[name] for name in StageLosses._fields}
        self.temperature, self.is_joined = float(hyp["ddf_temperature"]), hyp["union"]
        self.box_loss = BoxLoss(hyp["box_loss"], hyp, allow_code=allow_code)
        self.class_loss = choose_class_loss(hyp["cls_loss"], hyp)
        self.assigner = HungarianAssigner(
            hyp["cost_class"],
            hyp["cost_l1"],
            hyp["cost_giou"],
            hyp["cost_alpha"],
            hyp["cost_gamma"],
        )

    def __call__(self, raw: DFINERaw, targets: Targets) -> dict[str, Tensor]:
        """Weighted losses.

        `giou`, `cls`, `l1` and `fgl` are those of the last layer, `giou_aux` and so on the sums over all other stages
        and the encoder, `giou_dn` and so on the sums over the denoising queries of all stages (0 without any).
        `ddf` teaches all layers but the last.
        """
        targets, frame = in_shares(targets, raw.image_size)
        stages, shares = self.stage_losses(raw, targets, frame)
        terms = {name: stages._asdict()[name][-1] for name in ("giou", "cls", "l1", "fgl")}
        terms |= {f"{name}_aux": stages._asdict()[name][:-1].sum() for name in terms}
        terms["ddf"] = stages.ddf.sum()
        terms |= self._denoising_losses(raw, targets, frame, shares)
        self.box_loss.end_step()
        return terms

    def stage_losses(
        self, raw: DFINERaw, targets: Targets, frame: Frame
    ) -> tuple[StageLosses, Shares]:
        """Losses of the encoder, of what comes before the first refinement (in training), and of each layer.

        Classes go by each stage's own matching and are divided by the objects, boxes by the union of all matchings and
        are divided by its pairs, or without `union` as classes are.

        Args:
            raw: of the head.
            targets: boxes as shares of the image.
            frame: where they lie.
        """
        refined = _as_float(raw.refined)
        logits = torch.cat((raw.encoder_logits[None].float(), refined.logits))
        boxes = torch.cat((raw.encoder_boxes[None].float(), refined.boxes))
        match = self.assigner(
            logits, boxes, targets.image_index, targets.labels, targets.boxes,
            lambda queries, objects: self.box_loss.similarity(queries, objects, frame),
        )  # fmt: skip
        union = union_of_stages(match)
        shares = shares_of(union, refined.boxes.shape[1:3])
        objects, pairs = mean_count(targets.labels), mean_count(union.query)
        of_boxes = for_each_stage(union, len(boxes)) if self.is_joined else match
        giou, l1 = box_sums(self.box_loss, boxes, targets, of_boxes, frame)
        cls = class_sums(self.class_loss, self.hyp, logits, boxes, targets, match)
        fgl, ddf = self._edge_losses(refined, targets, union, shares)
        count = pairs if self.is_joined else objects
        found = StageLosses(giou / count, cls / objects, l1 / count, fgl / pairs, ddf)
        return self._weighted(found), shares

    def _denoising_losses(
        self, raw: DFINERaw, targets: Targets, frame: Frame, shares: Shares
    ) -> dict[str, Tensor]:
        """Losses of queries whose objects are known: no matching, and the shares of the other queries."""
        names = [f"{name}_dn" for name in StageLosses._fields]
        if raw.denoising is None:
            return {name: raw.encoder_boxes.new_zeros(()) for name in names}
        refined, match = (
            _as_float(raw.denoising.refined),
            match_of_copies(raw.denoising.object_index),
        )
        of_stages = for_each_stage(match, len(refined.boxes))
        count = mean_count(targets.labels) * raw.denoising.groups
        giou, l1 = box_sums(self.box_loss, refined.boxes, targets, of_stages, frame)
        cls = class_sums(self.class_loss, self.hyp, *refined[:2], targets, of_stages)
        fgl, ddf = self._edge_losses(refined, targets, match, shares)
        found = StageLosses(giou / count, cls / count, l1 / count, fgl / count, ddf)
        return {name: loss.sum() for name, loss in zip(names, self._weighted(found), strict=True)}

    def _weighted(self, losses: StageLosses) -> StageLosses:
        return StageLosses(*(self.weights[n] * loss for n, loss in losses._asdict().items()))

    def _edge_losses(
        self, refined: Refined, targets: Targets, match: Match, shares: Shares
    ) -> tuple[Tensor, Tensor]:
        """Sums of the fine-grained loss of each layer, (L,), and the distillation of all but the last, (L - 1,)."""
        place = (match.image, match.query)
        wanted = cxcywh_to_xyxy(targets.boxes[match.object])
        layers = len(refined.edges)
        with torch.no_grad():
            found = cxcywh_to_xyxy(refined.boxes[-layers:, match.image, match.query])
            overlap = elementwise_iou(found, wanted.expand_as(found))
            reference, scale = refined.reference[place], self.head.reg_scale.float()
            distances = distances_to_boxes(reference, wanted, scale)
            bins = bins_of(distances, self.head.bin_distances.float())
            weight = refined.logits[-1].sigmoid().amax(-1).repeat(layers - 1, 1, 1)
            weight[:, match.image, match.query] = overlap[:-1]
            is_matched = torch.zeros_like(refined.reference[..., 0], dtype=torch.bool)
            is_matched[place] = True
        edges = refined.edges
        fgl = fine_grained_loss(edges[:, match.image, match.query], bins) * overlap[..., None]
        ddf = (
            distillation_loss(edges[:-1], edges[-1].detach(), self.temperature) * weight[..., None]
        )
        return fgl.sum((1, 2)), mean_by_shares(ddf, is_matched, shares)


def fine_grained_loss(edges: Tensor, bins: Bins) -> Tensor:
    """Cross entropy with the two bins around each target, weighted by how near they are.

    Args:
        edges: logits, (..., P, 4, N + 1).
        bins: of the targets, (P, 4).

    Returns:
        (..., P, 4).
    """
    log_share = edges.log_softmax(-1)
    shape = edges.shape[:-1]
    left, right = (
        log_share.gather(-1, index.expand(shape)[..., None])[..., 0]
        for index in (bins.left, bins.left + 1)
    )
    return -left * (1 - bins.right_share) - right * bins.right_share


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """temperature^2 KL(teacher || student) of each edge, (..., 4), from logits (..., 4, N + 1) at that temperature."""
    log_student, log_teacher = (
        (logits / temperature).log_softmax(-1)
        for logits in torch.broadcast_tensors(student, teacher)
    )
    divergence = functional.kl_div(log_student, log_teacher, reduction="none", log_target=True)
    return temperature**2 * divergence.sum(-1)


def shares_of(union: Match, shape: Sequence[int]) -> Shares:
    """Roots of the numbers of matched and unmatched queries, from the pairs and (B, Q).

    Published are edges an image at a batch of 8; a common factor of both makes no difference.
    """
    matched = len(union.query)
    return Shares(math.sqrt(matched), math.sqrt(math.prod(shape) - matched))


def mean_by_shares(loss: Tensor, is_matched: Tensor, shares: Shares) -> Tensor:
    """Means over matched and over unmatched edges, joined by their shares.

    Args:
        loss: of each edge, (S, B, Q, 4).
        is_matched: (B, Q).
        shares: of the two.

    Returns:
        (S,).
    """
    total = loss.new_zeros(len(loss))
    for chosen, share in ((is_matched, shares.matched), (~is_matched, shares.unmatched)):
        total = total + share * (loss * chosen[..., None]).sum((1, 2, 3)) / (
            4 * chosen.sum()
        ).clamp(min=1)
    return total / max(shares.matched + shares.unmatched, 1.0)


def _as_float(refined: Refined) -> Refined:
    return Refined(*(tensor.float() for tensor in refined))
