"""Child processes: each training and each measurement has its own memory, and dies alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from utils.errors import ConfigError, printable
from utils.logger import get_logger

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two studies out of one folder
    fcntl = None  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parents[1]
LOOK = 0.3  # seconds between two looks at a child


class Ending(NamedTuple):
    """How a child ended: its exit code, and whether it was told to stop."""

    code: int
    was_stopped: bool


@contextmanager
def alone_in(folder: Path) -> Iterator[BinaryIO]:
    """Keep other studies out of a folder; children that outlive a killed study hold the lock until they end.

    Yields:
        The lock, to be handed to children.
    """
    with (folder / "study.lock").open("ab") as lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                get_logger().info(
                    f"{folder}: another study, or a training that a killed one left, still works here; waiting for it"
                )
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


def run_child(
    words: Sequence[str], log: Path, lock: BinaryIO, is_enough: Callable[[], bool]
) -> Ending:
    """Run Python with `words`; what it prints goes to a file.

    Args:
        words: a script or a module, and its flags.
        log: what it prints is added to this file.
        lock: of the study's folder.
        is_enough: asked now and then; once it says so, the child is told to stop where it can go on later.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    handed = (lock.fileno(),) if fcntl is not None else ()
    with log.open("ab") as file:
        child = subprocess.Popen(
            [sys.executable, *words], stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            env=environment, pass_fds=handed,
        )  # fmt: skip
        was_stopped = False
        try:
            while child.poll() is None:
                time.sleep(LOOK)
                if not was_stopped and is_enough() and child.poll() is None:
                    child.terminate()
                    was_stopped = True
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
    return Ending(child.returncode, was_stopped)


def require_success(ending: Ending, log: Path) -> None:
    """Nothing, if a child ended well.

    Raises:
        ConfigError: with the reason that it printed, or the signal that ended it.
    """
    if ending.code == 0:
        return
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() or ["it printed nothing"]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if ending.code < 0:
        name = signal.Signals(-ending.code).name
        hint = ", most often because the machine ran out of memory" if name == "SIGKILL" else ""
        raise ConfigError(f"ended by {name}{hint}; see {log}")
    raise ConfigError(printable(told[-1] if told else lines[-1].strip()))
