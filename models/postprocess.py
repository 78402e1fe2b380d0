"""From decoded predictions to detections: non-maximum suppression, or the best scores of a set.

Letters: B batch, A anchor points (or queries), C classes, M candidates of one image, K detections.

NMS follows torchvision's `batched_nms`: a box suppresses boxes of lower score and the same class
whose IoU with it is above the threshold. Heads that predict a set (RT-DETR) need no suppression,
only their best scores; of a one-to-one branch each prediction counts with its best class alone.
Not-a-number scores and boxes that are not finite never become detections.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from utils.structures import Decoded, Detections

MAX_CANDIDATES = 30_000
"""The most boxes of one image that enter suppression, best scores first."""
KINDS = ("nms", "topk", "best")
FEW = (25_000, 1000)
"""Candidates up to which one call for all classes is quicker than one a class, on a GPU and on the CPU: torchvision's."""


def postprocess(
    decoded: Decoded,
    kind: str,
    *,
    conf_thres: float,
    iou_thres: float,
    max_det: int,
    classes: Sequence[int] | None = None,
    agnostic: bool = False,
    multi_label: bool = False,
) -> list[Detections]:
    """Turn decoded predictions into the detections of each image, best score first.

    Args:
        decoded: boxes (B, A, 4), xyxy pixels, and scores (B, A, C).
        kind: one of `KINDS`, as the head says.
        conf_thres: a detection's score must be above it, in [0, 1].
        iou_thres: a box whose IoU with a better one is above it is suppressed (NMS only).
        max_det: the most detections of one image.
        classes: keep only these class indices.
        agnostic: suppress across classes too (NMS only).
        multi_label: every class of a box above `conf_thres` is a candidate (what an evaluation
            wants), not only its best one; not with "best".

    Raises:
        ValueError: `kind` is none of them.
    """
    if kind not in KINDS:
        raise ValueError(f"postprocess: unknown kind {kind!r}, expected one of {KINDS}")
    multi_label = multi_label and kind != "best"
    limit = MAX_CANDIDATES if kind == "nms" else max_det
    detections = []
    for boxes, scores in zip(decoded.boxes, decoded.scores):
        found = _candidates(boxes, scores, conf_thres, classes, multi_label, limit)
        if kind == "nms":
            found = _suppress(found, iou_thres, agnostic, max_det)
        detections.append(found)
    return detections


def best_rows(decoded: Decoded, max_det: int) -> Tensor:
    """What "best" leaves of each image as one tensor, best score first, in operations that every runtime has.

    Returns:
        xyxy, score, class: (B, max_det, 6); rows of zeros behind the last of fewer predictions.
    """
    scores, labels = decoded.scores.max(-1, keepdim=True)
    rows = torch.cat((decoded.boxes, scores, labels.to(scores)), -1)
    rows = functional.pad(rows, (0, 0, 0, max_det))
    place = rows[..., 4].topk(max_det, dim=1).indices
    return rows.gather(1, place[..., None].expand(-1, -1, 6))


def keep_best(
    found: Detections, conf_thres: float, max_det: int, classes: Sequence[int] | None = None
) -> Detections:
    """What of an image's finished detections, best first, passes these limits; see `postprocess`."""
    keep = found.scores > conf_thres
    if classes is not None:
        keep &= torch.isin(found.labels, torch.tensor(classes, device=found.labels.device))
    return Detections(*(value[keep][:max_det] for value in found))


def _candidates(
    boxes: Tensor,
    scores: Tensor,
    conf_thres: float,
    classes: Sequence[int] | None,
    multi_label: bool,
    limit: int,
) -> Detections:
    """The (box, class) pairs of one image above the threshold, best score first, `limit` at most.

    Args:
        boxes: (A, 4).
        scores: (A, C).
    """
    likely = (
        scores.amax(1) > conf_thres if scores.shape[1] else scores.new_zeros(len(scores)).bool()
    )
    if multi_label:  # amax is not a number as soon as one class is: other classes may still count
        likely |= scores.isnan().any(1)
    rows = likely.nonzero().squeeze(1)
    rows = rows[boxes[rows].isfinite().all(1)]
    boxes, scores = boxes[rows].float(), scores[rows].float()
    if multi_label:
        owner, labels = (scores > conf_thres).nonzero(as_tuple=True)
        boxes, scores = boxes[owner], scores[owner, labels]
    elif len(rows):
        scores, labels = scores.max(1)
    else:
        scores, labels = scores.new_zeros(0), rows
    if classes is not None:
        wanted = torch.isin(labels, torch.as_tensor(list(classes), device=labels.device))
        boxes, scores, labels = boxes[wanted], scores[wanted], labels[wanted]
    order = scores.argsort(descending=True, stable=True)[:limit]
    return Detections(boxes[order], scores[order], labels[order])


def _suppress(found: Detections, iou_thres: float, agnostic: bool, max_det: int) -> Detections:
    """Non-maximum suppression of one image's candidates (M), which come best score first."""
    if not len(found.scores):
        return found
    nms = _operator()
    if agnostic:
        kept = nms(found.boxes, found.scores, iou_thres)
    elif len(found.scores) <= FEW[found.scores.device.type == "cpu"]:
        # Boxes of one class are moved away from all others; the least corner becomes 0, so that none reaches into others.
        boxes = found.boxes - found.boxes.amin().clamp(max=0)
        apart = found.labels.to(boxes) * (boxes.max() + 1)
        kept = nms(boxes + apart[:, None], found.scores, iou_thres)
    else:
        rows = [(found.labels == label).nonzero().squeeze(1) for label in found.labels.unique()]
        kept = torch.cat([row[nms(found.boxes[row], found.scores[row], iou_thres)] for row in rows])
    kept = kept.sort().values[:max_det]  # candidate order is score order, equal scores included
    return Detections(found.boxes[kept], found.scores[kept], found.labels[kept])


@functools.cache
def _operator() -> Callable[[Tensor, Tensor, float], Tensor]:
    """torchvision's operator, without the package around it where that goes: it imports PyTorch's compiler, for seconds."""
    package = importlib.util.find_spec("torchvision")
    folders = (package and package.submodule_search_locations) or []
    found = [
        file
        for folder in folders
        for file in sorted(Path(folder).glob("_C*"))
        if file.suffix in (".so", ".pyd")
    ]
    with suppress(OSError):
        for file in found:
            torch.ops.load_library(file)
    if not hasattr(torch.ops.torchvision, "nms"):
        importlib.import_module("torchvision")
    nms: Callable[[Tensor, Tensor, float], Tensor] = torch.ops.torchvision.nms
    return nms
