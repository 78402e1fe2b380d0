"""Flags of export.py that must fit the model, the data or each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import export
from deploy.backends import load_backend
from models.yolo import build_model
from utils.errors import ConfigError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

QUERIES = {"hidden": 32, "num_queries": 20, "num_layers": 1, "feedforward": 32, "num_heads": 4}
ROWS = [[-1, 1, "Conv", [8, 3, 8]], [-1, 1, "Conv", [16, 3, 2]]]
SET = {"nc": 2, "backbone": ROWS, "head": [[[0, 1], 1, "RTDETRDecoder", ["nc", QUERIES]]]}
DENSE = {"nc": 2, "backbone": ROWS, "head": [[[0, 1], 1, "Detect", ["nc"]]]}


def options_of(model, *words: str):
    flags = export.parse_options(["--include", "onnx", *words])
    return export.export_options(flags, model)


@pytest.mark.parametrize(
    ("config", "words", "told"),
    [
        (SET, ["--imgsz", "32"], "maps have 20 cells"),
        (DENSE, ["--sampling", "gather"], "--sampling: got gather"),
        (DENSE, ["--include", "onnx", "onnx_end2end"], "which are one file"),
        (DENSE, ["--include", "pt", "--one-to-many"], "--include pt, which keeps both branches"),
    ],
)
def test_what_does_not_fit_is_told(config: dict, words: list[str], told: str):
    config = dict(config)
    if told.startswith("maps"):
        config["head"] = [[[0, 1], 1, "RTDETRDecoder", ["nc", {**QUERIES, "num_queries": 21}]]]
    with pytest.raises(ConfigError, match=told):
        options_of(build_model(config, imgsz=(64, 64)), *words)


def test_gathering_replaces_the_sampler_and_keeps_the_boxes(tmp_path: Path):
    torch.manual_seed(0)
    model = build_model(SET, imgsz=(64, 64)).eval()
    operators = {}
    for sampling in ("grid_sample", "gather"):
        options = options_of(model, "--imgsz", "64", "--sampling", sampling)
        artifact = export.export(model, ["onnx"], options, tmp_path / f"{sampling}.pt")[0]
        operators[sampling] = {node.op_type for node in onnx.load(str(artifact.path)).graph.node}
    assert "GridSample" in operators["grid_sample"] and "GridSample" not in operators["gather"]


def test_a_grey_model_is_written_for_one_channel_and_fed_colour(tmp_path: Path):
    torch.manual_seed(0)
    model = build_model({**DENSE, "ch": 1}, imgsz=(64, 64)).eval()
    options = options_of(model, "--imgsz", "64")
    path = export.export(model, ["onnx"], options, tmp_path / "grey.pt")[0].path
    given = onnx.load(str(path)).graph.input[0].type.tensor_type.shape.dim[1].dim_value
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = model.decode(model(images))
    assert given == 1
    torch.testing.assert_close(
        load_backend(path)(images).scores, expected.scores, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("words", [["--backbone", "resnet18"], ["--scale", "s"]])
def test_weights_say_what_they_are(words: list[str]):
    flags = export.parse_options(["--weights", "best.pt", *words])
    with pytest.raises(
        ConfigError, match=f"{words[0]}: belongs to --cfg( without weights)?; best.pt"
    ):
        export.models_of(flags)


def test_an_opset_that_torch_does_not_know_is_one_line(tmp_path: Path):
    model = build_model(DENSE, imgsz=(64, 64)).eval()
    with pytest.raises(ConfigError, match="--opset: got 99"):
        export.export(model, ["onnx"], options_of(model, "--opset", "99"), tmp_path / "a.pt")


def test_class_names_of_a_fresh_model_are_those_of_the_data(tmp_path: Path):
    data = tmp_path / "data.yaml"
    data.write_text("path: .\ntrain: images\nval: images\nnames: [cat, dog, hen]\n")
    flags = export.parse_options(["--cfg", "yolov5n", "--data", str(data), "--imgsz", "64"])
    model = export.models_of(flags)[0][0]
    assert model.names == ("cat", "dog", "hen") and model.head.num_classes == 3
