"""The one evaluation loop: predictions of a model, of whatever kind, against the labels of a split."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from models.postprocess import keep_best, postprocess
from utils.device import synchronize
from utils.metrics import CocoEvaluator, Metrics
from utils.structures import Batch, Decoded, Detections, Targets, as_float

Predict = Callable[[Tensor, Targets], "Decoded | list[Detections]"]


class Thresholds(NamedTuple):
    """What counts as a detection.

    Attributes:
        conf: lowest score.
        iou: largest overlap that NMS leaves.
        max_det: detections an image at most.
        agnostic: NMS over all classes together.
    """

    conf: float = 0.001
    iou: float = 0.6
    max_det: int = 300
    agnostic: bool = False


VALIDATION = Thresholds()


class Speed(NamedTuple):
    """Milliseconds an image: preparing it on the device, the network with decoding, and NMS or top-k."""

    prepare: float
    inference: float
    postprocess: float


class Evaluation(NamedTuple):
    """Metrics and how long an image took."""

    metrics: Metrics
    speed: Speed


@torch.inference_mode()
def evaluate(
    predict: Predict,
    kind: str,
    loader: Iterable[Batch],
    evaluator: CocoEvaluator,
    *,
    device: torch.device,
    thresholds: Thresholds = VALIDATION,
    gather: Callable[[CocoEvaluator], None] | None = None,
    on_batch: Callable[[Batch, list[Detections]], None] | None = None,
) -> Evaluation:
    """Run `predict` over a loader and measure.

    Args:
        predict: images (B, 3, H, W) in [0, 1] and their targets -> decoded predictions, or detections where the
            artifact has its postprocessing inside.
        kind: "nms" or "topk", what the family needs.
        loader: batches of uint8 images.
        evaluator: reset, filled and evaluated here.
        device: where the images go.
        thresholds: what counts as a detection.
        gather: called before the evaluation, to bring the shares of all processes together.
        on_batch: sees each batch and its detections in the batch's pixels.
    """
    evaluator.reset()
    clocks, images_seen = [0.0, 0.0, 0.0], 0
    for batch in loader:
        marks = [_now(device)]
        images, targets = as_float(batch.images, device), batch.targets.to(device)
        marks.append(_now(device))
        output = predict(images, targets)
        marks.append(_now(device))
        detections = _detections(output, kind, thresholds)
        marks.append(_now(device))
        clocks = [total + end - start for total, start, end in zip(clocks, marks, marks[1:])]
        images_seen += len(images)
        restored = [
            found._replace(boxes=box.restore(found.boxes))
            for found, box in zip(detections, batch.letterboxes)
        ]
        evaluator.process(batch.image_ids, restored)
        if on_batch:
            on_batch(batch, detections)
    if gather:
        gather(evaluator)
    return Evaluation(
        evaluator.evaluate(), Speed(*(1000 * clock / max(images_seen, 1) for clock in clocks))
    )


def _now(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()


def _detections(
    output: Decoded | list[Detections], kind: str, thresholds: Thresholds
) -> list[Detections]:
    if not isinstance(output, Decoded):
        return [keep_best(found, thresholds.conf, thresholds.max_det) for found in output]
    return postprocess(
        output, kind, conf_thres=thresholds.conf, iou_thres=thresholds.iou, max_det=thresholds.max_det,
        agnostic=thresholds.agnostic, multi_label=output.scores.shape[-1] > 1,
    )  # fmt: skip
