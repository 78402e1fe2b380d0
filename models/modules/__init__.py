"""Backbones, and what users add. Every file and package in this folder is found; nothing else needs editing.

A file may register its layers (`@register(rule)`) or simply define a class or function under the name that the YAML uses: what
it is, a block, a neck or a backbone, shows when the parser tries it. `file.Name` means the class of a certain file.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from types import ModuleType

from models.pasted.imports import pasted_imports
from models.registry import Layer, LayerError, backbone, by_signature, find, registering_modules
from utils.errors import ForeignError, foreign_code
from utils.logger import get_logger
from utils.user_code import PREFIX, findable, name_of, run_module

_FILES: dict[str, ModuleType] = {}
_BROKEN: dict[str, str] = {}
_SEEN: ContextVar[set[str] | None] = ContextVar("seen", default=None)
PACKAGE = "__init__.py"
USER_CODE = (f"{__name__}.", PREFIX)
"""How the names of modules begin that users write."""


def _import_files() -> None:
    for info in pkgutil.iter_modules(__path__):
        try:
            with foreign_code(users=USER_CODE), pasted_imports():
                _FILES[info.name] = importlib.import_module(f"{__name__}.{info.name}")
        except ForeignError as error:
            # One broken file of a user must not take every other model down; it is named on a failed look-up.
            _BROKEN[f"models/modules/{info.name}.py"] = str(error)


def import_outside(path: Path) -> set[str]:
    """Run a user's Python file or package, once a process, and offer what it registers or defines; the caller has been
    allowed to.

    Returns:
        The names that its modules have in this process.

    Raises:
        ForeignError: it is missing, or its own code failed.
    """
    path = path.resolve()
    root = path
    while (
        root.parent / PACKAGE
    ).is_file():  # a package's file: its relative imports need the whole
        root = root.parent
    name = name_of(root)
    with foreign_code(ForeignError, users=USER_CODE), findable(root.parent), pasted_imports():
        is_package = root.is_dir()
        _FILES[name] = (
            run_module(name, root / PACKAGE, root) if is_package else run_module(name, root)
        )
        inside: list[str] = []
        if path != root:
            inside = [".".join((name, *path.relative_to(root).with_suffix("").parts))]
        elif is_package and not any(layer_of(_FILES[name], key) for key in vars(_FILES[name])):
            # It offers nothing itself: its files do.
            inside = [f"{name}.{info.name}" for info in pkgutil.iter_modules([str(root)])]
        _FILES.update({key: importlib.import_module(key) for key in inside})
    return {key for key in _FILES if key == name or key.startswith(f"{name}.")}


@contextmanager
def seeing(imported: set[str]) -> Iterator[None]:
    """Within the block, names mean what this folder and the modules `imported` define, and nothing that another model of this
    process has imported."""
    token = _SEEN.set(imported)
    try:
        yield
    finally:
        _SEEN.reset(token)


def _files() -> list[ModuleType]:
    seen = _SEEN.get()
    return [
        m for key, m in _FILES.items() if seen is None or key in seen or not key.startswith(PREFIX)
    ]


def find_pasted(name: str) -> Layer | None:
    """The layer called `name` that a file of this folder or an import defines; registered backbones among them.

    `file.Name` means the one of that file, whatever else has the name.

    Raises:
        LayerError: it is defined twice.
    """
    place, _, own_name = name.rpartition(".")
    if place:
        files = [module for module in _files() if _stem(module) == place]
        own = find(own_name)
        layers = (
            own if own and own.place[0] == m.__name__ else layer_of(m, own_name) for m in files
        )
        return next(filter(None, layers), None)
    registered = find(name)
    if registered is not None and registered.rule is not backbone:
        return None  # a user's own `Conv` is a part of his file
    found = _unregistered(name) + ([registered] if registered is not None else [])
    if len(found) > 1:
        places = " and ".join(sorted(_file_of(layer) for layer in found))
        ways = " or ".join(sorted(_full_name(layer) for layer in found))
        raise LayerError(f"is defined twice, in {places}. Write {ways}, or rename one of them.")
    return found[0] if found else None


def shadowed(name: str) -> str:
    """What a YAML should know that names the built-in `name`, where a user's file defines one too; "" otherwise."""
    registered = find(name)
    if registered is None or registered.rule is backbone or not (found := _unregistered(name)):
        return ""
    ways = " or ".join(map(_full_name, found))
    return (
        f"the built-in {name} is meant, not the one in {_file_of(found[0])}. Write {ways} for that."
    )


def _unregistered(name: str) -> list[Layer]:
    """The layers called `name` in files that register nothing; a package and its file may offer the same."""
    found = [layer for module in _unregistered_files() if (layer := layer_of(module, name))]
    return list({id(layer.build): layer for layer in found}.values())


def _full_name(layer: Layer) -> str:
    """`file.Name`."""
    return f"{_stem(sys.modules[layer.place[0]])}.{layer.name}"


def _stem(module: ModuleType) -> str:
    """What a file or package is called, without its suffix."""
    path = Path(str(module.__file__))
    return path.parent.name if path.name == PACKAGE else path.stem


def _file_of(layer: Layer) -> str:
    name = layer.place[0]
    if name.startswith(f"{__name__}."):
        return name.replace(".", "/") + ".py"
    return str(sys.modules[name].__file__)  # of an import, where it was found


def _unregistered_files() -> list[ModuleType]:
    """Files that register nothing: their classes may be named as they are. In a file that registers, only what it
    registers counts; its other classes are parts."""
    return [module for module in _files() if module.__name__ not in registering_modules()]


def layer_of(module: ModuleType, name: str) -> Layer | None:
    """The public class or function `name` that `module`, or a part of the package, itself defines."""
    if name.startswith("_"):
        return None
    value = vars(module).get(name)
    if not inspect.isclass(value) and not inspect.isfunction(value):
        return None
    is_own = f"{value.__module__}.".startswith(f"{module.__name__}.")
    return Layer(name, value, by_signature) if is_own else None


def names_in_file(name: str) -> list[str]:
    """What the user's file called `name` defines."""
    files = [module for module in _files() if _stem(module) == name]
    return sorted(key for module in files for key in vars(module) if layer_of(module, key))


def private_place(name: str) -> str:
    """`mine.py` where a user's file defines `_name`; "" where none does."""
    files = [m for m in _unregistered_files() if inspect.isclass(vars(m).get(f"_{name}"))]
    return f"{_stem(files[0])}.py" if files else ""


def public_names() -> list[str]:
    """Names of the classes and functions that the files of this folder define."""
    return sorted(
        name for module in _unregistered_files() for name in vars(module) if layer_of(module, name)
    )


def broken_files() -> dict[str, str]:
    """Files of this folder that could not be imported, with the reason."""
    return dict(_BROKEN)


@cache
def tell_broken_files() -> None:
    """Warn of them, once a process: their names may mean another backbone meanwhile."""
    for file, why in _BROKEN.items():
        get_logger().warning(f"{file}: could not be imported, what it defines is not known - {why}")


_import_files()
