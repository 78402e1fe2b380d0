"""The annotations of a split in flat arrays, and the steps that all formats share.

n images, N objects. One array with offsets instead of a list of objects per image: worker
processes then share the memory, where reference counts of Python objects would copy it page by
page (the growth reported in pytorch issue 13246).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.formats.faults import Fault
from data.images import Header, ImageError, image_header
from utils.errors import DatasetError

EDGE_TOLERANCE = 0.5
"""Pixels by which a box may pass the edge of its image as a matter of rounding."""


class Texts(Sequence[str]):
    """A sequence of strings in one byte array with offsets."""

    def __init__(self, data: NDArray[np.uint8], offsets: NDArray[np.int64]) -> None:
        self.data = data
        self.offsets = offsets

    @classmethod
    def pack(cls, texts: Sequence[str]) -> Texts:
        """Store strings; undecodable bytes of file names survive."""
        encoded = [os.fsencode(text) for text in texts]
        ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index):  # type: ignore[no-untyped-def, override]
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index = index % len(self)
        return os.fsdecode(self.data[self.offsets[index] : self.offsets[index + 1]].tobytes())

    def __iter__(self) -> Iterator[str]:
        return (self[k] for k in range(len(self)))

    def take(self, order: NDArray[np.int64]) -> Texts:
        """The strings at the given places."""
        return Texts.pack([self[int(k)] for k in order])


@dataclass(frozen=True)
class Table:
    """A split as read from its files.

    Attributes:
        paths: image files, n of them.
        image_ids: ids under which the evaluator knows the images, (n,).
        sizes: height and width of the upright images, (n, 2).
        offsets: the objects of image i are `offsets[i]` to `offsets[i + 1]`, (n + 1,).
        labels: class indices, (N,).
        boxes: xyxy pixels of the upright image, (N, 4), float32.
        crowd: True for objects that are not trained on and not scored, (N,).
        faults: what was mended on the way.
        peak: the largest value in images of more than 8 bits; 0 where there is none.
    """

    paths: Texts
    image_ids: NDArray[np.int64]
    sizes: NDArray[np.int32]
    offsets: NDArray[np.int64]
    labels: NDArray[np.int64]
    boxes: NDArray[np.float32]
    crowd: NDArray[np.bool_]
    faults: tuple[Fault, ...]
    peak: int = 0

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, order: NDArray[np.int64]) -> Table:
        """The images at the given places, with their objects."""
        counts = np.diff(self.offsets)[order]
        spans = [np.arange(self.offsets[k], self.offsets[k + 1]) for k in order]
        rows = np.concatenate(spans) if spans else np.zeros(0, dtype=np.int64)
        return Table(
            self.paths.take(order),
            self.image_ids[order],
            self.sizes[order],
            offsets_of(counts),
            self.labels[rows],
            self.boxes[rows],
            self.crowd[rows],
            self.faults,
            self.peak,
        )


def merged(table: Table) -> Table:
    """The split without objects whose box another object of their image has, of whatever class.

    For data whose classes are taken for one, as of several labels for one object.
    """
    image_of = np.repeat(np.arange(len(table)), np.diff(table.offsets))
    rows = np.column_stack([image_of, table.boxes, table.crowd])
    _, first = np.unique(rows, axis=0, return_index=True)
    if len(first) == len(rows):
        return table
    kept = np.isin(np.arange(len(rows)), first)
    told = "got box ({}) in several classes, expected each object once with --single-cls"
    remarks = [
        Fault(table.paths[image_of[k]], "", told.format(_corners(table.boxes[k])), "merged")
        for k in np.flatnonzero(~kept)
    ]
    counts = np.bincount(image_of[kept], minlength=len(table))
    return replace(
        table,
        offsets=offsets_of(counts),
        labels=table.labels[kept],
        boxes=table.boxes[kept],
        crowd=table.crowd[kept],
        faults=(*table.faults, *remarks),
    )


def offsets_of(counts: NDArray[np.int64] | Sequence[int]) -> NDArray[np.int64]:
    """Running sums with a leading zero."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)


class Rows:
    """Collects the objects of a split, image after image, mending what can be mended."""

    def __init__(self, faults: list[Fault]) -> None:
        self.faults = faults
        self.counts: list[int] = []
        self._labels: list[NDArray[np.int64]] = []
        self._boxes: list[NDArray[np.float32]] = []
        self._crowd: list[NDArray[np.bool_]] = []

    def add(
        self,
        path: str,
        size: tuple[int, int],
        objects: tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.bool_]],
        places: Sequence[str],
    ) -> None:
        """Append the objects of one image.

        Args:
            path: file that the objects stand in, for messages.
            size: height and width of the image.
            objects: class indices (k,), xyxy pixels (k, 4), crowd marks (k,).
            places: `line 3` and the like for each object, k of them.
        """
        labels, boxes, crowd = objects
        height, width = size
        cut = np.clip(boxes, 0, [width, height, width, height])
        beyond = np.abs(boxes - cut).max(axis=1, initial=0) > EDGE_TOLERANCE
        has_area = _has_area(boxes)
        stays = has_area & _has_area(cut)
        is_repeated = _repeated(labels, cut, crowd) & stays
        for k in np.flatnonzero(beyond | ~stays | is_repeated).tolist():
            states = bool(has_area[k]), bool(stays[k]), bool(is_repeated[k])
            self.faults.append(_fault(path, places[k], boxes[k], size, states))
        kept = stays & ~is_repeated
        self.counts.append(int(kept.sum()))
        self._labels.append(labels[kept])
        self._boxes.append(cut[kept].astype(np.float32))
        self._crowd.append(crowd[kept])

    def table(self, paths: Sequence[str], image_ids: Sequence[int], headers: Headers) -> Table:
        """The finished table; `paths` and ids of the readable images, in the order of `add`."""
        sizes = headers.sizes[headers.readable]
        assert len(paths) == len(self.counts) == len(sizes), "one entry per image"
        return Table(
            Texts.pack(paths),
            np.asarray(image_ids, dtype=np.int64),
            sizes,
            offsets_of(self.counts),
            np.concatenate([np.zeros(0, np.int64), *self._labels]),
            np.concatenate([np.zeros((0, 4), np.float32), *self._boxes]),
            np.concatenate([np.zeros(0, np.bool_), *self._crowd]),
            tuple(self.faults),
            headers.peak,
        )


def _has_area(boxes: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.asarray((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]))


def _repeated(
    labels: NDArray[np.int64], boxes: NDArray[np.float64], crowd: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """True for every object that equals an earlier one of the same image."""
    if len(labels) < 2:
        return np.zeros(len(labels), dtype=np.bool_)
    rows = np.concatenate([labels[:, None], boxes, crowd[:, None]], axis=1)
    _, first = np.unique(rows, axis=0, return_index=True)
    repeated = np.ones(len(labels), dtype=np.bool_)
    repeated[first] = False
    return repeated


def _fault(
    path: str,
    place: str,
    box: NDArray[np.float64],
    size: tuple[int, int],
    states: tuple[bool, bool, bool],
) -> Fault:
    """What was wrong with a box; `states` tell if it has an area, stays, and is repeated."""
    has_area, stays, is_repeated = states
    corners = _corners(box)
    if not has_area:
        return Fault(path, place, f"got box ({corners}), expected width and height", "empty")
    if not stays:
        kind, problem = "away", f"got box ({corners}), expected one in {size[1]} x {size[0]}"
    elif is_repeated:
        kind, problem = "duplicate", f"got box ({corners}) again, expected each object once"
    else:
        kind, problem = "outside", f"got box ({corners}), expected one in {size[1]} x {size[0]}"
    return Fault(path, place, problem, kind)


def _corners(box: NDArray[Any]) -> str:
    return ", ".join(f"{value:.6g}" for value in box)


@dataclass(frozen=True)
class Headers:
    """What the scan of images tells.

    Attributes:
        sizes: height and width, (n, 2); zero where the image is unreadable.
        peak: the largest value in those of more than 8 bits; 0 where there is none.
    """

    sizes: NDArray[np.int32]
    peak: int = 0

    @property
    def readable(self) -> NDArray[np.int64]:
        """Places of the readable images."""
        return np.flatnonzero(self.sizes[:, 0] > 0)


def read_headers(paths: Sequence[str], faults: list[Fault]) -> Headers:
    """Read and check the headers of images in threads.

    Raises:
        DatasetError: files are missing or cannot be read, or no image is readable.
    """
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise DatasetError(
            f"{missing[0]}: no such image - {len(missing)} of {len(paths)} listed images are "
            "missing. Correct the list, or the folder that its names are relative to."
        )

    def read(path: str) -> Header | Fault:
        try:
            return image_header(path)
        except ImageError as error:
            return Fault(path, "", str(error).removeprefix(f"{path}: "), "unreadable")

    sizes, peak = np.zeros((len(paths), 2), dtype=np.int32), 0
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for k, result in enumerate(pool.map(read, paths)):
            if isinstance(result, Fault):
                faults.append(result)
            else:
                sizes[k], peak = result[:2], max(peak, result.peak)
    if len(paths) and not sizes.any():
        raise DatasetError(f"{faults[-1]} None of {len(paths)} images of the split is readable.")
    return Headers(sizes, peak)


def image_ids_from_names(paths: Sequence[str]) -> list[int]:
    """Ids for images that have none: the number that every name is (COCO), else 1, 2, 3.

    Numbers beyond 15 digits are no ids: not every reader of the JSON files would keep them exact.
    """
    stems = [os.path.splitext(os.path.basename(path))[0] for path in paths]
    if all(stem.isascii() and stem.isdigit() and len(stem) <= 15 for stem in stems):
        numbers = [int(stem) for stem in stems]
        if len(set(numbers)) == len(numbers):
            return numbers
    return list(range(1, len(paths) + 1))
