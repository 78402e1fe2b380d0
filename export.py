"""Write a detector for other runtimes: `python export.py --weights best.pt --include onnx openvino
--dynamic`.

Every artifact is run after it was written, and its boxes and scores are compared with PyTorch's,
at the traced batch and size and, with `--dynamic`, at others; a difference is an error.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from data.config import load_data_config
from data.dataset import DetectionDataset
from deploy.backends import Backend, load_backend, model_backend
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
from engine.calibration import calibration_images, load_split, measure
from engine.flags import add_ignored_flags, add_model_flags, add_size_flag, say_ignored
from models import table
from models.modules import USER_CODE
from models.reparam import fuse
from models.transformer import SAMPLINGS, DeformableAttention, set_sampling
from models.weights.load import load_single, load_weights, require_whole
from models.yolo import DetectionModel, build_model
from utils.channels import white_of
from utils.config import ArgumentParser, integer, number, parse_imgsz
from utils.device import select_device
from utils.errors import ConfigError, ForeignError, UserError, foreign_code, nearest, run_cli
from utils.logger import get_logger
from utils.metrics import Metrics

IGNORED = {
    "inplace": False, "keras": False, "optimize": False, "per_tensor": False, "cache": "",
    "mlmodel": False, "verbose": False, "workspace": 4, "agnostic_nms": False, "topk_per_class":
100, }  # fmt: skip


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
    """A written file or folder, how long it took, and how near it comes."""

    path: Path
    seconds: float
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
    fused = copy.deepcopy(model)
    height, width = model.imgsz
    gflops = [table.measure(model, model.imgsz).gflops]
    report = fuse(fused)
    gflops.append(table.measure(fused, model.imgsz).gflops)
    log.info(f"{report}; {gflops[0]:.2f} -> {gflops[1]:.2f} GFLOPs at {height}x{width}")
    artifacts = []
    for name, exporter in chosen:
        start = time.perf_counter()
        with _one_line(name, "cannot be written"):
            path = exporter.write(fused if exporter.fused else model, options, weights)
        seconds = time.perf_counter() - start
        log.info(f"{name}: {path} ({_megabytes(path):.1f} MB) in {seconds:.1f} s")
        with _one_line(name, f"was written to {path}, but cannot be run"):
            cases = verify(path, fused, _shown(exporter, options))
        for case in cases:
            log.info(f"  {case}")
        artifacts.append(Artifact(path, seconds, cases))
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


def _shown(exporter: Exporter, options: ExportOptions) -> ExportOptions:
    """Weights without a graph take any batch and size, and know no NMS."""
    return (
        options
        if exporter.fused
        else replace(options, dynamic="all", end2end=False, int8=False, raw=False)
    )


def _find(name: str, options: ExportOptions) -> tuple[str, Exporter]:
    key = ALIASES.get(name, name)
    if key in FOREIGN:
        library, advice = FOREIGN[key]
        state = (
            "is installed, but is not driven from here"
            if find_spec(library)
            else "is not installed"
        )
        raise ConfigError(f"--include {name}: {library} {state}. {advice}.")
    if key not in EXPORTERS:
        known = [*EXPORTERS, *FOREIGN]
        raise ConfigError(
            f"--include: got {name!r}, expected some of {', '.join(EXPORTERS)}."
            f"{nearest(name, known)}"
        )
    exporter = EXPORTERS[key]
    wanted = [flag for flag, on in (("--end2end", options.end2end), ("--int8", options.int8)) if on]
    if wanted and exporter.fused and not exporter.has_graph_options:
        raise ConfigError(f"--include {name}: cannot have {wanted[0]}, only onnx and openvino can.")
    return key, exporter


def _megabytes(path: Path) -> float:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files) / 1e6


def parse_options(arguments: Sequence[str] | None = None) -> Any:
    """Read the command line."""
    parser = ArgumentParser(
        description="Write a detector for other runtimes, and compare it with PyTorch."
    )
    parser.add_argument(
        "--weights", nargs="+", default=[], help="checkpoints; artifacts are put beside them"
    )
    add_model_flags(parser)
    add_size_flag(parser, None)
    parser.add_argument("--batch-size", type=integer(1), default=1, help="traced batch")
    parser.add_argument("--device", default="cpu", help="where the network is traced and compared")
    parser.add_argument("--include", nargs="+", default=["torchscript"], help=", ".join(EXPORTERS))
    parser.add_argument(
        "--dynamic", nargs="?", const="all", default="", choices=("", "batch", "all"),
        help="any batch, or any batch and size",
    )  # fmt: skip
    parser.add_argument(
        "--half", action="store_true", help="float16 weights; decoding stays float32"
    )
    parser.add_argument(
        "--int8",
        action="store_true",
        help="integers, calibrated on --data; head and decoding stay float32",
    )
    parser.add_argument(
        "--data",
        default="",
        help="data YAML: class names with --cfg, calibration images with --int8",
    )
    parser.add_argument("--simplify", action="store_true", help="run ONNX graphs through onnxslim")
    parser.add_argument("--opset", type=integer(11), default=17, help="of the ONNX file")
    parser.add_argument("--dynamo", action="store_true", help="use torch.export's ONNX exporter")
    parser.add_argument(
        "--nms", "--end2end", dest="end2end", action="store_true", help="NMS or top-k in the graph"
    )
    parser.add_argument(
        "--raw", action="store_true", help="what the head's layers give, no decoding"
    )
    parser.add_argument(
        "--sampling", choices=SAMPLINGS, default=SAMPLINGS[0],
        help="how RT-DETR reads its maps; gather is for runtimes without a (right) GridSample",
    )  # fmt: skip
    parser.add_argument(
        "--single",
        action="store_true",
        help="turn a dual YOLOv9 into the single form that --cfg names (gelan-c), checked",
    )
    parser.add_argument("--conf-thres", type=number(0, 1), default=0.25, help="of --end2end")
    parser.add_argument("--iou-thres", type=number(0, 1), default=0.45, help="of --end2end")
    parser.add_argument(
        "--max-det", "--topk-all", dest="max_det", type=integer(1), default=300, help="of --end2end"
    )
    add_ignored_flags(parser, IGNORED)
    return parser.parse_args(arguments)


def export_options(options: Any, model: DetectionModel) -> ExportOptions:
    """What the flags mean for `model`.

    Raises:
        ConfigError: flags that exclude each other.
    """
    end2end = options.end2end or "onnx_end2end" in options.include
    if end2end and options.raw:
        raise ConfigError("--end2end and --raw: got both, expected one of them.")
    if {"onnx", "onnx_end2end"} <= set(options.include):
        raise ConfigError(
            "--include: got onnx and onnx_end2end, which are one file, expected one of them. Export twice."
        )
    if options.half and options.int8:
        raise ConfigError("--half and --int8: got both, expected one of them.")
    is_deformable = any(isinstance(m, DeformableAttention) for m in model.modules())
    if options.sampling != SAMPLINGS[0] and not is_deformable:
        raise ConfigError(
            f"--sampling: got {options.sampling}, but this model samples nothing, expected an RT-DETR. Leave it out."
        )
    imgsz = parse_imgsz(options.imgsz, model.max_stride) if options.imgsz else model.imgsz
    queries = getattr(model.head, "num_queries", 0)
    cells = sum((imgsz[0] // stride) * (imgsz[1] // stride) for stride in model.strides)
    if cells < queries:
        raise ConfigError(
            f"--imgsz: got {imgsz[0]} {imgsz[1]}, whose maps have {cells} cells, expected the {queries} queries of the "
            "head at least. Give a larger size, or a YAML with a smaller num_queries."
        )
    return ExportOptions(
        imgsz=imgsz, batch=options.batch_size, dynamic=options.dynamic, half=options.half,
        int8=options.int8, simplify=options.simplify, opset=options.opset, dynamo=options.dynamo,
        end2end=end2end, raw=options.raw, conf_thres=options.conf_thres,
        iou_thres=options.iou_thres, max_det=options.max_det, device=select_device(options.device),
        channels=model.channels, sampling=options.sampling,
    )  # fmt: skip


def models_of(options: Any) -> list[tuple[DetectionModel, Path]]:
    """The networks to export, and beside which path; with `--cfg` alone, one with fresh weights."""
    if options.single:
        if not options.cfg:
            raise ConfigError("--single: needs the single form, such as --cfg gelan-c.yaml.")
        return [
            (load_single(w, options.cfg), Path(w).with_name(f"{Path(w).stem}-single.pt"))
            for w in options.weights
        ]
    if options.weights:
        return [(_load(w, options), Path(w)) for w in options.weights]
    if not options.cfg:
        raise ConfigError(
            "--weights: got nothing, expected a checkpoint (or --cfg for fresh weights)."
        )
    imgsz = parse_imgsz(options.imgsz, 32, tell=False) if options.imgsz else (640, 640)
    names = load_data_config(options.data).names if options.data else None
    model = build_model(
        options.cfg,
        num_classes=len(names) if names else None,
        names=names,
        scale=options.scale,
        imgsz=imgsz,
        backbone=options.backbone,
        allow_code=options.allow_code,
    )
    get_logger().info(f"{options.cfg}: fresh weights, not trained")
    return [(model, Path(Path(options.cfg).stem))]


def _load(weights: str, options: Any) -> DetectionModel:
    """The model of a weights file, whole."""
    if options.scale:
        raise ConfigError(
            f"--scale: belongs to --cfg without weights; {weights} says what it is. Leave one of them out."
        )
    if options.backbone and not options.cfg:
        raise ConfigError(
            f"--backbone: belongs to --cfg; {weights} says what it is. Leave one of them out."
        )
    loaded = load_weights(
        weights, cfg=options.cfg or None, backbone=options.backbone, allow_code=options.allow_code
    )
    if loaded.report is not None:
        require_whole(weights, loaded.report)
    return loaded.model


def with_calibration(options: ExportOptions, data: str, model: DetectionModel) -> ExportOptions:
    """The options with images of the training split, if integers are wanted."""
    if not options.int8:
        return options
    dataset = load_split(data, "train", options.imgsz, model.names, white_of(model.config))
    return replace(options, calibration=partial(calibration_images, dataset, options.batch))


def report_loss(
    artifacts: Sequence[Artifact], model: DetectionModel, options: ExportOptions, data: str
) -> None:
    """Say what integers cost: mAP of the network and of each artifact on the validation split."""
    dataset = load_split(data, "val", options.imgsz, model.names, white_of(model.config))
    before = _measure(model_backend(copy.deepcopy(model), options.device), dataset)
    for artifact in artifacts:
        after = _measure(load_backend(artifact.path, options.device), dataset)
        get_logger().info(
            f"{artifact.path}: mAP50-95 {before.map50_95:.4f} -> {after.map50_95:.4f}, "
            f"mAP50 {before.map50:.4f} -> {after.map50:.4f}"
        )


def _measure(backend: Backend, dataset: DetectionDataset) -> Metrics:
    return measure(backend, backend.postprocess_kind, dataset, backend.device)


def main() -> None:
    """Run from the shell."""
    flags = parse_options()
    say_ignored(flags, IGNORED)
    for model, weights in models_of(flags):
        options = with_calibration(export_options(flags, model), flags.data, model)
        artifacts = export(model, flags.include, options, weights)
        if options.int8 and not options.raw:
            report_loss(artifacts, model, options, flags.data)
        for artifact in artifacts:
            print(artifact.path)


if __name__ == "__main__":
    run_cli(main)
