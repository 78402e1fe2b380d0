"""Static quantisation of an ONNX graph: 8-bit convolutions, ranges measured on images.

The head and the decoding stay in float32: they carry box distances and rare scores, which 256 steps
cannot hold. The result is in QDQ form, which ONNX Runtime and OpenVINO both turn into integer kernels.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from deploy.exporters.network import ExportOptions
from utils.errors import ConfigError


def quantise(proto: Any, options: ExportOptions, head_row: int) -> Any:
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
    kept = [n.name for n in proto.graph.node if scope in n.name or "/decode/" in n.name]
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
    """Without the library's advice about steps that were taken already."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
