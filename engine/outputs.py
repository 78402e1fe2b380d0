"""What a measurement leaves behind: a table, pictures of its first batches, plots, label files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from utils.boxes import xyxy_to_cxcywh
from utils.files import FreeNames
from utils.metrics import ConfusionMatrix, Metrics
from utils.plots import plot_confusion_matrix, plot_curves
from utils.structures import Batch, Detections
from utils.visualize import plot_batch

PICTURED_BATCHES = 3


class Witness:
    """Sees the batches of a measurement: pictures the first ones, counts confusions, writes labels.

    Args:
        folder: where the files go.
        names: of the classes.
        plots: whether there are pictures.
        labels: writes what was found, on request.
    """

    def __init__(
        self,
        folder: Path,
        names: tuple[str, ...],
        *,
        plots: bool,
        labels: LabelWriter | None = None,
    ) -> None:
        self.folder, self.names, self.plots, self.labels = folder, names, plots, labels
        self.confusion, self.seen = ConfusionMatrix(len(names)), 0

    def __call__(self, batch: Batch, detections: list[Detections]) -> None:
        """Take a batch and its detections, in the batch's pixels."""
        for index, found in enumerate(detections):
            self.confusion.update(found, *batch.targets.of_image(index))
        if self.plots and self.seen < PICTURED_BATCHES:
            for kind, objects in (("labels", batch.targets), ("pred", detections)):
                path = self.folder / f"val_batch{self.seen}_{kind}.jpg"
                plot_batch(batch.images, objects, self.names, path, titles=batch.paths)
        if self.labels:
            self.labels.write(batch, detections)
        self.seen += 1

    def finish(self, metrics: Metrics) -> None:
        """Curves of precision, recall and F1, and the confusion matrix."""
        if self.plots:
            plot_curves(metrics.curves, self.folder, metrics.map50)
            path = self.folder / "confusion_matrix.png"
            plot_confusion_matrix(self.confusion.matrix, self.names, path)


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
    path: Path,
    found: Detections,
    size: tuple[int, int],
    with_score: bool,
    tracks: Sequence[int] = (),
) -> None:
    """`class x y w h [score] [track]` lines, parts of an image of `size` (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scale = found.boxes.new_tensor([size[1], size[0], size[1], size[0]])
    boxes = (xyxy_to_cxcywh(found.boxes) / scale).tolist()
    lines = []
    columns = found.labels.tolist(), boxes, found.scores.tolist()
    for place, (label, box, score) in enumerate(zip(*columns)):
        numbers = [*box, score] if with_score else box
        track = [str(number) for number in tracks[place : place + 1]]
        lines.append(" ".join([str(label), *(f"{value:.6g}" for value in numbers), *track]))
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
