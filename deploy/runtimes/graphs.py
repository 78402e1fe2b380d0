"""Files that have a graph of their own, and the libraries that run them: ONNX, TorchScript, torch.export, OpenVINO."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.export import ExportedProgram

from deploy.runtimes.artifact import (
    METADATA_FILE,
    OPENVINO_FOLDER,
    SUFFIXES,
    Backend,
    loading,
    missing_library,
)
from deploy.runtimes.metadata import GraphInput, check_inputs, decode_metadata, parse_metadata
from deploy.runtimes.program_file import read_program
from deploy.runtimes.script_file import read_script
from utils.errors import CheckpointError, ConfigError
from utils.files import refuse_special
from utils.logger import get_logger
from utils.yaml_file import load_yaml

if TYPE_CHECKING:
    import openvino

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


def open_artifact(
    path: Path,
    device: torch.device,
    *,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    taps: Sequence[str] = (),
) -> Backend:
    """Load a file that has a graph of its own; see `deploy.backends.load_backend`.

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
    except ImportError as error:
        raise missing_library("onnxruntime", path) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    available = onnxruntime.get_available_providers()
    if providers is None:
        wanted = [CUDA, CPU] if device.type == "cuda" else [CPU]
        providers = [name for name in wanted if name in available]
    unknown = [name for name in providers if name not in available]
    if unknown:
        raise ConfigError(
            f"{path}: got provider {unknown[0]!r}, expected one of {', '.join(available)}."
        )
    settings = [{"device_id": device.index or 0} if name == CUDA else {} for name in providers]
    with loading(path):
        source = _with_taps(path, taps) if taps else str(path)
        session = onnxruntime.InferenceSession(
            source, options, providers=list(providers), provider_options=settings
        )
    if device.type == "cuda" and session.get_providers()[0] == CPU:
        get_logger().warning(
            f"{path}: runs on the CPU, onnxruntime has no working CUDA here. pip install onnxruntime-gpu"
        )
    info = parse_metadata(session.get_modelmeta().custom_metadata_map, str(path))
    inputs = [GraphInput(i.name, i.shape, i.type) for i in session.get_inputs()]
    name = check_inputs(inputs, info, path)

    def compute(images: Tensor) -> list[Tensor]:
        outputs = session.run(None, {name: images.float().cpu().numpy()})
        return [torch.from_numpy(output) for output in outputs]

    return Backend(info, compute, device, path)


def _with_taps(path: Path, taps: Sequence[str]) -> bytes:
    """The ONNX file with further tensors as outputs."""
    import onnx

    proto = onnx.load(str(path))
    for name in taps:
        proto.graph.output.append(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        )
    return proto.SerializeToString()


def _load_torchscript(path: Path, device: torch.device) -> Backend:
    network, inputs, text = read_script(path, METADATA_FILE, device)
    info = decode_metadata(text, path)
    check_inputs(inputs, info, path)
    return Backend(info, lambda images: (network(images.float()),), device, path)


def _load_exported(path: Path, device: torch.device) -> Backend:
    program, text = read_program(path, METADATA_FILE)
    info = decode_metadata(text, path)
    check_inputs(list(_program_inputs(program)), info, path)
    places = (node.kwargs.get("device") for node in program.graph.nodes)
    if any(place is not None and torch.device(place).type != device.type for place in places):
        program = _moved(program, device, path)
    # The guards that newer versions add also say how tensors happened to lie in memory: they would
    # refuse sizes that the program computes rightly. Ranges of batch and size are checked anyway.
    known = "check_guards" in inspect.signature(program.module).parameters
    network = program.module(**({"check_guards": False} if known else {})).to(device)
    return Backend(info, lambda images: (network(images.float()),), device, path)


def _program_inputs(program: ExportedProgram) -> Iterator[GraphInput]:
    """What a program takes from outside; a size that may differ is None."""
    wanted = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in wanted:
            value = node.meta.get("val")
            is_tensor = isinstance(value, Tensor)
            sizes = [s if isinstance(s, int) else None for s in value.shape] if is_tensor else None
            kind = str(value.dtype) if is_tensor else type(value).__name__
            yield GraphInput(node.name, sizes, kind)


def _moved(program: ExportedProgram, device: torch.device, path: Path) -> ExportedProgram:
    """The program with the tensors that its own operations make on `device`."""
    try:
        from torch.export.passes import move_to_device_pass
    except ImportError as error:
        raise ConfigError(
            f"{path}: was exported on another device than {device}, expected torch 2.6 or newer to move it."
        ) from error
    return move_to_device_pass(program, device)


def import_openvino() -> ModuleType:
    """The openvino package without its telemetry, which would tell a server of every conversion and its operations.

    It takes its own silent stand-in for a telemetry module that cannot be imported.

    Raises:
        ImportError: openvino is not installed.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


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
    metadata = load_yaml(described)
    info = parse_metadata({key: str(value) for key, value in metadata.items()}, str(path))
    # float32 sums on every CPU: some would choose bfloat16 of themselves.
    hints: dict[str, object] = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    if threads:
        hints["INFERENCE_NUM_THREADS"] = threads
    with loading(path):
        refuse_special(files[0])
        core = openvino.Core()
        graph = core.read_model(str(files[0]))
        check_inputs([_openvino_input(port) for port in graph.inputs], info, path)
        if taps:
            graph.add_outputs(list(taps))
        network = core.compile_model(graph, "CPU", hints)

    def compute(images: Tensor) -> list[Tensor]:
        results = network(images.float().cpu().numpy())
        return [torch.from_numpy(results[i].copy()) for i in range(len(results))]

    return Backend(info, compute, device, path)


def _openvino_input(port: openvino.Output) -> GraphInput:
    """What stands at an input; None where the file leaves a size, or their number, open."""
    shape = port.get_partial_shape()
    sizes = (
        [s.get_length() if s.is_static else None for s in shape] if shape.rank.is_static else None
    )
    kind = port.get_element_type().get_type_name()
    return GraphInput(next(iter(port.get_names()), "?"), sizes, kind)
