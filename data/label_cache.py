"""Reading a split through a cache of its labels and image sizes.

The cache is an `.npz` of plain arrays, read with `allow_pickle=False`. It holds as long as the
names, sizes and modification times of all annotation and image files, the settings that matter and
the version below are the same; otherwise everything is read again.
"""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.formats import coco, voc, yolo
from data.formats.description import DataConfig, Listing
from data.formats.faults import Fault, raise_if_fatal, repeated_images, summarise
from data.formats.table import Table, Texts
from data.images import FULL_WHITE
from data.storage import cache_file, digest_of_files, write_cache
from utils.logger import get_logger

VERSION = 2
SUFFIX = ".yoke.npz"
ARRAYS = ("image_ids", "sizes", "offsets", "labels", "boxes", "crowd")
READERS = {"yolo": yolo, "coco": coco, "voc": voc}


def load_table(config: DataConfig, split: str) -> Table:
    """The annotations of a split, from the cache if it holds, else from the files.

    Mended faults are summarised as warnings, one line per kind, each time, and images without a
    label file are counted: a warning where they are more than half.

    Raises:
        DatasetError: files are missing, or hold faults that cannot be mended; all in one line.
    """
    reader = READERS[config.format]
    listing = reader.find(config, split)
    file = _cache_path(listing, split)
    reading = (config.format, config.names, config.one_based, config.keypoints)
    settings = (VERSION, *reading, config.images.get(split))
    annotation_key = digest_of_files([*listing.annotations, *(listing.images or [])], settings)
    table = _load(file, annotation_key)
    if table is None:
        read = reader.read(config, split, listing)
        raise_if_fatal(read.faults, f"Correct the labels, or the names in {config.file}.")
        write_cache(file, lambda stream: _save(stream, read, annotation_key))
        table = read
    table = _with_remarks(table, listing)
    for line in [*summarise(table.faults, split), *_depth(config, split, table.peak)]:
        get_logger().warning(line)
    missing = sum(fault.kind == "background" for fault in table.faults)
    if missing:
        level = logging.WARNING if missing > len(table) / 2 else logging.INFO
        told = "%s: %d of %d images have no label file (background)"
        get_logger().log(level, told, split, missing, len(table))
    return table


def read_afresh(config: DataConfig, split: str) -> Table:
    """The annotations of a split from its files, with the faults that stop a training among its faults.

    Raises:
        DatasetError: files are missing, or nothing of them can be read.
    """
    reader = READERS[config.format]
    listing = reader.find(config, split)
    return _with_remarks(reader.read(config, split, listing), listing)


def _with_remarks(table: Table, listing: Listing) -> Table:
    remarks = repeated_images(table.paths) if listing.images is None else listing.remarks
    return replace(table, faults=(*table.faults, *remarks))


def _depth(config: DataConfig, split: str, peak: int) -> Iterator[str]:
    """What is wrong with the white of images of more than 8 bits, whose largest value is `peak`."""
    if config.white is None and 0 < peak <= FULL_WHITE // 2:
        levels, bits = round(peak * 255 / FULL_WHITE) + 1, peak.bit_length()
        yield (
            f"{split}: images of 16 bits whose largest value is {peak} are read as {levels} of 256 "
            f"levels. Write `white: {2**bits - 1}` into {config.file} if they have {bits} bits."
        )
    elif config.white is not None and peak > config.white:
        yield f"{split}: values beyond white are cut, up to {peak} (white: {config.white:g})"
    elif config.white is not None and not peak:
        yield f"{split}: white: {config.white:g} is without effect, no image has more than 8 bits"


def _cache_path(listing: Listing, split: str) -> Path:
    first = Path(listing.annotations[0])
    if listing.images is None:
        return cache_file(first, SUFFIX)
    return cache_file(first.parent.with_name(f"{first.parent.name}-{split}"), SUFFIX)


def _save(stream: BinaryIO, table: Table, annotation_key: str) -> None:
    faults = json.dumps([list(fault) for fault in table.faults]).encode("utf-8", "surrogateescape")
    np.savez(
        stream,
        key=np.array([annotation_key, digest_of_files(table.paths)]),
        paths=table.paths.data,
        path_offsets=table.paths.offsets,
        peak=np.int64(table.peak),
        faults=np.frombuffer(faults, dtype=np.uint8),
        **{name: vars(table)[name] for name in ARRAYS},
    )


def _load(file: Path, annotation_key: str) -> Table | None:
    """The cached table; None if there is none, or it does not fit the files any more."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        paths = Texts(arrays["paths"], arrays["path_offsets"])
        rows = json.loads(arrays["faults"].tobytes().decode("utf-8", "surrogateescape"))
        faults = tuple(Fault(*row) for row in rows)
        own = {name: arrays[name] for name in ARRAYS}
        table = Table(paths=paths, faults=faults, peak=int(arrays["peak"]), **own)
        is_current = arrays["key"].tolist() == [annotation_key, digest_of_files(paths)]
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None
    return table if is_current else None
