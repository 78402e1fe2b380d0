"""ONNX: one graph, checked, with the metadata and the names that existing runners look for."""

from __future__ import annotations

import ast
import inspect
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deploy.exporters.end2end import TAPS, append_postprocess
from deploy.exporters.network import (
    ExportNetwork,
    ExportOptions,
    beside,
    build_network,
    example,
    metadata,
)
from deploy.exporters.precision import quantise, to_half
from deploy.runtimes.layouts import ANCHOR_AXES
from models.yolo import DetectionModel
from utils.errors import ConfigError
from utils.files import write_whole
from utils.logger import get_logger

if TYPE_CHECKING:
    import onnx

INPUT = "images"
AXIS_NAMES = {0: "batch", 2: "height", 3: "width"}
GENERAL_BATCH = 3
GENERAL_CELLS = (9, 11)
"""A shape without coincidences; rows and columns of the coarsest map."""
STANDARD_OUTPUT = 1
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
DYNAMO_OPSET = 18
NEWER_OPSETS = {"torchvision::deform_conv2d": 19}
"""Operators that opset 18 lacks, and the first that has them (onnx.ai/onnx/operators)."""
UNKNOWN_OPERATOR = re.compile(r"(?:operator '|unrecognized namespace )([\w:]+)")


def export_onnx(model: DetectionModel, options: ExportOptions, weights: Path) -> Path:
    """Write `<stem>.onnx`.

    Raises:
        ConfigError: the onnx package, or one that an option needs, is missing.
    """
    try:
        import onnx
    except ImportError as error:
        raise ConfigError("--include onnx needs onnx. pip install onnx onnxruntime") from error
    path = beside(weights, options, ".onnx")
    network = build_network(model, options)
    sizes = _output_sizes(network, options)
    proto = trace_onnx(network, options, list(sizes))
    if options.simplify:
        proto = _simplify(proto)
    if options.half:
        proto = to_half(proto)
    if options.int8:
        proto = quantise(proto, options, len(model.model) - 1)
    if options.end2end:
        proto = append_postprocess(proto, model.head.postprocess, options)
    _name_axes(proto, options, model, sizes)
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, metadata(model, options, weights.stem))
    write_whole(path, proto.SerializeToString())
    onnx.checker.check_model(str(path), full_check=True)
    return path


def trace_onnx(
    network: ExportNetwork, options: ExportOptions, outputs: list[str]
) -> onnx.ModelProto:
    """The ONNX model of `network`.

    torch deprecates its exporter by tracing, which is asked first all the same (2026-12, torch 2.14): that of
    torch.export takes ten times as long, writes a third more nodes for dynamic shapes and knows no opset below 18.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that deprecation, and constants that are checked
        if options.dynamo:
            return _trace_dynamo(network, outputs, options, "--dynamo")
        try:
            return _trace(network, outputs, options)
        except NotTracedError as reason:
            why, opset = str(reason), max(options.opset, reason.opset)
            proto = _trace_dynamo(network, outputs, replace(options, opset=opset), why)
    get_logger().info(f"{why}; written by torch.export's exporter instead, opset {opset}")
    return proto


class NotTracedError(Exception):
    """Why the exporter by tracing is of no use, and the lowest opset that the other one needs."""

    def __init__(self, why: str, opset: int = DYNAMO_OPSET) -> None:
        super().__init__(why)
        self.opset = opset


def _trace(network: ExportNetwork, outputs: list[str], options: ExportOptions) -> onnx.ModelProto:
    """The same by tracing.

    Raises:
        NotTracedError: this torch, or its exporter, cannot.
        ConfigError: there is no such opset.
    """
    import onnx

    known = inspect.signature(torch.onnx.export).parameters
    if "dynamic_axes" not in known:
        raise NotTracedError(f"onnx: torch {torch.__version__} has no exporter by tracing")
    by_tracing: dict[str, Any] = {"dynamo": False} if "dynamo" in known else {}
    axes = {name: {0: AXIS_NAMES[0]} for name in outputs}
    axes[INPUT] = AXIS_NAMES if options.dynamic == "all" else {0: AXIS_NAMES[0]}
    try:
        with _silent_output(), tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "traced.onnx")
            torch.onnx.export(
                network, (example(options),), path, input_names=[INPUT], output_names=outputs,
                opset_version=options.opset, dynamic_axes=axes if options.dynamic else {},
                **by_tracing,
            )  # fmt: skip
            proto = onnx.load(path)
    except torch.onnx.errors.UnsupportedOperatorError as error:
        found = UNKNOWN_OPERATOR.search(str(error))
        operator = found[1] if found else "an operator"
        why = f"onnx: {operator} is not in opset {options.opset}"
        raise NotTracedError(why, NEWER_OPSETS.get(operator, DYNAMO_OPSET)) from error
    except (ValueError, RuntimeError) as error:
        if "opset_version" not in str(error) and "ONNX opset" not in str(error):
            raise
        reason = " ".join(str(error).split())[:150]
        raise ConfigError(f"--opset: got {options.opset} - {reason}. Take 17.") from error
    if _computes_double(proto):
        raise NotTracedError("onnx: the usual exporter makes float64 of numbers that forward makes")
    return proto


def _computes_double(proto: onnx.ModelProto) -> bool:
    """Whether layers with weights work in float64, as behind a torch.linspace without a dtype; few runtimes do."""
    import onnx

    made = {name for n in proto.graph.node if n.op_type in WEIGHTED for name in n.output}
    return any(
        value.name in made and value.type.tensor_type.elem_type == onnx.TensorProto.DOUBLE
        for value in onnx.shape_inference.infer_shapes(proto).graph.value_info
    )


@contextmanager
def _silent_output() -> Iterator[None]:
    """Throw away what is written to standard output: on a failure torch prints the whole graph there."""
    sys.stdout.flush()
    kept = os.dup(STANDARD_OUTPUT)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, STANDARD_OUTPUT)
    try:
        yield
    finally:
        os.dup2(kept, STANDARD_OUTPUT)
        os.close(kept)
        os.close(nowhere)


def _trace_dynamo(
    network: ExportNetwork, outputs: list[str], options: ExportOptions, why: str
) -> onnx.ModelProto:
    """The same by torch.export's exporter; `why` says what asks for it."""
    if "dynamo" not in inspect.signature(torch.onnx.export).parameters:
        raise ConfigError(
            f"{why}: torch {torch.__version__} has no exporter for it - expected 2.5 or newer. "
            "Install it, or export torchscript."
        )
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{why}: torch.export's exporter needs onnxscript. pip install onnxscript, or export "
            "torchscript."
        ) from error
    program = torch.onnx.export(
        network, (dynamic_example(options, network.network.max_stride),), input_names=[INPUT], output_names=outputs,
        opset_version=max(options.opset, DYNAMO_OPSET), dynamic_shapes=dynamic_shapes(options,
    network.network.max_stride), dynamo=True, verbose=False, )  # fmt: skip
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    _name_by_scope(proto)
    return proto


def _name_by_scope(proto: onnx.ModelProto) -> None:
    """Begin the names of nodes with the paths of their modules, as tracing does.

    What else torch notes beside them goes, such as the places of source files on this machine; so do types of values
    in between, which are wrong as soon as a node works in another precision.
    """
    for node in proto.graph.node:
        notes = {item.key: item.value for item in node.metadata_props}
        scopes = ast.literal_eval(notes.get("pkg.torch.onnx.name_scopes", "[]"))[:-1]
        parts = [inner.removeprefix(f"{outer}.") for outer, inner in zip(scopes, scopes[1:])]
        node.name = "/".join(["", *parts, node.name])
        del node.metadata_props[:]
    del proto.graph.value_info[:]


def dynamic_example(options: ExportOptions, stride: int) -> torch.Tensor:
    """Images for torch.export: of a general shape where shapes are dynamic.

    It builds into a program what happens to be equal or 1 in the example, such as a batch of 1 or
    the one window of 7 x 7 that attention needs for a small map.
    """
    if not options.dynamic:
        return example(options)
    imgsz = options.imgsz
    if options.dynamic == "all":
        imgsz = (GENERAL_CELLS[0] * stride, GENERAL_CELLS[1] * stride)
    return example(replace(options, imgsz=imgsz), GENERAL_BATCH)


def dynamic_shapes(options: ExportOptions, stride: int) -> tuple[dict[int, Any]] | None:
    """What torch.export is told of the images' shape."""
    if not options.dynamic:
        return None
    shape: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=4096)}
    if options.dynamic == "all":
        shape[2] = stride * torch.export.Dim("rows", min=1, max=512)
        shape[3] = stride * torch.export.Dim("columns", min=1, max=512)
    return (shape,)


def _output_sizes(network: ExportNetwork, options: ExportOptions) -> dict[str, tuple[int, ...]]:
    """Names of the outputs, and their shapes for the traced input."""
    with torch.no_grad():
        result = network(example(options))
    tensors = [result] if isinstance(result, torch.Tensor) else list(result)
    names = [f"output{i}" for i in range(len(tensors))]
    if network.form == "decoded":
        names = list(TAPS)
    return {name: tuple(t.shape) for name, t in zip(names, tensors)}


def _name_axes(
    proto: onnx.ModelProto,
    options: ExportOptions,
    model: DetectionModel,
    sizes: dict[str, tuple[int, ...]],
) -> None:
    """Give the axes of input and outputs the names that runners look for, or their `sizes`."""
    image = proto.graph.input[0].type.tensor_type.shape.dim
    for axis, size in ((0, options.batch), (2, options.imgsz[0]), (3, options.imgsz[1])):
        if options.dynamic == "all" or (options.dynamic and axis == 0):
            image[axis].dim_param = AXIS_NAMES[axis]
        else:
            image[axis].dim_value = size
    layout = options.layout(model)
    for output in proto.graph.output:
        shape = output.type.tensor_type.shape.dim
        if options.dynamic:
            shape[0].dim_param = AXIS_NAMES[0]
        if layout == "raw" or output.name not in sizes:
            continue
        for axis, size in enumerate(sizes[output.name]):
            if axis == ANCHOR_AXES.get(layout) and options.dynamic == "all":
                shape[axis].dim_param = "anchors"
            elif axis or not options.dynamic:
                shape[axis].dim_value = size


def _simplify(proto: onnx.ModelProto) -> onnx.ModelProto:
    try:
        import onnxslim
    except ImportError as error:
        raise ConfigError(
            "--simplify needs onnxslim. pip install onnxslim, or leave it out."
        ) from error
    before = len(proto.graph.node)
    slim = onnxslim.slim(proto)
    get_logger().info(f"simplified: {before} -> {len(slim.graph.node)} nodes")
    return slim
