"""Keeping decoded, resized images: in memory, or in one file that is mapped into memory.

All images lie one behind the other in one byte array, so that worker processes share it.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from data.images import Image
from data.storage import write_atomically
from utils.distributed import local_processes

LOGGER = logging.getLogger("yoke.data")
MEMORY_SHARE = 0.8
"""Part of the free memory or disk that a cache may take."""


class ImageCache:
    """Images by index, out of one array.

    Args:
        sizes: height and width of every image, (n, 2).
        data: the bytes of all images, in memory; or
        file: an `.npy` file that holds them.
    """

    def __init__(
        self, sizes: NDArray[np.int32], data: torch.Tensor | None = None, file: Path | None = None
    ) -> None:
        self.sizes = sizes
        self.offsets = byte_offsets(sizes)
        self.data = data
        self.file = file
        self._mapped: NDArray[np.uint8] | None = None

    def __getitem__(self, index: int) -> Image:
        height, width = (int(side) for side in self.sizes[index])
        start, end = self.offsets[index], self.offsets[index + 1]
        return self._bytes()[start:end].reshape(height, width, 3)

    def _bytes(self) -> NDArray[np.uint8]:
        if self._mapped is None:
            if self.data is not None:
                self._mapped = self.data.numpy()
            else:
                assert self.file is not None
                self._mapped = np.load(self.file, mmap_mode="r", allow_pickle=False)
        return self._mapped

    def __getstate__(self) -> dict[str, Any]:
        # A mapped file is opened again by the worker instead of being copied to it.
        return {**self.__dict__, "_mapped": None}


def byte_offsets(sizes: NDArray[np.int32]) -> NDArray[np.int64]:
    """Where each image begins, and the total at the end, (n + 1,)."""
    lengths = sizes.astype(np.int64).prod(axis=1) * 3
    return np.concatenate([[0], np.cumsum(lengths)])


def cache_in_memory(sizes: NDArray[np.int32], load: Callable[[int], Image]) -> ImageCache | None:
    """Read all images into memory.

    Returns:
        None, after one line in the log, if they would take too much of it.
    """
    total = int(byte_offsets(sizes)[-1])
    free = available_memory()
    if free is not None and total * local_processes(1) > free * MEMORY_SHARE:  # each keeps its own
        LOGGER.warning(
            "--cache ram: not done - %s, expected at most %.0f %% of the %.1f GB of free memory",
            f"the images take {total / 1e9:.1f} GB",
            MEMORY_SHARE * 100,
            free / 1e9,
        )
        return None
    data = torch.empty(total, dtype=torch.uint8)
    if multiprocessing.get_start_method() != "fork":
        # Workers that do not begin as a copy of this process get a handle, not the bytes.
        data.share_memory_()
    cache = ImageCache(sizes, data=data)
    _fill(data.numpy(), cache.offsets, load)
    return cache


def cache_on_disk(
    sizes: NDArray[np.int32], load: Callable[[int], Image], file: Path, key: str
) -> ImageCache | None:
    """Keep all images in `<file>.<key>.npy`; one that is there already is used as it is.

    Args:
        sizes: of the images, (n, 2).
        load: reads one image.
        file: path without suffix; files of the same name with other keys are outdated and removed.
        key: digest of all that the contents depend on.

    Returns:
        None, after one line in the log, if there is no room or no permission.
    """
    target = file.with_name(f"{file.name}.{key[:16]}.npy")
    offsets = byte_offsets(sizes)
    total = int(offsets[-1])
    if _holds(target, total):
        return ImageCache(sizes, file=target)
    folder = next(parent for parent in target.parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if total * local_processes(1) > free * MEMORY_SHARE:  # each writes before one of them is kept
        LOGGER.warning(
            "--cache disk: not done - %s, expected at most %.0f %% of the %.1f GB free at %s",
            f"the images take {total / 1e9:.1f} GB",
            MEMORY_SHARE * 100,
            free / 1e9,
            folder,
        )
        return None

    def write(stream: BinaryIO) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": (total,)}
        np.lib.format.write_array_header_1_0(stream, header)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(sizes), 256):
                chosen = range(start, min(start + 256, len(sizes)))
                for image in pool.map(load, chosen):
                    stream.write(np.ascontiguousarray(image).data)

    if not write_atomically(target, write):
        LOGGER.warning("--cache disk: not done - %s cannot be written", target)
        return None
    for old in target.parent.glob(f"{file.name}.*.npy"):
        if old != target:
            old.unlink(missing_ok=True)
    return ImageCache(sizes, file=target)


def _holds(file: Path, total: int) -> bool:
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False).shape == (total,)
    except (OSError, ValueError, EOFError):
        return False


def _fill(
    data: NDArray[np.uint8], offsets: NDArray[np.int64], load: Callable[[int], Image]
) -> None:
    def copy(index: int) -> None:
        data[offsets[index] : offsets[index + 1]] = load(index).reshape(-1)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(copy, range(len(offsets) - 1)):
            pass


def available_memory() -> int | None:
    """Bytes that this process can still take, within its control group; None if unknown."""
    limits = [_free_of_machine(), _free_of_group()]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


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
