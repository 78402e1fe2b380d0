"""Texts that are run as files of a user."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from models.pasted.imports import pasted_imports

NAME = "yoke_import_pasted"


@pytest.fixture
def run(tmp_path: Path) -> Iterator:
    """Run a text as a user's file and give its module; nothing of it stays."""
    before = dict(sys.modules)

    def execute(text: str, file: str = "x.py") -> ModuleType:
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        is_package = path.name == "__init__.py"
        spec = importlib.util.spec_from_file_location(
            NAME, path, submodule_search_locations=[str(path.parent)] if is_package else None
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[NAME] = module
        with pasted_imports():
            spec.loader.exec_module(module)
        return module

    yield execute
    for name in [name for name in sys.modules if name.startswith(NAME)]:
        del sys.modules[name]
    assert {
        n: sys.modules[n] for n in before if n in sys.modules and not n.startswith(NAME)
    } == before
