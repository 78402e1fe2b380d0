"""The annotations of a split in flat arrays, and the steps that all formats share.

n images, N objects. One array with offsets instead of a list of objects per image: worker
processes then share the memory, where reference counts of Python objects would copy it page by
page (the growth reported in pytorch issue 13246).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from data.formats.faults import Fault
from data.images import Header, ImageError, image_header
from utils.errors import DatasetError

EDGE_TOLERANCE = 0.5
"""Pixels by which a box may pass the edge of its image as a matter of rounding."""
_NO_LABELS = np.zeros(0, np.int64)
_NO_BOXES = np.zeros((0, 4), np.float32)
_NO_CROWD = np.zeros(0, np.bool_)


class Texts(Sequence[str]):
    """A sequence of strings in one byte array with offsets."""

    def __init__(self, data: NDArray[np.uint8], offsets: NDArray[np.int64]) -> None:
        self.data = data
        self.offsets = offsets

    @classmethod
    def pack(cls, texts: Sequence[str]) -> Texts:
        """Store strings; undecodable bytes of file names survive."""
        encoded = [os.fsencode(text) for text in texts]
        return cls(
            np.frombuffer(b"".join(encoded), dtype=np.uint8), offsets_of([*map(len, encoded)])
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        places = range(len(self))[index]  # as ranges do: from the end, out of range
        if isinstance(places, range):
            return [self[k] for k in places]
        return os.fsdecode(self.data[self.offsets[places] : self.offsets[places + 1]].tobytes())

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

    def image_of_objects(self) -> NDArray[np.int64]:
        """The place of each object's image, (N,)."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def take(self, order: NDArray[np.int64]) -> Table:
        """The images at the given places, with their objects."""
        spans = [np.arange(self.offsets[k], self.offsets[k + 1]) for k in order]
        rows = np.concatenate([np.zeros(0, dtype=np.int64), *spans])
        return replace(
            self,
            paths=self.paths.take(order),
            image_ids=self.image_ids[order],
            sizes=self.sizes[order],
            offsets=offsets_of(np.diff(self.offsets)[order]),
            labels=self.labels[rows],
            boxes=self.boxes[rows],
            crowd=self.crowd[rows],
        )


def merged(table: Table) -> Table:
    """The split without objects whose box another object of their image has, of whatever class.

    For data whose classes are taken for one, as of several labels for one object.
    """
    image_of = table.image_of_objects()
    kept = _is_first(np.column_stack([image_of, table.boxes, table.crowd]))
    told = "got box ({}) in several classes, expected each object once with --single-cls"
    remarks = [
        Fault(table.paths[image_of[k]], "", told.format(_corners(table.boxes[k])), "merged")
        for k in np.flatnonzero(~kept)
    ]
    return replace(
        table,
        offsets=offsets_of(np.bincount(image_of[kept], minlength=len(table))),
        labels=table.labels[kept],
        boxes=table.boxes[kept],
        crowd=table.crowd[kept],
        faults=(*table.faults, *remarks),
    )


def offsets_of(counts: NDArray[np.int64] | Sequence[int]) -> NDArray[np.int64]:
    """Running sums with a leading zero."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)


@dataclass(frozen=True)
class Headers:
    """What the scan of images tells.

    Attributes:
        sizes: height and width, (n, 2); zero where the image is unreadable.
        peak: the largest value in those of more than 8 bits; 0 where there is none.
    """

    sizes: NDArray[np.int32]
    peak: int = 0


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


class Row(NamedTuple):
    """An object as its file has it.

    Attributes:
        path: the file.
        place: `line 3` and the like.
        label: class index.
        box: xyxy pixels, which may pass the image.
        is_crowd: whether it is neither trained on nor scored.
    """

    path: str
    place: str
    label: int
    box: Sequence[float]
    is_crowd: bool = False


def build_table(
    images: Sequence[str],
    headers: Headers,
    rows_of: Callable[[int, tuple[int, int]], Iterable[Row | Fault]],
    faults: list[Fault],
    image_ids: Sequence[int] | None = None,
) -> Table:
    """The table of a split; what can be mended in its rows is mended.

    Args:
        images: files.
        headers: of them; those that are unreadable are left out.
        rows_of: place of an image and its height and width -> its objects, and what is wrong.
        faults: gets those, and what was mended.
        image_ids: of `images`; made from their names where None.
    """
    places = np.flatnonzero(headers.sizes[:, 0] > 0).tolist()
    counts, labels, boxes, crowd = [], [_NO_LABELS], [_NO_BOXES], [_NO_CROWD]
    for k in places:
        height, width = headers.sizes[k].tolist()
        rows = []
        for row in rows_of(k, (height, width)):
            if isinstance(row, Fault):
                faults.append(row)
            else:
                rows.append(row)
        own_labels, own_boxes, own_crowd = _mended(rows, (height, width), faults)
        counts.append(len(own_labels))
        labels.append(own_labels)
        boxes.append(own_boxes)
        crowd.append(own_crowd)
    paths = [images[k] for k in places]
    ids = image_ids_from_names(paths) if image_ids is None else [image_ids[k] for k in places]
    return Table(
        Texts.pack(paths),
        np.asarray(ids, dtype=np.int64),
        headers.sizes[places],
        offsets_of(counts),
        np.concatenate(labels),
        np.concatenate(boxes),
        np.concatenate(crowd),
        tuple(faults),
        headers.peak,
    )


def _mended(
    rows: Sequence[Row], size: tuple[int, int], faults: list[Fault]
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_]]:
    """Labels, cut boxes and crowd marks of an image without objects that are none, or stand there twice."""
    height, width = size
    labels = np.array([row.label for row in rows], dtype=np.int64)
    boxes = np.array([row.box for row in rows], dtype=np.float64).reshape(-1, 4)
    crowd = np.array([row.is_crowd for row in rows], dtype=np.bool_)
    cut = np.clip(boxes, 0, [width, height, width, height])
    beyond = np.abs(boxes - cut).max(axis=1, initial=0) > EDGE_TOLERANCE
    has_area = _has_area(boxes)
    stays = has_area & _has_area(cut)
    is_first = _is_first(np.column_stack([labels, cut, crowd]))
    for k in np.flatnonzero(beyond | ~stays | ~is_first).tolist():
        kind, told = "outside", f", expected one in {width} x {height}"
        if not has_area[k]:
            kind, told = "empty", ", expected width and height"
        elif not stays[k]:
            kind = "away"
        elif not is_first[k]:
            kind, told = "duplicate", " again, expected each object once"
        problem = f"got box ({_corners(boxes[k])}){told}"
        faults.append(Fault(rows[k].path, rows[k].place, problem, kind))
    kept = stays & is_first
    return labels[kept], cut[kept].astype(np.float32), crowd[kept]


def _has_area(boxes: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.asarray((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]))


def _is_first(rows: NDArray[np.float64]) -> NDArray[np.bool_]:
    """False for every row that equals an earlier one."""
    first = np.ones(len(rows), dtype=np.bool_)
    if len(rows) > 1:
        first[:] = False
        first[np.unique(rows, axis=0, return_index=True)[1]] = True
    return first


def _corners(box: NDArray[np.float32] | NDArray[np.float64]) -> str:
    return ", ".join(f"{value:.6g}" for value in box)


def size_faults(image: str, size: tuple[int, int], stated: tuple[int, int]) -> Iterator[Fault]:
    """A remark where an annotation states another height and width than its image has."""
    if stated != size:
        problem = f"got {size[1]} x {size[0]}, expected {stated[1]} x {stated[0]} as annotated"
        yield Fault(image, "", problem, "size")


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
