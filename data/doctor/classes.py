"""Splits as a whole: classes that cannot be learned or measured, names, sizes against the network's cells."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.account import objects_of
from data.doctor.findings import Finding, Place, gathered
from data.formats.description import DataConfig
from data.formats.table import Table

FEW = 10
RARER = 100
MANY_SMALL = 0.1
"""Share of objects below a cell from which a split is told of."""
FEWER_SMALL = 0.05
"""Share of objects that may stay below a cell at the size that is advised."""
BOUNDS = (8, 16, 32, 64, 128)
"""Sides in pixels of the network's image between which objects are counted."""


def class_counts(table: Table, names: Sequence[str]) -> NDArray[np.int64]:
    """Objects of every class, crowds left out, (C,)."""
    return np.bincount(objects_of(table, False).labels, minlength=len(names)).astype(np.int64)


def object_sides(table: Table, imgsz: tuple[int, int]) -> NDArray[np.float64]:
    """Root of the area of every object, in pixels once its image is fitted into `imgsz`, (N,)."""
    objects = objects_of(table, False)
    scales = (np.array(imgsz) / table.sizes).min(axis=1)
    areas = (objects.boxes[:, 2:] - objects.boxes[:, :2]).astype(np.float64).prod(1)
    return np.asarray(np.sqrt(areas) * np.repeat(scales, np.diff(objects.offsets)))


def side_counts(sides: NDArray[np.float64]) -> dict[str, int]:
    """Objects by side: `under 8`, `8 to 16`, ..., `128 and more`."""
    counts = np.bincount(np.searchsorted(BOUNDS, sides, side="right"), minlength=len(BOUNDS) + 1)
    between = [f"{low} to {high}" for low, high in zip(BOUNDS, BOUNDS[1:])]
    words = [f"under {BOUNDS[0]}", *between, f"{BOUNDS[-1]} and more"]
    return dict(zip(words, counts.tolist()))


def odd_classes(tables: Mapping[str, Table], names: Sequence[str]) -> list[Finding]:
    """Classes that no split has, that are learned or measured alone, rare, or named alike."""
    counts = {split: class_counts(table, names) for split, table in tables.items()}
    everywhere = np.sum(list(counts.values()), axis=0)
    places = [
        ("unused class", Place(name, "no object"))
        for name, count in zip(names, everywhere)
        if not count
    ]
    places += _unlike(counts, names)
    if "train" in counts and counts["train"].any():
        own = counts["train"]
        for c in np.flatnonzero(own).tolist():
            told = f"{own[c]} objects in train"
            if own[c] < FEW:
                places.append(("rare", Place(names[c], told)))
            elif own[c] * RARER <= own.max():
                most = f"{own.max()} of {names[int(own.argmax())]}"
                places.append(("unbalanced", Place(names[c], f"{told}, {most}")))
    places += [("alike", Place(ours, f"and {other!r}")) for ours, other in _alike(names)]
    return gathered("", places)


def _unlike(
    counts: Mapping[str, NDArray[np.int64]], names: Sequence[str]
) -> Iterator[tuple[str, Place]]:
    """Classes of one split of two."""
    learned = counts.get("train")
    if learned is None or not learned.any():
        return
    for split, own in counts.items():
        for c in np.flatnonzero(own * (learned == 0)).tolist():
            yield "unlearned", Place(names[c], f"{own[c]} objects in {split}, none in train")
    if "val" in counts and counts["val"].any():
        for c in np.flatnonzero(learned * (counts["val"] == 0)).tolist():
            yield "unmeasured", Place(names[c], f"{learned[c]} objects in train, none in val")


def _alike(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names that are one name but for case, separators and a plural s."""
    first: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"[\W_]+", "", name.casefold()) or name
        plain = plain[:-1] if len(plain) > 3 and plain.endswith("s") else plain
        if (other := first.setdefault(plain, name)) != name:
            yield name, other


def odd_sizes(split: str, table: Table, imgsz: tuple[int, int], stride: int) -> list[Finding]:
    """Whether many objects are smaller than a cell of the finest map, and at which image size they would not be."""
    sides = object_sides(table, imgsz)
    share = float((sides < stride).mean()) if len(sides) else 0.0
    if share <= MANY_SMALL:
        return []
    factor = stride / max(float(np.quantile(sides, FEWER_SMALL)), 1e-3)
    wanted = math.ceil(max(imgsz) * factor / 32) * 32
    finer = f"with a finer map (stride {stride // 2})"
    advice = f"Train at --imgsz {wanted}, or {finer}."
    if factor > 4:
        advice = f"Cut the images into tiles, or train at a larger --imgsz and {finer}."
    size = "x".join(str(side) for side in dict.fromkeys(imgsz))
    told = f"{share:.0%} of {len(sides)} objects are under {stride} pixels at {size}"
    return [Finding("small", split, (Place(split, told),), advice)]


def odd_splits(config: DataConfig, tables: Mapping[str, Table]) -> list[Finding]:
    """Splits that are another one, empty, or mostly without objects."""
    found = [
        Finding("same split", split, (Place(split, f"the images of {other}"),))
        for split, other in same_splits(config).items()
    ]
    for split, table in tables.items():
        empty = int((np.diff(objects_of(table, False).offsets) == 0).sum())
        if empty == len(table):
            found.append(Finding("no objects", split, (Place(split, f"{empty} images"),)))
        elif empty > len(table) / 2:
            told = f"{empty} of {len(table)} images have no object"
            found.append(Finding("mostly empty", split, (Place(split, told),)))
    return found


def same_splits(config: DataConfig) -> dict[str, str]:
    """Splits that name the files of an earlier one, with that one."""
    first: dict[tuple[Path, ...], str] = {}
    return {
        split: other
        for split, entries in config.splits.items()
        if (other := first.setdefault(entries, split)) != split
    }
