"""Whether a list of detections is what NMS or top-k makes of given boxes and scores."""

from __future__ import annotations

import torch
from torch import Tensor

from deploy.exporters.network import ExportOptions
from utils.structures import Detections

EXACT = 1e-5
"""Slack in the rules of NMS for sums that another runtime rounds in another way."""


def selection_fault(
    found: Detections, boxes: Tensor, scores: Tensor, kind: str, options: ExportOptions
) -> str:
    """What is wrong with `found` as the NMS or top-k of one image; empty if nothing.

    Greedy suppression is settled by its rules, whatever order equal scores are taken in: what is
    kept comes from the candidates, best first, nothing kept overlaps a better one of its class,
    and whatever is missing overlaps a better one that is kept, or is worse than all of a full list.

    Args:
        found: detections, K.
        boxes: xyxy pixels, (A, 4).
        scores: (A, C).
    """
    from torchvision.ops import box_iou

    best, labels = scores.max(1)
    likely = best > options.conf_thres
    boxes, best, labels = boxes[likely], best[likely], labels[likely]
    count = min(len(best), options.max_det)
    if len(found.scores) > count or (kind == "topk" and len(found.scores) != count):
        return f"{len(found.scores)} detections, expected {count}"
    if not count:
        return ""
    if bool((found.scores.diff() > 0).any()):
        return "detections that are not in order of score"
    distance = torch.cdist(found.boxes, boxes, p=1) / boxes.abs().max().clamp(min=1)
    distance = distance + (found.scores[:, None] - best).abs() + (found.labels[:, None] != labels)
    nearest = distance.min(1) if len(found.scores) else None
    if nearest is not None and float(nearest.values.max()) > EXACT:
        return f"detection {int(nearest.values.argmax())}, which is none of the candidates"
    is_kept = torch.zeros(len(best), dtype=torch.bool, device=best.device)
    if nearest is not None:
        is_kept[nearest.indices] = True
    is_full = len(found.scores) == options.max_det
    floor = float(found.scores.min()) if is_full else options.conf_thres
    missing = ~is_kept & (best > floor + EXACT)
    if kind == "topk":
        return f"{int(missing.sum())} better candidates left out" if bool(missing.any()) else ""

    overlap = box_iou(found.boxes, boxes) * (found.labels[:, None] == labels)
    is_better = found.scores[:, None] >= best - EXACT
    covered = ((overlap > options.iou_thres - EXACT) & is_better).any(0)
    if bool((missing & ~covered).any()):
        count = int((missing & ~covered).sum())
        return f"{count} candidates missing that nothing suppresses"
    among = box_iou(found.boxes, found.boxes) * (found.labels[:, None] == found.labels)
    if bool((among.triu(1) > options.iou_thres + EXACT).any()):
        return "two detections of one class that overlap too much"
    return ""
