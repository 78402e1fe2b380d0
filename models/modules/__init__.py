"""Backbones: image -> list of feature maps. Every file in this folder is found; nothing else needs editing.

A file may register its layers (`@register(backbone)`) or simply define a class or function under the name that the
YAML uses, which then counts as a backbone.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import ModuleType

from models.registry import Layer, LayerError, backbone, find, registering_modules
from utils.errors import ForeignError, foreign_code
from utils.logger import get_logger

_FILES: dict[str, ModuleType] = {}
_BROKEN: dict[str, str] = {}
_TOLD: set[str] = set()
USER_CODE = (f"{__name__}.", "yoke_import_")
"""How the names of modules begin that users write."""


def _import_files() -> None:
    for info in pkgutil.iter_modules(__path__):
        try:
            with foreign_code(users=USER_CODE):
                _FILES[info.name] = importlib.import_module(f"{__name__}.{info.name}")
        except ForeignError as error:
            # One broken file of a user must not take every other model down; it is named on a failed look-up.
            _BROKEN[f"models/modules/{info.name}.py"] = str(error)


def import_outside(path: Path) -> None:
    """Run a user's Python file, once a process, and offer what it registers or defines; the caller has been allowed to.

    Raises:
        ForeignError: the file is missing, or its own code failed.
    """
    place = str(path.resolve())
    name = f"yoke_import_{path.stem}_{sha256(place.encode()).hexdigest()[:8]}"
    if name in _FILES:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ForeignError("is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for the names of annotations
    try:
        with foreign_code(users=USER_CODE), _findable(path.resolve().parent):
            spec.loader.exec_module(module)
    except ForeignError:
        del sys.modules[name]
        raise
    _FILES[name] = module


@contextmanager
def _findable(folder: Path) -> Iterator[None]:
    """Let a file import what lies beside it, as it may where it is run as a script; names of ours go before."""
    before = list(sys.path)
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path[:] = before


def find_backbone(name: str) -> Layer | None:
    """The backbone called `name`: registered, or a class or function that a file simply defines.

    Raises:
        LayerError: it is defined twice.
    """
    registered = find(name)
    if registered is not None and registered.rule is not backbone:
        return None  # a user's own `Conv` is a part of his file
    found = [layer for module in _unregistered_files() if (layer := layer_of(module, name))]
    found += [registered] if registered is not None else []
    if len(found) > 1:
        places = " and ".join(sorted(_file_of(layer) for layer in found))
        raise LayerError(f"is defined twice, in {places}. Rename one of them.")
    return found[0] if found else None


def _file_of(layer: Layer) -> str:
    name = layer.build.__module__
    if name.startswith(f"{__name__}."):
        return name.replace(".", "/") + ".py"
    return str(getattr(sys.modules.get(name), "__file__", name))  # of an import, where it was found


def _unregistered_files() -> list[ModuleType]:
    """Files that register nothing: their classes may be named as they are. In a file that registers, only what it
    registers counts; its other classes are parts."""
    return [module for module in _FILES.values() if module.__name__ not in registering_modules()]


def layer_of(module: ModuleType, name: str) -> Layer | None:
    """The public class or function `name` that `module` itself defines, as a backbone."""
    if name.startswith("_"):
        return None
    value = vars(module).get(name)
    is_own = getattr(value, "__module__", None) == module.__name__
    if is_own and (inspect.isclass(value) or inspect.isfunction(value)):
        return Layer(name, value, backbone)
    return None


def public_names() -> list[str]:
    """Names of the classes and functions that the files of this folder define."""
    return sorted(
        name for module in _unregistered_files() for name in vars(module) if layer_of(module, name)
    )


def broken_files() -> dict[str, str]:
    """Files of this folder that could not be imported, with the reason."""
    return dict(_BROKEN)


def tell_broken_files() -> None:
    """Warn of them, once a process: their names may mean another backbone meanwhile."""
    for file, why in _BROKEN.items():
        if file not in _TOLD:
            get_logger().warning(
                f"{file}: could not be imported, what it defines is not known - {why}"
            )
            _TOLD.add(file)


_import_files()
