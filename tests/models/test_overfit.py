"""Every family learns one batch by heart: loss, assignment, head and decoding agree with each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from shell import draw_picture
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.ops import box_iou

from engine.recipe import recipe
from models.family import build_criterion, total_loss
from models.postprocess import postprocess
from models.yolo import build_model
from utils.structures import Targets

QUICK = Path(__file__).resolve().parents[2] / "data" / "hyps" / "quick.yaml"
CONFIGS = {
    "yolov5n": 0.01,
    "gelan-t": 0.005,
    "yolov9-t": 0.005,
    "yolo11n": 0.005,
    "rtdetr-r18": 5e-4,
    "dfine-s": 5e-4,
}
IMGSZ = (160, 160)
STEPS = 250


def one_batch() -> tuple[Tensor, Targets]:
    """Four pictures with two to five objects each."""
    pictures, rows = zip(*(draw_picture(np.random.default_rng(n), 2 + n) for n in range(4)))
    images = torch.stack([torch.from_numpy(p.copy()).permute(2, 0, 1) / 255 for p in pictures])
    images = interpolate(images, IMGSZ, mode="bilinear")
    index = torch.tensor([n for n, own in enumerate(rows) for _ in own])
    cells = torch.tensor([[float(v) for v in row.split()] for own in rows for row in own])
    centre, half = cells[:, 1:3] * IMGSZ[0], cells[:, 3:] * IMGSZ[0] / 2
    boxes = torch.cat((centre - half, centre + half), 1)
    return images, Targets(index, cells[:, 0].long(), boxes)


@pytest.mark.slow
@pytest.mark.parametrize("cfg", CONFIGS)
def test_a_batch_is_learnt_by_heart(cfg: str) -> None:
    torch.manual_seed(0)
    model = build_model(cfg, num_classes=2, imgsz=IMGSZ).train()
    images, targets = one_batch()
    hyp = recipe(model.head.family, str(QUICK), {})
    criterion = build_criterion(model.head, hyp, IMGSZ)
    optimizer = torch.optim.AdamW(model.parameters(), CONFIGS[cfg], weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, CONFIGS[cfg], STEPS)
    totals = []
    for _ in range(STEPS):
        losses = criterion(model(images, targets), targets)
        total = total_loss(criterion, losses, len(images))
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
        totals.append(total.item())
    assert totals[-1] < 0.5 * totals[0]
    with torch.no_grad():
        model.eval()
        decoded = model.decode(model(images))
    found = postprocess(decoded, model.head.postprocess, conf_thres=0.25, iou_thres=0.6, max_det=50)
    missed = []
    for number, detections in enumerate(found):
        own = targets.image_index == number
        overlap = box_iou(targets.boxes[own], detections.boxes)
        same = targets.labels[own][:, None] == detections.labels
        best = (overlap * same).amax(1) if len(detections.labels) else torch.zeros(int(own.sum()))
        missed += best[best < 0.5].tolist()
    assert not missed, f"{len(missed)} of {len(targets.labels)} objects are not found"
