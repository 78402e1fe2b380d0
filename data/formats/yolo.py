"""YOLO text labels: one file per image, one object per line.

`<class> <x centre> <y centre> <width> <height>`, fractions of the image, or `<class> <x1> <y1>
<x2> <y2> <x3> <y3> ...`, a polygon, of which the surrounding box is taken. Where the data YAML has
`kpt_shape`, rows are boxes, with as many keypoints behind them or without. The labels of
`.../images/.../a.jpg` stand in `.../labels/.../a.txt` (the last folder named `images` counts);
without such a folder they stand beside the image.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from data.formats.description import DataConfig, Listing
from data.formats.faults import (
    Fault,
    repeated_images,
    shared_labels,
    unread_files,
    unused_labels,
)
from data.formats.files import files_below, files_in, read_text
from data.formats.table import Row, Table, build_table, read_headers
from data.images import is_image_path
from utils.errors import DatasetError
from utils.files import refuse_special

FEW_NAMES = 1000
"""Longer lists are compared with what their folders have."""
IGNORES_CASE = sys.platform in ("win32", "darwin")
TOLERANCE = 0.01
"""By how much a fraction may leave 0..1 before the row is held to be in other units."""


def label_path(image_path: str) -> str:
    """The text file with the labels of an image."""
    folder, name = os.path.split(image_path)
    parts = folder.split(os.sep)
    for place in range(len(parts) - 1, -1, -1):
        if parts[place] == "images":
            parts[place] = "labels"
            break
    return os.path.join(os.sep.join(parts), os.path.splitext(name)[0] + ".txt")


def find(config: DataConfig, split: str) -> Listing:
    """The images of a split and their label files."""
    images: list[str] = []
    others: list[str] = []
    for entry in config.entries(split):
        if entry.is_dir():
            files = files_below(entry)
            images += filter(is_image_path, files)
            others += itertools.filterfalse(is_image_path, files)
        elif entry.suffix.lower() == ".txt":
            images += read_list(entry, config.path)
        elif is_image_path(entry):
            images.append(str(entry))
        else:
            raise DatasetError(
                f"{config.file}: {split} - got {entry}, expected a folder of images or a .txt "
                "list of them."
            )
    if not images:
        raise DatasetError(
            f"{config.file}: {split} - got no image in "
            f"{', '.join(map(str, config.entries(split)))}, expected at least one."
        )
    labels = _label_files(images)
    remarks = [*unread_files(others), *repeated_images(images), *shared_labels(images, labels)]
    for folder, pictures, is_deep in _label_folders(config.entries(split), images):
        remarks += unused_labels(folder, pictures, labels, is_deep)
    return Listing(labels, images, tuple(remarks))


def _label_files(images: Sequence[str]) -> list[str]:
    """The label file of each image, under a suffix in capitals where it stands there so."""
    paths = [label_path(image) for image in images]
    present = {file for folder in {os.path.dirname(p) for p in paths} for file in files_in(folder)}
    capitals = {path: path[:-4] + ".TXT" for path in paths if path not in present}
    return [capitals[path] if capitals.get(path) in present else path for path in paths]


def _label_folders(
    entries: Sequence[Path], images: Sequence[str]
) -> Iterator[tuple[str, str, bool]]:
    """Folders of labels, that of their pictures, and whether those below count too."""
    whole = [str(entry) for entry in entries if entry.is_dir()]
    tops = tuple(top + os.sep for top in whole)
    listed = {os.path.dirname(image) for image in images}
    listed = {folder for folder in listed if not f"{folder}{os.sep}".startswith(tops)}
    for folder in [*whole, *sorted(listed)]:
        yield os.path.dirname(label_path(os.path.join(folder, "x"))), folder, folder in whole


def read_list(path: Path, root: Path) -> list[str]:
    """Image files named in a text file, one per line.

    A relative name is looked for beside the list, then in the data set's folder, then in the
    current one.
    """
    names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    folders = list(dict.fromkeys(str(folder) for folder in (path.parent, root, Path.cwd())))
    if len(names) > FEW_NAMES and not IGNORES_CASE:
        return _placed(names, folders)
    return [_place(name, folders) for name in names]


def _place(name: str, folders: Sequence[str]) -> str:
    if os.path.isabs(name):
        return name
    places = [os.path.normpath(os.path.join(folder, name)) for folder in folders]
    return next((place for place in places if os.path.exists(place)), places[0])


def _placed(names: Sequence[str], folders: Sequence[str]) -> list[str]:
    """`_place` of each name with one look into each folder: to ask for millions of files takes minutes."""
    inside: dict[str, list[tuple[str, frozenset[str]]]] = {}
    found = []
    for name in names:
        head, _, last = name.rpartition("/")
        if name.startswith("/") or last in ("", ".", ".."):
            found.append(_place(name, folders))
            continue
        if head not in inside:
            places = [os.path.normpath(os.path.join(folder, head)) for folder in folders]
            inside[head] = [(place, _names_in(place)) for place in places]
        place = next((p for p, known in inside[head] if last in known), inside[head][0][0])
        found.append(last if place == "." else os.path.join(place, last))
    return found


def _names_in(folder: str) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except OSError:
        return frozenset()


def read(config: DataConfig, split: str, listing: Listing) -> Table:
    """Read the labels of a split.

    Raises:
        DatasetError: no image has a label file, or an image is missing.
    """
    assert listing.images is not None
    labels = listing.annotations
    if not any(os.path.exists(path) for path in labels):
        raise DatasetError(
            f"{config.file}: {split} - none of {len(labels)} images has a label file, expected "
            f"for example {labels[0]}."
        )
    faults: list[Fault] = []
    headers = read_headers(listing.images, faults)
    return build_table(
        listing.images, headers, lambda k, size: _rows(labels[k], size, config), faults
    )


def _rows(path: str, size: tuple[int, int], config: DataConfig) -> Iterator[Row | Fault]:
    try:
        refuse_special(path)
        with open(path, encoding="utf-8-sig") as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        yield Fault(path, "", "no such file", "background")
        return
    except UnicodeDecodeError as error:
        yield Fault(path, "", f"got bytes that are no text ({error.reason})")
        return
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read - got {error.strerror}.") from error
    height, width = size
    for number, line in enumerate(lines, 1):
        if fields := line.split():
            place, found = f"line {number}", _read_row(fields, config.names, config.keypoints)
            if isinstance(found, str):
                yield Fault(path, place, found)
            else:
                label, (left, top, right, bottom) = found
                box = (left * width, top * height, right * width, bottom * height)
                yield Row(path, place, label, box)


def _read_row(
    fields: list[str], names: tuple[str, ...], keypoints: tuple[int, int] | None = None
) -> tuple[int, tuple[float, float, float, float]] | str:
    """Class and xyxy as fractions, or what is wrong with the row."""
    numbers = []
    for field in fields:
        try:
            numbers.append(float(field))
        except ValueError:
            return f"got {field!r}, expected a number"
    count = len(numbers)
    if keypoints and count == 5 + keypoints[0] * keypoints[1]:
        numbers, count = numbers[:5], 5
    if keypoints and count != 5:
        expected = f"{5 + keypoints[0] * keypoints[1]} (with the keypoints of kpt_shape)"
        return f"got {count} columns, expected 5 (a box) or {expected}"
    if count != 5 and (count < 7 or count % 2 == 0):
        return f"got {count} columns, expected 5 (a box) or 7, 9, ... (a polygon)"
    label, points = numbers[0], numbers[1:]
    if not 0 <= label < len(names) or label != int(label):
        expected = f"0 to {len(names) - 1} ({len(names)} names)"
        return f"class id - got {fields[0]}, expected {expected}"
    # Written so that NaN fails too.
    if not all(-TOLERANCE <= value <= 1 + TOLERANCE for value in points):
        wrong = next(f for f in fields[1:count] if not -TOLERANCE <= float(f) <= 1 + TOLERANCE)
        return f"got {wrong}, expected fractions of the image, 0 to 1"
    if count == 5:
        x, y, width, height = points
        return int(label), (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    xs, ys = points[0::2], points[1::2]
    return int(label), (min(xs), min(ys), max(xs), max(ys))
