"""Files that have a graph of their own, and the libraries that run them: ONNX, TorchScript, torch.export, OpenVINO."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from models.runtimes.artifact import (
    METADATA_FILE,
    OPENVINO_FOLDER,
    SUFFIXES,
    Backend,
    damaged,
    missing_library,
    parse_metadata,
)
from models.runtimes.openvino_library import import_openvino
from models.runtimes.program_file import read_program
from utils.errors import CheckpointError, ConfigError
from utils.logger import get_logger


def open_artifact(
    path: Path,
    device: torch.device,
    *,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    taps: Sequence[str] = (),
) -> Backend:
    """Load a file that has a graph of its own; see `models.backends.load_backend`.

    Args:
        taps: tensors inside an ONNX or OpenVINO graph that `run` shall return too, behind its
            outputs.
    """
    if path.is_dir():
        return _load_openvino(path, device, threads, taps)
    if path.suffix == ".onnx":
        return _load_onnx(path, device, providers, threads, taps)
    if path.suffix == ".torchscript":
        return _load_torchscript(path, device)
    if path.suffix == ".pt2":
        return _load_exported(path, device)
    raise CheckpointError(
        f"{path}: unknown kind of file {path.suffix!r}, expected {', '.join(SUFFIXES)} or a folder "
        f"*{OPENVINO_FOLDER}."
    )


def _load_onnx(
    path: Path,
    device: torch.device,
    providers: Sequence[str] | None,
    threads: int | None,
    taps: Sequence[str],
) -> Backend:
    try:
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as states
    except ImportError as error:
        raise missing_library("onnxruntime", path) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    available = onnxruntime.get_available_providers()
    if providers is None:
        wanted = ["CUDAExecutionProvider"] if device.type == "cuda" else []
        providers = [name for name in (*wanted, "CPUExecutionProvider") if name in available]
    unknown = [name for name in providers if name not in available]
    if unknown:
        raise ConfigError(
            f"{path}: got provider {unknown[0]!r}, expected one of {', '.join(available)}."
        )
    source = _with_taps(path, taps) if taps else str(path)
    settings = [
        {"device_id": device.index or 0} if name == "CUDAExecutionProvider" else {}
        for name in providers
    ]
    try:
        session = onnxruntime.InferenceSession(
            source, options, providers=list(providers), provider_options=settings
        )
    except (states.InvalidProtobuf, states.InvalidGraph, states.Fail, states.NoModel) as error:
        raise damaged(path, error) from error
    if device.type == "cuda" and session.get_providers()[0] == "CPUExecutionProvider":
        get_logger().warning(
            f"{path}: runs on the CPU, onnxruntime has no working CUDA here. pip install onnxruntime-gpu"
        )
    info = parse_metadata(session.get_modelmeta().custom_metadata_map, str(path))
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> list[Tensor]:
        outputs = session.run(None, {name: images.float().cpu().numpy()})
        return [torch.from_numpy(output) for output in outputs]

    return Backend(info, run, device)


def _with_taps(path: Path, taps: Sequence[str]) -> bytes:
    """The ONNX file with further tensors as outputs."""
    import onnx

    proto = onnx.load(str(path))
    for name in taps:
        proto.graph.output.append(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        )
    return bytes(proto.SerializeToString())


def _load_torchscript(path: Path, device: torch.device) -> Backend:
    extra = {METADATA_FILE: b""}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer versions of torch deprecate the format
            network = torch.jit.load(str(path), map_location=device, _extra_files=extra)
    except (RuntimeError, ValueError) as error:
        raise damaged(path, error) from error
    info = parse_metadata(_as_metadata(extra[METADATA_FILE], path), str(path))
    _move_constants(network, device)
    return Backend(info, lambda images: (network(images.float()),), device)


def _move_constants(network: Any, device: torch.device) -> None:
    """Let a traced network make its grids on `device`: tracing wrote down the one it ran on."""
    for module in network.modules():
        try:
            graph = module.forward.graph
        except (AttributeError, RuntimeError):  # a module without code
            continue
        for node in graph.findAllNodes("prim::Constant"):
            if str(node.output().type()) == "Device":
                node.s_("value", str(device))


def _load_exported(path: Path, device: torch.device) -> Backend:
    program, text = read_program(path, METADATA_FILE)
    info = parse_metadata(_as_metadata(text, path), str(path))
    if any(place.type != device.type for place in _written_devices(program)):
        program = _moved(program, device, path)
    # The guards that newer versions add also say how tensors happened to lie in memory: they would
    # refuse sizes that the program computes rightly. Ranges of batch and size are checked anyway.
    known = "check_guards" in inspect.signature(program.module).parameters
    network = program.module(**({"check_guards": False} if known else {})).to(device)
    return Backend(info, lambda images: (network(images.float()),), device)


def _written_devices(program: Any) -> set[torch.device]:
    """Devices that the program's own operations make tensors on."""
    places = (node.kwargs.get("device") for node in program.graph.nodes)
    return {torch.device(place) for place in places if place is not None}


def _moved(program: Any, device: torch.device, path: Path) -> Any:
    try:
        from torch.export.passes import move_to_device_pass
    except ImportError as error:
        raise ConfigError(
            f"{path}: was exported on another device than {device}, expected torch 2.6 or newer to move it."
        ) from error
    return move_to_device_pass(program, device)


def _load_openvino(
    path: Path, device: torch.device, threads: int | None, taps: Sequence[str]
) -> Backend:
    try:
        openvino = import_openvino()
    except ImportError as error:
        raise missing_library("openvino", path) from error
    files = sorted(path.glob("*.xml"))
    described = path / "metadata.yaml"
    if len(files) != 1 or not described.is_file():
        raise CheckpointError(
            f"{path}: got {len(files)} .xml files, expected a folder with one and metadata.yaml, "
            "as export.py writes it."
        )
    metadata = yaml.safe_load(described.read_text(encoding="utf-8"))
    if not isinstance(metadata, dict):
        raise CheckpointError(
            f"{described}: got {type(metadata).__name__}, expected keys and values."
        )
    info = parse_metadata({k: str(v) for k, v in metadata.items()}, str(path))
    core = openvino.Core()
    # float32 sums on every CPU: some would choose bfloat16 of themselves.
    hints: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        hints["INFERENCE_NUM_THREADS"] = threads
    try:
        graph = core.read_model(str(files[0]))
        if taps:
            graph.add_outputs(list(taps))
        network = core.compile_model(graph, "CPU", hints)
    except RuntimeError as error:
        raise damaged(path, error) from error

    def run(images: Tensor) -> list[Tensor]:
        results = network(images.float().cpu().numpy())
        return [torch.from_numpy(results[i].copy()) for i in range(len(results))]

    return Backend(info, run, device)


def _as_metadata(text: str | bytes, path: Path) -> dict[str, str]:
    try:
        found = json.loads(text or "{}")
    except ValueError as error:
        raise damaged(path, error) from error
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}
