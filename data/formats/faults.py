"""Faults of labels and images, and files that do not come to use or come to it twice.

They are collected over a whole split and reported together: each is a remark, none is lost.
"""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from data.formats.files import files_in
from data.images import is_image_path
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
SHOWN = 5
"""Faults, or names, in a message at most."""
SIDECARS = frozenset(
    {".cache", ".cfg", ".csv", ".data", ".db", ".html", ".ini", ".json", ".log", ".md", ".names"}
    | {".npy", ".npz", ".py", ".txt", ".xml", ".yaml", ".yml"}
)
"""What tools and people put beside images; not counted as left out."""
NO_LABELS = frozenset(
    {"classes.txt", "labels.txt", "notes.txt", "train.txt", "val.txt", "test.txt"}
)


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
    if others := fatal[SHOWN:]:
        files = len({fault.path for fault in others})
        shown += f"; and {len(others)} further faults in {files} files"
    raise LabelError(f"{shown}. {advice}", fatal)


def summarise(faults: Sequence[Fault], split: str) -> list[str]:
    """One line per kind of mended fault: how many, what was done, the first one."""
    silent = {"", "background", *COUNTED}
    by_kind: dict[str, list[Fault]] = {}
    for fault in faults:
        by_kind.setdefault(fault.kind, []).append(fault)
    return [
        f"{split}: {KINDS[kind]}: {len(found)}, the first: {found[0]}"
        for kind, found in by_kind.items()
        if kind not in silent
    ]


def write_faults(path: Path, splits: Mapping[str, Sequence[Fault]]) -> int:
    """Write every mended fault as a row: split, file, place in it, what was done, what was wrong.

    Returns:
        The number of rows; without any, no file is written.
    """
    rows = [
        (split, fault.path, fault.where, KINDS[fault.kind], fault.problem)
        for split, faults in splits.items()
        for fault in faults
        if fault.kind not in ("", "background")
    ]
    if rows:
        with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(("split", "file", "place", "kind", "problem"))
            writer.writerows(rows)
    return len(rows)


def unread_files(files: Iterable[str]) -> list[Fault]:
    """Files that are no images by their suffix; hidden ones and sidecars are not meant to be."""
    remarks = []
    for path in files:
        suffix, is_hidden = os.path.splitext(path)[1], os.path.basename(path).startswith(".")
        if not (is_image_path(path) or _is_sidecar(path) or is_hidden):
            told = f"got suffix {suffix!r}, expected that of an image such as .jpg or .png"
            remarks.append(Fault(path, "", told, "suffix"))
    return remarks


def suffixes_of(paths: Iterable[str]) -> str:
    """`.heic 3, .xyz 1`: how often each suffix comes, the most frequent first."""
    counts = Counter(os.path.splitext(path)[1].lower() or "none" for path in paths)
    told = [f"{suffix} {count}" for suffix, count in counts.most_common(SHOWN)]
    return ", ".join([*told, "..."] if len(counts) > SHOWN else told)


def repeated_images(images: Sequence[str]) -> list[Fault]:
    """Images that stand in the list, or in several folders of it, more than once."""
    return [
        Fault(path, "", f"got it {count} times, expected once", "repeated")
        for path, count in Counter(images).items()
        if count > 1
    ]


def shared_labels(images: Sequence[str], labels: Sequence[str]) -> list[Fault]:
    """Pictures whose label file is another picture's too, as those of `a.jpg` and `a.png`."""
    pairs = sorted(set(zip(images, labels, strict=True)))
    counts = Counter(label for _, label in pairs)
    return [
        Fault(image, "", f"has {label} together with another picture", "shared")
        for image, label in pairs
        if counts[label] > 1
    ]


def unused_labels(labels: str, pictures: str, used: Iterable[str], is_deep: bool) -> list[Fault]:
    """Label files of a folder that belong to no file of the folder of pictures.

    Args:
        labels: folder of the label files.
        pictures: where their pictures stand; may be the same folder.
        used: label files that were found from their pictures.
        is_deep: whether the folders below count too.
    """
    stems = {
        os.path.splitext(path)[0] for path in files_in(pictures, is_deep) if not _is_sidecar(path)
    }
    remarks = []
    for path in sorted(set(files_in(labels, is_deep)) - set(used)):
        stem, suffix = os.path.splitext(path)
        place = os.path.normpath(os.path.join(pictures, os.path.relpath(stem, labels)))
        name = os.path.basename(path).lower()
        is_label = name not in NO_LABELS and not name.startswith(("readme", "."))
        if suffix.lower() == ".txt" and place not in stems and is_label:
            told = f"no picture {place}.*, expected one of this name"
            remarks.append(Fault(path, "", told, "unused"))
    return remarks


def count_beside(paths: Iterable[str], known: Iterable[str] = ()) -> int:
    """Pictures in the folders of `paths` that are neither one of them nor `known`."""
    taken = set(paths)
    folders = {os.path.dirname(path) for path in taken}
    found = {path for folder in folders for path in files_in(folder) if is_image_path(path)}
    return len(found - taken - set(known))


def _is_sidecar(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in SIDECARS
