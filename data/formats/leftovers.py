"""Files of a split that do not come to use, or come to it twice: each is a remark, none is lost."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from data.formats.description import files_below
from data.formats.faults import Fault
from data.images import is_image_path

SIDECARS = frozenset(
    {".cache", ".cfg", ".csv", ".data", ".db", ".html", ".ini", ".json", ".log", ".md", ".names"}
    | {".npy", ".npz", ".py", ".txt", ".xml", ".yaml", ".yml"}
)
"""What tools and people put beside images; not counted as left out."""
SHOWN = 5
"""Names in a message at most."""
NO_LABELS = frozenset(
    {"classes.txt", "labels.txt", "notes.txt", "train.txt", "val.txt", "test.txt"}
)


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
        if suffix.lower() == ".txt" and place not in stems and not _is_no_label(path):
            told = f"no picture {place}.*, expected one of this name"
            remarks.append(Fault(path, "", told, "unused"))
    return remarks


def count_beside(paths: Iterable[str], known: Iterable[str] = ()) -> int:
    """Pictures in the folders of `paths` that are neither one of them nor `known`."""
    taken = set(paths)
    folders = {os.path.dirname(path) for path in taken}
    found = {path for folder in folders for path in files_in(folder) if is_image_path(path)}
    return len(found - taken - set(known))


def files_in(folder: str, is_deep: bool = False) -> list[str]:
    """Files of a folder, of those below too if `is_deep`; none where there is no such folder."""
    if not os.path.isdir(folder):
        return []
    if is_deep:
        return files_below(Path(folder))
    return [entry.path for entry in os.scandir(folder) if entry.is_file()]


def _is_sidecar(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in SIDECARS


def _is_no_label(path: str) -> bool:
    name = os.path.basename(path).lower()
    return name in NO_LABELS or name.startswith(("readme", "."))
