"""What a user can cause and mend: raised where it is noticed, printed as one line, exit code 2.

The form is *where: what - got, expected. what to do.*
"""

from __future__ import annotations

import difflib
import io
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """Base of every error that the user can mend; the scripts print it without a traceback."""


class ConfigError(UserError):
    """A model YAML, a hyper-parameter file or a command-line value is wrong."""


class DatasetError(UserError):
    """A data YAML, a label file or a folder of images is wrong."""


class CheckpointError(UserError):
    """A weights file cannot be read, or does not fit the model."""


FOREIGN_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, MemoryError, NameError,
    NotImplementedError, OSError, RuntimeError, SyntaxError, TypeError, ValueError, ConfigError,
)  # fmt: skip
"""What a user's code, or a library's, may raise on what it is given; weights that cannot be read keep their own error."""


def nearest(word: str, candidates: Iterable[str]) -> str:
    """Return `" Did you mean 'X'?"` for the candidate closest to `word`, or an empty string."""
    names = list(candidates)
    found = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if not found:
        lowered = {name.lower(): name for name in names}
        found = [
            lowered[m] for m in difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.6)
        ]
    return f" Did you mean {found[0]!r}?" if found else ""


def run_cli(main: Callable[[], None]) -> None:
    """Run a script's `main`; what a user can mend becomes one line on stderr and exit code 2.

    That is a `UserError`, or what the system refuses: a file for a folder, a full disk. Characters
    that the terminal's encoding lacks are printed as escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        raise
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        reason = " ".join((error.strerror or str(error)).split())
        print(f"error: {place}{reason}. Check the path, its rights and the disk.", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
