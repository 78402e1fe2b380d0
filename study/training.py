"""The trainings of a study: each by `train.py` in a process of its own, all in full or by successive halving.

Source: Jamieson and Talwalkar, Non-stochastic Best Arm Identification and Hyperparameter Optimization, AISTATS 2016.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from engine.flags import spelling
from engine.options import read_training
from study.children import ROOT, require_success, run_child
from study.plan import Entry, Study, Training
from utils.checkpoint import load_checkpoint
from utils.errors import CheckpointError, ConfigError, UserError
from utils.files import write_whole
from utils.logger import get_logger
from utils.progress import Parts

FAILED = "failed.json"
DONE = "trained.json"
OWN = "cfg data epochs seed project name exist_ok backbone imgsz workers device allow_code download resume evolve".split()
"""Flags of train.py that a study sets by itself."""
MAP = "metrics/mAP_0.5:0.95"


class EpochRow(NamedTuple):
    """An epoch of results.csv: its number from 1, mAP50-95 (nan where not measured), seconds since the start of the process."""

    epoch: int
    map50_95: float
    time: float


def read_epochs(folder: Path) -> list[EpochRow]:
    """The epochs that a training has behind it."""
    table = folder / "results.csv"
    if not table.is_file():
        return []
    with table.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if None not in row.values()]
    return [
        EpochRow(int(row["epoch"]) + 1, float(row.get(MAP) or "nan"), float(row["time"]))
        for row in rows
        if {"epoch", "time"} <= row.keys()  # a table of another project is none of ours
    ]


def seconds_per_epoch(rows: Sequence[EpochRow]) -> float:
    """The median, validation included; the clock of a training that was resumed begins anew."""
    times = [row.time for row in rows]
    taken = [now - before if now >= before else now for before, now in zip([0.0, *times], times)]
    return statistics.median(taken) if taken else math.nan


def words_of(study: Study, training: Training) -> list[str]:
    """The flags of train.py for a training from its start, without those behind `--train`."""
    options, entry = study.options, training.entry
    words = ["--cfg", entry.model, "--data", options.data, "--epochs", str(options.epochs)]
    words += ["--seed", str(training.seed), "--project", str(training.folder.parent)]
    words += ["--name", training.folder.name, "--exist-ok"]
    if options.imgsz:
        words += ["--imgsz", *map(str, options.imgsz)]
    if entry.backbone:
        words += ["--backbone", *entry.backbone]
    return [*words, *_local_words(study)]


def _local_words(study: Study) -> list[str]:
    """Flags that a resumed training wants from its own command line."""
    options = study.options
    words = ["--workers", str(options.workers)]
    words += ["--device", options.device] if options.device else []
    return (
        words
        + [f"--{flag}" for flag in ("download",) if options.download]
        + (["--allow-code"] if options.allow_code else [])
    )


def check_words(study: Study) -> None:
    """End with a line, as train.py would, where its flags behind `--train` are wrong.

    Raises:
        ConfigError: they change what the study itself says of its trainings.
    """
    for entry in study.entries:
        for training in study.trainings(entry):
            words = words_of(study, training)
            before, after = (
                vars(read_training([*words, *more])[0]) for more in ([], study.options.train)
            )
            if changed := [spelling(name) for name in OWN if before[name] != after[name]]:
                raise ConfigError(
                    f"--train: got {', '.join(changed)}, which compare.py has itself. Give it before --train."
                )
            return


def is_finished(training: Training) -> bool:
    """Whether a training has come to its end; train.py says so in last.pt, in the last moment."""
    try:
        return bool(load_checkpoint(training.last).get("finished"))
    except (CheckpointError, OSError):
        return False


def train(
    study: Study,
    training: Training,
    epochs: int,
    lock: BinaryIO,
    deadline: float = math.inf,
    tell: Callable[[int], None] = lambda epoch: None,
) -> None:
    """Bring a training to so many epochs, from wherever it is.

    Args:
        study: whose flags it has.
        training: which one.
        epochs: that it is to have behind it; those of the study bring it to its end.
        lock: of the study's folder.
        deadline: when it is told to stop, by `time.monotonic`.
        tell: is told the number of epochs, now and then.

    Raises:
        ConfigError: it broke down, with the reason.
    """
    if (training.folder / DONE).exists():
        return
    is_last = epochs >= (study.options.epochs or 0)

    def is_enough() -> bool:
        done = len(read_epochs(training.folder))
        tell(done)
        return time.monotonic() >= deadline or (done >= epochs and not is_last)

    if not is_finished(training) and not is_enough():
        words = [*words_of(study, training), *study.options.train]
        if training.last.is_file():
            words = ["--resume", str(training.last), *_local_words(study)]
        log = training.folder / "train.log"
        ending = run_child([str(ROOT / "train.py"), *words], log, lock, is_enough)
        if not ending.was_stopped:
            require_success(ending, log)
    if is_finished(training):
        rows = read_epochs(training.folder)
        content = {"epochs": len(rows), "seconds_per_epoch": seconds_per_epoch(rows)}
        write_whole(training.folder / DONE, json.dumps(content).encode())


class Reached(NamedTuple):
    """How far an entry is: epochs of its least trained seed, mean mAP50-95 of its newest epochs, seconds that an epoch takes."""

    epochs: int
    score: float
    seconds: float


def progress_of(study: Study, entry: Entry) -> Reached:
    """How far the trainings of an entry are."""
    rows = [read_epochs(training.folder) for training in study.trainings(entry)]
    scores = [max(found[-1].map50_95, 0.0) for found in rows if found]
    seconds = [seconds_per_epoch(found) for found in rows if found]
    return Reached(
        min(map(len, rows)), statistics.mean(scores or [0.0]), sum(seconds) if seconds else math.nan
    )


def train_all(study: Study, lock: BinaryIO, parts: Parts, after: Callable[[Entry], None]) -> None:
    """Train every config to its end, or what `--budget` has room for; one that breaks down leaves its reason.

    Args:
        study: whose entries are trained.
        lock: of its folder.
        parts: shows how far the study and its parts are.
        after: called for an entry once nothing more is trained of it.
    """
    total, budget = study.options.epochs or 0, study.options.budget
    waiting = [entry for entry in study.entries if entry.file is None]
    if budget is None or total <= 1:
        for entry in waiting:
            _train_entry(study, entry, total, lock, parts, math.inf)
            after(entry)
        return
    deadline = time.monotonic() + 60 * budget
    rung = max(1, total >> int(math.log2(max(len(waiting), 1))))
    while waiting:
        for entry in waiting:
            _train_entry(study, entry, rung, lock, parts, deadline)
        if rung >= total or time.monotonic() >= deadline:
            break
        waiting = survivors(
            {e: progress_of(study, e) for e in waiting if not (study.folder_of(e) / FAILED).exists()},
            total,
            deadline - time.monotonic(),
        )  # fmt: skip
        rung = min(2 * rung, total)
        parts.total += len(waiting) * study.options.seeds
        names = ", ".join(entry.name for entry in waiting) or "none"
        get_logger().info(f"budget: on to {rung} of {total} epochs: {names}")
    for entry in study.entries:
        after(entry)


def survivors(progress: dict[Entry, Reached], total: int, seconds: float) -> list[Entry]:
    """Those that go on: the best, as many as can be trained to the end in the time left, half of them at least."""
    ranked = sorted(progress, key=lambda entry: -progress[entry].score)
    kept: list[Entry] = []
    for entry in ranked:
        found = progress[entry]
        seconds -= (total - found.epochs) * found.seconds
        if seconds < 0 and 2 * len(kept) >= len(ranked):
            break
        kept.append(entry)
    return kept


def _train_entry(
    study: Study, entry: Entry, epochs: int, lock: BinaryIO, parts: Parts, deadline: float
) -> None:
    """All seeds of an entry; the reason of a failure is kept."""
    failed = study.folder_of(entry) / FAILED
    failed.unlink(missing_ok=True)
    for training in study.trainings(entry):
        if time.monotonic() >= deadline:
            return
        with parts.part(f"{entry.name}, seed {training.seed}", study.options.epochs or 0) as tell:
            try:
                train(study, training, epochs, lock, deadline, tell)
            except UserError as error:
                fail(failed, error)
                return


def fail(path: Path, error: UserError) -> None:
    """Keep the reason of a failure, and tell it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"reason": str(error)}).encode())
    get_logger().warning(f"{path.parent.name}: failed: {error}")
