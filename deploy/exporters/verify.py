"""Running a written artifact and holding its boxes and scores against the network's.

Letters: B batch, A anchor points or queries, C classes, K detections.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from deploy.backends import load_backend
from deploy.exporters.end2end import TAPS, beside_candidates, selection_fault
from deploy.exporters.network import ExportOptions, blobs, floating_tensors
from deploy.runtimes.artifact import Backend
from deploy.runtimes.graphs import open_artifact
from deploy.runtimes.layouts import read_detections
from models.yolo import DetectionModel
from utils.errors import UserError
from utils.structures import Decoded

T = TypeVar("T")
TOLERANCE, HALF_TOLERANCE = 1e-4, 2e-2
"""Largest |difference| over the largest |value| of boxes, and of scores."""
ROUNDING = 2.5e-7
"""A difference below it is none: two units in the last place of a score of 1, and what other runtimes'
sigmoids leave of a score near 0."""
ANYTHING = sys.float_info.max
"""The limit of integer artifacts: numbers that are finite."""
OWN_ROUNDINGS = 4
"""Where float32 itself has fewer digits: how many times further from the exact value than PyTorch."""
HALF_TRIES = 3
"""Images that a float16 head which ranks is tried on: it may choose too many other queries on one."""
CLEAR_LEAD = 1e-5
"""A share of the largest logit: at least so far the last chosen query must be ahead of the first left
out, ten times what float32 usually rounds off."""
ROUNDINGS_AHEAD = 4
"""And by so many times what it rounds off in this very network: either of two faithful runs may be off."""
ROUNDS = 8
"""So often images are drawn until there are enough with a clear lead."""
NO_PARTNER = 1e6
"""Distance of a query that is not finite from all others."""


class ExportMismatchError(UserError):
    """An artifact does not give what the network gives."""


class Reference(NamedTuple):
    """Images (B, 3, H, W), RGB in [0, 1], and what the network gives for them: decoded, and the head's own tensors."""

    images: Tensor
    decoded: Decoded
    raw: list[Tensor]

    def tensors(self, is_raw: bool) -> list[Tensor]:
        """What an artifact is compared with."""
        return self.raw if is_raw else list(self.decoded)


class Output(NamedTuple):
    """What an artifact gave.

    Attributes:
        tensors: boxes (B, A, 4) in xyxy pixels and scores (B, A, C), or the head's raw tensors, or the rows (B, K, 6)
            that a one-to-one branch leaves.
        detections: how many the NMS or top-k inside it chose.
        fault: what is wrong with that choice; empty if nothing, or if there is none.
    """

    tensors: list[Tensor]
    detections: int = 0
    fault: str = ""


class Gap(NamedTuple):
    """Where two tensors differ most.

    Attributes:
        what: "box" or "score".
        largest: largest |difference|; of boxes in pixels.
        relative: the same over the largest |value|.
        told: both values, in words.
        limit: what `relative` is held against.
    """

    what: str
    largest: float
    relative: float
    told: str
    limit: float


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        batch: images.
        imgsz: their size (height, width).
        gaps: one for each tensor, and one for a wrong choice of detections.
        rows: boxes that were compared.
        detections: compared after the NMS or top-k of an end-to-end graph.
        swapped: queries of an image that had no partner to be compared with.
    """

    batch: int
    imgsz: tuple[int, int]
    gaps: tuple[Gap, ...]
    rows: int
    detections: int
    swapped: int

    @property
    def limit(self) -> float:
        """The widest that a relative difference was held against."""
        return max(gap.limit for gap in self.gaps)

    @property
    def relative(self) -> float:
        """The largest |difference| over the largest |value|."""
        return max(gap.relative for gap in self.gaps)

    @property
    def worst(self) -> Gap | None:
        """What is furthest beyond its limit, None if nothing is."""
        far = [g for g in self.gaps if g.largest > ROUNDING and not g.relative <= g.limit]
        return max(far, key=lambda gap: gap.relative / gap.limit, default=None)

    def largest(self, what: str) -> Gap:
        """The largest gap of boxes ("box"), or of scores ("score")."""
        gaps = (gap for gap in self.gaps if gap.what == what)
        return max(gaps, key=lambda gap: gap.relative, default=Gap(what, 0.0, 0.0, "nothing", 0.0))

    def __str__(self) -> str:
        boxes, scores = self.largest("box"), self.largest("score")
        special = f", within {self.limit:.0e}" if TOLERANCE < self.limit < ANYTHING else ""
        kept = f" and {self.detections} detections" if self.detections else ""
        note = f"; {self.swapped} queries an image ranked otherwise" if self.swapped else ""
        return (
            f"batch {self.batch} at {self.imgsz[0]}x{self.imgsz[1]}: {self.rows} boxes{kept}, max |difference| "
            f"{boxes.largest:.2e} px ({boxes.relative:.1e}), scores {scores.largest:.2e} "
            f"({scores.relative:.1e}){special}{note}"
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
    if options.raw or options.end2end:
        backend = open_artifact(path, options.device, taps=TAPS if options.end2end else ())
    else:
        backend = load_backend(path, options.device, allow_code=True)  # it ran already
    tries = HALF_TRIES if options.half and model.head.num_queries > 0 else 1
    cases = []
    # A GPU may else round the factors of a convolution in float32 to 10 bits.
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        for number, (batch, imgsz) in enumerate(_shapes(model, options)):
            for attempt in range(tries):
                seed = 100 * attempt + number + 1
                reference = take_reference(model, batch, imgsz, seed=seed, device=options.device)
                case = compare(backend, model, reference, options)
                if case.worst is None:
                    break
            if case.worst is not None:
                raise ExportMismatchError(
                    f"{path}: differs from PyTorch, {case} - got {case.worst.told}; expected at most "
                    f"{case.worst.limit:.0e} of the largest value. The file stays for inspection; do not use it."
                )
            cases.append(case)
    return cases


def _shapes(model: DetectionModel, options: ExportOptions) -> list[tuple[int, tuple[int, int]]]:
    """Batches and sizes to compare at: the traced ones first; all have a cell for every query."""
    shapes = [(options.batch, options.imgsz)]
    if options.dynamic:
        stride = model.max_stride
        rows, columns = (side // stride for side in options.imgsz)
        rows, columns = max(rows // 2, 5), max(columns * 3 // 4, 7)
        while (
            rows * columns * sum((stride // s) ** 2 for s in model.strides) < model.head.num_queries
        ):
            rows, columns = rows + 1, columns + 1
        other = (rows * stride, columns * stride)
        shapes.append((options.batch + 1, other if options.dynamic == "all" else options.imgsz))
    return shapes


def compare(
    backend: Backend, model: DetectionModel, reference: Reference, options: ExportOptions
) -> Case:
    """Hold what an artifact makes of the reference's images against the reference.

    A network that amplifies rounding (a deep one that was never trained, above all) has results that
    float32 only gives to some digits. Where the artifact is not within the tolerance of PyTorch,
    float64 therefore tells how far both are from the exact values.
    """
    output = predict(backend, model, reference.images, options)
    case = hold(output, model, reference, options)
    is_ranking = model.head.num_queries > 0  # would choose other queries in float64
    may_widen = case.worst is not None and not options.half and not is_ranking
    exact = widen_reference(model, reference) if may_widen else None
    if exact is None:
        return case
    own = hold(Output(reference.tensors(options.raw)), model, exact, options).gaps
    case = hold(output, model, exact, options)
    limits = [allowed(gap.relative) for gap in own]
    limits += limits[-1:] * (len(case.gaps) - len(limits))
    gaps = [gap._replace(limit=limit) for gap, limit in zip(case.gaps, limits, strict=True)]
    return replace(case, gaps=tuple(gaps))


def allowed(own: float) -> float:
    """The tolerance where float32 itself is `own` away: never more than float16 gets."""
    return min(max(TOLERANCE, OWN_ROUNDINGS * own), HALF_TOLERANCE)


@torch.no_grad()
def predict(
    backend: Backend, model: DetectionModel, images: Tensor, options: ExportOptions
) -> Output:
    """Run an artifact that was made with `options`; its NMS or top-k is judged as well."""
    if options.raw:
        return Output([tensor.to(images.device) for tensor in backend.run(images)])
    if backend.end2end and not options.end2end:
        return Output([backend.run(images)[0].to(images.device)])
    if not options.end2end:
        result = backend(images)
        assert isinstance(result, Decoded)
        return Output(list(result))
    rows, _, boxes, scores = (tensor.to(images.device) for tensor in backend.run(images))
    found, kind = read_detections(rows), model.head.postprocess
    faults = (selection_fault(*one, kind, options) for one in zip(found, boxes, scores))
    fault = next(filter(None, faults), "")
    return Output([boxes, scores], sum(len(one.scores) for one in found), fault)


def hold(
    output: Output, model: DetectionModel, reference: Reference, options: ExportOptions
) -> Case:
    """What an artifact gave against the reference; queries, which are a set, are brought into one order."""
    found, expected, swapped = output.tensors, reference.tensors(options.raw), 0
    limit = ANYTHING if options.int8 else HALF_TOLERANCE if options.half else TOLERANCE
    if len(found) == 1 and not options.raw:
        found, expected = beside_candidates(found[0], reference.decoded)
    elif model.head.num_queries > 0 and not options.int8:
        found, expected, swapped = _paired(found, expected, limit, may_swap=options.half)
    names = ["score"] * len(expected) if options.raw else ["box", "score", "score"][: len(found)]
    gaps = [_gap(*three, limit) for three in zip(names, found, expected, strict=True)]
    if output.fault:
        gaps.append(Gap("box", float("inf"), float("inf"), output.fault, TOLERANCE))
    batch, _, height, width = reference.images.shape
    rows = expected[0].numel() // expected[0].shape[-1]
    return Case(batch, (height, width), tuple(gaps), rows, output.detections, swapped)


def _gap(what: str, found: Tensor, expected: Tensor, limit: float) -> Gap:
    """Where two tensors differ most; differences are infinite if their shapes differ."""
    if found.shape != expected.shape:
        told = f"{what} shape {list(found.shape)}, expected {list(expected.shape)}"
        return Gap(what, float("inf"), float("inf"), told, limit)
    gap = (found.double() - expected.double()).abs().nan_to_num(nan=float("inf"))
    place = int(gap.argmax())
    largest, scale = float(gap.flatten()[place]), max(float(expected.abs().max()), 1e-12)
    got, wanted = float(found.flatten()[place]), float(expected.flatten()[place])
    told = f"{what} value {got:.6g}, PyTorch gives {wanted:.6g}"
    return Gap(what, largest, largest / scale, told, limit)


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
    a, b = (torch.cat([t.double() / s for t, s in zip(ts, scales)], -1) for ts in (found, expected))
    gaps = torch.cdist(b, a, p=float("inf")).nan_to_num(nan=NO_PARTNER, posinf=NO_PARTNER)
    pairs = [linear_sum_assignment(gap)[1] for gap in gaps.cpu().numpy()]
    theirs = torch.stack([torch.as_tensor(columns) for columns in pairs]).to(gaps.device)
    gap = gaps.gather(2, theirs[..., None])[..., 0]
    strangers = int((gap > limit).sum(1).max())
    swapped = strangers if may_swap and strangers <= max(1, count // 100) else 0
    ours = gap.argsort(dim=1, stable=True)[:, : count - swapped]
    theirs, images = theirs.gather(1, ours), torch.arange(batch, device=gaps.device)[:, None]
    return [t[images, theirs] for t in found], [t[images, ours] for t in expected], swapped


@torch.no_grad()
def take_reference(
    model: DetectionModel,
    batch: int,
    imgsz: tuple[int, int],
    *,
    seed: int,
    device: torch.device | str = "cpu",
) -> Reference:
    """Run the network on `batch` images of `imgsz` (height, width); the same ones for one seed.

    A head that ranks gets images of which it is clear, however sums are rounded, which queries it
    chooses: nearly equal scores at the last rank would let two faithful runs choose differently.
    """
    if model.head.num_queries == 0:
        return _run(model, blobs(batch, imgsz, seed).to(device))
    probe = copy.deepcopy(model)
    probe.head.num_queries += 1
    drawn: list[tuple[float, Tensor]] = []
    for number in range(ROUNDS):
        images = blobs(batch, imgsz, seed + 1000 * number).to(device)
        logits = _ranked(probe, images)
        exact = _in_double(_ranked, probe, images)
        own = roundings(logits, logits if exact is None else exact)
        ahead = leads(logits, probe.head.num_queries)
        clear = (lead / max(CLEAR_LEAD, ROUNDINGS_AHEAD * off) for lead, off in zip(ahead, own))
        drawn += zip(clear, images)
        if sum(lead > 1 for lead, _ in drawn) >= batch:
            break
    # The first with a clear lead; where they are too few, those with the widest one as well.
    drawn.sort(key=lambda pair: -pair[0] if pair[0] <= 1 else -2.0)
    return _run(model, torch.stack([image for _, image in drawn[:batch]]))


def _ranked(model: DetectionModel, images: Tensor) -> Tensor:
    """Class logits of the tokens that a head chooses, best first, (B, A, C)."""
    return model(images).encoder_logits


def _run(model: DetectionModel, images: Tensor) -> Reference:
    raw = model(images)
    return Reference(images, model.decode(raw), floating_tensors(raw))


@torch.no_grad()
def widen_reference(model: DetectionModel, reference: Reference) -> Reference | None:
    """The same in float64: what both PyTorch's float32 and an artifact come near to; None where that cannot be had."""
    return _in_double(_run, model, reference.images)


def _in_double(
    run: Callable[[DetectionModel, Tensor], T], model: DetectionModel, images: Tensor
) -> T | None:
    """What `run` gives in float64; None on a device without it, or where a user's code makes tensors of its own in
    float32, which do not mix with others."""
    if images.device.type == "mps":
        return None
    try:
        return run(copy.deepcopy(model).double(), images.double())
    except (RuntimeError, TypeError):
        return None


def leads(logits: Tensor, ranks: int) -> list[float]:
    """How far the last rank but one of `logits` (B, A, C) is ahead of the last, as a share of the largest logit.

    Infinitely far where there are fewer than the `ranks` that were asked for.
    """
    if logits.shape[1] < ranks:
        return [float("inf")] * len(logits)
    best = logits.amax(-1)
    share = (best[:, -2] - best[:, -1]) / logits.abs().amax((1, 2)).clamp(min=1e-12)
    return list(share.tolist())


def roundings(logits: Tensor, exact: Tensor) -> list[float]:
    """How far logits are from their exact values at any rank, as a share of the largest; both (B, A, C)."""
    off = (logits.double().amax(-1) - exact.double().amax(-1)).abs().amax(1)
    return list((off / exact.double().abs().amax((1, 2)).clamp(min=1e-12)).tolist())
