"""An ONNX graph in smaller numbers: float16, or 8-bit convolutions with ranges measured on images.

Decoding stays float32 in both: it carries box distances and rare scores, which 256 steps cannot hold;
of integers the whole head is kept. Integer graphs are in QDQ form, which ONNX Runtime and OpenVINO
both turn into integer kernels.

What belongs to decoding and head is told by the names of nodes, which the exporters of torch
2.14 begin with the module's path; `onnxruntime.transformers.float16` is no part of ONNX Runtime's
documented interface and was seen in 1.32. Nothing else in this folder rests on either.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from graphlib import TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from deploy.exporters.network import ExportOptions
from utils.errors import ConfigError

if TYPE_CHECKING:
    import onnx

FLOAT32_OPERATORS = ("Softmax", "LayerNormalization", "ReduceMean", "GridSample", "Pow", "Sqrt")
"""Operators that overflow or round badly in float16 and stay float32 with `--half`."""


def is_decoding(node: onnx.NodeProto) -> bool:
    """Whether a node belongs to the decoding, by its scope."""
    return "/decode/" in node.name or node.name.startswith("/postprocess/")


def to_half(proto: onnx.ModelProto) -> onnx.ModelProto:
    """float16 weights and arithmetic; input, output, decoding and softmax stay float32.

    Raises:
        ConfigError: onnxruntime is missing.
    """
    try:
        from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
    except ImportError as error:
        raise ConfigError("--half needs onnxruntime. pip install onnxruntime") from error
    own = {node.name for node in proto.graph.node}
    converted = convert_float_to_float16(
        proto, keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, *FLOAT32_OPERATORS],
        node_block_list=[node.name for node in proto.graph.node if is_decoding(node)],
    )  # fmt: skip
    _drop_round_trips(converted.graph, own)
    _sort_nodes(converted.graph)
    return converted


def _drop_round_trips(graph: onnx.GraphProto, own: set[str]) -> None:
    """Connect float32 nodes directly where the conversion sends values between them through float16.

    Args:
        graph: converted.
        own: names of the nodes that it had before.
    """
    import onnx

    casts = {n.output[0]: n for n in graph.node if n.op_type == "Cast"}
    shorter: dict[str, str] = {}
    for name, node in casts.items():
        made = casts.get(node.input[0])
        if made is None or made.name in own or node.attribute[0].i != onnx.TensorProto.FLOAT:
            continue
        if made.attribute[0].i == onnx.TensorProto.FLOAT16:
            shorter[name] = made.input[0]
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = shorter.get(name, name)
    outputs = {value.name for value in graph.output}
    for node in graph.node:
        if node.output[0] in outputs & shorter.keys():  # the name of an output has to stay
            same = onnx.helper.make_node(
                "Identity", [shorter[node.output[0]]], node.output, node.name
            )
            node.CopyFrom(same)
    kept = [n for n in graph.node if n.output[0] not in shorter or n.output[0] in outputs]
    read = {name for node in kept for name in node.input} | outputs
    kept = [n for n in kept if n.op_type != "Cast" or n.output[0] in read]
    del graph.node[:]
    graph.node.extend(kept)


def _sort_nodes(graph: onnx.GraphProto) -> None:
    """Put every node behind those that make its inputs."""
    made_by = {name: i for i, node in enumerate(graph.node) for name in node.output}
    needs = {
        i: [made_by[name] for name in node.input if name in made_by]
        for i, node in enumerate(graph.node)
    }
    nodes = [graph.node[i] for i in TopologicalSorter(needs).static_order()]
    del graph.node[:]
    graph.node.extend(nodes)


def quantise(proto: onnx.ModelProto, options: ExportOptions, head_row: int) -> onnx.ModelProto:
    """The ONNX model with integer convolutions.

    Args:
        proto: float32 model whose input is `images`.
        options: `calibration` gives the images.
        head_row: number of the row that is the head.

    Raises:
        ConfigError: onnxruntime is missing, or there are no images to measure ranges on.
    """
    try:
        import onnx
        from onnxruntime.quantization import (
            CalibrationDataReader,
            QuantFormat,
            QuantType,
            quantize_static,
        )
    except ImportError as error:
        raise ConfigError("--int8 needs onnxruntime. pip install onnxruntime") from error
    if options.calibration is None:
        raise ConfigError("--int8: got no images to measure ranges on. Give --data.")
    images: Iterator[Tensor] = iter(options.calibration())

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """One batch after the other, as the library asks for them."""

        def get_next(self) -> dict[str, Any] | None:
            batch = next(images, None)
            return None if batch is None else {"images": batch.cpu().numpy()}

    scope = f"/network/model.{head_row}/"
    kept = [n.name for n in proto.graph.node if scope in n.name or is_decoding(n)]
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "int8.onnx"
        quantize_static(
            proto, str(path), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            op_types_to_quantize=["Conv"], nodes_to_exclude=kept,
        )  # fmt: skip
        return onnx.load(str(path))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's advice, given on the root logger, about steps that were taken already."""
    log, before = logging.getLogger(), logging.getLogger().level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
