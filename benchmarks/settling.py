"""Weights as a training leaves them, without the training.

A fresh network cannot show a fault. Its BatchNorm statistics never saw data, so signals die out on
the way and every image gives the same boxes; its scores are all alike and near 0; parts that start
at zero (layer scales, the last layers of box branches, sampling offsets) do nothing yet. And where
statistics are taken but every BatchNorm still has factor 1 and shift 0, what distinguishes two
images grows from layer to layer, rounding with it, until float32 has no digits left to compare.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deploy.exporters.network import blobs
from models.yolo import DetectionModel

BATCHES = 2
BATCH = 4
SLIGHT = 0.1  # a factor that starts below it hides what it multiplies
MATRIX_DEVIATION = 0.02
SILENT = 0.1  # a share of the mean variance; a channel silent here must not be blown up elsewhere
ANCHORS = range(1, 10)
BatchNorm = nn.modules.batchnorm._BatchNorm


@torch.no_grad()
def settle(model: DetectionModel, imgsz: tuple[int, int], seed: int = 0) -> None:
    """Give every part of a fresh `model` an influence on its outputs, in place; eval mode afterwards.

    Args:
        model: with weights as its constructors made them.
        imgsz: size (height, width) of the images that BatchNorm statistics are taken from.
        seed: of everything random.
    """
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            _wake(name, parameter)
        for norm in norms:
            if norm.affine:
                norm.weight.uniform_(0.4, 0.8)
                norm.bias.normal_(0, 1)
        for classifier in classifiers(model.head):
            assert classifier.bias is not None
            classifier.bias.normal_(-1, 1)
    model.eval()
    _collect_statistics(model, norms, imgsz, seed)


def _wake(name: str, parameter: Tensor) -> None:
    """Values for a parameter that starts with zeros or with one slight factor everywhere."""
    first = parameter.flatten()[:1]
    if name.endswith("bias") or parameter.numel() < 2 or bool((parameter != first).any()):
        return
    if parameter.squeeze().ndim >= 2 and not bool(first.any()):
        parameter.normal_(0, MATRIX_DEVIATION)
    elif bool(first.abs() < SLIGHT):
        parameter.uniform_(SLIGHT, 2 * SLIGHT)


def classifiers(head: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    """Layers of a head that give one number a class, with or without those of a box beside it."""
    classes = int(getattr(head, "num_classes"))  # noqa: B009  (nn.Module says Tensor of it)
    widths = {classes} | {anchors * (5 + classes) for anchors in ANCHORS}
    layers = [m for m in head.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return [m for m in layers if m.bias is not None and len(m.bias) in widths]


def _collect_statistics(
    model: DetectionModel, norms: list[BatchNorm], imgsz: tuple[int, int], seed: int
) -> None:
    """Let BatchNorm, and nothing else, train for a few batches; their plain mean counts."""
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches
        norm.train()
    for number in range(BATCHES):
        model(blobs(BATCH, imgsz, seed=1000 + BATCHES * seed + number))
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum
        norm.eval()
        if norm.running_var is not None:
            norm.running_var.clamp_(min=SILENT * float(norm.running_var.mean()))
