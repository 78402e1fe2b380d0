"""What a user can cause and mend: raised where it is noticed, printed as one line, exit code 2.

The form is *where: what - got, expected. what to do.*
"""

from __future__ import annotations

import difflib
import io
import re
import signal
import sys
import threading
import traceback
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import PurePath
from types import FrameType
from typing import NoReturn

MOST_PROBLEMS = 30
LONGEST_WORD, LONGEST_LINE = 300, 1200  # characters
LONG_WORD = re.compile(rf"\S{{{LONGEST_WORD + 1},}}")


class UserError(Exception):
    """Base of every error that the user can mend; the scripts print it without a traceback.

    Args:
        problems: what is wrong, each in one line; names and values in them may be anything.
    """

    def __init__(self, *problems: object) -> None:
        told = [str(problem) for problem in problems]
        more = [f"and {len(told) - MOST_PROBLEMS} more"] if len(told) > MOST_PROBLEMS else []
        super().__init__("\n".join([*map(printable, told[:MOST_PROBLEMS]), *more]))


class ConfigError(UserError):
    """A model YAML, a hyper-parameter file or a command-line value is wrong."""


class DatasetError(UserError):
    """A data YAML, a label file or a folder of images is wrong."""


class CheckpointError(UserError):
    """A weights file cannot be read, or does not fit the model."""


class StoppedError(KeyboardInterrupt):
    """A signal ends the script: told in one line, exit code 128 and the signal's number."""

    def __init__(self, number: int, text: str = "") -> None:
        super().__init__(text or f"stopped by {signal.Signals(number).name}")
        self.number = int(number)


class ForeignError(UserError):
    """Code of a user or of a library failed on what it was given; `__cause__` is its own error."""


def printable(text: str) -> str:
    """`text` in one line that a terminal shows as it is: what would steer it as escapes, long parts cut short.

    Names of files and values in them come from outside and may have any character and any length.
    """
    if len(text) <= LONGEST_WORD and text.isprintable():
        return text
    shown = "".join(c if _is_shown(c) else c.encode("unicode_escape").decode() for c in text)
    shown = LONG_WORD.sub(lambda word: _shortened(word.group(), LONGEST_WORD), shown)
    return _shortened(shown, LONGEST_LINE)


def _is_shown(character: str) -> bool:
    """Joiners belong to words and emoji; other characters of format, such as changes of direction, do not."""
    if character.isprintable() or character in "\u200c\u200d":
        return True
    return unicodedata.category(character) == "Zs"


def _shortened(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest * 2 // 3]}...{text[-longest // 4 :]}"


PLAIN_ERRORS = (RuntimeError, TypeError, ValueError, UserError)
LONGEST_REASON = 300  # characters of a foreign message inside ours


@contextmanager
def foreign_code(*own: type[BaseException], users: tuple[str, ...] = ()) -> Iterator[None]:
    """Whatever the block raises becomes a `ForeignError` of one line; a user's code may raise anything.

    Args:
        own: errors that pass as they are, beside those of weights that cannot be read.
        users: how the names of Python modules begin whose file and line the message tells.

    Raises:
        ForeignError: the block failed.
    """
    passing: tuple[type[BaseException], ...] = (CheckpointError, *own)
    try:
        yield
    except passing:
        raise
    except (Exception, SystemExit) as error:  # the one place that catches all, and raises again
        raise ForeignError(_told(error, users)) from error


def _told(error: BaseException, users: tuple[str, ...]) -> str:
    """`NameError: name 'y' is not defined (net.py line 12)`; the kind is left out where the words say it."""
    text = " ".join(str(error).split())
    if not text or not isinstance(error, PLAIN_ERRORS) or isinstance(error, NotImplementedError):
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    if len(text) > LONGEST_REASON:
        text = text[: LONGEST_REASON - 3] + "..."
    lines = [
        (frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if users and frame.f_globals.get("__name__", "").startswith(users)
    ]
    if not lines:
        return text
    file, line = lines[-1]
    place = f"{PurePath(file).name} line {line}"
    return text if text.startswith(place) else f"{text} ({place})"


def nearest(word: str, candidates: Iterable[str]) -> str:
    """Return `" Did you mean 'X'?"` for the candidate closest to `word`, or an empty string."""
    names = list(candidates)
    lowered = {name.lower(): name for name in names}
    for text, known in ((word, dict(zip(names, names))), (word.lower(), lowered)):
        if found := difflib.get_close_matches(text, known, n=1, cutoff=0.6):
            return f" Did you mean {known[found[0]]!r}?"
    return ""


def run_cli(main: Callable[[], None]) -> None:
    """Run a script's `main`; what a user can mend becomes one line on stderr and exit code 2.

    That is a `UserError`, or what the system refuses: a file for a folder, a full disk, a worker that
    it kills. Characters that the terminal's encoding lacks are printed as escapes.
    """
    _stop_at_sigterm()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            main()
        finally:
            _forget_workers()
    except UserError as error:
        _end(f"error: {error}", 2)
    except BrokenPipeError:
        raise
    except OSError as error:
        name = error.filename or _path_in_hand(error)
        place = f"{name}: " if name else ""
        reason = " ".join((error.strerror or str(error)).split())
        told = printable(f"{place}{reason}. Check the path, its rights and the disk.")
        _end(f"error: {told}", 2)
    except RuntimeError as error:
        if not (told := worker_death(error)):
            raise
        _end(f"error: {told}", 2)
    except KeyboardInterrupt as error:
        number = error.number if isinstance(error, StoppedError) else int(signal.SIGINT)
        _end(str(error) or "interrupted", 128 + number)


def _end(told: str, code: int) -> NoReturn:
    print(told, file=sys.stderr)
    sys.exit(code)


def _path_in_hand(error: BaseException) -> PurePath | None:
    """The innermost `path` that was worked with: a write that fails for want of room names no file."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    paths = (frame.f_locals.get("path") for frame in reversed(frames))
    return next((PurePath(path) for path in paths if isinstance(path, (str, PurePath))), None)


def worker_death(error: RuntimeError) -> str:
    """What to say of a data loader's worker that was killed; empty if `error` tells of something else.

    torch notices the death between any two steps of the main process and raises its error there.
    """
    text = " ".join(str(error).split()).rstrip(".")
    if "DataLoader worker" not in text:
        return ""
    return (
        f"data loader: {text}. Most often the machine or /dev/shm ran out of memory. Try --workers 0, "
        "fewer workers, or a smaller --batch-size; a training goes on with --resume."
    )


def _forget_workers() -> None:
    """Once the script has ended, the death of a data loader's worker is no news: torch would raise it anywhere."""
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _stop_at_sigterm() -> None:
    """Make SIGTERM unwind the script like Ctrl-C, so that files are closed and half ones removed."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise StoppedError(number)

    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, stop)
