"""One call for every artifact: checkpoint, ONNX, TorchScript, OpenVINO, torch.export, safetensors.

backend = load_backend("best.onnx")
decoded = backend(images)            # images (B, 3, H, W), RGB in [0, 1]
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from deploy.runtimes.artifact import ArtifactInfo, Backend, loading, missing_library
from deploy.runtimes.graphs import open_artifact
from deploy.runtimes.metadata import parse_metadata
from models.common import Conv
from models.heads.one_to_one import use_nms
from models.reparam import fuse as fuse_model
from models.weights.claimed import claimed
from models.weights.load import load_weights, require_whole
from models.yolo import DetectionModel, build_model
from utils.channels import white_of
from utils.checkpoint import require_finite
from utils.errors import CheckpointError, ConfigError
from utils.files import special_kind
from utils.structures import Decoded
from utils.thresholds import class_thresholds

__all__ = ["Backend", "load_backend", "model_backend", "model_info", "network_of"]


def load_backend(
    path: str | Path,
    device: torch.device | str = "cpu",
    *,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    half: bool = False,
    fuse: bool = True,
    cfg: str = "",
    backbone: Sequence[str] | None = None,
    allow_code: bool = False,
    one_to_many: bool = False,
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
        backbone: what `cfg` was trained with instead of its own, as for `build_model`.
        allow_code: whether Python files that the model's YAML imports may run.
        one_to_many: read the branch that needs NMS of a model that has one without beside it.

    Raises:
        CheckpointError: the file is missing, of another kind, or damaged.
        ConfigError: the library that runs it is not installed, or the model has no such branch.
    """
    path, device = Path(path), torch.device(device)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file. Give the path of a model.")
    if kind := special_kind(path):
        raise CheckpointError(f"{path}: got {kind}, expected the file of a model.")
    if backbone and not (cfg and path.suffix == ".pt"):
        raise ConfigError(
            f"--backbone: belongs to --cfg and a .pt file that carries no model; {path} says what it is. Leave it out."
        )
    if path.suffix in (".pt", ".safetensors"):
        model = _read_model(path, cfg, backbone, allow_code)
        if one_to_many:
            use_nms(model.head, str(path))
        return model_backend(model, device, half=half, fuse=fuse)
    if one_to_many:
        raise ConfigError(
            f"--one-to-many: got {path}, whose branch was chosen when it was exported, expected a .pt file. Export that "
            "with --one-to-many."
        )
    backend = open_artifact(path, device, providers=providers, threads=threads)
    if backend.info.layout == "raw":
        raise ConfigError(
            f"{path}: was exported with --raw and gives no boxes. Export it again without --raw."
        )
    return backend


def model_info(model: DetectionModel) -> ArtifactInfo:
    """What a model in memory would say about itself."""
    any_size = model.any_size
    return ArtifactInfo(
        model.names, model.max_stride, model.imgsz, None, any_size, model.head.family,
        model.head.postprocess, "decoded", model.channels, white=white_of(model.config),
        class_conf=class_thresholds(model.config, len(model.names)),
    )  # fmt: skip


class _ModelBackend(Backend):
    """A network in memory: it decodes itself, and takes images in its `memory_format`."""

    model: DetectionModel
    memory_format = torch.contiguous_format

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Decoded:
        """Boxes and scores of every anchor point; see `Backend`."""
        dtype = next(self.model.parameters()).dtype
        images = self._fit(images.to(self.device, dtype)).contiguous(
            memory_format=self.memory_format
        )
        decoded = self.model.decode(self.model(images))
        return Decoded(decoded.boxes.float(), decoded.scores.float())


def network_of(backend: Backend) -> DetectionModel | None:
    """The network behind a backend; None behind an exported file, or several."""
    return backend.model if isinstance(backend, _ModelBackend) else None


def model_backend(
    model: DetectionModel,
    device: torch.device | str = "cpu",
    *,
    half: bool = False,
    fuse: bool = True,
) -> Backend:
    """The same call around a network in memory, which is moved to `device` and fused in place."""
    device = torch.device(device)
    model = model.eval()
    if fuse:
        # in float64, which some devices lack and others are slow in
        fuse_model(model.cpu(), check=False)
    model = model.to(device)
    backend = _ModelBackend(model_info(model), lambda images: (), device)
    backend.model = model
    if half and device.type == "cuda":
        model.half()
    elif device.type == "cpu":
        backend.memory_format = quicken(model)
    return backend


def _read_model(
    path: Path, cfg: str, backbone: Sequence[str] | None, allow_code: bool
) -> DetectionModel:
    """The network of a file that has weights."""
    if path.suffix == ".safetensors":
        return _read_safetensors(path, allow_code)
    loaded = load_weights(path, cfg=cfg or None, backbone=backbone, allow_code=allow_code)
    if loaded.report is not None:
        require_whole(path, loaded.report)
    return loaded.model


def quicken(model: DetectionModel) -> torch.memory_format:
    """Bring a network, in place, into the form that a CPU runs a fifth faster; training it is no longer meant.

    Returns:
        The memory format of its weights, and of images that it need not rearrange.
    """
    last = model.computes_channels_last
    memory_format = torch.channels_last if last else torch.contiguous_format
    model.to(memory_format=memory_format)
    for module in model.modules():
        # What a convolution gave has no other reader than its activation, which may write over it.
        if isinstance(module, Conv) and isinstance(module.act, nn.SiLU):
            module.act = nn.SiLU(inplace=True)
    return memory_format


def _read_safetensors(path: Path, allow_code: bool) -> DetectionModel:
    """The network of a `.safetensors` file; its config is the file's metadata."""
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise missing_library("safetensors", path) from error
    with loading(path), safe_open(str(path), "pt") as file:
        metadata = file.metadata() or {}
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if "config" not in metadata:
        raise CheckpointError(f"{path}: has no model config, expected a file written by export.py.")
    info = parse_metadata(metadata, str(path))
    with loading(path):
        config = json.loads(metadata["config"])
    with claimed(path, config, state, len(info.names)):
        model = build_model(
            config, names=info.names, imgsz=info.imgsz, allow_code=allow_code, fresh=True
        )
    with loading(path):
        model.load_state_dict(state)
    require_finite(model.state_dict(), path)
    return model.float().eval()
