"""Running a written artifact and holding its boxes and scores against the network's."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from models.backends import Backend, load_backend, open_artifact
from models.exporters.end2end import TAPS
from models.exporters.network import ExportOptions, blobs
from models.exporters.selection import selection_fault
from models.layouts import read_detections
from models.yolo import DetectionModel
from utils.errors import UserError
from utils.structures import Decoded, Detections

TOLERANCE = 1e-4
HALF_TOLERANCE = 2e-2
"""Largest |difference| over the largest |value| of boxes, and of scores."""
ROUNDING = 1e-6
"""A difference below it is none: a score is a share of 1, and float32 has seven digits of that."""
OWN_ROUNDINGS = 4
"""Another runtime adds up in another order: so many times PyTorch's own rounding is none either."""
ATTEMPTS = 3
"""Images that a head which ranks is tried on, until all queries are the same."""
STRANGER = 1e-2
"""Two queries that differ by more, in a score or in a share of the image, are not the same one."""
SWAPPED_TOLERANCE = 1e-3
"""Where a query has no partner, the others looked at another neighbour."""


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
        swapped: queries of an image that had no partner to be compared with.
    """

    what: str
    largest: float
    relative: float
    told: str
    rows: int
    swapped: int = 0


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
        limit: what the relative differences were held against.
        note: what was special.
    """

    batch: int
    imgsz: tuple[int, int]
    boxes: float
    relative_boxes: float
    scores: float
    relative_scores: float
    rows: int
    detections: int
    limit: float
    note: str = ""

    def __str__(self) -> str:
        height, width = self.imgsz
        special = f", within {self.limit:.0e}" if self.limit != TOLERANCE else ""
        kept = f" and {self.detections} detections" if self.detections else ""
        return (
            f"batch {self.batch} at {height}x{width}: {self.rows} boxes{kept}, max |difference| "
            f"{self.boxes:.2e} px ({self.relative_boxes:.1e}), scores {self.scores:.2e} "
            f"({self.relative_scores:.1e}){special}{self.note}"
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
            artifacts are only required to be finite: what they lose is measured as mAP.
    """
    if options.raw:
        backend = open_artifact(path, options.device)
    elif options.end2end:
        backend = open_artifact(path, options.device, taps=TAPS)
    else:
        backend = load_backend(path, options.device)
    cases = []
    for number, (batch, imgsz) in enumerate(cases_of(backend, options)):
        for attempt in range(ATTEMPTS if model.head.postprocess == "topk" else 1):
            images = blobs(batch, imgsz, seed=100 * attempt + number + 1).to(options.device)
            with torch.no_grad():
                gaps = _gaps(backend, model, images, options)
                case = _case(gaps, batch, imgsz, _limit(gaps, model, images, options))
            if gaps[0].swapped:
                case = case._replace(note=f"; {gaps[0].swapped} queries an image ranked otherwise")
            if not gaps[0].swapped and not _worst(gaps, options, case.limit):
                break
        _require(case, _worst(gaps, options, case.limit), path)
        cases.append(case)
    return cases


def _limit(gaps: list[Gap], model: DetectionModel, images: Tensor, options: ExportOptions) -> float:
    """What differences are held against: more where float32 itself cannot give the digits.

    A network that amplifies rounding (a deep one that was never trained, above all) has results that
    PyTorch's float32 only gives to some digits; float64 tells how many.
    """
    if options.half:
        return HALF_TOLERANCE
    is_ranking = model.head.postprocess == "topk"
    if gaps[0].swapped:
        return SWAPPED_TOLERANCE
    if is_ranking or options.int8 or not _worst(gaps, options, TOLERANCE):
        return TOLERANCE
    if images.device.type == "mps":
        return TOLERANCE
    precise = copy.deepcopy(model).double()
    exact = precise.decode(precise(images.double()))
    single = model.decode(model(images))
    own = max(_gap(a, b, "").relative for a, b in zip(single, exact))
    return max(TOLERANCE, OWN_ROUNDINGS * own)


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
    swapped = 0
    if model.head.postprocess == "topk" and not options.int8:
        found, decoded, swapped = _paired(found, decoded, max(images.shape[-2:]))
    box = _gap(found.boxes, decoded.boxes, "box")
    score = _gap(found.scores, decoded.scores, "score")
    return [box._replace(swapped=swapped), score, *inside]


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


def _paired(found: Decoded, expected: Decoded, scale: int) -> tuple[Decoded, Decoded, int]:
    """Two sets of predictions in one order, without those that have no partner; how many had none.

    Which cells become queries is a matter of rank: near the last rank a change in the last digit
    chooses another one. One in a hundred, and one in any case, may have no partner.
    """
    from scipy.optimize import linear_sum_assignment

    pairs = []
    for sets in zip(found.boxes, found.scores, expected.boxes, expected.scores):
        a, b = (torch.cat((sets[i] / scale, sets[i + 1]), -1).double() for i in (0, 2))
        distance = torch.cdist(b, a, p=float("inf"))
        rows, columns = linear_sum_assignment(distance.cpu().numpy())
        order = torch.as_tensor(columns, device=a.device)
        pairs.append((order, distance[rows, columns]))
    allowed = max(1, expected.boxes.shape[1] // 100)
    strangers = max(int((gap > STRANGER).sum()) for _, gap in pairs)
    kept = expected.boxes.shape[1] - (strangers if strangers <= allowed else 0)
    ours = [gap.argsort(stable=True)[:kept] for _, gap in pairs]
    theirs = [order[own] for (order, _), own in zip(pairs, ours)]
    return (
        Decoded(*(torch.stack([t[i][at] for i, at in enumerate(theirs)]) for t in found)),
        Decoded(*(torch.stack([t[i][at] for i, at in enumerate(ours)]) for t in expected)),
        expected.boxes.shape[1] - kept,
    )


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


def _case(gaps: list[Gap], batch: int, imgsz: tuple[int, int], limit: float) -> Case:
    none = Gap("", 0.0, 0.0, "nothing", 0)
    box, score = (
        max((g for g in gaps if g.what == what), key=lambda g: g.relative, default=none)
        for what in ("box", "score")
    )
    detections = sum(g.rows for g in gaps[2:] if g.what == "box")
    shape = (batch, imgsz)
    differences = (box.largest, box.relative, score.largest, score.relative)
    return Case(*shape, *differences, gaps[0].rows, detections, limit)


def _worst(gaps: list[Gap], options: ExportOptions, limit: float) -> Gap | None:
    """The gap that is beyond the limit most, if one is."""
    limit = sys.float_info.max if options.int8 else limit
    beyond = [gap for gap in gaps if gap.largest > ROUNDING and not gap.relative <= limit]
    return max(beyond, key=lambda gap: gap.relative, default=None)


def _require(case: Case, worst: Gap | None, path: Path) -> None:
    if worst is not None:
        raise ExportMismatchError(
            f"{path}: differs from PyTorch, {case} - got {worst.told}; expected at most "
            f"{case.limit:.0e} of the largest value. The file stays for inspection; do not use it."
        )
