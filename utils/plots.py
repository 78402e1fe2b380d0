"""Charts of a run: labels, losses, precision and recall, confusion, speed against accuracy.

Figures are made without pyplot, so that no global state is touched and no display is needed.
"""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from utils.curves import Curves
from utils.visualize import class_colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[np.float64]
NAMED_CLASSES = 20  # more classes than this are drawn without a legend


class StudyPoint(NamedTuple):
    """One measurement of `--task study`.

    Attributes:
        imgsz: image size, the longer side.
        map50_95: COCO mAP.
        milliseconds: per image, preprocessing to detections.
    """

    imgsz: int
    map50_95: float
    milliseconds: float


def plot_labels(
    labels: NDArray[np.int64], boxes_cxcywhn: Array, names: Sequence[str], path: str | Path
) -> Path:
    """labels.jpg: objects per class, shapes, centres, sizes.

    Args:
        labels: class indices of a whole split, (N,).
        boxes_cxcywhn: centre and size as shares of the image, (N, 4).
        names: class names.
        path: the file.
    """
    figure, axes = _figure(2, 2, (11, 10))
    boxes = boxes_cxcywhn
    _plot_class_counts(axes[0], labels, names)
    _plot_shapes(axes[1], labels, boxes)
    _plot_density(axes[2], boxes[:, 0], boxes[:, 1], "x of the centre", "y of the centre")
    axes[2].invert_yaxis()
    _plot_density(axes[3], boxes[:, 2], boxes[:, 3], "width", "height")
    return _save(figure, path)


def plot_correlogram(boxes_cxcywhn: Array, path: str | Path) -> Path:
    """labels_correlogram.jpg: every pair of x, y, width, height, (N, 4), as a density."""
    figure, axes = _figure(4, 4, (11, 11))
    boxes = boxes_cxcywhn
    words = ("x", "y", "width", "height")
    for row in range(4):
        for column in range(4):
            axis = axes[row * 4 + column]
            if column > row:
                axis.set_visible(False)
            elif column == row:
                axis.hist(boxes[:, row], bins=40, range=(0, 1), color="#0079bf")
                axis.set_xlabel(words[row])
            else:
                _plot_density(axis, boxes[:, column], boxes[:, row], words[column], words[row])
    return _save(figure, path)


def plot_results(csv_path: str | Path, path: str | Path | None = None) -> Path:
    """results.png: each loss (training and validation together), each metric, the learning rates.

    Args:
        csv_path: a run's results.csv.
        path: the picture, beside the file and with its name where None.
    """
    from matplotlib.ticker import MaxNLocator

    csv_path = Path(csv_path)
    columns = read_results(csv_path)
    epochs = columns.pop("epoch", np.zeros(0))
    columns.pop("time", None)
    panels: dict[str, list[str]] = {}
    for name in columns:
        group, _, rest = name.partition("/")
        title = {"metrics": rest, "lr": "learning rate"}.get(group, rest.replace("_loss", " loss"))
        panels.setdefault(title, []).append(name)
    count = max(len(panels), 1)
    across = min(4, count)
    down = math.ceil(count / across)
    figure, axes = _figure(down, across, (3.6 * across, 2.9 * down))
    for axis, (title, members) in zip(axes, panels.items(), strict=False):
        for i, name in enumerate(members):
            colour = _hex(class_colour((1, 0, 2)[i % 3]))
            marker = "o" if len(epochs) < 3 else None
            axis.plot(epochs, columns[name], color=colour, label=name, linewidth=1.6, marker=marker)
        axis.set_title(title)
        if len(members) > 1:
            axis.legend(fontsize=7, frameon=False)
        axis.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    return _save(figure, path or csv_path.with_suffix(".png"))


def read_results(csv_path: str | Path) -> dict[str, Array]:
    """Columns of a results.csv as numbers; cells that are none become NaN."""
    with Path(csv_path).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, skipinitialspace=True))
    names = [name for name in (rows[0] if rows else {}) if name]
    return {name.strip(): np.array([_as_number(row[name]) for row in rows]) for name in names}


def plot_curves(curves: Curves, folder: str | Path, map50: float | None = None) -> list[Path]:
    """PR_curve.png, P_curve.png, R_curve.png and F1_curve.png in `folder`."""
    folder = Path(folder)
    confidence, mean_map = curves.confidence_axis, -1.0 if map50 is None else map50
    note = f" mAP50 {mean_map:.3f}" if mean_map >= 0 else ""
    charts = (
        ("PR", "recall", "precision", curves.recall_axis, curves.precision_at_recall, note),
        ("P", "confidence", "precision", confidence, curves.precision, ""),
        ("R", "confidence", "recall", confidence, curves.recall, ""),
        ("F1", "confidence", "F1", confidence, curves.f1, ""),
    )
    paths = []
    for short, x_label, y_label, x, values, extra in charts:
        figure, (axis,) = _figure(1, 1, (9, 6))
        note = extra or (_best_note(x, values) if short == "F1" else "")
        _plot_family(axis, x, values, curves.names, note)
        axis.set(xlabel=x_label, ylabel=y_label, xlim=(0, 1), ylim=(0, 1.02))
        axis.set_title(f"{y_label[0].upper()}{y_label[1:]} over {x_label}, IoU 0.5")
        paths.append(_save(figure, folder / f"{short}_curve.png"))
    return paths


def plot_confusion_matrix(
    matrix: NDArray[np.int64], names: Sequence[str], path: str | Path
) -> Path:
    """confusion_matrix.png: shares of each column, of the true class.

    Args:
        matrix: `[predicted, true]` counts with the background last, (C + 1, C + 1).
        names: C class names.
        path: the file.
    """
    shares = matrix / np.maximum(matrix.sum(0, keepdims=True), 1)
    size = min(max(6.0, 0.45 * len(matrix) + 3.5), 24.0)
    figure, (axis,) = _figure(1, 1, (size + 1, size))
    shown = np.where(matrix > 0, shares, np.nan)
    image = axis.imshow(shown, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axis, fraction=0.046, pad=0.03, label="share of the true class")
    words = [*names, "background"]
    if len(words) <= 60:
        axis.set_xticks(range(len(words)), words, rotation=90 if len(words) > 6 else 0)
        axis.set_yticks(range(len(words)), words)
    if len(words) <= 30:
        size = 9 if len(matrix) <= 12 else 6
        for row, column in np.argwhere(matrix > 0):
            share = shares[row, column]
            ink = "white" if share > 0.55 else "black"
            text = axis.text(column, row, f"{share:.2f}", color=ink, fontsize=size)
            text.set(ha="center", va="center")
    axis.set(xlabel="true", ylabel="predicted", title="Confusion matrix")
    axis.grid(False)
    return _save(figure, path)


def plot_study(studies: Mapping[str, Sequence[StudyPoint]], path: str | Path) -> Path:
    """study.png: mAP over time per image, one line per weights, one point per image size."""
    figure, (axis,) = _figure(1, 1, (8, 6))
    for i, (name, points) in enumerate(studies.items()):
        ordered = sorted(points, key=lambda point: point.imgsz)
        x, y = [p.milliseconds for p in ordered], [p.map50_95 for p in ordered]
        axis.plot(x, y, "o-", color=_hex(class_colour(i)), label=name, linewidth=1.8)
        for point in ordered:
            place = (point.milliseconds, point.map50_95)
            axis.annotate(
                str(point.imgsz), place, xytext=(4, -10), textcoords="offset points", fontsize=8
            )
    axis.set(xlabel="ms per image", ylabel="mAP50-95", title="Accuracy and time by image size")
    axis.set_xlim(left=0)
    if studies:
        axis.legend(frameon=False, loc="lower right")
    return _save(figure, path)


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axis in axes:
        axis.grid(True, alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(path, dpi=130)
    return path


def _plot_class_counts(axis: Axes, labels: NDArray[np.int64], names: Sequence[str]) -> None:
    counts = np.bincount(labels, minlength=len(names))
    colours = [_hex(class_colour(i)) for i in range(len(counts))]
    bars = axis.bar(range(len(counts)), counts, color=colours)
    axis.set(ylabel="objects", title=f"{counts.sum()} objects of {len(names)} classes")
    if len(names) <= 40:
        axis.set_xticks(range(len(names)), names, rotation=90 if len(names) > 6 else 0)
    if len(names) <= NAMED_CLASSES:
        axis.bar_label(bars, fontsize=8)
    axis.grid(False, axis="x")


def _plot_shapes(axis: Axes, labels: NDArray[np.int64], boxes: Array, limit: int = 500) -> None:
    """Outlines of some boxes laid over each other at one centre."""
    from matplotlib.collections import LineCollection

    chosen = np.linspace(0, len(boxes) - 1, min(limit, len(boxes))).astype(int)
    half_w, half_h = boxes[chosen, 2] / 2, boxes[chosen, 3] / 2
    x = np.stack((-half_w, half_w, half_w, -half_w, -half_w), axis=1) + 0.5
    y = np.stack((-half_h, -half_h, half_h, half_h, -half_h), axis=1) + 0.5
    colours = [_hex(class_colour(int(label))) for label in labels[chosen]]
    axis.add_collection(
        LineCollection(list(np.stack((x, y), axis=2)), colors=colours, linewidths=0.6, alpha=0.5)
    )
    axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", title=f"shapes of {len(chosen)} boxes")
    axis.grid(False)


def _plot_density(axis: Axes, x: Array, y: Array, x_label: str, y_label: str) -> None:
    from matplotlib.colors import PowerNorm

    if len(x):
        shade = PowerNorm(0.5, vmin=0)  # single objects stay visible beside dense bins
        axis.hist2d(x, y, bins=50, range=((0, 1), (0, 1)), cmap="Blues", norm=shade)
    axis.set(xlabel=x_label, ylabel=y_label, xlim=(0, 1), ylim=(0, 1), aspect="equal")


def _plot_family(axis: Axes, x: Array, values: Array, names: Sequence[str], note: str) -> None:
    """Thin lines for the classes, a thick one for their mean."""
    few = len(names) <= NAMED_CLASSES
    for i, name in enumerate(names):
        colour = _hex(class_colour(i)) if few else "#b8b8b8"
        axis.plot(x, values[i], color=colour, linewidth=1.2, label=name if few else None)
    if len(names):
        axis.plot(x, values.mean(0), color="black", linewidth=2.6, label=f"all classes{note}")
        axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    else:
        axis.text(0.5, 0.5, "no objects", ha="center", va="center")


def _best_note(x: Array, values: Array) -> str:
    if not len(values):
        return ""
    mean = values.mean(0)
    best = int(mean.argmax())
    return f" {mean[best]:.3f} at {x[best]:.3f}"


def _as_number(text: str | None) -> float:
    try:
        return float(text) if text else math.nan
    except ValueError:
        return math.nan


def _hex(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
