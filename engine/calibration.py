"""Images and mAP for an integer export: what ranges are measured on, what the integers cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor

from data.config import load_data_config
from data.dataset import DetectionDataset, build_dataset
from data.loader import build_loader
from engine.evaluation import evaluate
from engine.setup import with_white
from utils.errors import ConfigError
from utils.metrics import CocoEvaluator, Metrics
from utils.structures import Decoded, Detections, as_float

CALIBRATION_IMAGES = 128


def load_split(
    source: str,
    split: str,
    imgsz: tuple[int, int],
    names: tuple[str, ...],
    white: float | None = None,
) -> DetectionDataset:
    """A split of the data set that `--data` names, letterboxed to `imgsz`; `white` is the model's.

    Raises:
        ConfigError: nothing was given, or it has another number of classes than the model.
    """
    if not source:
        raise ConfigError("--int8: got no --data, expected the data YAML the model was trained on.")
    dataset = build_dataset(with_white(load_data_config(source), white), split, imgsz=imgsz)
    if len(dataset.names) != len(names):
        raise ConfigError(
            f"--data {source}: got {len(dataset.names)} classes, expected the model's {len(names)}."
        )
    return dataset


def calibration_images(dataset: DetectionDataset, batch: int) -> Iterator[Tensor]:
    """About `CALIBRATION_IMAGES` random images, as whole float batches (batch, 3, H, W) in [0,
    1].
    """
    loader = build_loader(dataset, batch, workers=0, shuffle=True, drop_last=True)
    for sample in islice(loader, math.ceil(CALIBRATION_IMAGES / batch)):
        yield as_float(sample.images, "cpu")


def measure(
    predict: Callable[[Tensor], Decoded | list[Detections]],
    kind: str,
    dataset: DetectionDataset,
    device: torch.device,
    batch: int = 8,
) -> Metrics:
    """COCO metrics of a model or an artifact, at the thresholds that val.py uses.

    Args:
        predict: images (B, 3, H, W) in [0, 1] -> decoded predictions, or detections.
        kind: "nms" or "topk", what the family needs.
        dataset: a split.
        device: where the images go.
        batch: images at a time.
    """
    evaluator = CocoEvaluator(dataset.coco_ground_truth(), dataset.category_ids, dataset.names)
    loader = build_loader(dataset, batch, workers=0)
    return evaluate(
        lambda images, _: predict(images), kind, loader, evaluator, device=device
    ).metrics
