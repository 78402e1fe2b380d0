"""Raw predictions of every family for the same objects, without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from models.family import build_criterion
from models.heads.anchor import AnchorDetect, AnchorRaw
from models.heads.ddetect import DualDDetect, DualRaw
from models.heads.dfine import DFINEDecoder, DFINERaw, Refined
from models.heads.dfl import DFLDetect, DFLRaw, anchor_points
from models.heads.rtdetr import RTDETRDecoder, RTDETRRaw
from utils.config import load_hyp
from utils.structures import Targets

HYPS = Path(__file__).parents[2] / "data" / "hyps"
SIZE = (64, 96)
TARGETS = Targets(
    torch.tensor([0, 0, 1]),
    torch.tensor([1, 2, 0]),
    torch.tensor([[8.0, 8, 30, 40], [20, 10, 60, 50], [4, 0, 90, 60]]),
)
FAMILIES = ("yolov5", "yolov9", "yolo11", "rtdetr", "dfine")


def dfl_raw(seed: int) -> DFLRaw:
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.empty(1, 1, SIZE[0] // s, SIZE[1] // s) for s in (8, 16)]
    points, strides = anchor_points(maps, (8, 16))
    distances = torch.randn(2, len(points), 64, generator=generator).requires_grad_()
    logits = torch.randn(2, len(points), 3, generator=generator).requires_grad_()
    return DFLRaw(distances, logits, points, strides)


def anchor_case(seed: int) -> tuple[Any, Any, list[torch.Tensor]]:
    head = AnchorDetect(3, [[s, s, 4.0 * s, 2.0 * s] for s in (8, 16)], [4, 4])
    head.initialize((8, 16))
    generator = torch.Generator().manual_seed(seed)
    levels = [
        torch.randn(2, 2, SIZE[0] // s, SIZE[1] // s, 8, generator=generator).requires_grad_()
        for s in (8, 16)
    ]
    return head, AnchorRaw(tuple(levels)), levels


def query_case(seed: int) -> tuple[Any, Any, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator).mul(0.4).add(0.2).requires_grad_()

    logits, boxes, first, start = draw(2, 2, 6, 3), draw(2, 2, 6, 4), draw(2, 6, 3), draw(2, 6, 4)
    head = RTDETRDecoder(3, [8], 8, num_heads=2, num_layers=1)
    raw = RTDETRRaw(logits, boxes, first, start, None, SIZE)
    return head, raw, [logits, boxes, first, start]


def distribution_case(seed: int) -> tuple[Any, Any, list[torch.Tensor]]:
    _, raw, leaves = query_case(seed)
    generator = torch.Generator().manual_seed(seed)
    edges = torch.randn(1, 2, 6, 4, 9, generator=generator).requires_grad_()
    refined = Refined(raw.logits, raw.boxes, edges, raw.boxes[0].detach())
    head = DFINEDecoder(3, [8], 8, num_heads=2, num_layers=1, reg_max=8)
    return head, DFINERaw(refined, *raw[2:]), [*leaves, edges]


def case(family: str, seed: int = 0) -> tuple[Any, Any, list[torch.Tensor]]:
    """A head, its raw predictions for two images, and their leaves."""
    if family == "yolov5":
        return anchor_case(seed)
    if family == "rtdetr":
        return query_case(seed)
    if family == "dfine":
        return distribution_case(seed)
    head = DualDDetect(3, [8] * 4) if family == "yolov9" else DFLDetect(3, channels=[8, 8])
    main, aux = dfl_raw(seed), dfl_raw(seed + 1)
    if family == "yolo11":
        return head, main, [main.distances, main.logits]
    return head, DualRaw(main, aux), [main.distances, main.logits, aux.distances, aux.logits]


def criterion_of(family: str, head: Any, **changes: Any) -> Any:
    hyp = {**load_hyp(None, HYPS / f"{family}.yaml"), **changes}
    return build_criterion(head, hyp, SIZE, allow_code="box_loss" in changes)
