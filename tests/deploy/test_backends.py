"""Every artifact by the same call; batches and sizes are fitted without the caller's help."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import HEADS, tiny_model
from torch import Tensor
from torch_versions import needs_programs

from deploy.backends import load_backend, model_backend, quicken
from deploy.exporters.network import ExportOptions, blobs, metadata
from deploy.exporters.torch_files import (
    export_pt,
    export_pt2,
    export_safetensors,
    export_torchscript,
)
from deploy.runtimes.artifact import PAD_VALUE, ArtifactInfo, Backend
from deploy.runtimes.layouts import read_detections, read_layout
from deploy.runtimes.metadata import parse_metadata
from deploy.runtimes.script_file import move_constants
from models.common import Conv
from utils.errors import CheckpointError, ConfigError
from utils.structures import Decoded

INFO = ArtifactInfo(("a", "b"), 32, (64, 96), 2, False, "yolo11", "nms", "channels")


def recording_backend(info: ArtifactInfo) -> tuple[Backend, list[Tensor]]:
    """A backend whose one anchor point tells the mean of its image as both scores."""
    seen: list[Tensor] = []

    def run(images: Tensor) -> list[Tensor]:
        seen.append(images)
        mean = images.mean((1, 2, 3))[:, None, None]
        return [torch.cat((torch.ones(len(images), 4, 1), mean, mean), 1)]

    return Backend(info, run, torch.device("cpu")), seen


def test_a_fixed_batch_is_fed_in_portions_and_the_filling_is_dropped():
    backend, seen = recording_backend(INFO)
    images = torch.arange(5.0)[:, None, None, None].expand(5, 3, 64, 96) / 10
    decoded = backend(images)
    assert [len(part) for part in seen] == [2, 2, 2]
    assert torch.allclose(decoded.scores[:, 0, 0], torch.arange(5.0) / 10)
    assert float(seen[-1][1].mean()) == pytest.approx(PAD_VALUE)


def test_a_smaller_image_is_padded_below_and_to_the_right():
    backend, seen = recording_backend(INFO)
    backend(torch.ones(2, 3, 32, 64))
    assert seen[0].shape == (2, 3, 64, 96)
    assert seen[0][:, :, :32, :64].min() == 1
    assert float(seen[0][:, :, 32:].max()) == pytest.approx(PAD_VALUE)


def test_an_image_that_cannot_be_taken_is_refused_with_both_sizes():
    fixed, _ = recording_backend(INFO)
    free, _ = recording_backend(replace(INFO, dynamic=True, batch=None))
    with pytest.raises(ConfigError, match="64x128.*64x96"):
        fixed(torch.zeros(1, 3, 64, 128))
    with pytest.raises(ConfigError, match="60x96.*multiples of 32"):
        free(torch.zeros(1, 3, 60, 96))


def test_layouts_are_read_as_they_are_written():
    # One anchor point, two classes: centre (20, 10), size (8, 4) -> corners (16, 8, 24, 12).
    box, scores = [20.0, 10.0, 8.0, 4.0], [0.5, 0.25]
    anchors = torch.tensor([[[*box, 0.5, *scores]]])
    channels = torch.tensor([[*box, *scores]])[:, :, None]
    queries = torch.tensor([[[20 / 96, 10 / 64, 8 / 96, 4 / 64, *scores]]])
    corners = torch.tensor([[[16.0, 8.0, 24.0, 12.0]]])
    for output, layout, factor in (
        (anchors, "anchors", 0.5), (channels, "channels", 1), (queries, "queries", 1),
    ):  # fmt: skip
        decoded = read_layout(output, layout, (64, 96))
        torch.testing.assert_close(decoded.boxes, corners)
        torch.testing.assert_close(decoded.scores, torch.tensor([[scores]]) * factor)
    rows = torch.tensor([[[1, 2, 3, 4, 0.5, 7], [0, 0, 0, 0, 0, 0]]])
    (found,) = read_detections(rows)
    assert found.boxes.tolist() == [[1, 2, 3, 4]] and found.labels.tolist() == [7]
    with pytest.raises(ValueError, match="raw"):
        read_layout(anchors, "raw", (64, 96))


@pytest.mark.parametrize("layout", HEADS)
def test_what_a_head_exports_is_read_back_as_what_it_decodes(layout: str):
    model = tiny_model(layout)
    with torch.no_grad():
        raw = model(blobs(2, (64, 96), 1))
        expected, output = model.decode(raw), model.head.export_layout(raw)
    found = read_layout(output, layout, (64, 96))
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=1e-6)


def test_metadata_says_again_what_was_exported():
    model = tiny_model("queries")
    options = ExportOptions(imgsz=(64, 96), batch=3, dynamic="batch")
    info = parse_metadata(metadata(model, options, "best"), "best.onnx")
    assert info == ArtifactInfo(
        ("cat", "it's", "dog"), 32, (64, 96), None, False, "rtdetr", "topk", "queries"
    )
    with pytest.raises(CheckpointError, match=r"best\.onnx: its metadata"):
        parse_metadata({"names": "{}", "imgsz": "[1, 1]", "dynamic": ""}, "best.onnx")


@pytest.mark.parametrize("write", [export_pt, export_safetensors])
def test_weights_come_back_as_the_same_detector(write, tmp_path: Path):
    model, images = tiny_model("channels"), blobs(2, (64, 128), 1)
    backend = load_backend(write(model, ExportOptions(imgsz=(64, 96)), tmp_path / "best.pt"))
    expected = model.decode(model(images))
    decoded = backend(images)
    assert isinstance(decoded, Decoded) and not backend.end2end and backend.dynamic
    assert (backend.names, backend.stride, backend.imgsz) == (model.names, 32, (64, 96))
    assert (backend.family, backend.postprocess_kind) == ("yolo11", "nms")
    torch.testing.assert_close(decoded.boxes, expected.boxes, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(decoded.scores, expected.scores, rtol=1e-4, atol=1e-6)


def test_a_network_in_memory_is_fused_unless_told_otherwise():
    fused, plain = tiny_model("anchors"), tiny_model("anchors")
    images = blobs(1, (64, 96), 1)
    found, expected = model_backend(fused)(images), model_backend(plain, fuse=False)(images)
    names = [type(m).__name__ for m in fused.modules()]
    assert "BatchNorm2d" not in names
    assert "BatchNorm2d" in [type(m).__name__ for m in plain.modules()]
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("given", [torch.channels_last, torch.contiguous_format])
def test_images_reach_a_network_on_the_cpu_in_its_own_memory_format(given: torch.memory_format):
    model, seen = tiny_model("channels"), []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model_backend(model, fuse=False)(blobs(2, (64, 96), 1).to(memory_format=given))
    assert model.computes_channels_last
    assert [images.is_contiguous(memory_format=torch.channels_last) for images in seen] == [True]


def test_the_form_for_a_cpu_computes_the_same_and_spares_activations_that_others_read():
    own, model = torch.nn.SiLU(), tiny_model("channels")
    model.own = own  # of a user's block, whose input something else may read
    images = blobs(1, (64, 96), 1)
    with torch.no_grad():
        expected = model.decode(model(images))
        quicken(model)
        found = model.decode(model(images))
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-6)
    inside = [m.act.inplace for m in model.modules() if isinstance(m, Conv) and m.act is not own]
    assert inside and all(inside) and not own.inplace


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("best.onnx", None, "no such file"),
        ("best.onnx", b"not a graph", "cannot be loaded"),
        ("best.torchscript", b"not a program", "cannot be loaded"),
        ("best.pt2", b"not a program", "cannot be loaded"),
        ("best.safetensors", b"not weights", "cannot be loaded"),
        ("best.pt", b"not weights", "best.pt"),
        ("best.engine", b"", "unknown kind of file '.engine'"),
        ("best_openvino_model", b"folder", "metadata.yaml"),
    ],
)
def test_a_file_that_cannot_be_run_is_told_in_one_line(
    tmp_path: Path, name: str, content: bytes | None, told: str
):
    path = tmp_path / name
    if content == b"folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_backend(path)
    assert told in str(caught.value) and name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_grids_of_a_traced_network_follow_the_device(tmp_path: Path):
    path = export_torchscript(
        tiny_model("channels"), ExportOptions(imgsz=(64, 96)), tmp_path / "a.pt"
    )
    network = torch.jit.load(str(path))
    assert device_constants(network) == {"cpu"}
    move_constants(network, torch.device("cuda:0"))
    assert device_constants(network) == {"cuda:0"}


def device_constants(network: torch.jit.ScriptModule) -> set[str]:
    graphs = [m.forward.graph for m in network.modules() if hasattr(m, "forward")]
    nodes = (node for graph in graphs for node in graph.findAllNodes("prim::Constant"))
    return {node.s("value") for node in nodes if str(node.output().type()) == "Device"}


@needs_programs
def test_a_program_runs_on_another_device_than_it_was_exported_on(tmp_path: Path):
    path = export_pt2(tiny_model("channels"), ExportOptions(imgsz=(64, 96)), tmp_path / "a.pt")
    backend = load_backend(path, "meta")
    assert backend.run(torch.rand(1, 3, 64, 96, device="meta"))[0].is_meta
