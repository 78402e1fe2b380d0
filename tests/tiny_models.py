"""One detector of each layout, small enough to be exported in a moment."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from models.yolo import DetectionModel, build_model

BACKBONE = [
    [-1, 1, "Conv", [8, 3, 2]],
    [-1, 1, "Conv", [16, 3, 2]],
    [-1, 1, "Conv", [16, 3, 2]],
    [-1, 1, "Conv", [24, 3, 2]],
    [-1, 1, "Conv", [32, 3, 2]],
]
HEADS: dict[str, list[Any]] = {
    "anchors": ["Detect", ["nc", [[10, 13, 16, 30], [30, 61, 62, 45], [116, 90, 156, 198]]]],
    "channels": ["Detect", ["nc"]],
    "queries": [
        "RTDETRDecoder",
        ["nc", {"hidden": 16, "num_queries": 40, "num_heads": 2, "num_layers": 2, "feedforward": 16}],
    ],
}  # fmt: skip


def tiny_model(layout: str, imgsz: tuple[int, int] = (64, 96)) -> DetectionModel:
    """A network of three classes whose scores spread over (0, 1); always the same weights."""
    head = [[[2, 3, 4], 1, *HEADS[layout]]]
    config = {"nc": 3, "backbone": BACKBONE, "head": head}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = build_model(config, names=("cat", "it's", "dog"), imgsz=imgsz)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "model.5" in name and name.endswith("bias"):
                    parameter.normal_(0, 1)
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_(0, 0.1)
                    module.weight.uniform_(0.5, 2)
                elif isinstance(module, nn.Conv2d):
                    module.weight.mul_(2)
    return model.eval()
