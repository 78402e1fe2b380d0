"""One call for every artifact: checkpoint, ONNX, TorchScript, OpenVINO, torch.export, safetensors.

    backend = load_backend("best.onnx")
    decoded = backend(images)            # images (B, 3, H, W), RGB in [0, 1]

What an artifact needs to be told lies in its metadata, so that nothing has to be said again. An
artifact of a fixed batch is fed in portions of that batch, one of a fixed size gets smaller images
padded.
"""

from __future__ import annotations

import ast
import inspect
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from models.graft import forget_weights
from models.layouts import read_detections, read_layout
from models.openvino_library import import_openvino
from models.pretrained import load_weights, require_whole
from models.program_file import read_program
from models.reparam import fuse as fuse_model
from models.yolo import DetectionModel, build_model
from utils.channels import as_channels
from utils.errors import CheckpointError, ConfigError
from utils.structures import Decoded, Detections

PAD_VALUE = 114 / 255
METADATA_FILE = "metadata.txt"
SUFFIXES = (".pt", ".onnx", ".torchscript", ".pt2", ".safetensors")
OPENVINO_FOLDER = "_openvino_model"


@dataclass(frozen=True)
class ArtifactInfo:
    """What an artifact says about itself.

    Attributes:
        names: class names.
        stride: image sizes are multiples of it.
        imgsz: size (height, width) it was made for.
        batch: the only batch it takes; None for any.
        dynamic: whether it takes other sizes than `imgsz`.
        family: "yolov5", "yolov9", "yolo11" or "rtdetr".
        postprocess_kind: "nms" or "topk".
        layout: form of the output, see `models.layouts`.
        channels: of the images.
        half: whether its weights are float16.
    """

    names: tuple[str, ...]
    stride: int
    imgsz: tuple[int, int]
    batch: int | None
    dynamic: bool
    family: str
    postprocess_kind: str
    layout: str
    channels: int = 3
    half: bool = False

    @property
    def end2end(self) -> bool:
        """Whether the artifact does its own NMS or top-k."""
        return self.layout == "end2end"


def parse_metadata(metadata: Mapping[str, str], source: str) -> ArtifactInfo:
    """Read the metadata that `export.py` writes.

    Raises:
        CheckpointError: a key is missing or cannot be read.
    """
    try:
        names = ast.literal_eval(metadata["names"])
        imgsz = ast.literal_eval(metadata["imgsz"])
        dynamic = metadata["dynamic"]
        return ArtifactInfo(
            names=tuple(str(names[key]) for key in sorted(names)),
            stride=int(metadata["stride"]),
            imgsz=(int(imgsz[0]), int(imgsz[1])),
            batch=None if dynamic in ("batch", "all") else int(metadata["batch"]),
            dynamic=dynamic == "all",
            family=metadata["family"],
            postprocess_kind=metadata["postprocess"],
            layout=metadata["layout"],
            channels=int(metadata["channels"]),
            half=metadata["half"] == "True",
        )
    except (KeyError, ValueError, SyntaxError, TypeError, IndexError) as error:
        raise CheckpointError(
            f"{source}: its metadata lacks or garbles {error} - "
            "expected a file that export.py wrote."
        ) from error


class Backend:
    """An artifact, loaded.

    Attributes:
        info: what it says about itself; its fields are attributes of the backend too.
        run: images (B, 3, H, W) in [0, 1] on `device` -> output tensors, for sizes the artifact
            takes.
        device: where images are expected and results come out.
    """

    def __init__(
        self, info: ArtifactInfo, run: Callable[[Tensor], Sequence[Tensor]], device: torch.device
    ) -> None:
        self.info, self.run, self.device = info, run, device
        self.names, self.stride, self.imgsz = info.names, info.stride, info.imgsz
        self.batch, self.dynamic, self.family = info.batch, info.dynamic, info.family
        self.postprocess_kind, self.end2end = info.postprocess_kind, info.end2end

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Decoded | list[Detections]:
        """Predictions in pixels of `images`.

        Args:
            images: RGB in [0, 1], (B, 3, H, W), float.

        Returns:
            Boxes and scores of every anchor point; detections if the artifact is end-to-end.

        Raises:
            ConfigError: images larger than a fixed-size artifact takes, or not multiples of the
                stride.
        """
        images = self._fit(as_channels(images.to(self.device), self.info.channels))
        imgsz = (images.shape[-2], images.shape[-1])
        parts = [self.run(part)[0] for part in self._portions(images)]
        output = (torch.cat(parts) if len(parts) > 1 else parts[0])[: len(images)]
        output = output.to(self.device)
        if self.end2end:
            return read_detections(output)
        return read_layout(output, self.info.layout, imgsz)

    def _portions(self, images: Tensor) -> list[Tensor]:
        """Pieces of the artifact's batch, the last one filled up with grey images."""
        if self.batch is None or len(images) == self.batch:
            return [images]
        missing = -len(images) % self.batch
        if missing:
            grey = images.new_full((missing, *images.shape[1:]), PAD_VALUE)
            images = torch.cat((images, grey))
        return list(images.split(self.batch))

    def _fit(self, images: Tensor) -> Tensor:
        """Pad smaller images below and to the right for an artifact of a fixed size."""
        height, width = images.shape[-2:]
        if self.dynamic:
            if height % self.stride or width % self.stride:
                raise ConfigError(
                    f"image size: got {height}x{width}, expected multiples of {self.stride}."
                )
            return images
        below, right = self.imgsz[0] - height, self.imgsz[1] - width
        if below < 0 or right < 0:
            raise ConfigError(
                f"image size: got {height}x{width}, but the artifact takes {self.imgsz[0]}x"
                f"{self.imgsz[1]}. Give --imgsz {self.imgsz[0]} {self.imgsz[1]}, or export with "
                "--dynamic."
            )
        return F.pad(images, (0, right, 0, below), value=PAD_VALUE) if below or right else images


def load_backend(
    path: str | Path,
    device: torch.device | str = "cpu",
    *,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    half: bool = False,
    fuse: bool = True,
    cfg: str = "",
    allow_code: bool = False,
) -> Backend:
    """Load an artifact by what its name ends in.

    Args:
        path: a `.pt`, `.onnx`, `.torchscript`, `.pt2` or `.safetensors` file, or a folder
            `*_openvino_model`.
        device: where to run; OpenVINO runs on the CPU.
        providers: ONNX Runtime's execution providers, best first; by default CUDA on a CUDA device.
        threads: of one operation on the CPU (ONNX Runtime and OpenVINO); by default the library's
            choice.
        half: run a `.pt` or `.safetensors` model in float16 (CUDA only).
        fuse: bring a `.pt` or `.safetensors` model into its deployed form.
        cfg: model YAML of a `.pt` that carries none that is known here.
        allow_code: whether Python files that the model's YAML imports may run.

    Raises:
        CheckpointError: the file is missing, of another kind, or damaged.
        ConfigError: the library that runs it is not installed.
    """
    path, device = Path(path), torch.device(device)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file. Give the path of a model.")
    if path.suffix == ".safetensors":
        return model_backend(_read_safetensors(path, allow_code), device, half=half, fuse=fuse)
    if path.suffix == ".pt":
        loaded = load_weights(path, cfg=cfg or None, allow_code=allow_code)
        if loaded.report is not None:
            require_whole(path, loaded.report)
        return model_backend(loaded.model, device, half=half, fuse=fuse)
    backend = open_artifact(path, device, providers=providers, threads=threads)
    if backend.info.layout == "raw":
        raise ConfigError(
            f"{path}: was exported with --raw and gives no boxes. Export it again without --raw."
        )
    return backend


def open_artifact(
    path: Path,
    device: torch.device,
    *,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    taps: Sequence[str] = (),
) -> Backend:
    """Load a file that has a graph of its own; see `load_backend`.

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


def model_info(model: DetectionModel) -> ArtifactInfo:
    """What a model in memory would say about itself."""
    any_size = all(getattr(module, "any_size", True) for module in model.modules())
    return ArtifactInfo(
        model.names, model.max_stride, model.imgsz, None, any_size, model.head.family,
        model.head.postprocess, "decoded", model.channels,
    )  # fmt: skip


class _ModelBackend(Backend):
    """A network in memory: it decodes itself."""

    model: DetectionModel

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Decoded:
        """Boxes and scores of every anchor point; see `Backend`."""
        dtype = next(self.model.parameters()).dtype
        images = self._fit(images.to(self.device, dtype))
        decoded = self.model.decode(self.model(images))
        return Decoded(decoded.boxes.float(), decoded.scores.float())


def model_backend(
    model: DetectionModel,
    device: torch.device | str = "cpu",
    *,
    half: bool = False,
    fuse: bool = True,
) -> Backend:
    """The same call around a network in memory, which is moved to `device` and fused in place."""
    device = torch.device(device)
    model = model.to(device).eval()
    if fuse:
        fuse_model(model, check=False)
    if half and device.type == "cuda":
        model = model.half()
    backend = _ModelBackend(model_info(model), lambda images: (), device)
    backend.model = model
    return backend


def _missing(library: str, path: Path) -> ConfigError:
    return ConfigError(
        f"{path}: running it needs {library}, which is not installed. pip install {library}"
    )


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())[:200]
    return CheckpointError(f"{path}: cannot be loaded - {reason or type(error).__name__}.")


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
        raise _missing("onnxruntime", path) from error
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
    try:
        session = onnxruntime.InferenceSession(source, options, providers=list(providers))
    except (states.InvalidProtobuf, states.InvalidGraph, states.Fail, states.NoModel) as error:
        raise _damaged(path, error) from error
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
        raise _damaged(path, error) from error
    info = parse_metadata(_as_metadata(extra[METADATA_FILE], path), str(path))
    return Backend(info, lambda images: (network(images.float()),), device)


def _load_exported(path: Path, device: torch.device) -> Backend:
    program, text = read_program(path, METADATA_FILE)
    info = parse_metadata(_as_metadata(text, path), str(path))
    # The guards that newer versions add also say how tensors happened to lie in memory: they would
    # refuse sizes that the program computes rightly. Ranges of batch and size are checked anyway.
    known = "check_guards" in inspect.signature(program.module).parameters
    network = program.module(**({"check_guards": False} if known else {})).to(device)
    return Backend(info, lambda images: (network(images.float()),), device)


def _load_openvino(
    path: Path, device: torch.device, threads: int | None, taps: Sequence[str]
) -> Backend:
    try:
        openvino = import_openvino()
    except ImportError as error:
        raise _missing("openvino", path) from error
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
        raise _damaged(path, error) from error

    def run(images: Tensor) -> list[Tensor]:
        results = network(images.float().cpu().numpy())
        return [torch.from_numpy(results[i].copy()) for i in range(len(results))]

    return Backend(info, run, device)


def _read_safetensors(path: Path, allow_code: bool) -> DetectionModel:
    """The network of a `.safetensors` file; its config is the file's metadata."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise _missing("safetensors", path) from error
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    if "config" not in metadata:
        raise CheckpointError(f"{path}: has no model config, expected a file written by export.py.")
    info = parse_metadata(metadata, str(path))
    try:
        config = json.loads(metadata["config"])
    except ValueError as error:
        raise _damaged(path, error) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: its config is a {type(config).__name__}, expected a mapping.")
    model = build_model(
        forget_weights(config), names=info.names, imgsz=info.imgsz, allow_code=allow_code
    )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise _damaged(path, error) from error
    return model.float().eval()


def _as_metadata(text: str | bytes, path: Path) -> dict[str, str]:
    try:
        found = json.loads(text or "{}")
    except ValueError as error:
        raise _damaged(path, error) from error
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}
