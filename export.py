"""Write a detector for other runtimes: `python export.py --weights best.pt --include onnx openvino
--dynamic`.

Every artifact is run after it was written, and its boxes and scores are compared with PyTorch's,
at the traced batch and size and, with `--dynamic`, at others; a difference is an error.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from data.config import load_data_config
from deploy.backends import load_backend, model_backend
from deploy.exporters.forms import EXPORTERS, Artifact, export
from deploy.exporters.network import ExportOptions
from engine.calibration import calibration_images, load_split, measure
from engine.flags import flag, read_flags, without_effect
from engine.options import FROM_ONE, MANY_HELP, SHARE, ModelFlags, size_flag
from models.heads.one_to_one import use_nms
from models.transformer import SAMPLINGS, DeformableAttention
from models.weights.load import load_single, load_weights, require_whole
from models.yolo import DetectionModel, build_model
from utils.channels import white_of
from utils.config import integer, parse_imgsz
from utils.device import select_device
from utils.errors import ConfigError, run_cli
from utils.logger import get_logger

DEFAULT = ExportOptions()
DYNAMIC = ("", "batch", "all")
MOST_HELP = "of --end2end, and of models that need no NMS"
SAMPLING_HELP = "how RT-DETR reads its maps; gather is for runtimes without a (right) GridSample"


@dataclass(frozen=True)
class ExportFlags(ModelFlags):
    """Write a detector for other runtimes, and compare it with PyTorch."""

    weights: list[str] = flag([], "checkpoints; artifacts are put beside them", nargs="+")
    imgsz: list[int] | None = size_flag(None)
    batch_size: int = flag(DEFAULT.batch, "traced batch", type=FROM_ONE)
    device: str = flag("cpu", "where the network is traced and compared")
    include: list[str] = flag(["torchscript"], ", ".join(EXPORTERS), nargs="+")
    dynamic: str = flag("", "any batch, or batch and size", nargs="?", const="all", choices=DYNAMIC)
    half: bool = flag(False, "float16 weights; decoding stays float32")
    int8: bool = flag(False, "integers, calibrated on --data; head and decoding stay float32")
    simplify: bool = flag(False, "run ONNX graphs through onnxslim")
    dynamo: bool = flag(False, "use torch.export's ONNX exporter")
    raw: bool = flag(False, "what the head's layers give, no decoding")
    single: bool = flag(False, "a dual YOLOv9 in the single form of --cfg (gelan-c), checked")
    data: str = flag("", "data YAML: class names with --cfg, images with --int8")
    opset: int = flag(DEFAULT.opset, "of the ONNX file", type=integer(11))
    end2end: bool = flag(False, "NMS or top-k in the graph", "--nms")
    one_to_many: bool = flag(False, MANY_HELP)
    sampling: str = flag(SAMPLINGS[0], SAMPLING_HELP, choices=SAMPLINGS)
    conf_thres: float = flag(DEFAULT.conf_thres, "of --end2end", type=SHARE)
    iou_thres: float = flag(DEFAULT.iou_thres, "of --end2end", type=SHARE)
    max_det: int = flag(DEFAULT.max_det, MOST_HELP, "--topk-all", type=FROM_ONE)
    inplace: bool = without_effect(False)
    keras: bool = without_effect(False)
    optimize: bool = without_effect(False)
    per_tensor: bool = without_effect(False)
    cache: str = without_effect("")
    mlmodel: bool = without_effect(False)
    verbose: bool = without_effect(False)
    workspace: int = without_effect(4)
    agnostic_nms: bool = without_effect(False)
    topk_per_class: int = without_effect(100)

    @property
    def options(self) -> ExportOptions:
        """What all forms share; `imgsz` and `channels` are those of no model yet."""
        return ExportOptions(
            batch=self.batch_size,
            dynamic=self.dynamic,
            half=self.half,
            int8=self.int8,
            simplify=self.simplify,
            dynamo=self.dynamo,
            raw=self.raw,
            opset=self.opset,
            end2end=self.end2end or "onnx_end2end" in self.include,
            sampling=self.sampling,
            conf_thres=self.conf_thres,
            iou_thres=self.iou_thres,
            max_det=self.max_det,
            device=select_device(self.device),
        )


def parse_options(arguments: Sequence[str] | None = None) -> ExportFlags:
    """Read the command line.

    Raises:
        ConfigError: flags that exclude each other.
    """
    flags = read_flags(ExportFlags, arguments)
    options = flags.options
    if options.end2end and options.raw:
        raise ConfigError("--end2end and --raw: got both, expected one of them.")
    if options.half and options.int8:
        raise ConfigError("--half and --int8: got both, expected one of them.")
    if flags.one_to_many and (whole := {*flags.include} & {"pt", "safetensors"}):
        raise ConfigError(
            f"--one-to-many: got --include {min(whole)}, which keeps both branches, expected another form. Give the flag to "
            "val.py or detect.py with that file."
        )
    if {"onnx", "onnx_end2end"} <= {*flags.include}:
        raise ConfigError(
            "--include: got onnx and onnx_end2end, which are one file, expected one of them. Export twice."
        )
    return flags


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
    for name, is_stray, owner in (
        ("--scale", bool(flags.scale), "--cfg without weights"),
        ("--backbone", bool(flags.backbone) and not flags.cfg, "--cfg"),
    ):
        if is_stray:
            raise ConfigError(
                f"{name}: belongs to {owner}; {weights} says what it is. Leave one of them out."
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
        if flags.one_to_many:
            use_nms(model.head, str(weights))
        options = export_options(flags, model)
        artifacts = export(model, flags.include, options, weights)
        if options.int8 and not options.raw:
            report_loss(artifacts, model, options, flags.data)
        for artifact in artifacts:
            print(artifact.path)


if __name__ == "__main__":
    run_cli(main)
