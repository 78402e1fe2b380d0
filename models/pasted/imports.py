"""Imports of pasted files: `from ultralytics.nn.modules import Conv` gives our `Conv`, an old path of timm the new one.

Every statement `import` of a user's file runs through `_import` below; nobody else's does. What a file really finds is left as
it is. What it does not find is looked up in the table of `models/pasted/families.py`; what is not there either is an
`ImportError` of one line, which a file may catch as any other.
"""

from __future__ import annotations

import builtins
import difflib
import importlib.util
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from types import CodeType, ModuleType
from typing import NamedTuple

from models.pasted.families import CUDA_ONLY, Family, family_of
from utils.errors import UserError, nearest
from utils.logger import get_logger
from utils.user_code import run_module

OWN_ROOMS = ("models", "utils", "data", "engine")
DROPPED_FILES = "models.modules."
PACKAGES = ("site-packages", "dist-packages")
BUILT_LATE = ("models.yolo",)
"""Ours, but it imports the users' files itself: what the table knows is taken from there."""

_plain_import = builtins.__import__
_told: set[str] = set()


class PastedImportError(UserError, ModuleNotFoundError):
    """A pasted file imports what is not known here; it may catch that as it would catch Python's own error."""


class Statement(NamedTuple):
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


def _without_cuda(statement: Statement) -> PastedImportError:
    """What to do about a CUDA extension that is not there."""
    missing = next(part for part in statement.path if part in CUDA_ONLY)
    return PastedImportError(
        f"{statement.place}: {statement.text()} - {missing} is not installed, needs a CUDA extension and has no equivalent "
        "here, expected layers of torch alone. Install it, or take a block without it"
    )


def _alone(statement: Statement) -> PastedImportError:
    """What to say of a relative import that leads nowhere."""
    told = f"{statement.place}: {statement.text()}"
    if statement.level == 1 and statement.name.isidentifier():
        own = statement.place.split(" ")[0]
        return PastedImportError(
            f"{told} - no {statement.name}.py lies beside {own}, and {_not_known(statement.names)}. Put the file there, or "
            "paste what is missing"
        )
    return PastedImportError(
        f"{told} - got a relative import in a file that stands alone, expected a name of its package. Name the package's "
        "folder, with an __init__.py, by `imports:`, or paste what is missing"
    )


def _not_known(names: Sequence[str]) -> str:
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} not known here"


def _unknown(statement: Statement, family: Family) -> PastedImportError:
    """What to say of names that neither a module nor the table has."""
    if statement.needs_cuda:
        return _without_cuda(statement)
    known = family.public()
    missing = [name for name in statement.names if name not in known and name != "*"]
    is_class = missing[0][0].isupper()
    alike = [name for name in known if name[0].isupper() == is_class]
    meant = nearest(missing[0], alike)
    if statement.level == 1 and not meant:
        return _alone(statement._replace(names=tuple(missing)))
    reason = _not_known(missing)
    if family.cuda:
        reason = f"{', '.join(missing)} needs a CUDA extension and has no equivalent here"
    some = ", ".join(difflib.get_close_matches(missing[0], alike, n=5, cutoff=0.0))
    return PastedImportError(
        f"{statement.place}: {statement.text(missing)} - {reason}, expected one of {some}, ... "
        f"({len(alike)} {'classes' if is_class else 'functions'}).{meant} Paste its "
        f"{'class' if is_class else 'code'} into the file"
    )


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
    globals: Mapping[str, object] | None = None,
    locals: Mapping[str, object] | None = None,
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
    file, full = PurePath(globals["__file__"]), name
    if level:
        try:
            full = importlib.util.resolve_name("." * level + name, globals.get("__package__"))
        except ImportError:
            full = ""
            beside = Path(file.parent, f"{name}.py")
            if level == 1 and name.isidentifier() and beside.is_file():
                with pasted_imports():
                    return run_module(f"{globals['__name__']}_{name}", beside)
    place = f"{file.name} line {frame.f_lineno}"
    return _resolve(Statement(name, tuple(fromlist or ()), level, full, place), globals)


def _is_users(scope: Mapping[str, object] | None) -> bool:
    """Whether the module with these globals is a file of a user: dropped into `models/modules/`, or outside of everything."""
    file, name = (scope or {}).get("__file__"), str((scope or {}).get("__name__"))
    if not isinstance(file, str) or name.startswith(DROPPED_FILES):
        return isinstance(file, str)
    is_ours = name.split(".")[0] in OWN_ROOMS
    return not is_ours and not file.startswith(_LIBRARIES) and not any(p in file for p in PACKAGES)


def _resolve(statement: Statement, scope: dict[str, object]) -> ModuleType:
    """What Python finds, where that has all the names; else what the table has for them."""
    asked = statement.name or ".".join(statement.names)  # `from . import conv`
    family = family_of(asked if statement.level else statement.full, statement.level)
    real: ModuleType | None = None
    if statement.full and not (family is not None and _is_replaced(statement, family)):
        try:
            with warnings.catch_warnings():
                told = "Importing from timm|Overwriting .* in registry"
                warnings.filterwarnings("ignore", message=told)
                real = _plain_import(statement.name, scope, None, statement.names, statement.level)
        except ImportError as error:
            if not _is_absent(error, statement.full, family):
                raise
            if statement.needs_cuda:
                raise _without_cuda(statement) from None
            if family is None:
                raise
    elif family is None:
        raise _without_cuda(statement) if statement.needs_cuda else _alone(statement)
    if real is not None and (family is None or statement.level or _has_all(real, statement)):
        return real
    assert family is not None
    return _stand_in(statement, family, real)


def _is_replaced(statement: Statement, family: Family) -> bool:
    """Whether Python must not be asked."""
    late = statement.full in BUILT_LATE and set(statement.names) <= set(family.names())
    return family.replaces or late


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
                raise _unknown(statement, family)
            setattr(module, name, _joined(name, names, None))  # `from . import conv`
    if family.told and family.told not in _told:
        _told.add(family.told)
        get_logger().info(f"{statement.place}: {statement.text()} - {family.told}")
    return module if statement.names else _with_parents(statement.full, module)


def _joined(name: str, names: Mapping[str, object], real: ModuleType | None) -> ModuleType:
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
