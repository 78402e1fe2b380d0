"""Exported files that say of themselves what cannot be: one line that names the file, and nothing is run."""

from __future__ import annotations

import resource
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model

from deploy.backends import load_backend
from deploy.exporters.network import ExportOptions, metadata
from deploy.exporters.torch_files import export_torchscript
from deploy.runtimes.artifact import ArtifactInfo, Backend
from deploy.runtimes.metadata import GraphInput, check_inputs, parse_metadata
from utils.errors import CheckpointError, UserError

INFO = ArtifactInfo(("a", "b"), 32, (64, 96), 2, False, "yolo11", "nms", "channels")


@pytest.fixture(scope="module")
def described() -> dict[str, str]:
    return metadata(tiny_model("channels"), ExportOptions(imgsz=(64, 96)), "best")


@pytest.mark.parametrize(
    ("key", "lies", "expected"),
    [
        ("batch", ("0", "-1", "1000000000", "1.0", "", "\u0663"), "1 to 4096"),
        ("imgsz", ("0", "'inf'", "[0, 64]", "[64]", "[1000000000, 64]", "[64.0, 1]"), "[height, width] from 1 to 16384"),
        ("imgsz", ("[" * 9000, "9" * 5000, "a()", "\x00"), "[height, width]"),
        ("stride", ("0", "-32", "1000000000", "None"), "1 to 1024"),
        ("channels", ("0", "three", "1000000000"), "1 to 64"),
        ("layout", ("cube", "", "0"), "one of anchors, channels, queries, end2end, raw, weights"),
        ("family", ("", "YOLO 99", "y" * 40), "the name of a family"),
        ("postprocess", ("none",), "nms, topk or best"),
        ("dynamic", ("yes",), "nothing, batch or all"),
        ("half", ("1",), "True or False"),
        ("names", ("", "{}", "[]", "{0: 'a', 2: 'b'}", "{0: []}", "{'a': 1}", "f()", "{" * 9000), "class names by index"),
        ("thresholds", ("0", "(2, 0.5, 300)", "(0.1, 0.5, 'many')", "(0.1, 0.5)", "('a', 'b', 1)"), "[score, overlap, detections]"),
        ("white", ("0", "inf", "bright", ""), "a number above 0"),
    ],
)  # fmt: skip
def test_metadata_are_believed_no_further_than_a_detector_can_be(
    key: str, lies: tuple[str, ...], expected: str, described: dict[str, str]
):
    for lie in lies:
        with pytest.raises(CheckpointError) as caught:
            parse_metadata({**described, key: lie}, "best.onnx")
        told = str(caught.value)
        assert told.startswith(f"best.onnx: its metadata {key} - got ") and expected in told
        assert told.isprintable() and len(told) < 300


def test_a_batch_is_bounded_with_its_size(described: dict[str, str]):
    large = {**described, "batch": "64", "imgsz": "[1280, 1280]"}
    assert parse_metadata(large, "x").batch == 64
    with pytest.raises(CheckpointError, match="batch and imgsz - got 4096 of 1280x1280"):
        parse_metadata({**large, "batch": "4096"}, "x")
    assert parse_metadata({**large, "batch": "4096", "dynamic": "all"}, "x").batch is None


@pytest.mark.parametrize("missing", ["names", "stride", "imgsz", "batch", "layout", "channels"])
def test_what_is_missing_is_named(missing: str, described: dict[str, str]):
    left = {key: value for key, value in described.items() if key != missing}
    with pytest.raises(CheckpointError, match=f"its metadata {missing} - got nothing, expected"):
        parse_metadata(left, "best.onnx")


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        ([], "got 0 inputs (), expected one, of images"),
        ([GraphInput("a", None, "Tensor"), GraphInput("b", None, "Tensor")], "got 2 inputs (a, b), expected one"),
        ([GraphInput("a", [2, 3, 64, 96], "tensor(float16)")], "got an input of tensor(float16), expected images of float32"),
        ([GraphInput("a", [2, 3, 64, 96], "int")], "got an input of int"),
        ([GraphInput("a", [2, 3, 64], "f32")], "got an input of 2x3x64, expected 2x3x64x96"),
        ([GraphInput("a", [1, 3, 64, 96], "f32")], "got an input of 1x3x64x96, expected 2x3x64x96"),
        ([GraphInput("a", ["N", 1, 64, 96], "f32")], "got an input of anyx1x64x96, expected 2x3x64x96"),
        ([GraphInput("a", [2, 3, "h", 64], "f32")], "got an input of 2x3xanyx64, expected 2x3x64x96"),
    ],
)  # fmt: skip
def test_a_graph_takes_what_its_metadata_say(inputs: list[GraphInput], told: str):
    with pytest.raises(CheckpointError) as caught:
        check_inputs(inputs, INFO, Path("best.onnx"))
    assert str(caught.value).startswith(f"best.onnx: {told}")
    good = [GraphInput("images", ["N", 3, 64, 96], "tensor(float)")]
    assert check_inputs(good, INFO, Path("best.onnx")) == "images"


@pytest.mark.parametrize(
    ("layout", "output", "told"),
    [
        ("channels", torch.zeros(2, 7, 9), "shape (2, 7, 9) for 2 images, expected 6 numbers a box on axis 1"),
        ("channels", torch.zeros(2, 6), "got an output of shape (2, 6)"),
        ("anchors", torch.zeros(2, 9, 6), "expected 7 numbers a box on axis 2 for 2 classes in the layout 'anchors'"),
        ("queries", torch.zeros(1, 9, 6), "got an output of shape (1, 9, 6) for 2 images"),
        ("end2end", torch.full((2, 9, 6), 7.0), "got class 7, expected one below 2"),
        ("end2end", torch.full((2, 9, 6), torch.nan), "got class nan, expected one below 2"),
    ],
)  # fmt: skip
def test_an_output_is_what_the_layout_says(layout: str, output: torch.Tensor, told: str):
    info = ArtifactInfo(("a", "b"), 32, (64, 96), None, False, "yolo11", "nms", layout)
    backend = Backend(info, lambda images: [output], torch.device("cpu"), "best.onnx")
    with pytest.raises(CheckpointError) as caught:
        backend(torch.zeros(2, 3, 64, 96))
    assert told in str(caught.value) and str(caught.value).startswith("best.onnx: got ")


@pytest.mark.parametrize("suffix", [".onnx", ".torchscript", ".pt2", ".safetensors", ".pt"])
def test_an_empty_file_is_named(suffix: str, tmp_path: Path):
    path = tmp_path / f"best{suffix}"
    path.write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        load_backend(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_script_that_opens_files_is_refused_before_it_is_loaded(tmp_path: Path):
    good = export_torchscript(
        tiny_model("channels"), ExportOptions(imgsz=(64, 96)), tmp_path / "m.pt"
    )
    bad = tmp_path / "bad.torchscript"
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(bad, "w") as new:
        for item in old.infolist():
            extra = b"  torch.save(x, 'planted')\n" if item.filename.endswith(".py") else b""
            new.writestr(item.filename, old.read(item) + extra)
    with pytest.raises(CheckpointError, match=r"cannot be loaded - it calls 'save\('"):
        load_backend(bad)
    with zipfile.ZipFile(bad, "w", zipfile.ZIP_DEFLATED) as new:
        new.writestr("a/code/x.py", b" " * (1 << 27))
    with pytest.raises(CheckpointError, match="its parts claim far more bytes than it has"):
        load_backend(bad)
    assert load_backend(good)(torch.zeros(1, 3, 64, 96)).scores.shape[2] == 3


def test_a_program_that_fails_on_what_it_says_to_take_is_told():
    def fails(images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(
            "The following operation failed:\n  some code\nRuntimeError: too small\n"
        )

    backend = Backend(INFO, lambda images: (fails(images),), torch.device("cpu"), Path("best.pt2"))
    with pytest.raises(CheckpointError) as caught:
        backend(torch.zeros(2, 3, 64, 96))
    assert str(caught.value) == (
        "best.pt2: fails on images of shape (2, 3, 64, 96), which its metadata say it takes - RuntimeError: too small. "
        "Export it again."
    )
    backend = Backend(INFO, lambda images: ((images,),), torch.device("cpu"), Path("best.pt2"))
    with pytest.raises(CheckpointError, match="got a tuple as output, expected a tensor"):
        backend(torch.zeros(2, 3, 64, 96))


@pytest.fixture
def ours(tmp_path: Path) -> dict[str, Any]:
    model = tiny_model("channels")
    return {
        "format": "yoke", "version": 1, "model": model.state_dict(), "config": model.config,
        "names": list(model.names), "imgsz": [64, 96],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"config": {"nc": 10**9}}, "its config asks for 1e+09 classes, its weights have "),
        ({"config": {"nc": 1e300}}, "its config asks for 1e+300 classes"),
        ({"config": 7}, "got config of the type int, expected a mapping"),
        ({"config": {}}, "its own model cannot be built - "),
        ({"config": {"width_multiple": 90.0}}, "its model asks for tensors of "),
        ({"model": [1]}, "got weights of the type list, expected a mapping"),
        ({"model": {"a": 1}}, "its weights 'a' are no tensor"),
        ({"names": "abc"}, "its names are 'abc', expected a list of words"),
        ({"names": [1, None]}, "its names are [1, None], expected a list of words"),
        ({"names": ["a"] * 70_000}, "its own model cannot be built - model: got 70000 class names"),
        ({"imgsz": [0, 64]}, "its imgsz is [0, 64], expected height and width up to 16384"),
        ({"imgsz": "inf"}, "its imgsz is 'inf'"),
        ({"ema": {"model": 3}}, "got weights of the type int"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_lies_about_its_model_takes_no_memory(
    change: dict[str, Any], told: str, ours: dict[str, Any], tmp_path: Path
):
    path, before = tmp_path / "last.pt", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if isinstance(change.get("config"), dict) and change["config"]:
        change = {"config": {**ours["config"], **change["config"]}}
    torch.save({**ours, **change}, path)
    with pytest.raises(UserError) as caught:
        load_backend(path)
    assert str(caught.value).startswith(f"{path}: {told}") and "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_a_checkpoint_that_says_what_is_true_is_read(ours: dict[str, Any], tmp_path: Path):
    torch.save(ours, tmp_path / "last.pt")
    assert load_backend(tmp_path / "last.pt").names == ("cat", "it's", "dog")
