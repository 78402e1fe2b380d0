"""Faults of labels and images: collected over a whole split, then reported together."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from utils.errors import DatasetError

KINDS = {
    "unreadable": "unreadable images, skipped",
    "background": "images without a label file, taken as background",
    "outside": "boxes that pass the edge of their image, cut",
    "away": "boxes wholly outside their image, dropped",
    "empty": "objects without width or height, dropped",
    "duplicate": "repeated objects, dropped",
    "namesake": "categories of one name, taken as one class",
    "size": "images not of the size that their annotation states",
    "merged": "objects of one box in several classes, taken once",
    "suffix": "files left out by suffix",
    "unused": "labels without a picture",
    "shared": "pictures that share a label file",
    "repeated": "images listed more than once, taken each time",
}
"""What was done about each kind of fault that does not stop the run."""
COUNTED = ("suffix", "unused", "shared", "repeated", "merged")
"""Kinds that stand in the account of a split, see `data.account`."""
SCORED_OTHERWISE = ("outside", "away", "empty", "duplicate", "merged")
"""Kinds that a COCO file is scored with as it stands, and that other forms are scored without."""
ORDINARY = frozenset({"background"})
"""Kinds that are no mistake."""
SHOWN = 5


class Fault(NamedTuple):
    """One thing wrong with a label or an image.

    Attributes:
        path: file.
        where: `line 3`, `object 2`, `annotation 17`, or empty for the whole file.
        problem: what was got and what was expected.
        kind: key of `KINDS`; empty for a fault that stops the run.
    """

    path: str
    where: str
    problem: str
    kind: str = ""

    def __str__(self) -> str:
        place = f"{self.path} {self.where}" if self.where else self.path
        return f"{place}: {self.problem}"


class LabelError(DatasetError):
    """Faults that stop a run; all of them are in `faults`."""

    def __init__(self, message: str, faults: Sequence[Fault] = ()) -> None:
        super().__init__(message)
        self.faults = tuple(faults)


def raise_if_fatal(faults: Iterable[Fault], advice: str) -> None:
    """Raise one `LabelError` for all faults that stop a run.

    Raises:
        LabelError: one line: the first few faults, the number of the others, and the advice.
    """
    fatal = [fault for fault in faults if not fault.kind]
    if not fatal:
        return
    shown = "; ".join(str(fault) for fault in fatal[:SHOWN])
    others = fatal[SHOWN:]
    if others:
        files = len({fault.path for fault in others})
        shown += f"; and {len(others)} further faults in {files} files"
    raise LabelError(f"{shown}. {advice}", fatal)


def count_backgrounds(faults: Iterable[Fault]) -> int:
    """Images without a label file."""
    return sum(fault.kind == "background" for fault in faults)


def summarise(faults: Sequence[Fault], split: str) -> list[str]:
    """One line per kind of mended fault: how many, what was done, the first one."""
    silent = {"", *ORDINARY, *COUNTED}
    counts = Counter(fault.kind for fault in faults if fault.kind not in silent)
    lines = []
    for kind, count in counts.items():
        first = next(fault for fault in faults if fault.kind == kind)
        lines.append(f"{split}: {KINDS[kind]}: {count}, the first: {first}")
    return lines


def write_faults(path: Path, splits: Mapping[str, Sequence[Fault]]) -> int:
    """Write every mended fault as a row: split, file, place in it, what was done, what was wrong.

    Returns:
        The number of rows; without any, no file is written.
    """
    rows = [
        (split, fault.path, fault.where, KINDS[fault.kind], fault.problem)
        for split, faults in splits.items()
        for fault in faults
        if fault.kind and fault.kind not in ORDINARY
    ]
    if rows:
        with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(("split", "file", "place", "kind", "problem"))
            writer.writerows(rows)
    return len(rows)
