"""Images and mAP for an integer export: what ranges are measured on, what the integers cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor

from data.config import load_data_config
from data.dataset import DetectionDataset, LoadOptions, build_dataset
from data.loader import build_loader
from engine.datasets import check_classes, with_white
from engine.evaluation import Output, collect, evaluator_of
from utils.errors import ConfigError
from utils.metrics import Metrics
from utils.structures import as_float

CALIBRATION_IMAGES = 128


def load_split(
    source: str,
    split: str,
    imgsz: tuple[int, int],
    names: tuple[str, ...],
    white: float | None = None,
) -> DetectionDataset:
    """A split for an integer export of a model of the classes `names`; `white` is the model's.

    Raises:
        ConfigError: nothing was given, or it has other classes, see `check_classes`.
    """
    if not source:
        raise ConfigError("--int8: got no --data, expected the data YAML the model was trained on.")
    config = with_white(load_data_config(source), white)
    dataset = build_dataset(config, split, LoadOptions(imgsz=imgsz))
    check_classes(names, dataset.names, "the model", source)
    return dataset


def calibration_images(dataset: DetectionDataset, batch: int) -> Iterator[Tensor]:
    """About `CALIBRATION_IMAGES` random images, as whole float batches (batch, 3, H, W) in [0, 1]."""
    loader = build_loader(dataset, batch, workers=0, shuffle=True, drop_last=True)
    for sample in islice(loader, math.ceil(CALIBRATION_IMAGES / batch)):
        yield as_float(sample.images, "cpu")


def measure(
    predict: Callable[[Tensor], Output],
    kind: str,
    dataset: DetectionDataset,
    device: torch.device,
    batch: int = 8,
) -> Metrics:
    """COCO metrics of a model or an artifact on a split, at the thresholds that val.py uses."""
    evaluator, loader = evaluator_of(dataset), build_loader(dataset, batch, workers=0)
    collect(lambda images, _: predict(images), kind, loader, evaluator, device)
    return evaluator.evaluate()
