"""Exported artifacts: the same boxes and scores at other batches and sizes, and said so by their metadata."""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from tiny_models import HEADS, tiny_model
from torch_versions import needs_both, needs_programs

import export
from data.images import read_image
from data.transforms import letterbox
from data.videos import Frame
from deploy.backends import load_backend
from deploy.exporters.end2end import append_postprocess, selection_fault
from deploy.exporters.network import ExportOptions, blobs
from deploy.exporters.onnx_file import export_onnx
from deploy.exporters.precision import _drop_round_trips, is_decoding
from deploy.exporters.torch_files import export_pt
from deploy.exporters.verify import ExportMismatchError, verify
from engine.frames import detect, fit
from engine.options import Thresholds
from models.postprocess import postprocess
from models.reparam import fuse
from utils.errors import ConfigError
from utils.structures import Decoded, Detections

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

IMGSZ = (64, 96)
DYNAMIC = ExportOptions(imgsz=IMGSZ, dynamic="all")
SHAPES = {
    "anchors": ["batch", "anchors", 8],
    "channels": ["batch", 7, "anchors"],
    "queries": ["batch", 40, 7],
}


def write(layout: str, form: str, options: ExportOptions, folder: Path) -> Path:
    """Export a tiny detector; every comparison that `export` makes must have been within 1e-4."""
    model = tiny_model(layout)
    (artifact,) = export.export(model, [form], options, folder / "best.pt")
    assert len(artifact.cases) == (2 if options.dynamic else 1)
    assert all(case.rows > 0 for case in artifact.cases)
    return artifact.path


def axes(value: Any) -> list[str | int]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("layout", HEADS)
def test_onnx_gives_the_same_at_other_batches_and_sizes(layout: str, tmp_path: Path):
    path, model = write(layout, "onnx", DYNAMIC, tmp_path), tiny_model(layout)
    graph = onnx.load(str(path)).graph
    assert [v.name for v in graph.input] == ["images"] and [v.name for v in graph.output] == [
        "output0"
    ]
    assert axes(graph.input[0]) == ["batch", 3, "height", "width"]
    assert axes(graph.output[0]) == SHAPES[layout]
    backend = load_backend(path, threads=1)
    assert backend.dynamic and backend.batch is None and not backend.end2end
    for batch, imgsz in ((1, (96, 64)), (2, (64, 96)), (5, (128, 96))):
        images = blobs(batch, imgsz, seed=9)
        with torch.no_grad():
            expected = model.decode(model(images))
        found = backend(images)
        if layout == "queries":  # a set: near scores may change places
            found = Decoded(*(t.sort(1).values for t in found))
            expected = Decoded(*(t.sort(1).values for t in expected))
        torch.testing.assert_close(found.boxes, expected.boxes, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-5)


def test_metadata_has_what_runners_look_for(tmp_path: Path):
    path = write("channels", "onnx", ExportOptions(imgsz=IMGSZ, batch=2), tmp_path)
    network = onnxruntime.InferenceSession(str(path))
    about = network.get_modelmeta().custom_metadata_map
    assert ast.literal_eval(about["names"]) == {0: "cat", 1: "it's", 2: "dog"}
    expected = {
        "stride": "32", "batch": "2", "imgsz": "[64, 96]", "task": "detect", "family": "yolo11", "half": "False",
        "end2end": "False", "channels": "3", "author": "Yoke", "producer": "Yoke", "dynamic": "", "layout": "channels",
    }  # fmt: skip
    assert {key: about[key] for key in expected} == expected
    assert {"description", "version", "date", "padding", "colour"} <= set(about)
    assert network.get_inputs()[0].shape == [2, 3, 64, 96]
    backend = load_backend(path)
    assert len(backend(blobs(3, IMGSZ, 1)).boxes) == 3


@pytest.mark.parametrize(
    "form", ["torchscript", pytest.param("pt2", marks=needs_programs), "openvino"]
)
def test_other_forms_give_the_same_at_another_batch_and_size(form: str, tmp_path: Path):
    pytest.importorskip("openvino") if form == "openvino" else None
    path = write("channels", form, DYNAMIC, tmp_path)
    backend = load_backend(path, threads=1)
    assert (backend.names, backend.dynamic) == (("cat", "it's", "dog"), True)


@pytest.mark.parametrize(
    "changes",
    [
        {"simplify": True},
        {"dynamic": "batch"},
        pytest.param({"dynamo": True}, marks=[pytest.mark.slow, needs_both]),
    ],
)
def test_onnx_options_keep_the_numbers(changes: dict[str, Any], tmp_path: Path):
    pytest.importorskip("onnxslim" if "simplify" in changes else "onnxscript")
    path = write("anchors", "onnx", replace(DYNAMIC, **changes), tmp_path)
    images, model = blobs(2, IMGSZ, seed=9), tiny_model("anchors")
    with torch.no_grad():
        expected = model.decode(model(images))
    found = load_backend(path, threads=1)(images)
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-5)


def test_half_keeps_input_output_and_decoding_in_float32(tmp_path: Path):
    path = write("channels", "onnx", replace(DYNAMIC, half=True), tmp_path)
    proto = onnx.load(str(path))
    assert {v.type.tensor_type.elem_type for v in (*proto.graph.input, *proto.graph.output)} == {1}
    kinds = {t.data_type for t in proto.graph.initializer if len(t.dims) == 4}
    assert kinds == {onnx.TensorProto.FLOAT16}
    decoding = {n for node in proto.graph.node if is_decoding(node) for n in node.output}
    inferred = onnx.shape_inference.infer_shapes(proto).graph.value_info
    types = {v.type.tensor_type.elem_type for v in inferred if v.name in decoding}
    assert onnx.TensorProto.FLOAT in types and onnx.TensorProto.FLOAT16 not in types


def test_an_output_does_not_go_through_float16():
    """As older converters write it: a float32 node, a cast to float16, a cast back that has the output's name."""
    half, whole = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    make, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    nodes = [
        make("Neg", ["images"], ["made"], "own"),
        make("Cast", ["made"], ["halved"], "a", to=half),
        make("Cast", ["halved"], ["output0"], "b", to=whole),
    ]
    ends = [[value(name, whole, [1])] for name in ("images", "output0")]
    graph = onnx.helper.make_graph(nodes, "g", *ends)
    _drop_round_trips(graph, {"own"})
    onnx.checker.check_graph(graph)
    told = [(n.op_type, list(n.input), list(n.output)) for n in graph.node]
    assert told == [("Neg", ["images"], ["made"]), ("Identity", ["made"], ["output0"])]


def test_raw_outputs_are_those_of_the_head_and_no_detector(tmp_path: Path):
    path = write("anchors", "onnx", replace(DYNAMIC, raw=True), tmp_path)
    assert [v.name for v in onnx.load(str(path)).graph.output] == ["output0", "output1", "output2"]
    with pytest.raises(ConfigError, match="--raw"):
        load_backend(path)


# --- NMS and top-k inside the graph ----------------------------------------------------------------


def postprocess_graph(kind: str, options: ExportOptions) -> Any:
    """A runner of the appended graph alone, behind a network that does nothing."""
    network = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> network (float[N, A, 4] b, float[N, A, C] s) '
        "=> (float[N, A, 4] boxes, float[N, A, C] scores) { boxes = Identity(b) scores = Identity(s) }"
    )
    model = append_postprocess(network, kind, options)
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(model.SerializeToString())


@pytest.mark.parametrize("kind", ["nms", "topk"])
@pytest.mark.parametrize(("batch", "max_det"), [(1, 300), (2, 5), (5, 40)])
def test_the_graph_selects_box_for_box_what_we_select(kind: str, batch: int, max_det: int):
    options = ExportOptions(conf_thres=0.25, iou_thres=0.45, max_det=max_det)
    network = postprocess_graph(kind, options)
    generator = torch.Generator().manual_seed(batch)
    for _ in range(10):
        corner = torch.rand(batch, 120, 2, generator=generator) * 60
        size = torch.rand(batch, 120, 2, generator=generator) * 40 + 1
        boxes = torch.cat((corner, corner + size), 2)
        scores = torch.rand(batch, 120, 3, generator=generator) ** 3
        scores[batch // 2] *= 0.2  # an image without detections
        rows, counts = network.run(None, {"b": boxes.numpy(), "s": scores.numpy()})
        assert rows.shape == (batch, max_det, 6) and counts.dtype == np.int64
        expected = postprocess(
            Decoded(boxes, scores), kind, conf_thres=0.25, iou_thres=0.45, max_det=max_det
        )
        assert counts.tolist() == [len(e.scores) for e in expected] and counts[batch // 2] == 0
        for row, found in zip(rows, expected):
            wanted = torch.cat((found.boxes, found.scores[:, None], found.labels[:, None]), 1)
            assert np.array_equal(row[: len(wanted)], wanted.numpy())
            assert not row[len(wanted) :].any()


@pytest.mark.parametrize("layout", ["anchors", "queries"])
def test_end2end_composes_with_dynamic(layout: str, tmp_path: Path):
    options = replace(DYNAMIC, end2end=True, max_det=20)
    path, model = write(layout, "onnx", options, tmp_path), tiny_model(layout)
    graph = onnx.load(str(path)).graph
    assert [axes(v) for v in graph.output] == [["batch", 20, 6], ["batch"]]
    backend = load_backend(path)
    assert backend.end2end
    for batch in (1, 2, 5):
        images = blobs(batch, (96, 96), seed=4)
        with torch.no_grad():
            decoded = model.decode(model(images))
        found = backend(images)
        assert isinstance(found, list) and len(found) == batch
        for i, detections in enumerate(found):
            near = replace(options, conf_thres=options.conf_thres)
            kind = model.head.postprocess
            assert len(detections.scores) == 20
            assert (
                selection_fault(detections, decoded.boxes[i], decoded.scores[i], kind, near) == ""
            )


# Boxes 0 and 1 overlap by 2/3, box 2 stands apart.
BOXES = torch.tensor([[0.0, 0, 10, 10], [2, 0, 12, 10], [50, 50, 60, 60]])
SCORES = torch.tensor([[0.9], [0.8], [0.7]])


@pytest.mark.parametrize(
    ("kept", "told"),
    [
        ([0, 2], ""),
        ([1, 2], "nothing suppresses"),
        ([0], "nothing suppresses"),
        ([0, 1, 2], "overlap too much"),
        ([2, 0], "order of score"),
    ],
)
def test_a_wrong_selection_is_told(kept: list[int], told: str):
    found = Detections(BOXES[kept], SCORES[kept, 0], torch.zeros(len(kept), dtype=torch.int64))
    fault = selection_fault(found, BOXES, SCORES, "nms", ExportOptions())
    assert told in fault and bool(fault) == bool(told)


def test_a_box_that_was_never_predicted_is_told():
    found = Detections(BOXES[[0, 2]] + 1, SCORES[[0, 2], 0], torch.zeros(2, dtype=torch.int64))
    assert "none of the candidates" in selection_fault(found, BOXES, SCORES, "nms", ExportOptions())


# --- errors ----------------------------------------------------------------------------------------


def test_an_artifact_that_differs_is_an_error_that_prints_both(tmp_path: Path):
    path = write("channels", "onnx", DYNAMIC, tmp_path)
    other = tiny_model("channels")
    with torch.no_grad():
        other.head.cv2[0][-1].bias[0] += 3  # all bins alike would change nothing
    fuse(other)
    with pytest.raises(ExportMismatchError, match=r"got box value \S+, PyTorch gives \S+;.*1e-04"):
        verify(path, other, DYNAMIC)


@pytest.mark.parametrize(
    ("include", "changes", "told"),
    [
        ("onxx", {}, "Did you mean 'onnx'"),
        ("engine", {}, "tensorrt is not installed"),
        ("torchscript", {"end2end": True}, "--end2end"),
        ("pt2", {"int8": True}, "--int8"),
    ],
)
def test_what_cannot_be_exported_is_told_before_anything_is_written(
    include: str, changes: dict[str, Any], told: str, tmp_path: Path
):
    with pytest.raises(ConfigError, match=told):
        options = replace(DYNAMIC, **changes)
        export.export(tiny_model("anchors"), [include], options, tmp_path / "best.pt")
    assert not list(tmp_path.iterdir())


def test_flags_that_exclude_each_other_are_told():
    model = tiny_model("anchors")
    for flags, told in ((["--nms", "--raw"], "--raw"), (["--half", "--int8"], "--int8")):
        with pytest.raises(ConfigError, match=told):
            export.export_options(export.parse_options(["--weights", "x.pt", *flags]), model)


def test_the_model_that_is_exported_stays_as_it_was(tmp_path: Path):
    model = tiny_model("anchors").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    export.export(model, ["onnx"], ExportOptions(imgsz=IMGSZ), tmp_path / "best.pt")
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# --- the runner that needs nothing of this project -------------------------------------------------


def load_runner() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "examples" / "onnx_runner.py"
    spec = importlib.util.spec_from_file_location("onnx_runner", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("layout", [*HEADS, "end2end"])
def test_the_example_finds_the_boxes_that_detect_finds(layout: str, tmp_path: Path):
    options = ExportOptions(imgsz=IMGSZ, dynamic="batch", end2end=layout == "end2end")
    path = write("anchors" if layout == "end2end" else layout, "onnx", options, tmp_path)
    image = (blobs(1, (80, 150), seed=6)[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    limits = Thresholds(0.25, 0.45, 1000)
    frame = Frame("x.png", image, 0, None)
    (expected,) = detect(load_backend(path), [fit(frame, IMGSZ)], limits)
    runner = load_runner()
    boxes, scores, labels = runner.detect(*runner.load(str(path)), image[..., ::-1])
    assert len(boxes) == len(expected.scores) > 3
    np.testing.assert_allclose(boxes, expected.boxes.numpy(), atol=0.01)
    np.testing.assert_allclose(scores, expected.scores.numpy(), atol=1e-5)
    assert labels.tolist() == expected.labels.tolist()


def test_the_example_prepares_images_as_we_do():
    runner = load_runner()
    for height, width in ((200, 100), (40, 90), (64, 96), (33, 1000)):
        image = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
        ours, _ = letterbox(image, IMGSZ)
        pixels, _, _ = runner.prepare(image[..., ::-1], IMGSZ)
        assert np.array_equal((pixels[0].transpose(1, 2, 0) * 255).round().astype(np.uint8), ours)


@pytest.mark.parametrize("white", [None, 4095.0])
def test_the_example_reads_deep_pictures_as_we_do(white: float | None, tmp_path: Path):
    model = tiny_model("channels")
    model.config |= {"white": white} if white else {}
    path = export_onnx(model, ExportOptions(imgsz=IMGSZ), tmp_path / "best.pt")
    runner, file = load_runner(), tmp_path / "deep.png"
    deep = np.random.default_rng(0).integers(0, 4096, (20, 30, 3), dtype=np.uint16)
    assert cv2.imwrite(str(file), deep)
    found = runner.read(str(file), runner.load(str(path))[1]["white"])
    assert np.array_equal(found[..., ::-1], read_image(file, white))
    assert found.max() == (255 if white else 16)


def test_the_example_is_short_and_stands_alone():
    path = Path(__file__).resolve().parents[2] / "examples" / "onnx_runner.py"
    text = path.read_text(encoding="utf-8")
    imports = [line for line in text.splitlines() if line.startswith(("import", "from"))]
    assert len(text.splitlines()) <= 100
    assert {line.split()[1] for line in imports} == {"ast", "sys", "cv2", "numpy", "onnxruntime"}


def test_the_script_writes_what_it_is_asked_for(run_script, tmp_path: Path):
    export_pt(tiny_model("channels"), ExportOptions(imgsz=IMGSZ), tmp_path / "best.pt")
    done = run_script(
        "export.py", "--weights", tmp_path / "best_yoke.pt", "--include", "onnx", "--dynamic", "--keras",
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "best_yoke.onnx")]
    assert "without effect" in done.stderr and "max |difference|" in done.stderr


def test_int8_keeps_head_and_decoding_in_float_and_tells_the_map(
    tmp_path: Path, shared_data: Path, caplog: pytest.LogCaptureFixture
):
    model = tiny_model("channels")
    model.names = ("square", "disc", "cat")
    data = tmp_path / "three.yaml"
    text = shared_data.read_text().replace("disc]", "disc, cat]")
    data.write_text(f"path: {shared_data.parent}\n{text}")
    flags = export.parse_options(["--int8", "--data", str(data)])
    options = export.export_options(flags, model)
    artifacts = export.export(model, ["onnx"], options, tmp_path / "best.pt")
    assert artifacts[0].path.name == "best_int8.onnx"
    graph = onnx.load(str(artifacts[0].path)).graph
    makers = {name: node for node in graph.node for name in node.output}
    is_integer = {
        "model.5" in node.name: makers[node.input[1]].op_type == "DequantizeLinear"
        for node in graph.node
        if node.op_type == "Conv" and node.input[1] in makers
    }
    in_head = [n for n in graph.node if n.op_type == "Conv" and "/network/model.5/" in n.name]
    assert is_integer == {False: True} and in_head
    export.report_loss(artifacts, model, options, str(data))
    assert "mAP50-95" in caplog.text and "->" in caplog.text


def test_int8_needs_data():
    with pytest.raises(ConfigError, match="--data"):
        export.export_options(export.parse_options(["--int8"]), tiny_model("anchors"))
