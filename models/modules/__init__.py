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
from hashlib import sha256
from pathlib import Path
from types import ModuleType

from models.registry import Layer, backbone, registering_modules
from utils.errors import FOREIGN_ERRORS

_FILES: dict[str, ModuleType] = {}
_BROKEN: dict[str, str] = {}


def _import_files() -> None:
    for info in pkgutil.iter_modules(__path__):
        try:
            _FILES[info.name] = importlib.import_module(f"{__name__}.{info.name}")
        except FOREIGN_ERRORS as error:
            # One broken file of a user must not take every other model down; it is named on a failed look-up.
            _BROKEN[f"models/modules/{info.name}.py"] = f"{type(error).__name__}: {error}"


def import_outside(path: Path) -> None:
    """Run a user's Python file, once a process, and offer what it registers or defines; the caller has been allowed to.

    Raises:
        OSError, ImportError, SyntaxError, ...: whatever the file's own code raises.
    """
    place = str(path.resolve())
    name = f"yoke_import_{path.stem}_{sha256(place.encode()).hexdigest()[:8]}"
    if name in _FILES:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for the names of annotations
    try:
        spec.loader.exec_module(module)
    except FOREIGN_ERRORS:
        del sys.modules[name]
        raise
    _FILES[name] = module


def find_unregistered(name: str) -> Layer | None:
    """A class or function called `name` that a file of this folder defines, as a backbone."""
    found = (layer_of(module, name) for module in _unregistered_files())
    return next((layer for layer in found if layer), None)


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


_import_files()
