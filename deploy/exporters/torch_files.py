"""Forms that PyTorch itself reads: TorchScript, torch.export, safetensors, our own checkpoint."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path

import torch

from deploy.exporters.network import ExportOptions, beside, build_network, example, metadata
from deploy.exporters.onnx_file import dynamic_example, dynamic_shapes
from deploy.runtimes.artifact import METADATA_FILE
from deploy.runtimes.program_file import reads_programs
from models.yolo import DetectionModel
from utils.checkpoint import save_checkpoint
from utils.errors import ConfigError
from utils.files import write_whole


def export_torchscript(model: DetectionModel, options: ExportOptions, weights: Path) -> Path:
    """Write `<stem>.torchscript`; any batch and size that the network takes, whatever was
    traced."""
    path = beside(weights, options, ".torchscript")
    network = build_network(model, options, half=options.half)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecation, and constants that are checked afterwards
        traced = torch.jit.trace(network, example(options), check_trace=False)
        traced = torch.jit.freeze(traced.eval())
    text = json.dumps(metadata(model, options, weights.stem))
    buffer = io.BytesIO()  # torch ends the whole process where a disk is full
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(traced, buffer, _extra_files={METADATA_FILE: text.encode()})
    write_whole(path, buffer.getvalue())
    return path


def export_pt2(model: DetectionModel, options: ExportOptions, weights: Path) -> Path:
    """Write `<stem>.pt2`, a program of torch.export.

    Raises:
        ConfigError: this torch packs programs in another form.
    """
    if not reads_programs():
        raise ConfigError(
            f"--include pt2: torch {torch.__version__} packs programs in an earlier form - expected a newer one, such as 2.14. "
            "Install it, or export torchscript."
        )
    path = beside(weights, options, ".pt2")
    network = build_network(model, options, half=options.half)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            network, (dynamic_example(options, model.max_stride),), strict=False,
            dynamic_shapes=dynamic_shapes(options, model.max_stride),
        )  # fmt: skip
    text = json.dumps(metadata(model, options, weights.stem))
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={METADATA_FILE: text})
    write_whole(path, buffer.getvalue())
    return path


def export_safetensors(model: DetectionModel, options: ExportOptions, weights: Path) -> Path:
    """Write `<stem>.safetensors`: weights, with the model's config as metadata."""
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ConfigError(
            "--include safetensors needs safetensors. pip install safetensors"
        ) from error
    path = beside(weights, options, ".safetensors")
    state = {  # copies: the format refuses tensors that share memory
        key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()
    }
    if options.half:
        state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    described = metadata(model, options, weights.stem) | {"layout": "weights", "dynamic": "all"}
    described["config"] = json.dumps(model.config)
    write_whole(path, save(state, metadata=described))
    return path


def export_pt(model: DetectionModel, options: ExportOptions, weights: Path) -> Path:
    """Write `<stem>_yoke.pt`, a checkpoint that train.py, val.py and detect.py read."""
    path = weights.with_name(f"{weights.stem}_yoke.pt")
    state = {
        key: value.half() if options.half and value.is_floating_point() else value
        for key, value in model.state_dict().items()
    }
    save_checkpoint(
        path,
        {
            "config": model.config,
            "names": list(model.names),
            "imgsz": list(options.imgsz),
            "strides": list(model.strides),
            "model": state,
        },
    )
    return path
