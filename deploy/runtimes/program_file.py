"""Reading a program of torch.export (`.pt2`) without running what it carries.

The library's own reader unpickles objects that a file asks it to, and evaluates the file's expressions
over sizes. A detector's program needs neither objects nor more than arithmetic, so a file with
anything else is refused before the library sees it.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from utils.errors import CheckpointError

MEMBERS = re.compile(
    r"data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)"
    r"|data/sample_inputs/model\.pt|models/model\.json|extra/[\w.]+"
    r"|archive_format|archive_version|byteorder|\.data/\w+"
)
OPERATORS = re.compile(
    r"torch\.ops\.(aten|prims|torchvision)\.\w+\.\w+|_operator\.\w+|math\.\w+|torch\.sym_\w+"
)
FUNCTIONS = frozenset(
    "Integer Symbol Mul Add Pow Min Max Mod PythonMod FloorDiv CeilDiv CleanDiv CeilToInt "
    "FloorToInt TruncToInt IntTrueDiv ToFloat Eq Ne Le Lt Ge Gt size sym_max sym_min".split()
)
MOST_CODE = 1 << 26  # bytes of a TorchScript file's code
SCRIPT_TRAPS = re.compile(rb"\b(?:save|from_file|load|read_file|write)\s*\(")
ZIP_ERRORS = (
    *(zipfile.BadZipFile, struct.error, zlib.error, RuntimeError, ValueError, OSError, EOFError),
    *(LookupError, AssertionError, TypeError, AttributeError, NotImplementedError, OverflowError),
)
ATTRIBUTES = frozenset({"size", "sym_max", "sym_min"})
EXPRESSION_KEYS = frozenset({"expr_str", "guards_code"})


def read_program(path: Path, extra: str) -> tuple[Any, str]:
    """The program in `path`, and its extra file called `extra`.

    Raises:
        CheckpointError: damaged, or with parts that a detector's program has not.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            fault = _fault(archive)
        if not fault:
            files = {extra: ""}
            with _silent():
                return torch.export.load(str(path), extra_files=files), files[extra]
    except ZIP_ERRORS as error:
        fault = " ".join(str(error).split())[:200] or type(error).__name__
    raise CheckpointError(
        f"{path}: cannot be loaded - {fault}. Expected a file that export.py wrote."
    )


@contextmanager
def _silent() -> Iterator[None]:
    """What fails is raised, and told in one line; torch logs its traceback as well."""
    log = logging.getLogger("torch.export")
    was_disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = was_disabled


def check_script(path: Path) -> None:
    """Refuse a TorchScript file before it is loaded, where it holds more than a network.

    Loading one runs code of its own language, which can open files by name.

    Raises:
        CheckpointError: it names such a function, or grows without measure.
    """
    with zipfile.ZipFile(path) as archive:
        fault = ""
        if sum(item.file_size for item in archive.infolist()) > path.stat().st_size + MOST_CODE:
            fault = "its parts claim far more bytes than it has"  # only code is compressed
        for item in archive.infolist() if not fault else []:
            if item.filename.endswith(".py") and (found := SCRIPT_TRAPS.search(archive.read(item))):
                fault = f"it calls {found.group().decode('ascii', 'replace')!r}"
    if fault:
        raise CheckpointError(
            f"{path}: cannot be loaded - {fault}. Expected a file that export.py wrote."
        )


def _packing_fault(archive: zipfile.ZipFile, size: int) -> str:
    """What is wrong with parts that are stored as they are, in a file of `size` bytes; empty if nothing."""
    parts = archive.infolist()
    if any(item.compress_type or item.file_size != item.compress_size for item in parts):
        return "it has compressed parts"
    if len({item.filename for item in parts}) != len(parts):
        return "it has two parts of one name"
    if sum(item.file_size for item in parts) > size:
        return "its parts claim more bytes than it has"
    return ""


def _fault(archive: zipfile.ZipFile) -> str:
    """What an archive has that it may not have; empty if nothing."""
    size = os.fstat(archive.fp.fileno()).st_size if archive.fp else 0
    if fault := _packing_fault(archive, size):
        return fault
    for name in archive.namelist():
        inner = name.partition("/")[2]
        if not MEMBERS.fullmatch(inner):
            return f"it has a part {name!r}"
        if inner.endswith("_config.json"):
            if _has_objects(json.loads(archive.read(name))):
                return f"{name} asks for objects to be unpickled"
        elif inner == "models/model.json":
            fault = _program_fault(json.loads(archive.read(name)))
            if fault:
                return fault
        elif inner.startswith("data/sample_inputs/"):
            try:
                torch.load(io.BytesIO(archive.read(name)), weights_only=True)
            except UnpicklingError:
                return f"{name} holds more than tensors"
    return ""


def _has_objects(config: Any) -> bool:
    return any(
        entry.get("use_pickle")
        or not re.fullmatch(r"(weight|tensor)_\d+", str(entry.get("path_name")))
        for entry in config["config"].values()
    )


def _program_fault(program: Any) -> str:
    for key, text in _texts(program):
        if key == "target" and not OPERATORS.fullmatch(text):
            return f"it calls {text[:80]!r}"
        if key in EXPRESSION_KEYS and not is_arithmetic(text):
            return f"it has the expression {text[:80]!r}"
    return ""


def _texts(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in nested JSON, with the key it stands under."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _texts(value, name)
    elif isinstance(tree, list):
        for value in tree:
            yield from _texts(value, key)
    elif isinstance(tree, str):
        yield key, tree


def is_arithmetic(text: str) -> bool:
    """Whether an expression only computes with sizes: known functions, no attribute beyond them."""
    called = set(re.findall(r"(\w+)\s*\(", text)) - {"and", "or", "not"}
    attributes = set(re.findall(r"\.\s*([A-Za-z_]\w*)", text))
    return (
        re.fullmatch(r"[\w\s()\[\]'.,+\-*/%<>=!]*", text) is not None
        and "__" not in text
        and called <= FUNCTIONS
        and attributes <= ATTRIBUTES
        and not re.search(r"[)\]]\s*\(", text)
    )
