"""Nothing forgets the device: forward, loss, gradients and detections of every family beside an accelerator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from other_device import Elsewhere, MixedDevicesError, other_device, send, send_model

from engine.anchors import check_anchors
from engine.recipe import recipe
from models.family import build_criterion, total_loss
from models.postprocess import postprocess
from models.yolo import build_model
from utils.structures import Targets

IMGSZ = (160, 160)
CONFIGS = ("yolov5n", "yolov9-t", "yolo11n", "rtdetr-r18")
COUPLINGS = ("yolov5n-emo", "yolov5n-revcol", "yolo11-mobilenetv4")


def targets() -> Targets:
    boxes = torch.tensor([[10.0, 12, 60, 70], [50, 40, 130, 150], [5, 5, 30, 28]])
    return Targets(torch.tensor([0, 0, 1]), torch.tensor([0, 2, 1]), boxes)


def test_the_stand_in_tells_devices_apart() -> None:
    here, there = torch.ones(3), send(torch.ones(3))
    with other_device():
        assert isinstance(torch.zeros(2, device=there.device), Elsewhere)
        assert not isinstance((there + there).cpu(), Elsewhere)
        assert isinstance(there[torch.tensor([0, 1])] * 2 + torch.tensor(1.0), Elsewhere)
        with pytest.raises(MixedDevicesError):
            here + there
        with pytest.raises(MixedDevicesError):
            here[there.long()]


@pytest.mark.parametrize(
    "cfg", [*CONFIGS, *(pytest.param(c, marks=pytest.mark.slow) for c in COUPLINGS)]
)
def test_a_family_stays_on_its_device(cfg: str) -> None:
    torch.manual_seed(0)
    model = send_model(build_model(cfg, num_classes=3, imgsz=IMGSZ))
    hyp = recipe(model.head.family, None, {})
    with other_device():
        criterion = build_criterion(model.head, hyp, IMGSZ)
        images = send(torch.rand(2, 3, *IMGSZ))
        objects = Targets(*(send(t) for t in targets()))
        losses = criterion(model.train()(images, objects), objects)
        total = total_loss(criterion, losses, 2)
        assert isinstance(total, Elsewhere)
        total.backward()
        missing = [
            k
            for k, p in model.named_parameters()
            if p.requires_grad and not isinstance(p.grad, Elsewhere)
        ]
        assert not missing
        with torch.no_grad():
            decoded = model.eval().decode(model(images))
            found = postprocess(
                decoded, model.head.postprocess, conf_thres=0.0, iou_thres=0.6, max_det=20
            )
    assert all(isinstance(t, Elsewhere) for detections in found for t in detections)
    assert len(found) == 2


def test_fitted_anchors_go_where_the_head_is() -> None:
    model = send_model(build_model("yolov5n", num_classes=3, imgsz=IMGSZ))
    sizes = np.random.default_rng(0).uniform(2, 5, (60, 2)) * [[1, 9]]  # unlike COCO's objects
    with other_device():
        before = model.head.anchors.clone().cpu()
        check_anchors(model.head, sizes, 2.0, 0)
        after = model.head.anchors
        assert isinstance(after, Elsewhere)
        assert not torch.equal(after.cpu(), before)
