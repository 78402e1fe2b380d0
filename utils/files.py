"""Files: what a path leads to, writing them whole, names that are still free."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

KINDS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)
SHELL = ("/dev/fd/", "/proc/self/fd/", "/dev/stdin")  # `<(command)`, whose writer is there


def special_kind(path: str | Path) -> str:
    """`a named pipe`, `a device` or `a socket`; empty for files, folders and what is not there."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return ""
    return next((name for test, name in KINDS if test(mode)), "")


def refuse_special(path: str | Path) -> None:
    """Nothing, if a path can be read to its end or is not there: a pipe waits for a writer, a device never ends.

    Raises:
        OSError: it is a pipe, a device or a socket; as the system refuses a folder.
    """
    kind = special_kind(path)
    if kind and not (kind == "a named pipe" and str(path).startswith(SHELL)):
        raise OSError(errno.EINVAL, f"{kind}, not a file", str(path))


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A stream whose file takes the place of `path` at the end of the block: readers never find half of one.

    Raises:
        OSError: the system refuses, as a full disk does; what was there stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file as `written_whole` does."""
    with written_whole(path) as file:
        file.write(data)


class FreeNames:
    """Gives names to files, so that two of one name do not overwrite each other."""

    def __init__(self) -> None:
        self._owners: dict[str, str] = {}
        self._numbered: dict[tuple[str, str], str] = {}
        self._next: dict[str, int] = {}

    def take(self, name: str, owner: str, suffix: str = "") -> str:
        """`name` with its suffix for what comes from `owner`; numbered if another one has it."""
        key = self.find(name, owner, suffix)
        self._owners[key] = owner
        if key != name + suffix:
            self._numbered[name + suffix, owner] = key
        return key

    def find(self, name: str, owner: str, suffix: str = "") -> str:
        """The name that `take` would give, without taking it."""
        plain = name + suffix
        if self._owners.get(plain, owner) == owner:
            return plain
        if (plain, owner) in self._numbered:
            return self._numbered[plain, owner]
        number = self._next.get(plain, 2)
        while f"{name}_{number}{suffix}" in self._owners:
            number += 1
        self._next[plain] = number  # the next one need not count from the start
        return f"{name}_{number}{suffix}"
