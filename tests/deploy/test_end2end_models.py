"""Models with a one-to-one branch in other runtimes: no suppression in the file, the same boxes as PyTorch's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch_versions import needs_programs

import export
from deploy.backends import load_backend
from deploy.exporters.end2end import beside_candidates, selection_fault
from deploy.exporters.network import ExportOptions, blobs
from models.heads.one_to_one import use_nms
from models.postprocess import KINDS, postprocess
from models.yolo import DetectionModel, build_model
from utils.errors import ConfigError
from utils.structures import Decoded

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

BACKBONE = [[-1, 1, "Conv", [8, 3, 2]], *([[-1, 1, "Conv", [16, 3, 2]]] * 4)]
OPTIONS = ExportOptions(imgsz=(64, 96), dynamic="all", end2end=True, conf_thres=0.01)
OPTIONS_PLAIN = ExportOptions(imgsz=(64, 96), batch=2)


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
    assert backend.postprocess_kind == ("nms" if nms else "best")
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


FORMS = ["onnx", "torchscript", pytest.param("pt2", marks=needs_programs), "openvino"]


@pytest.mark.parametrize("form", FORMS)
def test_a_file_has_the_best_300_rows_unasked_and_what_pytorch_detects(form: str, tmp_path: Path):
    if form == "openvino":
        pytest.importorskip("openvino")
    model = model_with_branches("Detect", 1)
    options = ExportOptions(imgsz=(64, 96), dynamic="all")
    (artifact,) = export.export(model, [form], options, tmp_path / "best.pt")
    backend = load_backend(artifact.path)
    assert backend.end2end and backend.info.thresholds == (0.0, 1.0, 300)
    # 126 predictions, rows of zeros behind them; 504, of which 300 are left.
    for batch, size, count in ((1, (64, 96), 126), (5, (128, 192), 300)):
        images = blobs(batch, size, seed=4)
        (rows,) = backend.run(images)
        assert (
            rows.shape == (batch, 300, 6) and (rows[:, :, 4] > 0).sum(1).tolist() == [count] * batch
        )
        with torch.no_grad():
            expected = postprocess(
                model.decode(model(images)), "best", conf_thres=0, iou_thres=0, max_det=300
            )
        for found, wanted in zip(backend(images), expected, strict=True):
            torch.testing.assert_close(found.scores, wanted.scores, rtol=0, atol=1e-5)
            gaps = (found.boxes[:, None] - wanted.boxes).abs().amax(-1)
            gaps += 1000 * (found.labels[:, None] != wanted.labels)
            assert gaps.amin(1).max() < 1e-3


def test_the_graph_of_an_onnx_file_has_one_branch_and_no_suppression(tmp_path: Path):
    model = model_with_branches("Detect", 16)
    plain = ExportOptions(imgsz=(64, 96))
    (artifact,) = export.export(model, ["onnx"], plain, tmp_path / "best.pt")
    graph = onnx.load(str(artifact.path)).graph
    kinds = [node.op_type for node in graph.node]
    assert "NonMaxSuppression" not in kinds and kinds.count("TopK") == 1
    (output,) = graph.output
    assert [d.dim_value for d in output.type.tensor_type.shape.dim] == [1, 300, 6]
    branch = [
        node.name for node in graph.node if node.op_type == "Conv" and "/model.5/" in node.name
    ]
    assert branch and all("one2one" in name or "/cv" in name for name in branch)
    convolutions = [m for part in (model.head.cv2, model.head.cv3) for m in part.modules()]
    assert len(branch) == sum(isinstance(m, nn.Conv2d) for m in convolutions)


def test_rows_that_are_not_the_networks_are_refused():
    """A swapped score, a box of a neighbour, another label and a lost detection each show in one of the gaps."""
    scores = torch.tensor([[[0.9, 0.1], [0.2, 0.7], [0.5, 0.3]]])
    boxes = torch.tensor([[[0.0, 0, 8, 8], [4, 4, 20, 20], [9, 9, 30, 31]]])
    right = torch.tensor(
        [[[0.0, 0, 8, 8, 0.9, 0], [4, 4, 20, 20, 0.7, 1], [9, 9, 30, 31, 0.5, 0], [0] * 6]]
    )

    def gap(rows: torch.Tensor) -> float:
        found, expected = beside_candidates(rows, Decoded(boxes, scores))
        return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))

    assert gap(right) == 0
    exact = Decoded(boxes.double(), scores.double())
    assert all(map(torch.allclose, *beside_candidates(right, exact)))
    assert gap(right[:, [1, 0, 2, 3]]) == pytest.approx(0.2)  # out of order
    for place, value in (((0, 1, 4), 0.5), ((0, 0, 2), 9.0), ((0, 1, 5), 0.0), ((0, 2, 4), 0.0)):
        wrong = right.clone()
        wrong[place] = value
        assert gap(wrong) > 0.1, place


def test_the_branch_that_needs_nms_can_still_be_run(tmp_path: Path):
    """`--one-to-many` reads the other branch of weights as they were trained; a file has one of the two."""
    model = model_with_branches("Detect", 1)
    (file,) = export.export(model, ["pt"], OPTIONS, tmp_path / "best.pt")
    images = blobs(2, (64, 96), seed=4)
    with torch.no_grad():
        raw = model(images)
    for many, branch in ((False, raw.one), (True, raw.many)):
        backend = load_backend(file.path, one_to_many=many)
        assert backend.postprocess_kind == ("nms" if many else "best")
        torch.testing.assert_close(backend(images).scores, branch.logits.sigmoid())
    (written,) = export.export(model, ["torchscript"], OPTIONS_PLAIN, tmp_path / "best.pt")
    with pytest.raises(ConfigError, match="--one-to-many: got .*best.torchscript"):
        load_backend(written.path, one_to_many=True)
    use_nms(model.head)
    (written,) = export.export(model, ["torchscript"], OPTIONS_PLAIN, tmp_path / "best.pt")
    backend = load_backend(written.path)
    assert not backend.end2end and backend.postprocess_kind == "nms"
    torch.testing.assert_close(backend(images).scores, raw.many.logits.sigmoid(), rtol=0, atol=1e-5)


def test_a_prediction_has_its_best_class_alone():
    decoded = Decoded(torch.tensor([[[0.0, 0, 8, 8]]]), torch.tensor([[[0.9, 0.8]]]))
    limits = {"conf_thres": 0.1, "iou_thres": 0.5, "max_det": 9, "multi_label": True}
    assert [len(postprocess(decoded, kind, **limits)[0].scores) for kind in KINDS] == [2, 2, 1]
