"""Derived files: where they go, beside the data or in the project, and writing them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

from utils.files import written_whole
from utils.logger import get_logger

FALLBACK = Path(__file__).resolve().parents[1] / "datasets" / ".cache"
_WRITE_BITS = 0o222


def is_writable(folder: Path) -> bool:
    """True if a file may be made in a folder.

    The mode counts besides the permission: for the superuser every folder is writable, also one
    that its owner has marked read-only.
    """
    try:
        return bool(folder.stat().st_mode & _WRITE_BITS) and os.access(folder, os.W_OK)
    except OSError:
        return False


def cache_file(beside: Path, suffix: str) -> Path:
    """Path of a derived file: next to `beside`, or in the project if that folder is read-only."""
    name = f"{beside.name or 'data'}{suffix}"
    if is_writable(beside.parent):
        return beside.parent / name
    digest = hashlib.sha256(os.fsencode(beside.resolve())).hexdigest()[:12]
    return FALLBACK / f"{digest}-{name}"


def write_cache(path: Path, write: Callable[[BinaryIO], None]) -> bool:
    """Write a derived file whole.

    Returns:
        False, after one line in the log, if the place cannot be written; nothing is left behind.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as file:
            write(file)
    except OSError as error:
        get_logger().info("%s: not cached - %s", path, error.strerror)
        return False
    return True


def digest_of_files(paths: Iterable[str], *settings: object) -> str:
    """A digest of names, sizes and modification times, and of settings; absent files count too."""
    digest = hashlib.sha256(repr(settings).encode())
    for path in paths:
        try:
            status = os.stat(path)
            state = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:
            state = "absent"
        digest.update(os.fsencode(path) + b"\0" + state.encode() + b"\n")
    return digest.hexdigest()
