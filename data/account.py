"""The account of a split: what became of its files and objects on the way to the network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.formats.faults import COUNTED, KINDS, SHOWN, Fault, count_beside, suffixes_of
from data.formats.table import Table, offsets_of
from data.transforms import MAX_ASPECT, MIN_SIDE


class Objects(NamedTuple):
    """The objects of a split that are trained on, or scored.

    Attributes:
        labels: class indices, (N,).
        boxes: xyxy in pixels of the images as stored, (N, 4).
        offsets: image i has the objects `offsets[i]` to `offsets[i + 1]`, (n + 1,).
    """

    labels: NDArray[np.int64]
    boxes: NDArray[np.float32]
    offsets: NDArray[np.int64]


def objects_of(table: Table, single_cls: bool) -> Objects:
    """The objects of a split without crowds; all of class 0 if classes are taken for one."""
    kept = ~table.crowd
    before = np.concatenate([[0], np.cumsum(kept)])
    offsets = offsets_of(np.diff(before[table.offsets]))
    labels = table.labels[kept]
    return Objects(np.zeros_like(labels) if single_cls else labels, table.boxes[kept], offsets)


def account_of(
    table: Table, objects: Objects, names: Sequence[str], imgsz: tuple[int, int]
) -> tuple[str, bool]:
    """How much a split has, and what of it does not come to use.

    Args:
        table: the split as it was read.
        objects: its objects without crowds, that are trained on or scored.
        names: class names.
        imgsz: height and width that images are fitted into.

    Returns:
        The account in words with its numbers, and whether anything is left out, taken twice or
        hard to learn.
    """
    left_out = sum(fault.kind in ("unreadable", "suffix") for fault in table.faults)
    found = f"files found: {len(table) + left_out}; images: {len(table)}"
    lost = [*_counted(table.faults), *_hard(table, objects, imgsz)]
    notes = [*_beside(table), *_classes_without_object(objects.labels, names)]
    return "; ".join([found, f"objects: {len(objects.labels)}", *lost, *notes]), bool(lost)


def _counted(faults: Iterable[Fault]) -> Iterable[str]:
    """Each kind of remark on files, with its number and its first file."""
    by_kind: dict[str, list[str]] = {}
    for fault in faults:
        by_kind.setdefault(fault.kind, []).append(fault.path)
    for kind in ("unreadable", *COUNTED):
        if paths := by_kind.get(kind):
            shown = suffixes_of(paths) if kind == "suffix" else f"the first: {paths[0]}"
            yield f"{KINDS[kind]}: {len(paths)} ({shown})"


def _hard(table: Table, objects: Objects, imgsz: tuple[int, int]) -> Iterable[str]:
    """Objects that training drops, or drops where something cuts them; see `keep_visible`."""
    counts = np.diff(objects.offsets)
    scales = np.repeat((np.array(imgsz) / table.sizes).min(axis=1), counts)
    sides = np.sort(objects.boxes[:, 2:] - objects.boxes[:, :2], axis=1) * scales[:, None]
    is_small = sides[:, 0] <= MIN_SIDE
    is_long = ~is_small & (sides[:, 1] >= MAX_ASPECT * sides[:, 0])
    size = f"{imgsz[0]}x{imgsz[1]}"
    if is_small.any():
        told = f"objects too small to learn, at most {MIN_SIDE:g} pixels at {size}"
        yield f"{told}: {is_small.sum()}"
    if is_long.any():
        yield f"objects beyond {MAX_ASPECT:g}:1, learned only where uncut: {is_long.sum()}"


def _beside(table: Table) -> Iterable[str]:
    """Pictures that lie beside those of the split and that no annotation names."""
    known = {fault.path for fault in table.faults}
    if count := count_beside(table.paths, known):
        yield f"pictures beside them that no annotation names: {count}"


def _classes_without_object(labels: NDArray[np.int64], names: Sequence[str]) -> Iterable[str]:
    counts = np.bincount(labels, minlength=len(names))
    absent = [name for name, count in zip(names, counts) if not count]
    if absent and len(labels):
        shown = ", ".join([*absent[:SHOWN], "..."] if len(absent) > SHOWN else absent)
        yield f"classes without an object: {len(absent)} of {len(names)} ({shown})"
