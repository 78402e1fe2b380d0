"""Python files of users: run once a process, on leave, under a name that tells their lines in errors."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import ModuleType

from utils.errors import ForeignError, foreign_code

PREFIX = "yoke_import_"
"""How the names of such modules begin."""


def import_file(path: Path) -> ModuleType:
    """Run a user's file, or give back what it was when it ran before; the caller has been allowed to.

    Raises:
        ForeignError: it is no Python file, or its own code failed.
    """
    place = str(path.resolve())
    name = f"{PREFIX}{path.stem}_{sha256(place.encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ForeignError("is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for the names of annotations
    try:
        with foreign_code(users=(PREFIX,)), _findable(path.resolve().parent):
            spec.loader.exec_module(module)
    except ForeignError:
        del sys.modules[name]
        raise
    return module


@contextmanager
def _findable(folder: Path) -> Iterator[None]:
    """Let a file import what lies beside it, as it may where it is run as a script; names of ours go before."""
    before = list(sys.path)
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path[:] = before
