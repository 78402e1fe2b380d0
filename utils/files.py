"""What a path leads to: a pipe waits for a writer and a device never ends, so only plain files are read."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

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
    """Nothing, if a path can be read to its end or is not there.

    Raises:
        OSError: it is a pipe, a device or a socket; as the system refuses a folder.
    """
    kind = special_kind(path)
    if kind and not (kind == "a named pipe" and str(path).startswith(SHELL)):
        raise OSError(errno.EINVAL, f"{kind}, not a file", str(path))


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a reader finds the old one or the new one, never half of one.

    Raises:
        OSError: the system refuses, as a full disk does; what was there stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
