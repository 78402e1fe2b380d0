"""OpenVINO: a folder with the graph, its weights and the metadata."""

from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from pathlib import Path

import yaml

from deploy.exporters.network import ExportOptions, metadata
from deploy.exporters.onnx_file import export_onnx
from deploy.runtimes.artifact import OPENVINO_FOLDER
from deploy.runtimes.graphs import import_openvino
from models.yolo import DetectionModel
from utils.errors import ConfigError
from utils.files import write_whole

MISSING = re.compile(r"No conversion rule found for operations: (.+)")


def export_openvino(model: DetectionModel, options: ExportOptions, weights: Path) -> Path:
    """Write `<stem>_openvino_model/`, by way of an ONNX file that is not kept.

    Raises:
        ConfigError: the openvino package is missing, or lacks an operator.
    """
    try:
        openvino = import_openvino()
    except ImportError as error:
        raise ConfigError("--include openvino needs openvino. pip install openvino") from error
    folder = weights.with_name(f"{weights.stem}{options.suffix()}{OPENVINO_FOLDER}")
    with tempfile.TemporaryDirectory() as temporary:
        path = export_onnx(model, replace(options, half=False), Path(temporary) / weights.name)
        try:
            converted = openvino.convert_model(str(path))
        except openvino.frontend.OpConversionFailure as error:
            raise ConfigError(_missing(str(error))) from error
        described = metadata(model, options, weights.stem)
        for key, value in described.items():
            converted.set_rt_info(value, ["model_info", key])
        file = Path(temporary) / f"{weights.stem}.xml"
        openvino.save_model(converted, str(file), compress_to_fp16=options.half)
        parts = {part.name: part.read_bytes() for part in (file.with_suffix(".bin"), file)}
    parts["metadata.yaml"] = yaml.safe_dump(described, sort_keys=False, allow_unicode=True).encode()
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.xml"):
        old.unlink()
    for name, data in parts.items():
        write_whole(folder / name, data)
    return folder


def _missing(report: str) -> str:
    """The line of a report of many that names what OpenVINO does not know."""
    found = MISSING.search(report)
    what = found[1] if found else " ".join(report.split())[-200:]
    return f"--include openvino: OpenVINO has no {what}. Take onnx or torchscript for this model."
