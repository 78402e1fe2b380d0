"""What a training leaves behind: settings, a table and pictures as it goes, the measurement of its best checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from data.dataset import DetectionDataset
from data.loader import DetectionLoader
from engine.datasets import save_faults, validation_loader
from engine.evaluation import collect, tell_other_score
from engine.outputs import PICTURED_BATCHES, Witness, class_table
from engine.run import Run
from engine.state import finish, way_on
from models.reparam import fuse
from models.weights.load import load_weights
from models.yolo import DetectionModel
from utils.channels import as_channels
from utils.checkpoint import load_checkpoint
from utils.config import save_yaml
from utils.logger import CsvLogger, TensorBoardLogger, get_logger, results_columns
from utils.metrics import Metrics
from utils.plots import plot_correlogram, plot_labels, plot_results
from utils.structures import Targets
from utils.visualize import plot_batch


class RunRecorder:
    """Writes a training's files as it goes; does nothing on processes other than the main one."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.plots = run.world.is_main and not run.options.noplots
        self.csv: CsvLogger | None = None
        self.board = TensorBoardLogger(run.folder, enabled=False)

    def start(self) -> None:
        """The run's settings and the pictures of its labels."""
        run, folder = self.run, self.run.folder
        if not run.world.is_main:
            return
        (folder / "weights").mkdir(parents=True, exist_ok=True)
        save_yaml(folder / "opt.yaml", vars(run.options))
        save_yaml(folder / "hyp.yaml", run.hyp)
        save_yaml(folder / "model.yaml", run.model.config)
        self.board = TensorBoardLogger(folder)  # after files whose errors are told in one line
        get_logger().info(
            f"{len(run.train_set)} training and {len(run.val_set)} validation images at {run.imgsz[0]}x{run.imgsz[1]}, "
            f"{len(run.val_set.names)} classes; results go to {folder}"
        )
        save_faults(folder, {"train": run.train_set, "val": run.val_set})
        if self.plots and run.place.epoch == 0:
            labels, boxes = _normalised_objects(run.train_set)
            plot_labels(labels, boxes, run.train_set.names, folder / "labels.jpg")
            plot_correlogram(boxes, folder / "labels_correlogram.jpg")

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
        metrics: Metrics | None,
        seconds: float,
    ) -> None:
        """One row of results.csv, one step of the events."""
        if not self.run.world.is_main:
            return
        row = {f"train/{name}_loss": value for name, value in losses.items()}
        row |= {f"val/{name}_loss": value for name, value in val_losses.items() if name in losses}
        if metrics:
            row |= {
                "metrics/precision": metrics.precision,
                "metrics/recall": metrics.recall,
                "metrics/mAP_0.5": metrics.map50,
                "metrics/mAP_0.5:0.95": metrics.map50_95,
            }
            get_logger().info(
                f"epoch {epoch + 1}/{self.run.options.epochs}: mAP50 {metrics.map50:.4f}, "
                f"mAP50-95 {metrics.map50_95:.4f}, P {metrics.precision:.3f}, R {metrics.recall:.3f}"
            )
        groups = self.run.optimizer.param_groups[:3]
        row |= {f"lr/pg{i}": group["lr"] for i, group in enumerate(groups)}
        if self.csv is None:
            columns = results_columns(tuple(losses))
            self.csv = CsvLogger(self.run.folder / "results.csv", columns, start_epoch=epoch)
        self.csv.write({"epoch": epoch, "time": seconds, **row})
        self.board.scalars({name: float(value) for name, value in row.items()}, epoch)


def conclude(run: Run, recorder: RunRecorder) -> Metrics | None:
    """On the main process: measure the best checkpoint, draw the pictures, finish the checkpoints.

    They are finished last: until then a killed run can be resumed, and comes here again.
    """
    if not run.world.is_main:
        return None
    if run.ema.updates == 0:
        _warn_of_no_step(run)
    best = run.last.with_name("best.pt")
    best_epoch, model = load_checkpoint(best)["epoch"], _deployed(run)
    witness = Witness(run.folder, run.val_set.names, plots=recorder.plots)
    collect(
        lambda images, _: model.decode(model(images)),
        model.head.postprocess,
        run.stop.until(whole_val_loader(run), way_on(run)),
        run.evaluator,
        run.device,
        on_batch=witness,
    )
    metrics = run.evaluator.evaluate()
    witness.finish(metrics)
    table = run.folder / "results.csv"
    if recorder.plots and table.exists():
        plot_results(table)
    recorder.board.close()
    tell_other_score(run.val_set, run.evaluator)
    finish(run.last.parent)
    print(class_table(metrics))
    print(
        f"best epoch {best_epoch + 1}: mAP50 {metrics.map50:.4f}, "
        f"mAP50-95 {metrics.map50_95:.4f}; results in {run.folder}"
    )
    return metrics


def whole_val_loader(run: Run) -> DetectionLoader:
    """All validation images, not this process's share only."""
    if not run.world.is_distributed:
        return run.val_loader
    return validation_loader(run.options, run.val_set, run.world, whole=True)


def _deployed(run: Run) -> DetectionModel:
    """The model of best.pt in the form that inference uses."""
    best = run.last.with_name("best.pt")
    model = load_weights(best, allow_code=run.options.allow_code).model
    fuse(model, check=False)  # in float64, which some devices lack and others are slow in
    return model.to(run.device)


def _warn_of_no_step(run: Run) -> None:
    get_logger().warning(
        f"the weights were never changed: {run.place.epoch * len(run.train_loader)} batches, but an optimiser step needs "
        f"{run.accumulate} with a finite loss (nbs {run.hyp['nbs']} / --batch-size {run.options.batch_size}). "
        "Lower nbs in the recipe, or raise --epochs."
    )


def _normalised_objects(dataset: DetectionDataset) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Labels (N,) and cxcywh as parts of the image (N, 4) of a whole split."""
    sizes = np.repeat(np.asarray(dataset.sizes), np.diff(dataset.offsets), axis=0)
    boxes = np.asarray(dataset.boxes, dtype=np.float64)
    centre, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    parts = np.concatenate((centre, size), 1) / np.tile(sizes[:, ::-1], 2)
    return np.asarray(dataset.labels), parts
