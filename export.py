"""Write a detector for other runtimes: `python export.py --weights best.pt --include onnx openvino
--dynamic`.

Every artifact is run after it was written, and its boxes and scores are compared with PyTorch's,
at the traced batch and size and, with `--dynamic`, at others; a difference is an error.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

from data.config import load_data_config
from deploy.backends import load_backend, model_backend
from deploy.exporters.forms import EXPORTERS, Artifact, export
from deploy.exporters.network import ExportOptions
from engine.calibration import calibration_images, load_split, measure
from engine.flags import add_ignored_flags, add_model_flags, add_size_flag, say_ignored
from models.transformer import SAMPLINGS, DeformableAttention
from models.weights.load import load_single, load_weights, require_whole
from models.yolo import DetectionModel, build_model
from utils.channels import white_of
from utils.config import ArgumentParser, integer, number, parse_imgsz
from utils.device import select_device
from utils.errors import ConfigError, run_cli
from utils.logger import get_logger

IGNORED = {
    "inplace": False, "keras": False, "optimize": False, "per_tensor": False, "cache": "",
    "mlmodel": False, "verbose": False, "workspace": 4, "agnostic_nms": False, "topk_per_class":
100, }  # fmt: skip


DEFAULT = ExportOptions()
SWITCHES = {
    "half": "float16 weights; decoding stays float32",
    "int8": "integers, calibrated on --data; head and decoding stay float32",
    "simplify": "run ONNX graphs through onnxslim",
    "dynamo": "use torch.export's ONNX exporter",
    "raw": "what the head's layers give, no decoding",
    "single": "turn a dual YOLOv9 into the single form that --cfg names (gelan-c), checked",
}


@dataclass(frozen=True)
class ExportFlags:
    """The command line: what is exported, as which forms, and how.

    Attributes:
        weights, cfg, scale, backbone, allow_code: which models; see `--help`.
        single: whether dual YOLOv9 weights become the single form that `cfg` names.
        imgsz: one size or height and width; None is the model's own.
        include: names of forms.
        data: data YAML of class names or calibration images; empty for none.
        options: the rest; its `imgsz` and `channels` are those of no model yet.
    """

    weights: list[str]
    cfg: str
    scale: str | None
    backbone: list[str] | None
    allow_code: bool
    single: bool
    imgsz: list[int] | None
    include: list[str]
    data: str
    options: ExportOptions


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Write a detector for other runtimes, and compare it with PyTorch."
    )
    add = parser.add_argument
    add("--weights", nargs="+", default=[], help="checkpoints; artifacts are put beside them")
    add_model_flags(parser)
    add_size_flag(parser, None)
    add("--batch-size", dest="batch", type=integer(1), default=DEFAULT.batch, help="traced batch")
    add("--device", default="cpu", help="where the network is traced and compared")
    add("--include", nargs="+", default=["torchscript"], help=", ".join(EXPORTERS))
    add("--dynamic", nargs="?", const="all", default="", choices=("", "batch", "all"),
        help="any batch, or any batch and size")  # fmt: skip
    for name, told in SWITCHES.items():
        add(f"--{name}", action="store_true", help=told)
    add("--data", default="", help="data YAML: class names with --cfg, images with --int8")
    add("--opset", type=integer(11), default=DEFAULT.opset, help="of the ONNX file")
    add("--nms", "--end2end", dest="end2end", action="store_true", help="NMS or top-k in the graph")
    add("--sampling", choices=SAMPLINGS, default=SAMPLINGS[0],
        help="how RT-DETR reads its maps; gather is for runtimes without a (right) GridSample")  # fmt: skip
    add("--conf-thres", type=number(0, 1), default=DEFAULT.conf_thres, help="of --end2end")
    add("--iou-thres", type=number(0, 1), default=DEFAULT.iou_thres, help="of --end2end")
    add("--max-det", "--topk-all", type=integer(1), default=DEFAULT.max_det, help="of --end2end")
    add_ignored_flags(parser, IGNORED)
    return parser


def parse_options(arguments: Sequence[str] | None = None) -> ExportFlags:
    """Read the command line.

    Raises:
        ConfigError: flags that exclude each other.
    """
    given = _parser().parse_args(arguments)
    say_ignored(given, IGNORED)
    given.device = select_device(given.device)
    given.end2end = given.end2end or "onnx_end2end" in given.include
    for one, other in (("end2end", "raw"), ("half", "int8")):
        if vars(given)[one] and vars(given)[other]:
            raise ConfigError(f"--{one} and --{other}: got both, expected one of them.")
    if {"onnx", "onnx_end2end"} <= {*given.include}:
        raise ConfigError(
            "--include: got onnx and onnx_end2end, which are one file, expected one of them. Export twice."
        )
    shared = {f.name for f in fields(ExportOptions)} & vars(given).keys() - {"imgsz"}
    own = {f.name for f in fields(ExportFlags)} & vars(given).keys()
    options = ExportOptions(**{name: vars(given)[name] for name in shared})
    return ExportFlags(**{name: vars(given)[name] for name in own}, options=options)


def export_options(flags: ExportFlags, model: DetectionModel) -> ExportOptions:
    """What the flags mean for `model`.

    Raises:
        ConfigError: a flag that does not go with the model.
    """
    sampling = flags.options.sampling
    is_deformable = any(isinstance(m, DeformableAttention) for m in model.modules())
    if sampling != SAMPLINGS[0] and not is_deformable:
        raise ConfigError(
            f"--sampling: got {sampling}, but this model samples nothing, expected an RT-DETR. Leave it out."
        )
    imgsz = parse_imgsz(flags.imgsz, model.max_stride) if flags.imgsz else model.imgsz
    cells = sum((imgsz[0] // stride) * (imgsz[1] // stride) for stride in model.strides)
    if cells < model.head.num_queries:
        raise ConfigError(
            f"--imgsz: got {imgsz[0]} {imgsz[1]}, whose maps have {cells} cells, expected the "
            f"{model.head.num_queries} queries of the head at least. Give a larger size, or a YAML with a smaller "
            "num_queries."
        )
    options = replace(flags.options, imgsz=imgsz, channels=model.channels)
    if not options.int8:
        return options
    dataset = load_split(flags.data, "train", imgsz, model.names, white_of(model.config))
    return replace(options, calibration=partial(calibration_images, dataset, options.batch))


def models_of(flags: ExportFlags) -> list[tuple[DetectionModel, Path]]:
    """The networks to export, and beside which path; with `--cfg` alone, one with fresh weights."""
    if flags.single:
        if not flags.cfg:
            raise ConfigError("--single: needs the single form, such as --cfg gelan-c.yaml.")
        return [
            (load_single(w, flags.cfg), Path(w).with_name(f"{Path(w).stem}-single.pt"))
            for w in flags.weights
        ]
    if flags.weights:
        return [(_load(w, flags), Path(w)) for w in flags.weights]
    if not flags.cfg:
        raise ConfigError(
            "--weights: got nothing, expected a checkpoint (or --cfg for fresh weights)."
        )
    names = load_data_config(flags.data).names if flags.data else None
    model = build_model(
        flags.cfg, num_classes=len(names) if names else None, names=names, scale=flags.scale,
        imgsz=parse_imgsz(flags.imgsz, 32, tell=False) if flags.imgsz else DEFAULT.imgsz,
        backbone=flags.backbone, allow_code=flags.allow_code,
    )  # fmt: skip
    get_logger().info(f"{flags.cfg}: fresh weights, not trained")
    return [(model, Path(Path(flags.cfg).stem))]


def _load(weights: str, flags: ExportFlags) -> DetectionModel:
    """The model of a weights file, whole."""
    for flag, is_stray, owner in (
        ("--scale", bool(flags.scale), "--cfg without weights"),
        ("--backbone", bool(flags.backbone) and not flags.cfg, "--cfg"),
    ):
        if is_stray:
            raise ConfigError(
                f"{flag}: belongs to {owner}; {weights} says what it is. Leave one of them out."
            )
    loaded = load_weights(
        weights, cfg=flags.cfg or None, backbone=flags.backbone, allow_code=flags.allow_code
    )
    if loaded.report is not None:
        require_whole(weights, loaded.report)
    return loaded.model


def report_loss(
    artifacts: Sequence[Artifact], model: DetectionModel, options: ExportOptions, data: str
) -> None:
    """Say what integers cost: mAP of the network and of each artifact on the validation split."""
    dataset = load_split(data, "val", options.imgsz, model.names, white_of(model.config))
    network = model_backend(copy.deepcopy(model), options.device)
    before = measure(network, network.postprocess_kind, dataset, options.device)
    for artifact in artifacts:
        backend = load_backend(artifact.path, options.device)
        after = measure(backend, backend.postprocess_kind, dataset, options.device)
        get_logger().info(
            f"{artifact.path}: mAP50-95 {before.map50_95:.4f} -> {after.map50_95:.4f}, "
            f"mAP50 {before.map50:.4f} -> {after.map50:.4f}"
        )


def main() -> None:
    """Run from the shell."""
    flags = parse_options()
    for model, weights in models_of(flags):
        options = export_options(flags, model)
        artifacts = export(model, flags.include, options, weights)
        if options.int8 and not options.raw:
            report_loss(artifacts, model, options, flags.data)
        for artifact in artifacts:
            print(artifact.path)


if __name__ == "__main__":
    run_cli(main)
