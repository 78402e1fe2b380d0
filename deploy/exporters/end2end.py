"""NMS or top-k as an ONNX graph, put behind a network that gives boxes and scores, and whether it chose rightly.

Letters: N batch, A anchor points, C classes, S boxes that NMS selects in the whole batch, K `max_det`.

The graphs do what `models.postprocess` does with one label a box: the best class of each box
counts, boxes suppress others of their class, the K best of each image stay. Every image gets K
rows; those after its last detection are zeros. All shapes come from the tensors, so batch and
image size may be dynamic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deploy.exporters.network import ExportOptions
from models.postprocess import best_rows
from utils.structures import Decoded, Detections

if TYPE_CHECKING:
    import onnx

OUTPUTS = ("output0", "num_dets")
TAPS = ("boxes", "scores")
"""Tensors inside the graph that go into the NMS or top-k."""
SCOPE = "/postprocess/"
EXACT = 1e-5
"""Slack in the rules of NMS for sums that another runtime rounds in another way."""

# The best class of each box: `best` (N, A) where above the threshold, else -1.
_BEST = """
    label = ArgMax <axis = 2, keepdims = 1> (scores)
    best_column = GatherElements <axis = 2> (scores, label)
"""

# `selected` (S, 3): image, class, box. All classes but the best of each box are set to 0.
_SUPPRESS = """
    class_count = Shape <start = 2, end = 3> (scores)
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    last_axis = Constant <value_ints = [0]> ()
    class_count0 = Squeeze (class_count, last_axis)
    classes = Range (zero, class_count0, one)
    is_best = Equal (label, classes)
    nothing = Constant <value_float = 0.0> ()
    best_only = Where (is_best, scores, nothing)
    by_class = Transpose <perm = [0, 2, 1]> (best_only)
    limit = Constant <value_ints = [{max_det}]> ()
    iou = Constant <value_floats = [{iou_thres}]> ()
    conf = Constant <value_floats = [{conf_thres}]> ()
    selected = NonMaxSuppression (boxes, by_class, limit, iou, conf)
    columns = Constant <value_ints = [1]> ()
    image_at = Constant <value_ints = [0]> ()
    class_at = Constant <value_ints = [1]> ()
    image_and_box = Constant <value_ints = [0, 2]> ()
    image_column = Gather <axis = 1> (selected, image_at)
    class_column = Gather <axis = 1> (selected, class_at)
    place = Gather <axis = 1> (selected, image_and_box)
    found_boxes = GatherND (boxes, place)
    found_scores = GatherND (by_class, selected)
    found_score_column = Unsqueeze (found_scores, columns)
    found_labels = Cast <to = 1> (class_column)
    found_rows = Concat <axis = 1> (found_boxes, found_score_column, found_labels)
    batch = Shape <start = 0, end = 1> (scores)
    batch0 = Squeeze (batch, last_axis)
    images = Range (zero, batch0, one)
    image_column0 = Unsqueeze (images, columns)
    image_row = Transpose <perm = [1, 0]> (image_column)
    is_of_image = Equal (image_column0, image_row)
    score_row = Transpose <perm = [1, 0]> (found_score_column)
    absent = Constant <value_float = -1.0> ()
    keys = Where (is_of_image, score_row, absent)
"""

# `keys` (N, S) -> the K best of each image; K rows of zeros are appended so that there are always
# K.
_SORT = """
    filler_keys_shape = Concat <axis = 0> (batch, limit)
    filler_keys = ConstantOfShape <value = float[1] {{-1.0}}> (filler_keys_shape)
    all_keys = Concat <axis = 1> (keys, filler_keys)
    six = Constant <value_ints = [6]> ()
    filler_rows_shape = Concat <axis = 0> (limit, six)
    filler_rows = ConstantOfShape <value = float[1] {{0.0}}> (filler_rows_shape)
    all_rows = Concat <axis = 0> (found_rows, filler_rows)
    top_keys, top = TopK <axis = 1, largest = 1, sorted = 1> (all_keys, limit)
    chosen = Gather <axis = 0> (all_rows, top)
    nothing0 = Constant <value_float = 0.0> ()
    is_found = Greater (top_keys, nothing0)
    last = Constant <value_ints = [2]> ()
    is_found_column = Unsqueeze (is_found, last)
    output0 = Where (is_found_column, chosen, nothing0)
"""

# Without suppression: every (N, A) box competes in its image with its best class.
_RANK = """
    limit = Constant <value_ints = [{max_det}]> ()
    batch = Shape <start = 0, end = 1> (scores)
    label_column = Cast <to = 1> (label)
    rows = Concat <axis = 2> (boxes, best_column, label_column)
    conf = Constant <value_float = {conf_thres}> ()
    nothing0 = Constant <value_float = 0.0> ()
    is_likely = Greater (best_column, conf)
    likely_rows = Where (is_likely, rows, nothing0)
    six = Constant <value_ints = [6]> ()
    filler_shape = Concat <axis = 0> (batch, limit, six)
    filler = ConstantOfShape <value = float[1] {{0.0}}> (filler_shape)
    all_rows = Concat <axis = 1> (likely_rows, filler)
    score_at = Constant <value_int = 4> ()
    keys = Gather <axis = 2> (all_rows, score_at)
    top_keys, top = TopK <axis = 1, largest = 1, sorted = 1> (keys, limit)
    last = Constant <value_ints = [2]> ()
    top_column = Unsqueeze (top, last)
    row_shape = Concat <axis = 0> (batch, limit, six)
    top_rows = Expand (top_column, row_shape)
    output0 = GatherElements <axis = 1> (all_rows, top_rows)
    is_found = Greater (top_keys, nothing0)
"""

_COUNT = """
    counted = Cast <to = 7> (is_found)
    along = Constant <value_ints = [1]> ()
    num_dets = ReduceSum <keepdims = 0> (counted, along)
"""


def append_postprocess(
    network: onnx.ModelProto, kind: str, options: ExportOptions
) -> onnx.ModelProto:
    """An ONNX model with outputs `output0` (N, K, 6) and `num_dets` (N,).

    Args:
        network: ONNX model with outputs `boxes` (N, A, 4), xyxy, and `scores` (N, A, C).
        kind: one of `models.postprocess.KINDS`.
        options: thresholds and `max_det`.
    """
    import onnx

    opset = next(o.version for o in network.opset_import if o.domain in ("", "ai.onnx"))
    body = _BEST + (_SUPPRESS + _SORT if kind == "nms" else _RANK) + _COUNT
    body = body.format(
        max_det=options.max_det,
        iou_thres=_literal(options.iou_thres),
        conf_thres=_literal(options.conf_thres),
    )
    text = (
        f'<ir_version: {network.ir_version}, opset_import: ["": {opset}]>\n'
        f"postprocess (float[N, A, 4] boxes, float[N, A, C] scores)"
        f" => (float[N, {options.max_det}, 6] output0, int64[N] num_dets) {{{body}}}"
    )
    tail = onnx.parser.parse_model(text)
    _put_under(SCOPE, tail.graph)
    return onnx.compose.merge_models(
        network, tail, io_map=[("boxes", "boxes"), ("scores", "scores")], outputs=list(OUTPUTS)
    )


def _put_under(scope: str, graph: onnx.GraphProto) -> None:
    """Begin the names of nodes, and of values that stay inside, with `scope`."""
    kept = {value.name for value in (*graph.input, *graph.output)}
    for node in graph.node:
        node.name = scope + node.output[0]
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                names[place] = name if name in kept else scope + name


def _literal(number: float) -> str:
    """A float as the ONNX text form writes it: digits, a point, no exponent."""
    return f"{number:.10f}"


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
        kind: one of `models.postprocess.KINDS`.
        options: thresholds and the most detections.
    """
    from torchvision.ops import box_iou

    best, labels = scores.max(1)
    likely = best > options.conf_thres
    boxes, best, labels = boxes[likely], best[likely], labels[likely]
    kept, most = len(found.scores), min(len(best), options.max_det)
    if kept > most or (kind != "nms" and kept != most):
        return f"{kept} detections, expected {most}"
    if not most:
        return ""
    if bool((found.scores.diff() > 0).any()):
        return "detections that are not in order of score"
    is_other = found.labels[:, None] != labels
    distance = torch.cdist(found.boxes, boxes, p=1) / boxes.abs().max().clamp(min=1)
    distance = distance + (found.scores[:, None] - best).abs() + is_other
    distance, candidates = distance.min(1)
    if bool((distance > EXACT).any()):
        return f"detection {int(distance.argmax())}, which is none of the candidates"
    floor = float(found.scores[-1]) if kept == options.max_det else options.conf_thres
    missing = best > floor + EXACT
    missing[candidates] = False
    if kind != "nms":
        return f"{int(missing.sum())} better candidates left out" if bool(missing.any()) else ""
    overlaps = box_iou(found.boxes, boxes) > options.iou_thres - EXACT
    missing &= ~(overlaps & ~is_other & (found.scores[:, None] >= best - EXACT)).any(0)
    if bool(missing.any()):
        return f"{int(missing.sum())} candidates missing that nothing suppresses"
    among = box_iou(found.boxes, found.boxes) * (found.labels[:, None] == found.labels)
    if bool((among.triu(1) > options.iou_thres + EXACT).any()):
        return "two detections of one class that overlap too much"
    return ""


def beside_candidates(rows: Tensor, decoded: Decoded) -> tuple[list[Tensor], list[Tensor]]:
    """Rows (B, K, 6) of a one-to-one branch, and what they should be: boxes, scores, and scores by rank.

    Nearly equal scores may rank either way, so that a row is held against the candidate that it is nearest to; that none
    was left out shows in the scores by rank, which no rounding moves further than itself.
    """
    rows = rows.to(decoded.boxes.dtype)
    best = best_rows(decoded, rows.shape[1])
    boxes, scores = rows[..., :4].clone(), rows[..., 4].clone()
    most = decoded.scores.shape[-1] - 1
    scale = decoded.boxes.abs().amax().clamp(min=1)
    for image, (own, labels) in enumerate(zip(rows, rows[..., 5].round().long().clamp(0, most))):
        own_scores = decoded.scores[image][:, labels].T
        gaps = torch.cdist(own[:, :4] / scale, decoded.boxes[image] / scale, p=float("inf"))
        nearest = (gaps + (own_scores - own[:, 4:5]).abs()).argmin(1, keepdim=True)
        is_row = own[:, 4] > 0  # behind the last there are zeros
        boxes[image, is_row] = decoded.boxes[image][nearest[is_row, 0]]
        scores[image, is_row] = own_scores.gather(1, nearest)[is_row, 0]
    return [rows[..., :4], rows[..., 4], rows[..., 4]], [boxes, scores, best[..., 4]]
