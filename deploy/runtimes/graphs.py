"""Files that have a graph of their own, and the libraries that run them: ONNX, TorchScript, torch.export, OpenVINO."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deploy.runtimes.artifact import (
    METADATA_FILE,
    OPENVINO_FOLDER,
    SUFFIXES,
    ArtifactInfo,
    Backend,
    damaged,
    missing_library,
    not_run,
)
from deploy.runtimes.inputs import GraphInput, check_inputs
from deploy.runtimes.metadata import parse_metadata
from deploy.runtimes.openvino_library import import_openvino
from deploy.runtimes.program_file import ZIP_ERRORS, check_script, read_program
from utils.errors import CheckpointError, ConfigError
from utils.files import refuse_special
from utils.logger import get_logger
from utils.yaml_file import load_yaml


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
        from onnxruntime.capi import onnxruntime_pybind11_state as states
    except ImportError as error:
        raise missing_library("onnxruntime", path) from error
    errors: Any = _errors_of(states)
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
    except errors as error:
        raise damaged(path, error) from error
    if device.type == "cuda" and session.get_providers()[0] == "CPUExecutionProvider":
        get_logger().warning(
            f"{path}: runs on the CPU, onnxruntime has no working CUDA here. pip install onnxruntime-gpu"
        )
    info = parse_metadata(session.get_modelmeta().custom_metadata_map, str(path))
    inputs = [GraphInput(i.name, i.shape, i.type) for i in session.get_inputs()]
    name = check_inputs(inputs, info, path)

    def run(images: Tensor) -> list[Tensor]:
        try:
            outputs = session.run(None, {name: images.float().cpu().numpy()})
            return [torch.from_numpy(output) for output in outputs]
        except (*errors, TypeError) as error:
            raise not_run(path, images, error) from error

    return Backend(info, run, device, path)


def _errors_of(states: Any) -> tuple[type[Exception], ...]:
    """What onnxruntime raises, a class for each of its codes."""
    kinds = (value for value in vars(states).values() if isinstance(value, type))
    return tuple(kind for kind in kinds if issubclass(kind, Exception))


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
            check_script(path)
            network = torch.jit.load(str(path), map_location=device, _extra_files=extra)
            arguments = network.forward.schema.arguments[1:]
    except (RuntimeError, ValueError, AttributeError, *ZIP_ERRORS) as error:
        raise damaged(path, error) from error
    info = parse_metadata(_as_metadata(extra[METADATA_FILE], path), str(path))
    check_inputs([GraphInput(a.name, None, str(a.type)) for a in arguments], info, path)
    _move_constants(network, device)
    return _torch_backend(network, info, device, path)


def _torch_backend(network: Any, info: ArtifactInfo, device: torch.device, path: Path) -> Backend:
    def run(images: Tensor) -> tuple[Tensor]:
        try:
            output = network(images.float())
        except (RuntimeError, torch.jit.Error, AssertionError, TypeError, ValueError) as error:
            raise not_run(path, images, error) from error
        if not isinstance(output, Tensor):
            raise CheckpointError(
                f"{path}: got a {type(output).__name__} as output, expected a tensor. Export it again."
            )
        return (output,)

    return Backend(info, run, device, path)


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
    check_inputs(list(_program_inputs(program)), info, path)
    return _torch_backend(network, info, device, path)


def _program_inputs(program: Any) -> Iterator[GraphInput]:
    """What a program takes from outside; a size that may differ is None."""
    wanted = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in wanted:
            value = node.meta.get("val")
            is_tensor = isinstance(value, Tensor)
            sizes = [s if isinstance(s, int) else None for s in value.shape] if is_tensor else None
            kind = str(value.dtype) if is_tensor else type(value).__name__
            yield GraphInput(node.name, sizes, kind)


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
    metadata = load_yaml(described)
    info = parse_metadata({k: str(v) for k, v in metadata.items()}, str(path))
    core = openvino.Core()
    # float32 sums on every CPU: some would choose bfloat16 of themselves.
    hints: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        hints["INFERENCE_NUM_THREADS"] = threads
    try:
        refuse_special(files[0])
        graph = core.read_model(str(files[0]))
        inputs = [
            GraphInput(
                _name_of(i), _sizes(i.get_partial_shape()), i.get_element_type().get_type_name()
            )
            for i in graph.inputs
        ]
        check_inputs(inputs, info, path)
        if taps:
            graph.add_outputs(list(taps))
        network = core.compile_model(graph, "CPU", hints)
    except (RuntimeError, OSError) as error:
        raise damaged(path, error) from error

    def run(images: Tensor) -> list[Tensor]:
        try:
            results = network(images.float().cpu().numpy())
            return [torch.from_numpy(results[i].copy()) for i in range(len(results))]
        except (RuntimeError, TypeError) as error:
            raise not_run(path, images, error) from error

    return Backend(info, run, device, path)


def _name_of(port: Any) -> str:
    return next(iter(port.get_names()), "?")


def _sizes(shape: Any) -> list[int | None] | None:
    """Sizes of an OpenVINO shape; None where the file leaves one, or their number, open."""
    if not shape.rank.is_static:
        return None
    return [size.get_length() if size.is_static else None for size in shape]


def _as_metadata(text: str | bytes, path: Path) -> dict[str, str]:
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from error
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}
