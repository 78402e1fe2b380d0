"""Running a written artifact and holding its boxes and scores against the network's."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from models.backends import Backend, load_backend, open_artifact
from models.exporters.end2end import TAPS
from models.exporters.network import ExportOptions, blobs
from models.layouts import read_detections
from models.yolo import DetectionModel
from utils.errors import UserError
from utils.structures import Decoded, Detections

TOLERANCE = 1e-4
HALF_TOLERANCE = 2e-2
"""Largest |difference| over the largest |value| of boxes, and of scores."""
ROUNDING = 1e-6
"""A difference below it is none: a score is a share of 1, and float32 has seven digits of that."""
EXACT = 1e-5
"""Slack in the rules of NMS for sums that another runtime rounds in another way."""


class ExportMismatchError(UserError):
    """An artifact does not give what the network gives."""


class Gap(NamedTuple):
    """Where two tensors differ most: by how much, by how much of the largest value, and both
    values.

    Attributes:
        what: "box" or "score".
        largest: largest |difference|.
        relative: the same over the largest |value|.
        told: both values, in words.
        rows: how many were compared.
    """

    what: str
    largest: float
    relative: float
    told: str
    rows: int


class Case(NamedTuple):
    """One comparison.

    Attributes:
        batch: images.
        imgsz: their size (height, width).
        boxes: largest |difference| of a coordinate, in pixels.
        relative_boxes: the same over the largest coordinate.
        scores: largest |difference| of a score.
        relative_scores: the same over the largest score.
        rows: how many were compared.
        detections: compared after the NMS or top-k of an end-to-end graph.
    """

    batch: int
    imgsz: tuple[int, int]
    boxes: float
    relative_boxes: float
    scores: float
    relative_scores: float
    rows: int
    detections: int

    def __str__(self) -> str:
        height, width = self.imgsz
        kept = f" and {self.detections} detections" if self.detections else ""
        return (
            f"batch {self.batch} at {height}x{width}: {self.rows} boxes{kept}, max |difference| "
            f"{self.boxes:.2e} px ({self.relative_boxes:.1e}), scores {self.scores:.2e} "
            f"({self.relative_scores:.1e})"
        )


def verify(path: Path, model: DetectionModel, options: ExportOptions) -> list[Case]:
    """Compare at the traced batch and size and, where they are dynamic, at others too.

    NMS inside a graph is judged on the very boxes and scores it was given, and these are compared
    with the network's: nearly equal scores may else be ranked either way.

    Args:
        path: the artifact.
        model: the fused network in float32.
        options: what the artifact was made with.

    Raises:
        ExportMismatchError: a difference is beyond the tolerance; both values are told. Integer
            artifacts
            are only required to be finite: what they lose is measured as mAP.
    """
    if options.raw:
        backend = open_artifact(path, options.device)
    elif options.end2end:
        backend = open_artifact(path, options.device, taps=TAPS)
    else:
        backend = load_backend(path, options.device)
    cases: list[Case] = []
    for batch, imgsz in cases_of(backend, options):
        images = blobs(batch, imgsz, seed=len(cases) + 1).to(options.device)
        with torch.no_grad():
            gaps = _gaps(backend, model, images, options)
        cases.append(_case(gaps, batch, imgsz))
        _require(cases[-1], gaps, path, options)
    return cases


def _gaps(
    backend: Backend, model: DetectionModel, images: Tensor, options: ExportOptions
) -> list[Gap]:
    raw = model(images)
    if options.raw:
        expected = [leaf for leaf in tree_leaves(raw) if isinstance(leaf, Tensor)]
        expected = [t for t in expected if t.is_floating_point()]
        return [_gap(a, b, "score") for a, b in zip(backend.run(images), expected, strict=True)]
    decoded = model.decode(raw)
    if options.end2end:
        rows, _, boxes, scores = (t.to(images.device) for t in backend.run(images))
        found = Decoded(boxes, scores)
        inside = _detection_gaps(read_detections(rows), found, model.head.postprocess, options)
    else:
        result = backend(images)
        assert isinstance(result, Decoded)
        found, inside = result, []
    if model.head.postprocess == "topk" and not options.int8:
        found = _in_order_of(decoded, found, max(images.shape[-2:]))
    return [
        _gap(found.boxes, decoded.boxes, "box"),
        _gap(found.scores, decoded.scores, "score"),
        *inside,
    ]


def cases_of(backend: Backend, options: ExportOptions) -> list[tuple[int, tuple[int, int]]]:
    """Batches and sizes to compare at: the traced ones first."""
    cases = [(options.batch, options.imgsz)]
    if options.dynamic:
        stride = backend.stride
        height, width = options.imgsz
        rows, columns = height // stride // 2, width * 3 // stride // 4
        other = (max(rows, 5) * stride, max(columns, 7) * stride)  # cells for 300 queries
        cases.append((options.batch + 1, other if options.dynamic == "all" else options.imgsz))
    return cases


def _in_order_of(expected: Decoded, found: Decoded, scale: int) -> Decoded:
    """Bring a set of predictions into the order of another: equal scores may be ranked either
    way."""
    from scipy.optimize import linear_sum_assignment

    boxes, scores = [], []
    for i in range(len(expected.boxes)):
        a = torch.cat((expected.boxes[i] / scale, expected.scores[i]), -1)
        b = torch.cat((found.boxes[i] / scale, found.scores[i]), -1)
        _, order = linear_sum_assignment(torch.cdist(a.double(), b.double(), p=1).cpu().numpy())
        index = torch.as_tensor(order, device=found.boxes.device)
        boxes.append(found.boxes[i][index])
        scores.append(found.scores[i][index])
    return Decoded(torch.stack(boxes), torch.stack(scores))


def _gap(found: Tensor, expected: Tensor, what: str) -> Gap:
    """Where two tensors differ most; differences are infinite if their shapes differ."""
    if found.shape != expected.shape:
        told = f"{what} shape {list(found.shape)}, expected {list(expected.shape)}"
        return Gap(what, float("inf"), float("inf"), told, 0)
    if not expected.numel():
        return Gap(what, 0.0, 0.0, "nothing", 0)
    gap = (found.double() - expected.double()).abs().nan_to_num(nan=float("inf"))
    place = int(gap.argmax())
    largest = float(gap.flatten()[place])
    scale = max(float(expected.abs().max()), 1e-12)
    got, wanted = float(found.flatten()[place]), float(expected.flatten()[place])
    told = f"{what} value {got:.6g}, PyTorch gives {wanted:.6g}"
    return Gap(what, largest, largest / scale, told, expected.numel() // expected.shape[-1])


def _detection_gaps(
    found: list[Detections], given: Decoded, kind: str, options: ExportOptions
) -> list[Gap]:
    """One entry an image: 0 if the artifact's detections are what NMS or top-k makes of `given`."""
    gaps = []
    for theirs, boxes, scores in zip(found, given.boxes, given.scores):
        fault = selection_fault(theirs, boxes, scores, kind, options)
        size = float("inf") if fault else 0.0
        gaps.append(Gap("box", size, size, fault, len(theirs.scores)))
    return gaps


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


def _case(gaps: list[Gap], batch: int, imgsz: tuple[int, int]) -> Case:
    none = Gap("", 0.0, 0.0, "nothing", 0)
    box, score = (
        max((g for g in gaps if g.what == what), key=lambda g: g.relative, default=none)
        for what in ("box", "score")
    )
    detections = sum(g.rows for g in gaps[2:] if g.what == "box")
    shape = (batch, imgsz)
    differences = (box.largest, box.relative, score.largest, score.relative)
    return Case(*shape, *differences, gaps[0].rows, detections)


def _require(case: Case, gaps: list[Gap], path: Path, options: ExportOptions) -> None:
    limit = HALF_TOLERANCE if options.half else TOLERANCE
    worst = max(
        (gap for gap in gaps if gap.largest > ROUNDING), key=lambda g: g.relative, default=None
    )
    if worst is None or (options.int8 and worst.relative < float("inf")):
        return
    if not worst.relative <= limit:
        raise ExportMismatchError(
            f"{path}: differs from PyTorch, {case} - got {worst.told}; expected at most "
            f"{limit:.0e} of the largest value. The file stays for inspection; do not use it."
        )
