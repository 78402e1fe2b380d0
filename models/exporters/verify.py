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
from models.postprocess import postprocess
from models.yolo import DetectionModel
from utils.errors import UserError
from utils.structures import Decoded, Detections

TOLERANCE = 1e-4
HALF_TOLERANCE = 2e-2


class ExportMismatch(UserError):
    """An artifact does not give what the network gives."""


class Gap(NamedTuple):
    """Where two tensors differ most: by how much, by how much of the largest value, and both values.

    Attributes:
        what: "box", "score" or "class".
        largest: largest |difference|.
        relative: the same over the largest |value|.
        told: both values, in words.
        count: rows compared.
    """

    what: str
    largest: float
    relative: float
    told: str
    count: int


class Case(NamedTuple):
    """One comparison.

    Attributes:
        batch: images.
        imgsz: their size (height, width).
        boxes: largest |difference| of a coordinate, in pixels.
        relative_boxes: the same over the largest coordinate.
        scores: largest |difference| of a score.
        relative_scores: the same over the largest score.
        count: rows compared.
        detections: compared after the NMS or top-k of an end-to-end graph.
    """

    batch: int
    imgsz: tuple[int, int]
    boxes: float
    relative_boxes: float
    scores: float
    relative_scores: float
    count: int
    detections: int

    def __str__(self) -> str:
        height, width = self.imgsz
        kept = f" and {self.detections} detections" if self.detections else ""
        return (
            f"batch {self.batch} at {height}x{width}: {self.count} boxes{kept}, max |difference| "
            f"{self.boxes:.2e} px ({self.relative_boxes:.1e}), scores {self.scores:.2e} "
            f"({self.relative_scores:.1e})"
        )


def verify(path: Path, model: DetectionModel, options: ExportOptions) -> list[Case]:
    """Compare at the traced batch and size and, where they are dynamic, at others too.

    NMS inside a graph is held against ours on the very boxes and scores it was given (nearly equal scores
    may else be ranked either way), and these against the network's.

    Args:
        path: the artifact.
        model: the fused network in float32.
        options: what the artifact was made with.

    Raises:
        ExportMismatch: a difference is beyond the tolerance; both values are told. Integer artifacts
            are only required to be finite: what they lose is measured as mAP.
    """
    if options.raw:
        backend = open_artifact(path, options.device)
    elif options.end2end:
        backend = open_artifact(path, options.device, taps=TAPS)
    else:
        backend = load_backend(path, options.device)
    cases = []
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
        wanted = postprocess(
            found, model.head.postprocess, conf_thres=options.conf_thres,
            iou_thres=options.iou_thres, max_det=options.max_det,
        )  # fmt: skip
        inside = _detection_gaps(read_detections(rows), wanted)
    else:
        result = backend(images)
        assert isinstance(result, Decoded)
        found, inside = result, []
    if model.head.postprocess == "topk" and not options.int8:
        found = _in_order_of(decoded, found, max(images.shape[-2:]))
    return [_gap(found.boxes, decoded.boxes, "box"), _gap(found.scores, decoded.scores, "score"), *inside]


def cases_of(backend: Backend, options: ExportOptions) -> list[tuple[int, tuple[int, int]]]:
    """Batches and sizes to compare at: the traced ones first."""
    cases = [(options.batch, options.imgsz)]
    if options.dynamic:
        stride = backend.stride
        height, width = options.imgsz
        other = (max(height // stride // 2, 2) * stride, max(width * 3 // stride // 4, 3) * stride)
        cases.append((options.batch + 1, other if options.dynamic == "all" else options.imgsz))
    return cases


def _in_order_of(expected: Decoded, found: Decoded, scale: int) -> Decoded:
    """Bring a set of predictions into the order of another: equal scores may be ranked either way."""
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


def _detection_gaps(found: list[Detections], wanted: list[Detections]) -> list[Gap]:
    """The artifact's own NMS or top-k against ours, box by box in order of score."""
    gaps = []
    for theirs, ours in zip(found, wanted):
        if len(theirs.scores) == len(ours.scores):
            theirs, ours = _by_score(theirs), _by_score(ours)
        gaps += [_gap(theirs.boxes, ours.boxes, "box"), _gap(theirs.scores, ours.scores, "score")]
        gaps.append(_gap(theirs.labels.float(), ours.labels.float(), "class")._replace(count=0))
    return gaps


def _by_score(found: Detections) -> Detections:
    """Best first; equal scores by class and place, since their order is nobody's promise."""
    keys = zip((-found.scores).tolist(), found.labels.tolist(), found.boxes.tolist(), strict=True)
    order = [i for i, _ in sorted(enumerate(keys), key=lambda item: item[1])]
    return Detections(found.boxes[order], found.scores[order], found.labels[order])


def _case(gaps: list[Gap], batch: int, imgsz: tuple[int, int]) -> Case:
    worst = {
        kind: max((g for g in gaps if (g.what == "box") == (kind == "box")), key=lambda g: g.relative,
                  default=Gap(kind, 0.0, 0.0, "nothing", 0))
        for kind in ("box", "score")
    }  # fmt: skip
    box, score = worst["box"], worst["score"]
    detections = sum(g.count for g in gaps[2:] if g.what == "box")
    return Case(
        batch, imgsz, box.largest, box.relative, score.largest, score.relative, gaps[0].count, detections
    )


def _require(case: Case, gaps: list[Gap], path: Path, options: ExportOptions) -> None:
    limit = HALF_TOLERANCE if options.half else TOLERANCE
    worst = max(gaps, key=lambda gap: gap.relative)
    if options.int8 and worst.relative < float("inf"):
        return
    if not worst.relative <= limit:
        raise ExportMismatch(
            f"{path}: differs from PyTorch, {case} - got {worst.told}; expected at most {limit:.0e} "
            "of the largest value. The file stays for inspection; do not use it."
        )
