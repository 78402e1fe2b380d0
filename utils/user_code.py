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
    with foreign_code(ForeignError, users=(PREFIX,)), findable(path.resolve().parent):
        return run_module(name_of(path), path)


def name_of(path: Path) -> str:
    """What the module of a user's file, or of a folder with an `__init__.py`, is called in this process."""
    return f"{PREFIX}{path.stem}_{sha256(str(path.resolve()).encode()).hexdigest()[:8]}"


def run_module(name: str, file: Path, folder: Path | None = None) -> ModuleType:
    """The module `name`, run from its file if it was not before; of a package, `folder` is where its parts lie.

    Raises:
        ForeignError: it is no Python file.
        Whatever its own code raises.
    """
    if name in sys.modules:
        return sys.modules[name]
    inside = [str(folder)] if folder else None
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=inside)
    if spec is None or spec.loader is None:
        raise ForeignError("is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for the names of annotations
    is_done = False
    try:
        spec.loader.exec_module(module)
        is_done = True
    finally:
        if not is_done:
            del sys.modules[name]
    return module


@contextmanager
def findable(folder: Path) -> Iterator[None]:
    """Let a file import what lies beside it, as it may where it is run as a script; names of ours go before."""
    before = list(sys.path)
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path[:] = before
