"""Keeping decoded, resized images: in memory, or in one file that is mapped into memory.

All images lie one behind the other in one byte array, so that worker processes share it; behind
them stands a byte for each, 0 for those that could not be read.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from data.images import Image
from data.storage import write_cache
from utils.distributed import local_processes
from utils.logger import get_logger

CACHES = ("auto", "ram", "disk", "off")
MEMORY_SHARE = 0.8
"""Part of the free memory or disk that a cache may take."""
SMALL = 2**30
"""Bytes that a cache may take on this machine unasked, and no more than `SMALL_SHARE` of the free memory."""
SMALL_SHARE = 0.1
AT_ONCE = 256
"""Images that are read ahead."""


class ImageCache:
    """Images by index, out of one array; None in place of one that could not be read.

    Args:
        sizes: height and width of every image, (n, 2).
        data: the bytes, in memory; or
        file: a file that holds them.
    """

    def __init__(
        self, sizes: NDArray[np.int32], data: torch.Tensor | None = None, file: Path | None = None
    ) -> None:
        self.sizes = sizes
        self.offsets = byte_offsets(sizes)
        self.data, self.file = data, file
        self._mapped: NDArray[np.uint8] | None = None

    def __getitem__(self, index: int) -> Image | None:
        if self._mapped is None:
            self._mapped = self._bytes()
        if not self._mapped[self.offsets[-1] + index]:
            return None
        start, end = self.offsets[index], self.offsets[index + 1]
        return self._mapped[start:end].reshape(*self.sizes[index].tolist(), 3)

    def _bytes(self) -> NDArray[np.uint8]:
        if self.data is not None:
            return self.data.numpy()
        assert self.file is not None
        return np.memmap(self.file, dtype=np.uint8, mode="r")

    def __getstate__(self) -> dict[str, object]:
        # A mapped file is opened again by the worker instead of being copied to it.
        return {**self.__dict__, "_mapped": None}


def byte_offsets(sizes: NDArray[np.int32]) -> NDArray[np.int64]:
    """Where each image begins, and where the last one ends, (n + 1,)."""
    return np.concatenate([[0], np.cumsum(sizes.astype(np.int64).prod(axis=1) * 3)])


def cache_bytes(sizes: NDArray[np.int32]) -> int:
    """Bytes of a cache."""
    return int(byte_offsets(sizes)[-1]) + len(sizes)


def cache_in_memory(
    sizes: NDArray[np.int32], load: Callable[[int], Image | None]
) -> ImageCache | None:
    """Read all images into memory.

    Returns:
        None, after one line in the log, if they would take too much of it.
    """
    if not _has_room("ram", cache_bytes(sizes), available_memory(), "of free memory"):
        return None
    return _in_memory(sizes, load)


def cache_if_small(
    sizes: NDArray[np.int32], load: Callable[[int], Image | None]
) -> ImageCache | None:
    """Read all images into memory, where they take so little of it that nobody needs to be asked.

    Workers must begin as copies of this process: memory that is handed over is often small, as in containers.
    """
    total, free = cache_bytes(sizes) * local_processes(1), available_memory()
    most = SMALL if free is None else min(SMALL, free * SMALL_SHARE)
    if total > most or multiprocessing.get_start_method() != "fork":
        return None
    return _in_memory(sizes, load)


def _in_memory(sizes: NDArray[np.int32], load: Callable[[int], Image | None]) -> ImageCache:
    total = cache_bytes(sizes)
    data = torch.empty(total, dtype=torch.uint8)
    if multiprocessing.get_start_method() != "fork":
        # Workers that do not begin as a copy of this process get a handle, not the bytes.
        data.share_memory_()
    place, everything = 0, data.numpy()
    for piece in _pieces(sizes, load):
        everything[place : place + len(piece)] = piece
        place += len(piece)
    return ImageCache(sizes, data=data)


def cache_on_disk(
    sizes: NDArray[np.int32], load: Callable[[int], Image | None], file: Path, key: str
) -> ImageCache | None:
    """Keep all images in `<file>.<key>.images`; one that is there already is used as it is.

    Args:
        sizes: of the images, (n, 2).
        load: reads one image; None where it cannot be read.
        file: path without suffix; files of the same name with other keys are outdated and removed.
        key: digest of all that the contents depend on.

    Returns:
        None, after one line in the log, if there is no room or no permission.
    """
    target = file.with_name(f"{file.name}.{key[:16]}.images")
    total = cache_bytes(sizes)
    if target.is_file() and target.stat().st_size == total:
        return ImageCache(sizes, file=target)
    folder = next(parent for parent in target.parents if parent.is_dir())
    if not _has_room("disk", total, shutil.disk_usage(folder).free, f"free at {folder}"):
        return None

    def write(stream: BinaryIO) -> None:
        for piece in _pieces(sizes, load):
            stream.write(piece.data)

    if not write_cache(target, write):
        get_logger().warning("--cache disk: not done - %s cannot be written", target)
        return None
    for old in target.parent.glob(f"{file.name}.*.images"):
        if old != target:
            old.unlink(missing_ok=True)
    return ImageCache(sizes, file=target)


def _has_room(kind: str, total: int, free: int | None, where: str) -> bool:
    """Whether `total` bytes for each process of this machine fit into `free` ones; a line in the log if not."""
    if free is None or total * local_processes(1) <= free * MEMORY_SHARE:
        return True
    get_logger().warning(
        f"--cache {kind}: not done - the images take {total / 1e9:.1f} GB, "
        f"expected at most {MEMORY_SHARE * 100:.0f} % of the {free / 1e9:.1f} GB {where}"
    )
    return False


def _pieces(
    sizes: NDArray[np.int32], load: Callable[[int], Image | None]
) -> Iterator[NDArray[np.uint8]]:
    """The bytes of one image after the other, then the marks; read by several threads."""
    is_read = np.ones(len(sizes), dtype=np.uint8)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(sizes), AT_ONCE):
            chosen = range(start, min(start + AT_ONCE, len(sizes)))
            for index, image in zip(chosen, pool.map(load, chosen)):
                is_read[index] = image is not None
                length = int(sizes[index].prod()) * 3
                yield np.zeros(length, np.uint8) if image is None else image.reshape(length)
    yield is_read


def available_memory() -> int | None:
    """Bytes that this process can still take, within its control group; None if unknown."""
    limits = [_free_of_machine(), _free_of_group()]
    return min((limit for limit in limits if limit is not None), default=None)


def _free_of_machine() -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            rows = dict(line.split(":", 1) for line in file)
        return int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _free_of_group() -> int | None:
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
        return None if limit == "max" else max(0, int(limit) - used)
    except (OSError, ValueError):
        return None
