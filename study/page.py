"""A study as one HTML page: what to choose, the table, the picture, learning curves, examples side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from data.images import read_image
from study.measure import EXAMPLES
from study.plan import Study
from study.results import FAILURE, Row, choice_of, front_of, main_rows
from study.text import NOTES, extent, setting, spread, verdict
from study.training import read_epochs
from utils import page as kit
from utils.charts import Point, Series, axis_of, line_chart, scatter_chart
from utils.page import Cell, Column

MOST_PICTURES = 600_000  # bytes of examples in a page
COLUMNS = (
    Column("model"), Column("mAP50-95", ".3f"), Column("95 % interval"), Column("behind the best"), Column("mAP50", ".3f"),
    Column("ms", ".1f"), Column("quartiles"), Column("params, M", ".2f"), Column("deployed, M", ".2f"), Column("GFLOPs", ".2f"),
    Column("deployed, GFLOPs", ".2f"), Column("MiB", ".1f"), Column("AP small", ".3f"), Column("medium", ".3f"),
    Column("large", ".3f"), Column("s an epoch", ".1f"), Column("training, GiB", ".2f"), Column("epochs", "d"), Column("state"),
)  # fmt: skip


def study_page(study: Study, rows: Sequence[Row], title: str) -> str:
    """The page.

    Args:
        study: what was asked for.
        rows: what was found.
        title: of the page.
    """
    main = main_rows(study, rows)
    parts = [kit.section("Which one to choose", kit.paragraph(verdict(main), "lead"))]
    parts.append(
        kit.section(
            "Results", _table(main), kit.paragraph(f"{extent(study, main)} {NOTES}", "soft")
        )
    )
    if failed := {
        row.name: row.state.removeprefix(FAILURE) for row in rows if row.state.startswith(FAILURE)
    }:
        parts.append(kit.section("What failed", kit.facts(failed)))
    if picture := _picture(main):
        parts.append(kit.section("Speed and accuracy", picture))
    if len(study.options.runtime) > 1:
        parts.append(kit.section("Runtimes", _runtimes(rows)))
    if curves := _curves(study):
        parts.append(kit.section("Learning curves", curves))
    if examples := _examples(study, main):
        parts.append(kit.section("What each one finds", examples))
    commands = "\n".join([*study.commands, f"python compare.py --resume {study.folder}"])
    how = [kit.code(commands), kit.facts(setting(study))]
    return kit.page(title, [*parts, kit.section("How it was made", *how)])


def _table(rows: Sequence[Row]) -> Markup:
    front, choice = {id(row) for row in front_of(rows)}, choice_of(rows)
    ordered = sorted(rows, key=lambda row: -1.0 if row.map50_95 is None else row.map50_95, reverse=True)  # fmt: skip
    return kit.table(
        COLUMNS,
        [_cells(row, is_best=id(row) in front, is_chosen=row is choice) for row in ordered],
        "All entries, best mAP first; a click on a column's name sorts by it. On the front: no other is both faster and better.",
    )  # fmt: skip


def _cells(row: Row, *, is_best: bool, is_chosen: bool) -> list[Cell]:
    words = ["choice"] * is_chosen + ["front"] * is_best
    name = Markup(" ").join([Markup("{}").format(row.name), *map(kit.badge, words)])
    state = "failed, see below" if row.state.startswith(FAILURE) else row.state
    if not row.is_whole:
        state = Markup('<span class="warn">{}</span>').format(state)
    millions = [None if n is None else n / 1e6 for n in (row.params, row.params_deployed)]
    behind = "best" if row.map50_95 is not None and row.behind is None else None
    if row.behind is not None:
        behind = spread(row.behind, row.behind_low, row.behind_high, ".3f")
    return [
        name, row.map50_95, _range(row.map_low, row.map_high, ".3f"), behind, row.map50,
        row.latency, _range(row.latency_low, row.latency_high, ".1f"), *millions, row.gflops,
        row.gflops_deployed, row.memory, row.small, row.medium, row.large,
        row.seconds_per_epoch, row.train_memory, row.epochs, state,
    ]  # fmt: skip


def _range(low: float | None, high: float | None, layout: str) -> str | None:
    return None if low is None or high is None else f"{low:{layout}} to {high:{layout}}"


def _picture(rows: Sequence[Row]) -> Markup | None:
    known = [row for row in rows if row.is_measured]
    if not known:
        return None
    front = {id(row) for row in front_of(rows)}
    points = [
        Point(
            row.name, row.latency or 0.0, row.map50_95 or 0.0, row.map_low or 0.0, row.map_high or 0.0,
            id(row) in front, row.is_whole,
        )
        for row in known
    ]  # fmt: skip
    times = [point.x for point in points]
    x = axis_of(times, "milliseconds for one image", is_log=max(times) > 4 * min(times))
    y = axis_of([value for p in points for value in (p.low, p.high)], "mAP50-95")
    caption = (
        "Up and to the left is better. Filled blue: on the front; hollow: not trained to the end. Bars: 95 % interval over the "
        "images; of two models on the same images the column “behind the best” tells more than bars that overlap."
    )
    return kit.figure(scatter_chart(points, x, y, "mAP50-95 over latency, the front marked"), caption)  # fmt: skip


def _runtimes(rows: Sequence[Row]) -> Markup:
    columns = (
        Column("model"), Column("runtime"), Column("mAP50-95", ".4f"), Column("ms", ".1f"), Column("quartiles"), Column("state"),
    )  # fmt: skip
    lines: list[Sequence[Cell]] = [
        (row.name, row.runtime, row.map50_95, row.latency, _range(row.latency_low, row.latency_high, ".1f"), row.state)
        for row in rows if row.runtime
    ]  # fmt: skip
    return kit.table(columns, lines, "Each model as the file of each runtime.")


def _curves(study: Study) -> Markup | None:
    series = []
    for entry in study.entries:
        for seed, folder in enumerate(study.runs_of(entry)):
            points = [
                (row.epoch, row.map50_95)
                for row in read_epochs(folder)
                if math.isfinite(row.map50_95)
            ]
            name = f"{entry.name}, seed {seed}" if study.options.seeds > 1 else entry.name
            series += [Series(name, points)] if len(points) > 1 else []
    if not series:
        return None
    x = axis_of([a for line in series for a, _ in line.points], "epoch")
    y = axis_of([0.0, *(b for line in series for _, b in line.points)], "mAP50-95")
    chart = line_chart(series, x, y, "mAP50-95 of the averaged weights by epoch")
    return kit.figure(chart, "mAP50-95 on the validation split after each epoch.")


def _examples(study: Study, rows: Sequence[Row]) -> Markup | None:
    """The same images with what is there and what each entry finds; as many as the page has room for."""
    shown = {row.name for row in rows}
    folders = {e.name: study.folder_of(e) for e in study.entries if e.name in shown}
    parts, room = [], MOST_PICTURES
    for number in range(EXAMPLES):
        files = _pictures(folders, number)
        size = sum(path.stat().st_size for path in files.values())
        if not files or size > room:
            break
        room -= size
        figures = [
            kit.figure(kit.picture(read_image(path), f"image {number + 1}: {name}"), name)
            for name, path in files.items()
        ]
        parts.append(kit.fold(f"Image {number + 1}", kit.gallery(figures), is_open=number == 0))
    return Markup("\n").join(parts) if parts else None


def _pictures(folders: Mapping[str, Path], number: int) -> dict[str, Path]:
    found = {name: path for name, folder in folders.items() if (path := folder / f"found{number}.jpg").is_file()}  # fmt: skip
    truth = [path for name in found if (path := folders[name] / f"truth{number}.jpg").is_file()]
    return {"labels": truth[0], **found} if truth else found
