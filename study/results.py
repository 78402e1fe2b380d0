"""The rows of a study, read from its folder: what is known of each entry in each runtime, which are best, which to take."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from study.plan import LATENCY, MEASURED, Entry, Study, Training
from study.training import DONE, FAILED, read_epochs, seconds_per_epoch
from utils.bootstrap import Interval, interval
from utils.files import write_whole

FAILURE = "failed: "
MEMORY = re.compile(r"memory (\d+\.\d+)G")


@dataclass(frozen=True)
class Row:
    """An entry in a runtime; None is what is not known.

    Attributes:
        name: of the entry.
        model, backbone: what it is made of.
        runtime: where it was measured; empty if it was not.
        state: `trained`, `given`, how far its training came, or why there is nothing.
        is_whole: whether it had all the training that it was to have.
        epochs: that were trained; of several seeds the fewest.
        params, params_deployed: of the training form and the deployed one.
        gflops, gflops_deployed: 2 x GMACs for one image.
        memory: MiB of weights and maps of the deployed form at a time for one image.
        latency, latency_low, latency_high: milliseconds for one image: median and quartiles.
        map50, map50_95: COCO mAP, the mean over seeds.
        map_low, map_high: confidence interval of mAP50-95 over images, 95 %.
        seed_low, seed_high: mAP50-95 of the worst and the best seed, where there are several.
        images: that it was measured on.
        small, medium, large: COCO mAP of objects under 32 x 32 pixels, between, over 96 x 96.
        behind: how much mAP50-95 less than the best one.
        behind_low, behind_high: its confidence interval, both on the same images.
        seconds_per_epoch: of a training, validation included; the median.
        train_memory: GiB of its process, on a GPU of the GPU, at most.
        samples: mAP50-95 of halves of the split.
    """

    name: str
    model: str
    backbone: str
    runtime: str = ""
    state: str = ""
    is_whole: bool = False
    epochs: int | None = None
    params: int | None = None
    params_deployed: int | None = None
    gflops: float | None = None
    gflops_deployed: float | None = None
    memory: float | None = None
    latency: float | None = None
    latency_low: float | None = None
    latency_high: float | None = None
    map50: float | None = None
    map50_95: float | None = None
    map_low: float | None = None
    map_high: float | None = None
    seed_low: float | None = None
    seed_high: float | None = None
    images: int | None = None
    small: float | None = None
    medium: float | None = None
    large: float | None = None
    behind: float | None = None
    behind_low: float | None = None
    behind_high: float | None = None
    seconds_per_epoch: float | None = None
    train_memory: float | None = None
    samples: tuple[float, ...] = ()

    @property
    def is_measured(self) -> bool:
        """Whether it has a place in the picture."""
        return self.map50_95 is not None and self.latency is not None


COLUMNS = tuple(item.name for item in fields(Row) if item.name != "samples")


def rows_of(study: Study) -> list[Row]:
    """A row for every entry and runtime, in the order of the plan."""
    timed = _read(study.folder / LATENCY).get("entries", {})
    rows = [row for entry in study.entries for row in _rows_of_entry(study, entry, timed)]
    best = best_of(main_rows(study, rows))
    return [_with_distance(row, best) for row in rows]


def main_rows(study: Study, rows: Sequence[Row]) -> list[Row]:
    """A row an entry: that of the first runtime, where it has one. Among these the choice is made."""
    first = study.options.runtime[0]
    others = {row.name for row in rows} - {row.name for row in rows if row.runtime == first}
    return [row for row in rows if row.runtime == first or row.name in others]


def load_of(study: Study) -> float | None:
    """Processes that wanted to run while the models were timed, on average; None where it is not known."""
    load: float | None = _read(study.folder / LATENCY).get("load")
    return load


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _rows_of_entry(study: Study, entry: Entry, timed: Mapping[str, Any]) -> list[Row]:
    folder, trainings = study.folder_of(entry), list(study.trainings(entry))
    words = " ".join(entry.backbone) or ("" if entry.file else "own")
    known: dict[str, Any] = {"name": entry.name, "model": entry.model, "backbone": words}
    failed, measured = _read(folder / FAILED), _read(folder / MEASURED)
    known |= _training_facts(study, entry, trainings)
    if failed:
        known |= {"state": f"{FAILURE}{failed['reason']}", "is_whole": False}
    if not measured:
        return [Row(**{"state": "not measured", **known})]
    for form, suffix in (("trained", ""), ("deployed", "_deployed")):
        if form in measured:
            known |= {f"params{suffix}": measured[form]["params"], f"gflops{suffix}": measured[form]["gflops"]}  # fmt: skip
    known |= {"memory": measured["deployed"]["memory"]} if "deployed" in measured else {}
    return [
        Row(**known, runtime=runtime, **_runtime_facts(found, timed.get(folder.name, {}).get(runtime)))
        if "reason" not in found
        else Row(**{**known, "runtime": runtime, "state": f"{FAILURE}{found['reason']}", "is_whole": False})
        for runtime, found in measured["runtimes"].items()
    ]  # fmt: skip


def _training_facts(study: Study, entry: Entry, trainings: Sequence[Training]) -> dict[str, Any]:
    epochs = [read_epochs(folder) for folder in study.runs_of(entry)]
    fewest, total = min(map(len, epochs), default=0), study.options.epochs
    is_whole = all((training.folder / DONE).exists() for training in trainings)
    seconds = [seconds_per_epoch(rows) for rows in epochs if rows]
    memory = [found for training in trainings if (found := _memory(training.folder / "train.log"))]
    stopped = f"stopped after {fewest} of {total} epochs"
    return {
        "state": "given" if entry.file else "trained" if is_whole else stopped,
        "is_whole": is_whole,
        "epochs": fewest or None,
        "seconds_per_epoch": mean(seconds) if seconds else None,
        "train_memory": max(memory, default=None),
    }


def _memory(log: Path) -> float:
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return max(map(float, MEMORY.findall(text)), default=0.0)


def _runtime_facts(found: Mapping[str, Any], latency: Sequence[float] | None) -> dict[str, Any]:
    facts: dict[str, Any] = {name: _defined(found[name]) for name in ("map50", "map50_95", "small", "medium", "large")}  # fmt: skip
    facts |= {"samples": tuple(found["samples"]), "images": found["images"]}
    if facts["map50_95"] is not None:
        facts["map_low"], facts["map_high"] = interval(facts["map50_95"], np.array(found["samples"]))  # fmt: skip
    if len(seeds := found["seeds"]["map50_95"]) > 1:
        facts |= {"seed_low": min(seeds), "seed_high": max(seeds)}
    if latency:
        facts |= dict(zip(("latency", "latency_low", "latency_high"), latency))
    return facts


def _defined(value: float) -> float | None:
    """None for COCO's -1, an average over nothing."""
    return None if value < 0 else value


def best_of(rows: Sequence[Row]) -> Row | None:
    """The row with the highest mAP50-95, of those that had all their training if there are such."""
    known = [row for row in rows if row.is_measured]
    whole = [row for row in known if row.is_whole] or known
    return max(whole, key=lambda row: row.map50_95 or 0.0, default=None)


def _with_distance(row: Row, best: Row | None) -> Row:
    if best is None or row.map50_95 is None or row is best:
        return row
    reach, behind = distance(best, row), (best.map50_95 or 0.0) - row.map50_95
    return replace(row, behind=behind, behind_low=reach.low, behind_high=reach.high)


def distance(best: Row, row: Row) -> Interval:
    """Confidence interval of how far `row` is behind `best`, both on the same images.

    Two models find most of the same images hard, so that their difference is known better than either.
    """
    gaps = np.array(best.samples) - np.array(row.samples)
    return interval((best.map50_95 or 0.0) - (row.map50_95 or 0.0), gaps, -1.0)


def front_of(rows: Sequence[Row]) -> list[Row]:
    """Those that no other beats in latency and mAP50-95 both."""
    known = [row for row in rows if row.is_measured and row.is_whole]
    return [
        row
        for row in known
        if not any(
            (other.latency or 0.0) <= (row.latency or 0.0)
            and (other.map50_95 or 0.0) >= (row.map50_95 or 0.0)
            and (other.latency, other.map50_95) != (row.latency, row.map50_95)
            for other in known
        )
    ]


def choice_of(rows: Sequence[Row]) -> Row | None:
    """The fastest of those that cannot be told from the best one: the interval of how far they are behind holds 0."""
    best = best_of(rows)
    close = [
        row for row in rows
        if row.is_measured and row.is_whole and (row.behind_low is None or row.behind_low <= 0)
    ]  # fmt: skip
    return min(close, key=lambda row: row.latency or 0.0, default=best)


def save_rows(rows: Sequence[Row], folder: Path) -> None:
    """The rows as `study.csv` and `study.json`."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(vars(row) for row in rows)
    write_whole(folder / "study.csv", text.getvalue().encode())
    content = [{name: value for name, value in asdict(row).items() if name != "samples"} for row in rows]  # fmt: skip
    write_whole(folder / "study.json", json.dumps(content, indent=1).encode())
