"""Rows of a study: which are best, how sure that is, what is told of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.options import CompareOptions
from study.page import study_page
from study.plan import LATENCY, MEASURED, Entry, Study
from study.results import Row, best_of, choice_of, front_of, rows_of
from study.text import markdown, verdict
from study.training import DONE, EpochRow, Reached, seconds_per_epoch, survivors

NOISE = np.random.default_rng(0).normal(0, 0.02, 500)
HOSTILE = "<script>alert(1)</script>|"


def row(name: str, latency: float | None, value: float | None, **more: object) -> Row:
    own = {"latency": latency, "map50_95": value, "is_whole": True, "runtime": "torch"}
    return Row(name, "yolo11n", name, **{**own, **more})


def names(rows: list[Row]) -> list[str]:
    return [row.name for row in rows]


def test_the_front_by_hand():
    rows = [
        row("slow and best", 30, 0.6), row("fast", 10, 0.4), row("between", 20, 0.5), row("beaten", 25, 0.5),
        row("twin", 20, 0.5), row("not timed", None, 0.9), row("cut short", 5, 0.9, is_whole=False),
    ]  # fmt: skip
    assert names(front_of(rows)) == ["slow and best", "fast", "between", "twin"]
    best = best_of(rows)
    assert best is not None and best.name == "slow and best"


def study_of(folder: Path, found: dict[str, tuple[float, float, np.ndarray]]) -> Study:
    """A study whose entries have been measured: mAP50-95, latency and samples by backbone."""
    flags = CompareOptions(models=["yolo11n"], data="d.yaml", epochs=2)
    entries = tuple(Entry("yolo11n", (name,)) for name in found)
    study, timed = Study(folder, flags, entries, ("python compare.py",)), {}
    for entry, (value, latency, samples) in zip(entries, found.values()):
        place = study.folder_of(entry)
        (place / "seed0").mkdir(parents=True)
        (place / "seed0" / DONE).touch()
        stats = dict.fromkeys(("map50", "small", "medium"), 0.5) | {
            "map50_95": value,
            "large": -1.0,
        }
        torch = {**stats, "samples": samples.tolist(), "seeds": {"map50_95": [value]}, "names": ["a"], "images": 87}  # fmt: skip
        (place / MEASURED).write_text(json.dumps({"runtimes": {"torch": torch}}))
        timed[entry.folder_name] = {"torch": [latency, latency - 1, latency + 1]}
    (folder / LATENCY).write_text(json.dumps({"load": 9.0, "entries": timed}))
    return study


def test_of_models_that_the_images_cannot_tell_apart_the_fastest_is_chosen(tmp_path: Path):
    own = np.random.default_rng(1).normal(0, 0.004, 500)
    study = study_of(
        tmp_path,
        {
            "best": (0.60, 30, 0.60 + NOISE),
            "near": (0.597, 20, 0.597 + NOISE + own),  # the same images are hard for both
            "clearly_behind": (
                0.58,
                10,
                0.58 + NOISE + own,
            ),  # although its own interval overlaps the best one's
        },
    )
    best, near, behind = rows_of(study)
    assert near.behind_low is not None and near.behind_low < 0 < near.behind_high
    assert behind.behind_low == pytest.approx(0.02 - 1.96 * 0.004, abs=0.001)
    assert behind.map_high is not None and best.map_low is not None
    assert behind.map_high > best.map_low and behind.behind_low > 0
    choice = choice_of([best, near, behind])
    assert choice is not None and choice.name == "yolo11n + near"
    assert best.large is None  # no such objects
    told = verdict([best, near, behind])
    assert (
        told.startswith("yolo11n + near: mAP50-95 0.597 (")
        and "yolo11n + best has the highest" in told
    )


def test_words_from_outside_are_escaped_and_pages_are_whole(tmp_path: Path):
    study = study_of(tmp_path, {"x": (0.6, 30, 0.6 + NOISE), "y": (0.5, 20, 0.5 + NOISE)})
    rows = [replace(found, name=HOSTILE) for found in rows_of(study)]
    page = study_page(study, [*rows, Row(HOSTILE, "a", "b", state=HOSTILE)], HOSTILE)
    assert "<script>alert" not in page and "alert(1)" in page
    assert page.count("<svg class=") == 1 and len(page) < 1_000_000
    text = markdown(study, rows, "Title")
    assert "87 validation images and 1 training of each" in text and "9.0 processes" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace(r"\|", "").count("|") for line in table}) == 1


def test_a_study_of_failures_has_a_page_too(tmp_path: Path):
    study = Study(tmp_path, CompareOptions(models=["a"], epochs=1), (Entry("a"),), ())
    assert [found.state for found in rows_of(study)] == ["stopped after 0 of 1 epochs"]
    assert "Nothing was measured" in study_page(study, rows_of(study), "t")


def test_detectors_that_find_nothing_are_no_choice():
    said = verdict([row("a", 10, 0.004), row("b", 9, 0.0)])
    assert said.startswith("Nothing to choose by: the best mAP50-95 is 0.0040")


def test_the_clock_of_a_resumed_training_begins_anew():
    rows = [EpochRow(n + 1, 0.0, time) for n, time in enumerate([10.0, 19.0, 8.0, 16.0])]
    assert seconds_per_epoch(rows) == 8.5  # 10, 9, 8, 8


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(1e9, "dcba"), (100, "dc"), (0, "dc"), (270, "dcb"), (269, "dc")],
)
def test_those_go_on_for_whom_there_is_time_and_half_of_them_at_least(
    seconds: float, expected: str
):
    progress = {Entry(name): Reached(1, score, 10.0) for score, name in enumerate("abcd")}
    assert "".join(e.model for e in survivors(progress, 10, seconds)) == expected
