"""Imports of pasted files: `from ultralytics.nn.modules import Conv` gives our `Conv`, an old path of timm the new one.

Every statement `import` of a user's file runs through `_import` below; nobody else's does. What a file really finds is left as
it is. What it does not find is looked up in the table of `models/pasted/families.py`; what is not there either is an
`ImportError` of one line, which a file may catch as any other.
"""

from __future__ import annotations

import builtins
import difflib
import importlib
import importlib.util
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from types import CodeType, ModuleType
from typing import Any, NamedTuple

from models.pasted.families import CUDA_ONLY, Family, family_of
from utils.errors import UserError, nearest
from utils.logger import get_logger

ROOT = Path(__file__).resolve().parents[2]
OWN_ROOMS = ("models", "utils", "data", "engine")
DROPPED_FILES = "models.modules."
BUILT_LATE = ("models.yolo",)
"""Ours, but it imports the users' files itself: what the table knows is taken from there."""

_plain_import = builtins.__import__
_told: set[str] = set()


class PastedImportError(UserError, ModuleNotFoundError):
    """A pasted file imports what is not known here; it may catch that as it would catch Python's own error."""


class _Statement(NamedTuple):
    """An import statement of a user's file; `full` is "" where a relative name has no package to start from."""

    name: str
    names: tuple[str, ...]
    level: int
    full: str
    place: str

    @property
    def path(self) -> list[str]:
        """Packages and the module, as far as they are known."""
        return (self.full or self.name).split(".")

    @property
    def needs_cuda(self) -> bool:
        """Whether it asks for a CUDA extension that nothing stands for."""
        return not CUDA_ONLY.isdisjoint(self.path)

    def text(self, names: Sequence[str] = ()) -> str:
        """`from models.common import Foo`."""
        module = "." * self.level + self.name
        names = names or self.names
        return f"from {module} import {', '.join(names)}" if names else f"import {module}"


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
    statement = _Statement(name, tuple(fromlist or ()), level, full, place)
    return _resolve(statement, globals)


def _is_users(scope: Mapping[str, Any] | None) -> bool:
    """Whether the module with these globals is a file of a user: dropped into `models/modules/`, or outside of everything."""
    file = (scope or {}).get("__file__")
    if not scope or not isinstance(file, str):
        return False
    if str(scope.get("__name__")).startswith(DROPPED_FILES):
        return True
    packages = ("site-packages", "dist-packages")
    return not file.startswith(_NOT_USERS) and not any(part in file for part in packages)


def _absolute(name: str, level: int, scope: Mapping[str, Any]) -> str:
    if not level:
        return name
    try:
        return importlib.util.resolve_name("." * level + name, scope.get("__package__"))
    except ImportError:
        return ""


def _resolve(statement: _Statement, scope: dict[str, Any]) -> ModuleType:
    """What Python finds, where that has all the names; else what the table has for them."""
    asked = statement.name or ".".join(
        statement.names
    )  # a relative name, without the package of the file
    family = family_of(asked if statement.level else statement.full, statement.level)
    real: ModuleType | None = None
    if not _is_replaced(statement, family):
        try:
            real = _find(statement, scope)
        except ImportError as error:
            if not _is_absent(error, statement.full, family):
                raise
            if family is None or statement.needs_cuda:
                raise _absent(statement, error) from None
    if family is None:
        if real is None:
            raise _absent(statement, None) if statement.needs_cuda else _alone(statement)
        return real
    if real is not None and (statement.level or _has_all(real, statement)):
        return real
    return _stand_in(statement, family, real)


def _is_replaced(statement: _Statement, family: Family | None) -> bool:
    """Whether Python is not asked: it cannot be, or must not."""
    if not statement.full or family is None:
        return not statement.full
    late = statement.full in BUILT_LATE and set(statement.names) <= set(family.names())
    return family.replaces or late


def _find(statement: _Statement, scope: dict[str, Any]) -> ModuleType:
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


def _has_all(real: ModuleType, statement: _Statement) -> bool:
    """Whether nothing is missing; of `import a.b` it cannot be known what will be asked for."""
    wanted = statement.names
    return bool(wanted) and "*" not in wanted and all(hasattr(real, name) for name in wanted)


def _stand_in(statement: _Statement, family: Family, real: ModuleType | None) -> ModuleType:
    """A module with the names of `real`, those of the family where it lacks them."""
    names = family.names()
    leaf = sys.modules.get(statement.full) if real is not None else None
    module = _joined(statement.full or statement.name or "pasted", names, leaf)
    for name in statement.names:
        if name != "*" and not hasattr(module, name):
            if family_of(name, 1) is None:
                raise _unknown(statement, family)
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


def _absent(statement: _Statement, error: ImportError | None) -> ImportError:
    """Python's own error, or what to do about a CUDA extension."""
    if error is not None and not statement.needs_cuda:
        return error
    missing = next(part for part in statement.path if part in CUDA_ONLY)
    return PastedImportError(
        f"{statement.place}: {statement.text()} - {missing} is not installed, needs a CUDA extension and has no equivalent "
        "here, expected layers of torch alone. Install it, or take a block without it."
    )


def _alone(statement: _Statement) -> ImportError:
    return PastedImportError(
        f"{statement.place}: {statement.text()} - got a relative import in a file that stands alone, expected a name of a "
        "package. Name its folder, with an __init__.py, by `imports:`, or paste what is missing into the file."
    )


def _unknown(statement: _Statement, family: Family) -> ImportError:
    if statement.needs_cuda:
        return _absent(statement, None)
    known = family.public()
    missing = [name for name in statement.names if name not in known and name != "*"]
    is_class = missing[0][0].isupper()
    alike = [name for name in known if name[0].isupper() == is_class]
    if family.cuda:
        reason = "needs a CUDA extension and has no equivalent here"
    else:
        reason = "is not known here" if len(missing) == 1 else "are not known here"
    some = ", ".join(difflib.get_close_matches(missing[0], alike, n=5, cutoff=0.0))
    return PastedImportError(
        f"{statement.place}: {statement.text(missing)} - {', '.join(missing)} {reason}, expected one of {some}, ... "
        f"({len(alike)} {'classes' if is_class else 'functions'}).{nearest(missing[0], alike)} Paste its "
        f"{'class' if is_class else 'code'} into the file."
    )


_BUILTINS = {**vars(builtins), "__import__": _import}
_NOT_USERS = (
    *(f"{ROOT / room}/" for room in OWN_ROOMS),
    *(f"{sysconfig.get_path(kind)}/" for kind in ("stdlib", "platstdlib", "purelib", "platlib")),
    "<",
)
