"""Measure a detector: `python val.py --weights runs/train/exp/weights/best.pt --data data/shapes.yaml`.

`.pt`, `.onnx` and every other exported form run through the same call and the same postprocessing, so the numbers
can be compared. mAP is COCO's, computed by faster-coco-eval over whatever form the labels have.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.dataset import DetectionDataset, build_dataset
from data.loader import build_loader
from deploy.backends import Backend, load_backend
from deploy.ensemble import as_one
from engine.evaluation import Evaluation, Thresholds, evaluate
from engine.flags import (
    add_data_flag,
    add_device_flag,
    add_foreign_flags,
    add_ignored_flags,
    add_run_flags,
    add_size_flag,
    add_threshold_flags,
    say_ignored,
)  # fmt: skip
from engine.outputs import (
    LabelWriter,
    class_table,
    save_batch_pictures,
    save_faults,
    save_metric_plots,
    tell_other_score,
)
from engine.setup import check_classes, open_data
from utils.config import ArgumentParser, increment_path, integer, parse_imgsz
from utils.device import select_device
from utils.errors import ConfigError, run_cli
from utils.logger import get_logger
from utils.metrics import CocoEvaluator, ConfusionMatrix
from utils.plots import StudyPoint, plot_study
from utils.progress import Progress
from utils.structures import Batch, Decoded, Detections, Targets, as_one_class

IGNORED = {"save_hybrid": False, "dnn": False, "augment": False, "min_items": None}


class Validation:
    """One weights file on one split: the loader, the evaluator, and what is written on the way."""

    def __init__(self, options: Any, backend: Backend, imgsz: tuple[int, int]) -> None:
        self.options, self.backend = options, backend
        split = options.task if options.task in ("train", "val", "test") else "val"
        if options.rect and not backend.dynamic:
            raise ConfigError(
                f"--rect: {options.weights} has a fixed image size. Leave it out or export with --dynamic."
            )
        config = open_data(options, backend.info.white)
        self.dataset: DetectionDataset = build_dataset(
            config, split, imgsz=imgsz, rect=options.rect, batch_size=options.batch_size, stride=backend.stride,
            single_cls=options.single_cls,
        )  # fmt: skip
        if not options.single_cls:
            check_classes(backend.names, self.dataset.names, options.weights, options.data)
        self.loader = build_loader(self.dataset, options.batch_size, workers=options.workers)
        self.evaluator = CocoEvaluator(
            self.dataset.coco_ground_truth(), self.dataset.category_ids, self.dataset.names
        )
        self.confusion = ConfusionMatrix(len(self.dataset.names))

    def run(self, folder: Path | None, thresholds: Thresholds, device: torch.device) -> Evaluation:
        """Evaluate; with a folder, leave pictures and files in it."""
        bar = Progress(self.loader, len(self.loader), "val")
        seen = 0
        labels_to = None
        if folder and self.options.save_txt:
            labels_to = LabelWriter(folder / "labels", self.dataset.paths, self.options.save_conf)

        def on_batch(batch: Batch, detections: list[Detections]) -> None:
            nonlocal seen
            for index, found in enumerate(detections):
                labels, boxes = batch.targets.of_image(index)
                self.confusion.update(found, labels, boxes)
            if folder and not self.options.noplots and seen < 3:
                save_batch_pictures(
                    folder, f"val_batch{seen}", batch, detections, self.dataset.names
                )
            if labels_to:
                labels_to.write(batch, detections)
            seen += 1

        def predict(images: Tensor, targets: Targets) -> Decoded | list[Detections]:
            output = self.backend(images)
            return as_one_class(output) if self.options.single_cls else output

        return evaluate(
            predict, self.backend.postprocess_kind, bar, self.evaluator,
            device=device, thresholds=thresholds, on_batch=on_batch if folder else None,
        )  # fmt: skip


def parse_options(arguments: Sequence[str] | None = None) -> Any:
    """Read the command line."""
    parser = ArgumentParser(description="Measure a detector: COCO mAP, per class table, plots.")
    parser.add_argument(
        "--weights",
        nargs="+",
        default=["runs/train/exp/weights/best.pt"],
        help="one or more models",
    )
    parser.add_argument(
        "--ensemble",
        action="store_true",
        help="measure them as one, predictions joined before NMS, instead of each",
    )
    add_foreign_flags(parser)
    add_data_flag(parser)
    parser.add_argument("--batch-size", type=integer(1), default=32, help="images a batch")
    add_size_flag(parser, default=None)
    add_threshold_flags(parser, conf=0.001, iou=0.6, max_det=300)
    parser.add_argument(
        "--task",
        default="val",
        choices=("train", "val", "test", "speed", "study"),
        help="split, or what to measure",
    )
    add_device_flag(parser)
    parser.add_argument("--workers", type=integer(0), default=2, help="processes that load images")
    parser.add_argument(
        "--rect", action="store_true", help="batches of the images' own shape instead of square"
    )
    parser.add_argument("--single-cls", action="store_true", help="treat all classes as one")
    parser.add_argument("--agnostic-nms", action="store_true", help="NMS over all classes together")
    parser.add_argument(
        "--verbose", action="store_true", help="one line a class, also beyond 20 classes"
    )
    parser.add_argument("--save-txt", action="store_true", help="write predictions as YOLO labels")
    parser.add_argument("--save-conf", action="store_true", help="with the score behind each")
    parser.add_argument("--save-json", action="store_true", help="write predictions as COCO JSON")
    parser.add_argument("--half", action="store_true", help="half precision")
    parser.add_argument("--noplots", action="store_true", help="write no pictures")
    add_run_flags(parser, "runs/val")
    add_ignored_flags(parser, IGNORED)
    options = parser.parse_args(arguments)
    say_ignored(options, IGNORED)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every given model."""
    options = parse_options(arguments)
    device = select_device(options.device)
    run = {"speed": _speed, "study": _study}.get(options.task, _validate)
    every = [options.weights] if options.ensemble else [[path] for path in options.weights]
    for paths in every:
        members = [
            load_backend(
                path, device, half=options.half, cfg=options.cfg, backbone=options.backbone, allow_code=options.allow_code,
            )
            for path in paths
        ]  # fmt: skip
        backend = as_one(members, paths)
        options.weights = "+".join(Path(p).name for p in paths) if len(paths) > 1 else paths[0]
        _tell_thresholds(options, backend)
        run(options, backend, device)


def _tell_thresholds(options: Any, backend: Backend) -> None:
    """Warn of a curve that is cut, by the flag or inside the file."""
    log = get_logger()
    conf = options.conf_thres
    if backend.end2end:
        inside = backend.info.thresholds
        log.info(
            f"{options.weights}: {backend.info.told_inside}; --iou-thres and --agnostic-nms cannot act on it"
        )
        conf = max(conf, inside[0] if inside else 0.0)
    if conf > 0.01 and options.task != "speed":
        advice = (
            " Export it with --conf-thres 0.001 to measure it." if conf > options.conf_thres else ""
        )
        log.warning(
            f"scores below {conf} are cut from the precision-recall curve: mAP will come out too low.{advice}"
        )


def _size(options: Any, backend: Backend) -> tuple[int, int]:
    if options.imgsz is None:
        return backend.imgsz
    imgsz = parse_imgsz(options.imgsz, backend.stride)
    if not backend.dynamic and imgsz != tuple(backend.imgsz):
        raise ConfigError(
            f"--imgsz: got {imgsz[0]} {imgsz[1]}, but {options.weights} was exported for "
            f"{backend.imgsz[0]} {backend.imgsz[1]}. Leave --imgsz out or export with --dynamic."
        )
    return imgsz


def _validate(options: Any, backend: Backend, device: torch.device) -> None:
    log, imgsz = get_logger(), _size(options, backend)
    validation = Validation(options, backend, imgsz)
    folder = increment_path(options.project, options.name, options.exist_ok)
    folder.mkdir(parents=True, exist_ok=True)
    save_faults(folder, {options.task: validation.dataset})
    thresholds = Thresholds(
        options.conf_thres, options.iou_thres, options.max_det, options.agnostic_nms
    )
    metrics, speed = validation.run(folder, thresholds, device)
    print(class_table(metrics, options.verbose or len(metrics.per_class) <= 20))
    tell_other_score(validation.dataset, validation.evaluator)
    print(
        f"speed: {speed.prepare:.1f} ms prepare, {speed.inference:.1f} ms inference, {speed.postprocess:.1f} ms "
        f"postprocess an image at {imgsz[0]}x{imgsz[1]}, batch {options.batch_size}, {device}"
    )
    if options.save_json:
        _save_json(folder, Path(options.weights).stem, validation)
    if not options.noplots:
        save_metric_plots(folder, metrics, validation.confusion)
    log.info(f"results in {folder}")


def _save_json(folder: Path, stem: str, validation: Validation) -> None:
    """Predictions in COCO's results format, each with the name of its file, and the ground truth whose ids they have."""
    truth = validation.dataset.coco_ground_truth()
    files = {image["id"]: image["file_name"] for image in truth["images"]}
    rows = validation.evaluator.predictions()
    predictions = [{**row, "file_name": files[row["image_id"]]} for row in rows]
    for name, content in ((f"{stem}_predictions.json", predictions), ("ground_truth.json", truth)):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
        get_logger().info(f"{folder / name}: in COCO's form")


def _speed(options: Any, backend: Backend, device: torch.device) -> None:
    """Time one image a batch at detect.py's thresholds."""
    options.batch_size = 1
    validation = Validation(options, backend, _size(options, backend))
    speed = validation.run(None, Thresholds(0.25, 0.45), device).speed
    print(
        f"{options.weights}: {speed.prepare:.2f} ms prepare, {speed.inference:.2f} ms inference, "
        f"{speed.postprocess:.2f} ms postprocess an image, batch 1, {device}"
    )


def _study(options: Any, backend: Backend, device: torch.device) -> None:
    """mAP and time over image sizes."""
    if not backend.dynamic:
        raise ConfigError(
            f"{options.weights}: has a fixed image size, expected a .pt or a --dynamic export for --task study."
        )
    folder = increment_path(options.project, options.name, options.exist_ok)
    folder.mkdir(parents=True, exist_ok=True)
    largest = max(_size(options, backend))
    rows: list[Mapping[str, float]] = []
    for side in sorted(
        {
            parse_imgsz(round(largest * part), backend.stride)[0]
            for part in (0.5, 0.75, 1, 1.25, 1.5)
        }
    ):
        metrics, speed = Validation(options, backend, (side, side)).run(None, Thresholds(), device)
        rows.append(
            {
                "imgsz": side,
                "mAP50": metrics.map50,
                "mAP50-95": metrics.map50_95,
                "ms": speed.inference,
            }
        )
        print(
            f"imgsz {side}: mAP50 {metrics.map50:.4f}, mAP50-95 {metrics.map50_95:.4f}, {speed.inference:.1f} ms"
        )
    text = "\n".join(
        [",".join(rows[0]), *(",".join(f"{value:.6g}" for value in row.values()) for row in rows)]
    )
    (folder / "study.csv").write_text(text + "\n", encoding="utf-8")
    points = [StudyPoint(int(row["imgsz"]), row["mAP50-95"], row["ms"]) for row in rows]
    plot_study({Path(options.weights).stem: points}, folder / "study.png")
    get_logger().info(f"results in {folder}: study.csv, study.png")


if __name__ == "__main__":
    run_cli(main)
