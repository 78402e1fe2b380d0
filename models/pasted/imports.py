"""Imports of pasted files: `from ultralytics.nn.modules import Conv` gives our `Conv`, an old path of timm the new one.

Every statement `import` of a user's file runs through `_import` below; nobody else's does. What a file really finds is left as
it is. What it does not find is looked up in the table of `models/pasted/families.py`; what is not there either is an
`ImportError` of one line, which a file may catch as any other.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from types import CodeType, ModuleType
from typing import Any

from models.pasted.families import Family, family_of
from models.pasted.statement import PastedImportError, Statement, alone, unknown, without_cuda
from utils.logger import get_logger

OWN_ROOMS = ("models", "utils", "data", "engine")
DROPPED_FILES = "models.modules."
PACKAGES = ("site-packages", "dist-packages")
BUILT_LATE = ("models.yolo",)
"""Ours, but it imports the users' files itself: what the table knows is taken from there."""

_plain_import = builtins.__import__
_told: set[str] = set()


@contextmanager
def pasted_imports() -> Iterator[None]:
    """Users' files that run inside the block find our stand-ins; also later, in imports inside their functions."""
    before = builtins.__import__
    builtins.__import__ = _import
    try:
        yield
    finally:
        builtins.__import__ = before


def _import(
    name: str,
    globals: Mapping[str, Any] | None = None,
    locals: Mapping[str, Any] | None = None,
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> ModuleType:
    """`__import__`, as Python calls it for every statement.

    Raises:
        PastedImportError: neither Python nor the table knows what a user's file asks for.
    """
    if not _is_users(globals):
        return _plain_import(name, globals, locals, fromlist or (), level)
    assert isinstance(globals, dict)
    globals["__builtins__"] = _BUILTINS  # where the functions of the file look for `__import__`
    frame = sys._getframe(1)
    _load_operators(frame.f_code)
    place = f"{PurePath(globals['__file__']).name} line {frame.f_lineno}"
    full = _absolute(name, level, globals)
    statement = Statement(name, tuple(fromlist or ()), level, full, place)
    return _resolve(statement, globals)


def _is_users(scope: Mapping[str, Any] | None) -> bool:
    """Whether the module with these globals is a file of a user: dropped into `models/modules/`, or outside of everything."""
    file, name = (scope or {}).get("__file__"), str((scope or {}).get("__name__"))
    if not isinstance(file, str) or name.startswith(DROPPED_FILES):
        return isinstance(file, str)
    is_ours = name.split(".")[0] in OWN_ROOMS
    return not is_ours and not file.startswith(_LIBRARIES) and not any(p in file for p in PACKAGES)


def _absolute(name: str, level: int, scope: Mapping[str, Any]) -> str:
    if not level:
        return name
    try:
        return importlib.util.resolve_name("." * level + name, scope.get("__package__"))
    except ImportError:
        return ""


def _resolve(statement: Statement, scope: dict[str, Any]) -> ModuleType:
    """What Python finds, where that has all the names; else what the table has for them."""
    beside = _beside(statement, scope)
    if beside is not None:
        return _run_beside(statement, scope, beside)
    asked = statement.name or ".".join(statement.names)  # `from . import conv`
    family = family_of(asked if statement.level else statement.full, statement.level)
    real: ModuleType | None = None
    if not _is_replaced(statement, family):
        try:
            real = _find(statement, scope)
        except ImportError as error:
            if not _is_absent(error, statement.full, family):
                raise
            if statement.needs_cuda:
                raise without_cuda(statement) from None
            if family is None:
                raise
    if family is None:
        if real is None:
            raise without_cuda(statement) if statement.needs_cuda else alone(statement)
        return real
    if real is not None and (statement.level or _has_all(real, statement)):
        return real
    return _stand_in(statement, family, real)


def _beside(statement: Statement, scope: dict[str, Any]) -> Path | None:
    """The file that `from .name import ...` means in a file that is no part of a package, if it lies there."""
    if statement.full or statement.level != 1 or not statement.name.isidentifier():
        return None
    path = Path(scope["__file__"]).parent / f"{statement.name}.py"
    return path if path.is_file() else None


def _run_beside(statement: Statement, scope: dict[str, Any], path: Path) -> ModuleType:
    """The module of a file beside the user's, run once for him."""
    name = f"{scope['__name__']}_{statement.name}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    is_done = False
    try:
        with pasted_imports():
            spec.loader.exec_module(module)
        is_done = True
    finally:
        if not is_done:
            del sys.modules[name]
    return module


def _is_replaced(statement: Statement, family: Family | None) -> bool:
    """Whether Python is not asked: it cannot be, or must not."""
    if not statement.full or family is None:
        return not statement.full
    late = statement.full in BUILT_LATE and set(statement.names) <= set(family.names())
    return family.replaces or late


def _find(statement: Statement, scope: dict[str, Any]) -> ModuleType:
    if not statement.full.startswith("timm."):
        return _plain_import(statement.name, scope, None, statement.names, statement.level)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Importing from timm|Overwriting .* in registry")
        return _plain_import(statement.name, scope, None, statement.names, statement.level)


def _is_absent(error: ImportError, full: str, family: Family | None) -> bool:
    """Whether the module itself is missing, or its CUDA extension, rather than something that it imports."""
    if isinstance(error, PastedImportError):
        return False
    is_missing = isinstance(error, ModuleNotFoundError) and bool(error.name)
    return (
        is_missing and f"{full}.".startswith(f"{error.name}.") or family is not None and family.cuda
    )


def _has_all(real: ModuleType, statement: Statement) -> bool:
    """Whether nothing is missing; of `import a.b` it cannot be known what will be asked for."""
    wanted = statement.names
    return bool(wanted) and "*" not in wanted and all(hasattr(real, name) for name in wanted)


def _stand_in(statement: Statement, family: Family, real: ModuleType | None) -> ModuleType:
    """A module with the names of `real`, those of the family where it lacks them."""
    names = family.names()
    leaf = sys.modules.get(statement.full) if real is not None else None
    module = _joined(statement.full or statement.name or "pasted", names, leaf)
    for name in statement.names:
        if name != "*" and not hasattr(module, name):
            if family_of(name, 1) is None:
                raise unknown(statement, family)
            setattr(module, name, _joined(name, names, None))  # `from . import conv`
    if family.told and family.told not in _told:
        _told.add(family.told)
        get_logger().info(f"{statement.place}: {statement.text()} - {family.told}")
    return module if statement.names else _with_parents(statement.full, module)


def _joined(name: str, names: Mapping[str, Any], real: ModuleType | None) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update({**names, **(vars(real) if real is not None else {})})
    module.__dict__.pop("__all__", None)  # `from ... import *` takes them all
    return module


def _with_parents(full: str, module: ModuleType) -> ModuleType:
    """The first package of `full`, from which attributes lead to `module`: what `import a.b` binds."""
    path = full.split(".")
    for end in range(len(path) - 1, 0, -1):
        parent = ".".join(path[:end])
        module = _joined(parent, {path[end]: module}, None)
        for name, value in vars(sys.modules.get(parent, module)).items():
            module.__dict__.setdefault(name, value)
    return module


def _load_operators(code: CodeType) -> None:
    """`torch.ops.torchvision` is there once torchvision is loaded, which a pasted file leaves to the others of its project."""
    codes = [code]
    for inner in codes:
        if {"ops", "torchvision"} <= set(inner.co_names):
            importlib.import_module("torchvision")
            return
        codes += [value for value in inner.co_consts if isinstance(value, CodeType)]


_BUILTINS = {**vars(builtins), "__import__": _import}
_LIBRARIES = tuple(
    sysconfig.get_path(kind) + os.sep for kind in ("stdlib", "platstdlib", "purelib", "platlib")
)
