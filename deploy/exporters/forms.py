"""Every form that a detector is written in, and the one call that writes and compares it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from deploy.exporters.network import ExportOptions
from deploy.exporters.onnx_file import export_onnx
from deploy.exporters.openvino_folder import export_openvino
from deploy.exporters.torch_files import (
    export_pt,
    export_pt2,
    export_safetensors,
    export_torchscript,
)
from deploy.exporters.verify import Case, verify
from models import table
from models.modules import USER_CODE
from models.reparam import fuse
from models.transformer import set_sampling
from models.yolo import DetectionModel
from utils.errors import ConfigError, ForeignError, UserError, foreign_code, nearest
from utils.logger import get_logger


class Exporter(NamedTuple):
    """A form: how it is written, and what it can do.

    Attributes:
        write: (model, options, path of the weights) -> path of the artifact.
        fused: whether it takes the deployed form; the others keep the weights as they were trained.
        has_graph_options: whether `--end2end` and `--int8` are possible.
    """

    write: Callable[[DetectionModel, ExportOptions, Path], Path]
    fused: bool = True
    has_graph_options: bool = False


EXPORTERS = {
    "onnx": Exporter(export_onnx, has_graph_options=True),
    "torchscript": Exporter(export_torchscript),
    "openvino": Exporter(export_openvino, has_graph_options=True),
    "pt2": Exporter(export_pt2),
    "safetensors": Exporter(export_safetensors, fused=False),
    "pt": Exporter(export_pt, fused=False),
}
ALIASES = {"torch.export": "pt2", "torch_export": "pt2", "onnx_end2end": "onnx", "ov": "openvino"}

# Forms of other trees: the library they would need, and what to do meanwhile.
FOREIGN = {
    "engine": ("tensorrt", "Export onnx and run trtexec --onnx=FILE --saveEngine=FILE"),
    "coreml": ("coremltools", "Export torchscript and convert it with coremltools.convert"),
    "tflite": ("onnx2tf", "Export onnx and run onnx2tf -i FILE"),
    "saved_model": ("onnx2tf", "Export onnx and run onnx2tf -i FILE"),
    "pb": ("onnx2tf", "Export onnx and run onnx2tf -i FILE"),
    "edgetpu": ("onnx2tf", "Export onnx and run onnx2tf -i FILE -oiqt"),
    "tfjs": ("onnx2tf", "Export onnx, run onnx2tf -i FILE, then tensorflowjs_converter"),
    "paddle": ("x2paddle", "Export onnx and run x2paddle --framework=onnx --model=FILE"),
}


class Artifact(NamedTuple):
    """A written file or folder, and how near it comes."""

    path: Path
    cases: list[Case]


def export(
    model: DetectionModel, include: Sequence[str], options: ExportOptions, weights: Path
) -> list[Artifact]:
    """Write and verify every form in `include`; `model` stays as it is.

    Args:
        model: a detector in float32.
        include: names from `EXPORTERS`.
        options: what all of them share.
        weights: artifacts are put beside this path, under its stem.

    Raises:
        ConfigError: an unknown form, or an option that a form cannot have.
        ExportMismatchError: an artifact differs from the network.
    """
    log = get_logger()
    chosen = [_find(name, options) for name in include]
    model = copy.deepcopy(model).to(options.device).float().eval()
    set_sampling(model, options.sampling)
    fused, (height, width) = copy.deepcopy(model), model.imgsz
    report = fuse(fused)
    before, after = (table.measure(network, model.imgsz).gflops for network in (model, fused))
    log.info(f"{report}; {before:.2f} -> {after:.2f} GFLOPs at {height}x{width}")
    artifacts = []
    for name, exporter in chosen:
        start = time.perf_counter()
        with _one_line(name, "cannot be written"):
            path = exporter.write(fused if exporter.fused else model, options, weights)
        seconds = time.perf_counter() - start
        parts = path.rglob("*") if path.is_dir() else [path]
        size = sum(part.stat().st_size for part in parts) / 1e6
        log.info(f"{name}: {path} ({size:.1f} MB) in {seconds:.1f} s")
        shown = options
        if not exporter.fused:  # weights without a graph take any batch and size, and know no NMS
            shown = replace(options, dynamic="all", end2end=False, int8=False, raw=False)
        with _one_line(name, f"was written to {path}, but cannot be run"):
            cases = verify(path, fused, shown)
        for case in cases:
            log.info(f"  {case}")
        artifacts.append(Artifact(path, cases))
    return artifacts


@contextmanager
def _one_line(name: str, what: str) -> Iterator[None]:
    """What an exporter or a runtime cannot do with a model, as one line with the reason."""
    try:
        with foreign_code(UserError, OSError, users=USER_CODE):
            yield
    except ForeignError as error:
        others = ", ".join(form for form in EXPORTERS if form != name)
        reason = str(error).rstrip(".")
        raise ConfigError(
            f"--include {name}: this model {what} - {reason}. Take another form ({others}), or change "
            "that part of the model."
        ) from error


def _find(name: str, options: ExportOptions) -> tuple[str, Exporter]:
    key = ALIASES.get(name, name)
    if key in FOREIGN:
        library, advice = FOREIGN[key]
        is_here = find_spec(library) is not None
        state = "is installed, but is not driven from here" if is_here else "is not installed"
        raise ConfigError(f"--include {name}: {library} {state}. {advice}.")
    if key not in EXPORTERS:
        raise ConfigError(
            f"--include: got {name!r}, expected some of {', '.join(EXPORTERS)}."
            f"{nearest(name, [*EXPORTERS, *FOREIGN])}"
        )
    exporter = EXPORTERS[key]
    wanted = [flag for flag, on in (("--end2end", options.end2end), ("--int8", options.int8)) if on]
    if wanted and exporter.fused and not exporter.has_graph_options:
        raise ConfigError(f"--include {name}: cannot have {wanted[0]}, only onnx and openvino can.")
    return key, exporter
