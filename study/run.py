"""A study from its flags to its page: train, measure, time, compare."""

from __future__ import annotations

import json
from collections.abc import Set
from pathlib import Path
from typing import BinaryIO

from engine.options import CompareOptions
from study.children import alone_in, require_success, run_child
from study.page import study_page
from study.plan import LATENCY, MEASURED, WEIGHTS, Entry, Study, open_study
from study.results import Row, choice_of, main_rows, rows_of, save_rows
from study.text import markdown, model_card, table_of, verdict
from study.training import FAILED, check_words, fail, train_all
from utils.errors import ConfigError, UserError
from utils.files import write_whole
from utils.logger import get_logger
from utils.progress import Parts

TITLE = "Which backbone to choose"


def run_study(options: CompareOptions, given: Set[str]) -> None:
    """Do what is still to be done of a study, and write what was found.

    Args:
        options: flags of compare.py.
        given: names of those that stand on the command line.

    Raises:
        ConfigError: flags that make no study.
    """
    _check(options)
    study = open_study(options, given)
    if study.options.epochs:
        check_words(study)
    elif configs := [entry.name for entry in study.entries if entry.file is None]:
        raise ConfigError(
            f"--epochs 0: trains nothing, but {configs[0]} has no weights. Leave it out, or train it."
        )
    count, folder = len(study.entries), study.folder
    get_logger().info(f"{count} entries in {folder}; if it is stopped, --resume {folder} goes on")
    with alone_in(study.folder) as lock:
        total = (
            len(study.entries) + sum(e.file is None for e in study.entries) * study.options.seeds
        )
        parts = Parts(total, "study")
        train_all(study, lock, parts, lambda entry: _measure(study, entry, lock, parts))
        for entry in study.entries:
            _measure(study, entry, lock, parts)
        _time(study, lock)
        save(study)


def _check(options: CompareOptions) -> None:
    if options.resume:
        return
    if not options.models:
        raise ConfigError("--models: got nothing, expected configs or weights. Name some.")
    if not options.data:
        raise ConfigError("--data: got nothing, expected the data of the study. Name its YAML.")


def _measure(study: Study, entry: Entry, lock: BinaryIO, parts: Parts) -> None:
    """Measure an entry in a process of its own, unless it was done since its last training; keep why it fails."""
    folder = study.folder_of(entry)
    has_failed = (folder / FAILED).exists() and entry.file is None
    if has_failed or _is_measured(study, entry):
        return
    log = folder / "measure.log"
    with parts.part(f"{entry.name}, measuring", 1):
        (folder / MEASURED).unlink(missing_ok=True)
        words = ["-m", "study.measure", str(study.folder), entry.folder_name]
        try:
            require_success(run_child(words, log, lock, lambda: False), log)
            (folder / FAILED).unlink(missing_ok=True)
        except UserError as error:
            fail(folder / FAILED, error)


def _is_measured(study: Study, entry: Entry) -> bool:
    path = study.folder_of(entry) / MEASURED
    if not path.is_file():
        return False
    found = set(json.loads(path.read_text(encoding="utf-8"))["runtimes"])
    files = [training.best for training in study.trainings(entry)] or [entry.file or path]
    is_newer = all(f.exists() and f.stat().st_mtime <= path.stat().st_mtime for f in files)
    is_export = entry.file is not None and entry.file.suffix not in WEIGHTS
    return is_newer and (is_export or found == {*study.options.runtime})


def _time(study: Study, lock: BinaryIO) -> None:
    """Time all that was measured, in one process; without it the rows have no latency."""
    table, log = study.folder / LATENCY, study.folder / "latency.log"
    measured = [path.stat().st_mtime for path in study.folder.glob(f"entries/*/{MEASURED}")]
    if not measured or (table.is_file() and table.stat().st_mtime >= max(measured)):
        return
    try:
        words = ["-m", "study.latency", str(study.folder)]
        require_success(run_child(words, log, lock, lambda: False), log)
    except UserError as error:
        get_logger().warning(f"latencies could not be measured: {error}")


def save(study: Study) -> None:
    """Write table, page and card, and tell what was found."""
    rows, folder = rows_of(study), study.folder
    save_rows(rows, folder)
    title = TITLE if any(entry.backbone for entry in study.entries) else "Which model to choose"
    text = markdown(study, rows, title).encode()
    write_whole(folder / "study.md", text)
    if study.options.markdown:
        write_whole(Path(study.options.markdown), text)
    write_whole(folder / "study.html", study_page(study, rows, title).encode())
    main = main_rows(study, rows)
    if choice := choice_of(main):
        write_whole(folder / "model_card.md", _card(study, choice).encode())
    print(table_of(study, rows))
    print(verdict(main))
    get_logger().info(f"{folder}: study.html, study.md, study.csv, study.json, model_card.md")


def _card(study: Study, choice: Row) -> str:
    entry = next(entry for entry in study.entries if entry.name == choice.name)
    measured = json.loads((study.folder_of(entry) / MEASURED).read_text(encoding="utf-8"))
    return model_card(study, choice, measured["runtimes"][choice.runtime]["names"])
