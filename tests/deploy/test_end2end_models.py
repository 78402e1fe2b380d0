"""Models with a one-to-one branch in other runtimes: no suppression in the file, the same boxes as PyTorch's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import export
from deploy.backends import load_backend
from deploy.exporters.end2end import selection_fault
from deploy.exporters.network import ExportOptions, blobs
from models.heads.one_to_one import use_nms
from models.yolo import DetectionModel, build_model

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

BACKBONE = [[-1, 1, "Conv", [8, 3, 2]], *([[-1, 1, "Conv", [16, 3, 2]]] * 4)]
OPTIONS = ExportOptions(imgsz=(64, 96), dynamic="all", end2end=True, conf_thres=0.01)


def model_with_branches(head: str, reg_max: int) -> DetectionModel:
    """Three classes whose scores spread over (0, 1), some boxes of no area; the branches differ."""
    rows = [[[2, 3, 4], 1, head, ["nc"]]]
    config = {"nc": 3, "backbone": BACKBONE, "head": rows, "end2end": True, "reg_max": reg_max}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = build_model(config, names=("cat", "it's", "dog"), imgsz=(64, 96))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.startswith("model.5") and name.endswith("bias"):
                    parameter.add_(torch.randn(parameter.shape) + 4)
            for module in model.modules():
                if isinstance(module, nn.Conv2d):
                    module.weight.mul_(2)
    return model.eval()


@pytest.mark.parametrize(("head", "reg_max"), [("Detect", 1), ("Detect", 16), ("DDetect", 1)])
@pytest.mark.parametrize("nms", [False, True], ids=["one", "many"])
def test_the_file_does_what_the_branch_says(head: str, reg_max: int, nms: bool, tmp_path: Path):
    model = model_with_branches(head, reg_max)
    if nms:
        use_nms(model.head)
    (artifact,) = export.export(model, ["onnx"], OPTIONS, tmp_path / "best.pt")
    graph = onnx.load(str(artifact.path)).graph
    kinds = {node.op_type for node in graph.node}
    assert ("NonMaxSuppression" in kinds) == nms and "TopK" in kinds
    assert [d.dim_value for d in graph.output[0].type.tensor_type.shape.dim][1:] == [300, 6]
    backend = load_backend(artifact.path)
    assert backend.postprocess_kind == ("nms" if nms else "topk")
    for batch in (1, 2, 5):
        images = blobs(batch, (96, 96), seed=4)
        with torch.no_grad():
            decoded = model.decode(model(images))
        found = backend(images)
        assert isinstance(found, list) and len(found) == batch
        for boxes, scores, detections in zip(decoded.boxes, decoded.scores, found, strict=True):
            kept = (detections.boxes, detections.scores, detections.labels)
            assert len(kept[1]) > (0 if nms else 100)
            assert (
                selection_fault(detections, boxes, scores, backend.postprocess_kind, OPTIONS) == ""
            )
            best = scores.amax(1)
            place = (best[None] - kept[1][:, None]).abs().argmin(1)
            torch.testing.assert_close(best[place], kept[1], rtol=0, atol=1e-4)


def test_a_file_without_top_k_says_how_it_is_read(tmp_path: Path):
    model = model_with_branches("Detect", 1)
    options = ExportOptions(imgsz=(64, 96), dynamic="batch")
    (artifact,) = export.export(model, ["torchscript"], options, tmp_path / "best.pt")
    backend = load_backend(artifact.path)
    assert backend.postprocess_kind == "topk" and not backend.end2end
    images = blobs(2, (64, 96), seed=4)
    with torch.no_grad():
        expected = model.decode(model(images))
    for a, b in zip(backend(images), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
