"""What `val.py --report` leaves: `report.html`, one page about one model on one split, and its numbers as `report.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from engine.assessment import Assessment
from engine.report_pictures import Picture, Source, suspects, worst_images
from utils.calibration import LEAST_SCORE
from utils.charts import Axis, Series, line_chart
from utils.heat_map import heat_map
from utils.page import (
    Column,
    facts,
    figure,
    fold,
    gallery,
    page,
    paragraph,
    picture,
    section,
    table,
)
from utils.tide import KINDS

LIMIT = 1_000_000
SIDES = (400, 320, 240, 160)
"""Pixels of the longer side of pictures; the first at which the page stays below LIMIT bytes is taken."""
MOST_LINES = 20
WORST = "At the thresholds of the table above. Green: found; red: found and wrong; orange: labelled and not found."
SUSPICION = (
    "Red is what the detector says, surest first, orange what the labels say. It may be right: these are the places where "
    "a label is most likely missing, of another class, or loose."
)
ADVICE = {
    "classification": "Look at the confused pairs below; more examples that differ in what tells them apart.",
    "localisation": "Draw boxes more evenly, train at a larger --imgsz, or try another --box-loss.",
    "both": "Wrong class and loose box together: more images of these classes.",
    "duplicate": "Lower --iou-thres, or train with --end2end.",
    "background": "Add images without objects that look alike; see below whether labels are missing.",
    "missed": "Train at a larger --imgsz or with a finer map; look at the missed objects below.",
}


def write_report(
    found: Assessment,
    source: Source,
    confusion: NDArray[np.int64],
    told: Mapping[str, str],
    folder: Path,
) -> Path:
    """Write `report.html`, below a megabyte, and `report.json`.

    Args:
        found: what it tells.
        source: where its pictures are.
        confusion: `[predicted, true]` counts with the background last, (C + 1, C + 1).
        told: what was measured, by name: `weights`, `split` and others.
        folder: where it goes.

    Returns:
        The page.
    """
    record = {**told, **found.record()}
    (folder / "report.json").write_text(json.dumps(record, indent=1), encoding="ascii")
    plain = [
        _summary(found, told),
        _errors(found),
        _classes(found),
        _curves(found),
        _confusions(confusion, found.evaluator.names),
        _calibration(found),
    ]
    title = f"{Path(told['weights']).name} on {told['split']}"
    for side in SIDES:
        pictures = [
            _gallery("The images with most errors", WORST, worst_images(found, source, side)),
            _gallery("Labels to look at", SUSPICION, suspects(found, source, side)),
        ]
        html = page(title, [*plain, *pictures]).encode()
        if len(html) < LIMIT:
            break
    path = folder / "report.html"
    path.write_bytes(html)
    return path


def _gallery(heading: str, told: str, pictures: Sequence[Picture]) -> Markup:
    figures = [figure(picture(one.image, one.caption, 75), one.caption) for one in pictures]
    return section(heading, paragraph(told), gallery(figures))


def _summary(found: Assessment, told: Mapping[str, str]) -> Markup:
    metrics = found.metrics
    worst = max(KINDS, key=lambda kind: found.costs[kind])
    low, high = found.interval
    pairs = {
        **told,
        "images, objects": f"{metrics.images}, {metrics.instances}",
        "mAP50-95": f"{metrics.map50_95:.4f}, 95 % interval {low:.4f} to {high:.4f}",
        "mAP50": "{:.4f}, 95 % interval {:.4f} to {:.4f}".format(metrics.map50, *found.interval50),
    }
    advice = (
        f"What costs most: {worst}, {100 * found.costs[worst]:.1f} points of mAP50. {ADVICE[worst]}"
    )
    return section("The model on this split", facts(pairs), paragraph(advice))


def _errors(found: Assessment) -> Markup:
    counts = found.errors.counts()
    kinds = sorted(KINDS, key=lambda kind: -found.costs[kind])
    rows = [(kind, counts[kind], 100 * found.costs[kind]) for kind in kinds]
    columns = (Column("error"), Column("number", "d"), Column("points of mAP50", ".2f"))
    told = (
        f"Once all false positives were gone, mAP50 would be {100 * found.costs['false positives']:.1f} points higher; once "
        f"nothing was missed, {100 * found.costs['false negatives']:.1f}."
    )
    caption = (
        "Errors (TIDE) among all detections, and the mAP50 gained once those of one kind are mended"
    )
    parts = table(columns, rows, caption), paragraph(told, "soft")
    return section("What the errors cost", *parts, fold("What helps", facts(ADVICE)))


def _classes(found: Assessment) -> Markup:
    curves, common, rows = found.metrics.curves, found.metrics.confidence, []
    places = {name: k for k, name in enumerate(curves.names)}
    for row, threshold in zip(found.metrics.per_class, found.thresholds.tolist()):
        values: list[float | None] = [None] * 4
        if (k := places.get(row.name)) is not None:
            own, shared = np.searchsorted(curves.confidence_axis, (threshold, common))
            values = [float(v[k, own]) for v in (curves.precision, curves.recall, curves.f1)]
            values.append(float(curves.f1[k, shared]))
        rows.append((row.name, row.instances, *_defined(row[5:]), threshold, *values))
    numbers = ("AP50", "AP50-95", "threshold", "precision", "recall", "F1", f"F1 at {common:.3f}")
    columns = [Column("class"), Column("objects", "d"), *(Column(word, ".3f") for word in numbers)]
    caption = (
        "At IoU 0.5 and the threshold where F1, smoothed, is best, and F1 at the best one for all"
    )
    return section("Classes and sizes", table(columns, rows, caption), _sizes(found))


def _sizes(found: Assessment) -> Markup:
    words, counts = ("under 32 x 32", "between", "over 96 x 96"), found.evaluator.size_counts()
    values = _defined(found.metrics.stats[3:6])
    columns = (Column("pixels"), Column("objects", "d"), Column("AP50-95", ".3f"))
    rows = list(zip(words, counts, values, strict=True))
    return table(columns, rows, "By size of the object in its image")


def _defined(values: Sequence[float]) -> list[float | None]:
    """COCO's -1 is for an average over nothing."""
    return [value if value >= 0 else None for value in values]


def _curves(found: Assessment) -> Markup:
    curves = found.metrics.curves
    names = curves.names if len(curves.names) <= MOST_LINES else ()
    charts = []
    for y_label, x_label, x, values in (
        ("precision", "recall", curves.recall_axis, curves.precision_at_recall),
        ("F1", "confidence", curves.confidence_axis[::10], curves.f1[:, ::10]),
    ):
        lines = [("all classes", values.mean(0)), *zip(names, values)] if len(values) else []
        series = [Series(name, list(zip(x.tolist(), y.tolist()))) for name, y in lines]
        title = f"{y_label} over {x_label} at IoU 0.5"
        chart = line_chart(series, Axis(x_label, 0, 1), Axis(y_label, 0, 1), title)
        charts.append(figure(chart, title))
    return section("Curves", *charts)


def _confusions(confusion: NDArray[np.int64], names: Sequence[str]) -> Markup:
    words = [*names, "background"]
    pairs = [
        (words[true], words[predicted], int(confusion[predicted, true]))
        for predicted, true in np.argwhere(confusion).tolist()
        if predicted != true
    ]
    pairs = sorted(pairs, key=lambda pair: -pair[2])[:10]
    columns = (Column("true"), Column("predicted"), Column("number", "d"))
    chart = heat_map(confusion, words, "predicted", "true", "Confusion matrix")
    return section(
        "What is taken for what",
        figure(chart, "Detections from score 0.25 and IoU 0.45; background: nothing there, or nothing found"),
        table(columns, pairs, "The most frequent mistakes"),
    )  # fmt: skip


def _calibration(found: Assessment) -> Markup:
    scores = found.calibration
    told = (
        f"Scores and shares of right detections differ by {scores.error:.3f} on average (D-ECE, from score {LEAST_SCORE}). "
        f"Logits divided by {scores.temperature:.2f} bring them together: fitted to one half of the images, that takes the "
        f"other half from {scores.held_out:.3f} to {scores.held_out_scaled:.3f}."
    )
    lines = [Series("as it should be", [(0, 0), (1, 1)])]
    for name, tenths in zip(("as they are", f"divided by {scores.temperature:.2f}"), scores.tenths):
        points = [(float(x), float(y)) for n, x, y in zip(*tenths) if n]
        lines.append(Series(name, points))
    axes = Axis("mean score", 0, 1), Axis("share that is right", 0, 1)
    chart = line_chart(lines, *axes, "Reliability of scores")
    caption = "Detections by tenths of their score"
    return section("Can scores be believed?", paragraph(told), figure(chart, caption))
