"""Running a written artifact and holding its boxes and scores against the network's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from deploy.backends import load_backend
from deploy.exporters.end2end import TAPS
from deploy.exporters.network import ExportOptions
from deploy.exporters.reference import Reference, take_reference, widen_reference
from deploy.exporters.selection import selection_fault
from deploy.runtimes.artifact import Backend
from deploy.runtimes.graphs import open_artifact
from deploy.runtimes.layouts import read_detections
from models.yolo import DetectionModel
from utils.errors import UserError
from utils.structures import Decoded, Detections

TOLERANCE = 1e-4
HALF_TOLERANCE = 2e-2
"""Largest |difference| over the largest |value| of boxes, and of scores."""
ROUNDING = 2.5e-7
"""A difference below it is none: it is two units in the last place of a score of 1, and what other
runtimes' sigmoids leave of a score near 0."""
HALF_TRIES = 3
"""Images that a float16 head which ranks is tried on: it may choose too many other queries on one."""
OWN_ROUNDINGS = 4
"""Where float32 itself has fewer digits: how many times further from the exact value than PyTorch."""
ANYTHING = sys.float_info.max
"""The limit of integer artifacts: numbers that are finite."""
NO_PARTNER = 1e6
"""Distance of a query that is not finite from all others."""


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
        limit: what `relative` is held against.
        swapped: queries of an image that had no partner to be compared with.
        is_selection: whether it is about the NMS or top-k inside the artifact.
    """

    what: str
    largest: float
    relative: float
    told: str
    rows: int
    limit: float = TOLERANCE
    swapped: int = 0
    is_selection: bool = False

    @property
    def is_beyond(self) -> bool:
        """Whether it is more than what is allowed."""
        return self.largest > ROUNDING and not self.relative <= self.limit


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
        special = f", within {self.limit:.0e}" if TOLERANCE < self.limit < ANYTHING else ""
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
    with _exact_convolutions():
        return _verify(path, model, options)


@contextmanager
def _exact_convolutions() -> Iterator[None]:
    """Convolutions of a GPU in float32, which may round their factors to 10 bits otherwise."""
    kept = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = kept


def _verify(path: Path, model: DetectionModel, options: ExportOptions) -> list[Case]:
    if options.raw:
        backend = open_artifact(path, options.device)
    elif options.end2end:
        backend = open_artifact(path, options.device, taps=TAPS)
    else:
        backend = load_backend(path, options.device, allow_code=True)  # it ran already
    tries = HALF_TRIES if options.half and model.head.postprocess == "topk" else 1
    cases = []
    for number, (batch, imgsz) in enumerate(cases_of(backend, options)):
        for attempt in range(tries):
            seed = 100 * attempt + number + 1
            reference = take_reference(model, batch, imgsz, seed=seed, device=options.device)
            case, worst = compare(backend, model, reference, options)
            if worst is None:
                break
        if worst is not None:
            raise ExportMismatchError(
                f"{path}: differs from PyTorch, {case} - got {worst.told}; expected at most "
                f"{worst.limit:.0e} of the largest value. The file stays for inspection; do not "
                "use it."
            )
        cases.append(case)
    return cases


def compare(
    backend: Backend, model: DetectionModel, reference: Reference, options: ExportOptions
) -> tuple[Case, Gap | None]:
    """Hold what an artifact makes of the reference's images against the reference.

    A network that amplifies rounding (a deep one that was never trained, above all) has results that
    float32 only gives to some digits. Where the artifact is not within the tolerance of PyTorch,
    float64 therefore tells how far both are from the exact values.

    Returns:
        The comparison, and the gap that is furthest beyond what is allowed, None if none is.
    """
    output = predict(backend, model, reference.images, options)
    gaps = output.gaps(model, reference, options)
    worst = _worst(gaps)
    is_ranking = model.head.postprocess == "topk"  # would choose other queries in float64
    has_double = reference.images.device.type != "mps"
    if worst is None or options.half or is_ranking or not has_double:
        return _case(gaps, reference), worst
    exact = widen_reference(model, reference)
    if exact is None:
        return _case(gaps, reference), worst
    own = Output(reference.tensors(options.raw), []).gaps(model, exact, options)
    gaps = output.gaps(model, exact, options)
    limits = [_limit(gap.relative) for gap in own] + [gap.limit for gap in output.selection]
    gaps = [gap._replace(limit=limit) for gap, limit in zip(gaps, limits, strict=True)]
    return _case(gaps, reference), _worst(gaps)


def _limit(own: float) -> float:
    """What is allowed where float32 itself is `own` away: never more than float16 gets."""
    return min(max(TOLERANCE, OWN_ROUNDINGS * own), HALF_TOLERANCE)


class Output(NamedTuple):
    """What an artifact gave.

    Attributes:
        tensors: boxes (B, A, 4) in xyxy pixels and scores (B, A, C), or the head's raw tensors.
        selection: one gap an image for the NMS or top-k inside it.
    """

    tensors: list[Tensor]
    selection: list[Gap]

    def gaps(
        self, model: DetectionModel, reference: Reference, options: ExportOptions
    ) -> list[Gap]:
        """One gap a tensor, and the selection; queries, which are a set, are brought into one order."""
        found, expected = self.tensors, reference.tensors(options.raw)
        names = ["score"] * len(expected) if options.raw else ["box", "score"]
        limit = ANYTHING if options.int8 else HALF_TOLERANCE if options.half else TOLERANCE
        swapped = 0
        if model.head.postprocess == "topk" and not options.int8:
            found, expected, swapped = _paired(found, expected, limit, may_swap=options.half)
        gaps = [_gap(a, b, name) for a, b, name in zip(found, expected, names, strict=True)]
        gaps = [gap._replace(limit=limit, swapped=swapped) for gap in gaps]
        return [*gaps, *self.selection]


@torch.no_grad()
def predict(
    backend: Backend, model: DetectionModel, images: Tensor, options: ExportOptions
) -> Output:
    """Run an artifact that was made with `options`; its NMS or top-k is judged as well."""
    if options.raw:
        return Output([tensor.to(images.device) for tensor in backend.run(images)], [])
    if options.end2end:
        rows, _, boxes, scores = (t.to(images.device) for t in backend.run(images))
        given = Decoded(boxes, scores)
        kind = model.head.postprocess
        selection = _detection_gaps(read_detections(rows), given, kind, options)
        return Output(list(given), selection)
    result = backend(images)
    assert isinstance(result, Decoded)
    return Output(list(result), [])


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


def _paired(
    found: list[Tensor], expected: list[Tensor], limit: float, *, may_swap: bool
) -> tuple[list[Tensor], list[Tensor], int]:
    """Two sets of predictions, tensors (..., B, A, *) each, in one order; how many were left out.

    float16 may choose other queries near the last rank: with `may_swap`, one in a hundred, and one
    in any case, that finds no partner within `limit` is left out of both.
    """
    from scipy.optimize import linear_sum_assignment

    batch, count = expected[0].shape[-3:-1]
    if [t.shape for t in found] != [t.shape for t in expected]:
        return found, expected, 0
    found, expected = ([t.reshape(batch, count, -1) for t in ts] for ts in (found, expected))
    scales = [max(float(t.abs().max()), 1e-12) for t in expected]
    pairs = []
    for image in range(batch):
        a, b = (
            torch.cat([t[image].double() / scale for t, scale in zip(ts, scales)], -1)
            for ts in (found, expected)
        )
        distance = torch.cdist(b, a, p=float("inf")).nan_to_num(nan=NO_PARTNER, posinf=NO_PARTNER)
        rows, columns = linear_sum_assignment(distance.cpu().numpy())
        pairs.append((torch.as_tensor(columns, device=a.device), distance[rows, columns]))
    strangers = max(int((gap > limit).sum()) for _, gap in pairs)
    kept = count - (strangers if may_swap and strangers <= max(1, count // 100) else 0)
    ours = [gap.argsort(stable=True)[:kept] for _, gap in pairs]
    theirs = [order[own] for (order, _), own in zip(pairs, ours)]
    found = [torch.stack([t[i][at] for i, at in enumerate(theirs)]) for t in found]
    expected = [torch.stack([t[i][at] for i, at in enumerate(ours)]) for t in expected]
    return found, expected, count - kept


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
        gaps.append(Gap("box", size, size, fault, len(theirs.scores), is_selection=True))
    return gaps


def _case(gaps: list[Gap], reference: Reference) -> Case:
    none = Gap("", 0.0, 0.0, "nothing", 0)
    box, score = (
        max((g for g in gaps if g.what == what), key=lambda g: g.relative, default=none)
        for what in ("box", "score")
    )
    detections = sum(g.rows for g in gaps if g.is_selection)
    differences = (box.largest, box.relative, score.largest, score.relative)
    limit = max(gap.limit for gap in gaps)
    note = f"; {gaps[0].swapped} queries an image ranked otherwise" if gaps[0].swapped else ""
    shape = (len(reference.images), reference.imgsz)
    return Case(*shape, *differences, gaps[0].rows, detections, limit, note)


def _worst(gaps: list[Gap]) -> Gap | None:
    """The gap that is beyond its limit most, if one is."""
    beyond = [gap for gap in gaps if gap.is_beyond]
    return max(beyond, key=lambda gap: gap.relative / gap.limit, default=None)
