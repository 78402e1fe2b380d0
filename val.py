"""Measure a detector: `python val.py --weights runs/train/exp/weights/best.pt --data data/shapes.yaml`.

`.pt`, `.onnx` and every other exported form run through the same call and the same postprocessing, so the numbers
can be compared. mAP is COCO's, computed by faster-coco-eval over whatever form the labels have.
"""

from __future__ import annotations

import csv
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from data.dataset import LoadOptions
from deploy.backends import Backend
from deploy.ensemble import load_as_one
from engine.assessment import assess
from engine.datasets import save_faults
from engine.evaluation import Validation, tell_other_score
from engine.flags import read_flags
from engine.options import SPLITS, Thresholds, ValOptions
from engine.outputs import LabelWriter, Witness, class_table
from engine.report import write_report
from engine.report_pictures import Source
from utils.checkpoint import ForeignCheckpointError
from utils.config import parse_imgsz
from utils.device import select_device
from utils.errors import ConfigError, run_cli
from utils.logger import get_logger
from utils.metrics import Metrics
from utils.plots import StudyPoint, plot_study
from utils.thresholds import keep_thresholds

DETECTION = Thresholds(0.25, 0.45)  # those of detect.py


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every given model."""
    options = read_flags(ValOptions, arguments)
    device = select_device(options.device)
    run = {"speed": speed, "study": study}.get(options.task, validate)
    for files in [options.weights] if options.ensemble else [[path] for path in options.weights]:
        backend = load_as_one(
            files,
            device,
            half=options.half,
            cfg=options.cfg,
            backbone=options.backbone,
            allow_code=options.allow_code,
            one_to_many=options.one_to_many,
        )
        name = "+".join(Path(file).name for file in files) if len(files) > 1 else files[0]
        tell_thresholds(options, backend, name)
        run(options, backend, name, device)


def tell_thresholds(options: ValOptions, backend: Backend, name: str) -> None:
    """Warn of a curve that is cut, by the flag or inside the file."""
    log, conf = get_logger(), options.conf_thres
    if backend.end2end:
        inside = backend.info.thresholds
        log.info(
            f"{name}: {backend.info.told_inside}; --iou-thres and --agnostic-nms cannot act on it"
        )
        conf = max(conf, inside[0] if inside else 0.0)
    if conf > 0.01 and options.task != "speed":
        advice = (
            " Export it with --conf-thres 0.001 to measure it." if conf > options.conf_thres else ""
        )
        log.warning(
            f"scores below {conf} are cut from the precision-recall curve: mAP will come out too low.{advice}"
        )


def validation_of(
    options: ValOptions, backend: Backend, name: str, imgsz: tuple[int, int], batch_size: int
) -> Validation:
    """The model on the split of `--task`, or on that for validation."""
    if options.rect and not backend.dynamic:
        raise ConfigError(
            f"--rect: {name} has a fixed image size. Leave it out or export with --dynamic."
        )
    load = LoadOptions(
        imgsz=imgsz,
        rect=options.rect,
        batch_size=batch_size,
        stride=backend.stride,
        single_cls=options.single_cls,
    )
    split = options.task if options.task in SPLITS else "val"
    return Validation(backend, name, options, split, load, options.workers)


def validate(options: ValOptions, backend: Backend, name: str, device: torch.device) -> None:
    """Measure a model on a split, and leave what the flags ask for."""
    imgsz = options.size_for(backend, name)
    validation = validation_of(options, backend, name, imgsz, options.batch_size)
    dataset, folder = validation.dataset, options.make_folder()
    save_faults(folder, {options.task: dataset})
    labels = None
    if options.save_txt:
        labels = LabelWriter(folder / "labels", dataset.paths, options.save_conf)
    witness = Witness(folder, dataset.names, plots=not options.noplots, labels=labels)
    metrics, taken = validation.run(device, options.thresholds, witness)
    print(class_table(metrics, options.verbose or len(metrics.per_class) <= 20))
    tell_other_score(dataset, validation.evaluator)
    print(
        f"speed: {taken.prepare:.1f} ms prepare, {taken.inference:.1f} ms inference, {taken.postprocess:.1f} ms "
        f"postprocess an image at {imgsz[0]}x{imgsz[1]}, batch {options.batch_size}, {device}"
    )
    if options.save_json:
        save_json(folder, Path(name).stem, validation)
    witness.finish(metrics)
    if options.report:
        report(options, validation, metrics, witness, name, folder)
    get_logger().info(f"results in {folder}")


def report(
    options: ValOptions,
    validation: Validation,
    metrics: Metrics,
    witness: Witness,
    name: str,
    folder: Path,
) -> None:
    """`report.html`, and the best thresholds into the checkpoint if they were found on the split for that."""
    if not metrics.instances:
        get_logger().warning("--report: got a split without objects, there is nothing to tell")
        return
    dataset, (height, width) = validation.dataset, validation.dataset.options.imgsz
    found = assess(validation.evaluator, metrics)
    source = Source(dict(zip(dataset.image_ids.tolist(), dataset.paths)), dataset.config.white)
    told = {"weights": name, "data": options.data, "split": dataset.split}
    told |= {"image size": f"{height} x {width}", "command": shlex.join(["python", *sys.argv])}
    path = write_report(found, source, witness.confusion.matrix, told, folder)
    get_logger().info(f"{path}: what the errors are, and what each costs")
    if options.task != "val" or options.single_cls or not name.endswith(".pt"):
        get_logger().info("thresholds stay in the report: a .pt takes them, with --task val")
        return
    try:
        keep_thresholds(Path(name), found.thresholds.tolist())
    except ForeignCheckpointError as error:
        get_logger().info(f"thresholds stay in the report: {error}")
    else:
        get_logger().info(
            f"{name}: has the best threshold of each class for detect.py --conf-thres auto"
        )


def save_json(folder: Path, stem: str, validation: Validation) -> None:
    """Predictions in COCO's results format, each with the name of its file, and the ground truth whose ids they have."""
    truth = validation.dataset.coco_ground_truth()
    files = {image["id"]: image["file_name"] for image in truth["images"]}
    found = validation.evaluator.predictions()
    rows = [{**row, "file_name": files[row["image_id"]]} for row in found]
    for name, content in ((f"{stem}_predictions.json", rows), ("ground_truth.json", truth)):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
        get_logger().info(f"{folder / name}: in COCO's form")


def speed(options: ValOptions, backend: Backend, name: str, device: torch.device) -> None:
    """Time one image a batch at detect.py's thresholds."""
    imgsz = options.size_for(backend, name)
    validation = validation_of(options, backend, name, imgsz, 1)
    taken = validation.run(device, DETECTION)[1]
    print(
        f"{name}: {taken.prepare:.2f} ms prepare, {taken.inference:.2f} ms inference, "
        f"{taken.postprocess:.2f} ms postprocess an image, batch 1, {device}"
    )


def study(options: ValOptions, backend: Backend, name: str, device: torch.device) -> None:
    """mAP and time over image sizes."""
    if not backend.dynamic:
        raise ConfigError(
            f"{name}: has a fixed image size, expected a .pt or a --dynamic export for --task study."
        )
    largest, folder = max(options.size_for(backend, name)), options.make_folder()
    shares = (largest * part for part in (0.5, 0.75, 1, 1.25, 1.5))
    sides = {parse_imgsz(round(share), backend.stride)[0] for share in shares}
    points: list[StudyPoint] = []
    with (folder / "study.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("imgsz", "mAP50", "mAP50-95", "ms"))
        for side in sorted(sides):
            validation = validation_of(options, backend, name, (side, side), options.batch_size)
            metrics, taken = validation.run(device)
            values = (metrics.map50, metrics.map50_95, taken.inference)
            table.writerow((side, *(f"{value:.6g}" for value in values)))
            points.append(StudyPoint(side, metrics.map50_95, taken.inference))
            print(
                f"imgsz {side}: mAP50 {metrics.map50:.4f}, mAP50-95 {metrics.map50_95:.4f}, {taken.inference:.1f} ms"
            )
    plot_study({Path(name).stem: points}, folder / "study.png")
    get_logger().info(f"results in {folder}: study.csv, study.png")


if __name__ == "__main__":
    run_cli(main)
