"""What a run leaves behind: tables, pictures, label files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from data.dataset import DetectionDataset
from data.formats.faults import write_faults
from engine.run import Run
from utils.boxes import xyxy_to_cxcywh
from utils.channels import as_channels
from utils.config import save_yaml
from utils.file_names import FreeNames
from utils.logger import CsvLogger, TensorBoardLogger, get_logger, results_columns
from utils.metrics import CocoEvaluator, ConfusionMatrix, Metrics
from utils.plots import (
    plot_confusion_matrix,
    plot_correlogram,
    plot_curves,
    plot_labels,
    plot_results,
)
from utils.structures import Batch, Detections, Targets
from utils.visualize import plot_batch

PICTURED_BATCHES = 3


def save_faults(folder: Path, splits: Mapping[str, DetectionDataset]) -> None:
    """Leave what was mended or skipped in labels and images as `faults.csv`, and say so."""
    path = folder / "faults.csv"
    count = write_faults(path, {split: dataset.faults for split, dataset in splits.items()})
    if count:
        get_logger().warning(f"{path}: all {count} faults of labels and images")


def tell_other_score(dataset: DetectionDataset, evaluator: CocoEvaluator) -> None:
    """Say what the mAP is without the faults of a COCO file, which is scored as pycocotools scores it.

    Args:
        dataset: what was measured.
        evaluator: with the detections in it.
    """
    if not dataset.scored_otherwise:
        return
    truth = dataset.coco_ground_truth(as_read=True)
    other = CocoEvaluator(truth, dataset.category_ids, dataset.names)
    other.merge([evaluator.state()])
    found = other.evaluate()
    get_logger().warning(
        f"{dataset.config.file}: {dataset.split} - {dataset.scored_otherwise} objects that were cut or dropped on reading "
        f"are scored as the COCO file has them; as in other forms, without that, mAP50 {found.map50:.4f}, "
        f"mAP50-95 {found.map50_95:.4f}"
    )


class RunRecorder:
    """Writes a training's files as it goes; does nothing on processes other than the main one."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.is_main = run.world.is_main
        self.plots = self.is_main and not run.options.noplots
        self.csv: CsvLogger | None = None
        self.confusion = ConfusionMatrix(len(run.val_set.names))
        self.val_batches = 0
        self.board = TensorBoardLogger(run.folder, enabled=False)

    def start(self) -> None:
        """The run's settings and the pictures of its labels."""
        if not self.is_main:
            return
        run, log = self.run, get_logger()
        (run.folder / "weights").mkdir(parents=True, exist_ok=True)
        save_yaml(
            run.folder / "opt.yaml", {k: v for k, v in vars(run.options).items() if k != "config"}
        )
        save_yaml(run.folder / "hyp.yaml", run.hyp)
        save_yaml(run.folder / "model.yaml", run.model.config)
        self.board = TensorBoardLogger(run.folder)  # after files whose errors are told in one line
        log.info(
            f"{len(run.train_set)} training and {len(run.val_set)} validation images at {run.imgsz[0]}x{run.imgsz[1]}, "
            f"{len(run.val_set.names)} classes; results go to {run.folder}"
        )
        save_faults(run.folder, {"train": run.train_set, "val": run.val_set})
        if self.plots and run.epoch == 0:
            labels, boxes = _normalised_objects(run.train_set)
            plot_labels(labels, boxes, run.train_set.names, run.folder / "labels.jpg")
            plot_correlogram(boxes, run.folder / "labels_correlogram.jpg")

    def batch(
        self, epoch: int, step: int, images: Tensor, targets: Targets, paths: Sequence[str]
    ) -> None:
        """Picture the first training batches as the network gets them: (B, 3, H, W) in [0, 1]."""
        if self.plots and epoch == 0 and step < PICTURED_BATCHES:
            seen = as_channels(images, self.run.model.channels).expand(-1, 3, -1, -1)
            pixels = seen.mul(255).round().clamp(0, 255).byte()
            path = self.run.folder / f"train_batch{step}.jpg"
            plot_batch(pixels, targets, self.run.train_set.names, path, titles=paths)

    def epoch(
        self,
        epoch: int,
        losses: Mapping[str, float],
        val_losses: Mapping[str, float],
        evaluation: Any,
        seconds: float,
    ) -> None:
        """One row of results.csv, one step of the events."""
        if not self.is_main:
            return
        row: dict[str, Any] = {f"train/{name}_loss": value for name, value in losses.items()}
        row |= {f"val/{name}_loss": value for name, value in val_losses.items() if name in losses}
        if evaluation:
            row |= _metrics_row(evaluation.metrics)
            metrics = evaluation.metrics
            get_logger().info(
                f"epoch {epoch + 1}/{self.run.options.epochs}: mAP50 {metrics.map50:.4f}, "
                f"mAP50-95 {metrics.map50_95:.4f}, P {metrics.precision:.3f}, R {metrics.recall:.3f}"
            )
        row |= {
            f"lr/pg{i}": group["lr"] for i, group in enumerate(self.run.optimizer.param_groups[:3])
        }
        if self.csv is None:
            columns = results_columns(tuple(losses))
            self.csv = CsvLogger(self.run.folder / "results.csv", columns, start_epoch=epoch)
        self.csv.write({"epoch": epoch, "time": seconds, **row})
        self.board.scalars({name: float(value) for name, value in row.items()}, epoch)

    def val_batch(self, batch: Batch, detections: list[Detections]) -> None:
        """Count the confusions of the final validation and picture its first batches."""
        for index, found in enumerate(detections):
            self.confusion.update(found, *batch.targets.of_image(index))
        if self.plots and self.val_batches < PICTURED_BATCHES:
            name = f"val_batch{self.val_batches}"
            save_batch_pictures(self.run.folder, name, batch, detections, self.run.val_set.names)
        self.val_batches += 1

    def finish(self, evaluation: Any) -> None:
        """Curves, confusion matrix and the picture of results.csv."""
        if self.plots:
            save_metric_plots(self.run.folder, evaluation.metrics, self.confusion)
            if (self.run.folder / "results.csv").exists():
                plot_results(self.run.folder / "results.csv")
        self.board.close()


def _metrics_row(metrics: Metrics) -> dict[str, float]:
    return {
        "metrics/precision": metrics.precision, "metrics/recall": metrics.recall,
        "metrics/mAP_0.5": metrics.map50, "metrics/mAP_0.5:0.95": metrics.map50_95,
    }  # fmt: skip


def _normalised_objects(dataset: Any) -> tuple[np.ndarray, np.ndarray]:
    """Labels (N,) and cxcywh as parts of the image (N, 4) of a whole split."""
    sizes = np.repeat(np.asarray(dataset.sizes), np.diff(dataset.offsets), axis=0)
    boxes = np.asarray(dataset.boxes, dtype=np.float64)
    centre, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    return np.asarray(dataset.labels), np.concatenate((centre, size), 1) / np.tile(
        sizes[:, ::-1], 2
    )


def save_batch_pictures(
    folder: Path, name: str, batch: Batch, detections: list[Detections], names: tuple[str, ...]
) -> None:
    """`<name>_labels.jpg` and `<name>_pred.jpg`."""
    plot_batch(
        batch.images, batch.targets, names, folder / f"{name}_labels.jpg", titles=batch.paths
    )
    plot_batch(batch.images, detections, names, folder / f"{name}_pred.jpg", titles=batch.paths)


def save_metric_plots(folder: Path, metrics: Metrics, confusion: ConfusionMatrix) -> None:
    """Curves of precision, recall and F1, and the confusion matrix."""
    plot_curves(metrics.curves, folder, metrics.map50)
    names = tuple(row.name for row in metrics.per_class)
    plot_confusion_matrix(confusion.matrix, names, folder / "confusion_matrix.png")


class LabelWriter:
    """Writes detections as YOLO label files, in folders as those of the images.

    Args:
        folder: where the files go.
        images: all images of the split; what their paths have in common is left out of the names.
        with_score: write the score behind each box.
    """

    def __init__(self, folder: Path, images: Iterable[str], with_score: bool) -> None:
        self.folder, self.with_score = folder, with_score
        self.root = os.path.commonpath({os.path.dirname(os.path.abspath(p)) for p in images})
        self.free_names = FreeNames()

    def write(self, batch: Batch, detections: list[Detections]) -> None:
        """Detections of a batch, in parts of the original images."""
        for path, box, found in zip(batch.paths, batch.letterboxes, detections):
            original = found._replace(boxes=box.restore(found.boxes))
            below = os.path.splitext(os.path.relpath(path, self.root))[0]
            file = self.folder / self.free_names.take(below, path, ".txt")
            write_yolo_labels(file, original, (box.height, box.width), self.with_score)


def write_yolo_labels(
    path: Path, found: Detections, size: tuple[int, int], with_score: bool
) -> None:
    """`class x y w h [score]` lines, parts of an image of `size` (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scale = found.boxes.new_tensor([size[1], size[0], size[1], size[0]])
    boxes = (xyxy_to_cxcywh(found.boxes) / scale).tolist()
    lines = []
    for label, box, score in zip(found.labels.tolist(), boxes, found.scores.tolist()):
        numbers = [*box, score] if with_score else box
        lines.append(" ".join([str(label), *(f"{value:.6g}" for value in numbers)]))
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def class_table(metrics: Metrics, verbose: bool = True) -> str:
    """The metrics as text: all classes, then one line a class."""
    lines = [
        f"{'class':>22}{'images':>9}{'objects':>9}{'P':>9}{'R':>9}{'mAP50':>9}{'mAP50-95':>10}"
    ]
    everything = (metrics.precision, metrics.recall, metrics.map50, metrics.map50_95)
    lines.append(_line("all", metrics.images, metrics.instances, everything))
    if verbose and len(metrics.per_class) > 1:
        lines += [_line(row.name, row.images, row.instances, row[3:]) for row in metrics.per_class]
    return "\n".join(lines)


def _line(name: str, images: int, instances: int, values: Sequence[float]) -> str:
    return f"{name[:20]:>22}{images:>9}{instances:>9}" + "".join(
        f"{value:>{width}.4f}" if value >= 0 else f"{'-':>{width}}"  # COCO's -1: no objects
        for value, width in zip(values, (9, 9, 9, 10))
    )
