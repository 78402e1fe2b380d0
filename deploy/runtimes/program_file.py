"""Reading a program of torch.export (`.pt2`) without running what it carries.

The library's own reader unpickles objects that a file asks it to, evaluates the file's expressions over
sizes, and writes Python of the names that stand in it. A detector's program needs no objects, no more
than arithmetic and no other names than words, so a file with anything else is refused before the library
sees it. The form of these files was read in torch 2.14.
"""

from __future__ import annotations

import ast
import io
import json
import logging
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch.export import ExportedProgram

from deploy.runtimes.artifact import loading
from utils.errors import CheckpointError

MEMBERS = {
    "": {"archive_format", "archive_version", "byteorder"},
    "models": {"model.json"},
    "data/sample_inputs": {"model.pt"},
    "data/weights": {"weight_", "model_weights_config.json"},
    "data/constants": {"tensor_", "model_constants_config.json"},
}
"""What each folder of a file may have; a number stands behind names that end in `_`."""
FREE_FOLDERS = {"extra", ".data"}  # texts, which are handed back
FILE_CALLS = {"save", "from_file", "load", "read_file", "write", "write_file"}
"""Operators that open files by name."""
VISION = {"nms", "deform_conv2d", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool"}
ARITHMETIC = set(
    "add sub mul floordiv truediv mod pow neg pos abs eq ne lt le gt ge and_ or_ not_ lshift rshift "
    "trunc getitem ceil floor sqrt".split()
)
SIZES = {"size", "sym_max", "sym_min"}
FUNCTIONS = SIZES | set(
    "Integer Mul Add Pow Min Max Mod PythonMod FloorDiv CeilDiv CleanDiv CeilToInt "
    "FloorToInt TruncToInt IntTrueDiv ToFloat Eq Ne Le Lt Ge Gt".split()
)
SILENT = {"metadata", "torch_version", "as_string"}  # told to people, or an operator's argument
WEIGHT_NAMES = {"parameter_name", "buffer_name", "tensor_constant_name", "fqn"}
"""Keys of names that a user's modules may have any characters in; they are written into quotes."""
CONTAINERS = {None, "builtins.tuple", "builtins.list", "builtins.dict"}


def reads_programs() -> bool:
    """Whether this torch packs programs as they are read here; not yet in torch 2.8.

    The import, of torch's compiler, takes a second, so only who has such a file asks.
    """
    try:
        from torch.export.pt2_archive import constants
    except ImportError:  # torch 2.4
        return False
    return hasattr(constants, "WEIGHTS_CONFIG_FILENAME_FORMAT")


def read_program(path: Path, extra: str) -> tuple[ExportedProgram, str]:
    """The program in `path`, and its extra file called `extra`.

    Raises:
        CheckpointError: damaged, or with parts that a detector's program has not.
    """
    with loading(path), _silent():
        with zipfile.ZipFile(path) as archive:
            fault = _packing_fault(archive, path.stat().st_size) or _fault(archive)
        if fault:
            raise CheckpointError(
                f"{path}: cannot be loaded - {fault}. Expected a file that export.py wrote."
            )
        files = {extra: ""}
        return torch.export.load(str(path), extra_files=files), files[extra]


@contextmanager
def _silent() -> Iterator[None]:
    """What fails is raised, and told in one line; torch logs its traceback as well."""
    log = logging.getLogger("torch.export")
    was_disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = was_disabled


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
    for name in archive.namelist():
        folder, _, member = name.partition("/")[2].rpartition("/")
        if folder in FREE_FOLDERS:
            continue
        if _unnumbered(member) not in MEMBERS.get(folder, ()):
            return f"it has a part {name!r}"
        if member == "model.json":
            if fault := program_fault(json.loads(archive.read(name))):
                return fault
        elif member.endswith("_config.json"):
            entries = json.loads(archive.read(name))["config"].values()
            paths = (_unnumbered(str(entry["path_name"])) for entry in entries)
            if any(e.get("use_pickle") for e in entries) or not {*paths} <= {"weight_", "tensor_"}:
                return f"{name} asks for objects to be unpickled"
        elif member == "model.pt":
            try:
                torch.load(io.BytesIO(archive.read(name)), weights_only=True)
            except UnpicklingError:
                return f"{name} holds more than tensors"
    return ""


def _unnumbered(name: str) -> str:
    """`weight_` of `weight_12`; other names as they are."""
    start, bar, number = name.rpartition("_")
    return start + bar if number.isdecimal() else name


def program_fault(tree: object, key: str = "") -> str:
    """What a program has that it may not have; empty if nothing.

    Args:
        tree: the program, or a part of it, as JSON gives it.
        key: what the part stands under.
    """
    parts: list[tuple[str, object]] = []
    if isinstance(tree, dict):
        odd = (name for name in tree if not (_is_path(name) or is_arithmetic(name)))
        if (name := next(odd, None)) is not None:
            return f"it has the name {name[:80]!r}"
        parts = [(name, part) for name, part in tree.items() if name not in SILENT]
    elif isinstance(tree, list):
        parts = [(key, part) for part in tree]
    elif isinstance(tree, str):
        return _text_fault(tree, key)
    return next((fault for name, part in parts if (fault := program_fault(part, name))), "")


def _text_fault(text: str, key: str) -> str:
    if key in ("target", "as_operator"):
        return "" if _is_operator(text) else f"it calls {text[:80]!r}"
    if key in ("expr_str", "guards_code"):
        return "" if is_arithmetic(text) else f"it has the expression {text[:80]!r}"
    if key in ("in_spec", "out_spec"):
        is_good = not text or _is_container(json.loads(text)[1])
        return "" if is_good else f"it packs its tensors as {text[:80]!r}"
    is_quotable = text.isprintable() and not {*text} & {*"\"'\\"}
    is_good = _is_path(text) or (key in WEIGHT_NAMES and is_quotable)
    return "" if is_good else f"it has the name {text[:80]!r}"


def _is_operator(target: str) -> bool:
    match target.split("."):
        case ["torch", "ops", "aten" | "prims", name, _]:
            return _is_path(target) and name not in FILE_CALLS
        case ["torch", "ops", "torchvision", name, _]:
            return _is_path(target) and name in VISION
        case ["_operator" | "math", name]:
            return name in ARITHMETIC
        case ["torch", name]:
            return name.isidentifier() and name.startswith("sym_")
    return False


def _is_path(text: str) -> bool:
    """Whether it is empty, or words and numbers between dots."""
    return not text or all(f"_{word}".isidentifier() for word in text.split("."))


def _is_container(spec: dict[str, object]) -> bool:
    """Whether a tree of tensors is tuples, lists and mappings by words."""
    keys = json.loads(str(spec["context"] or "null")) or []
    children = spec["children_spec"]
    return (
        spec["type"] in CONTAINERS
        and all(isinstance(name, str) and name.isidentifier() for name in keys)
        and isinstance(children, list)
        and all(_is_container(child) for child in children)
    )


def is_arithmetic(text: str) -> bool:
    """Whether an expression only computes with sizes: known functions, no attribute beyond them."""
    try:
        return _computes(ast.parse(text, mode="eval").body)
    except SyntaxError:
        return False


def _computes(node: ast.expr) -> bool:
    match node:
        case ast.Constant(value=bool() | int() | float()):
            return True
        case ast.Name(id=name):
            return "__" not in name
        case ast.Subscript(value=ast.Name(id="L"), slice=ast.Constant(value=str(name))):
            return name.isidentifier()
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str(name))]):
            return name.isidentifier() and all(_computes(word.value) for word in node.keywords)
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), keywords=[]):
            inner = [node.func.value] if isinstance(node.func, ast.Attribute) else []
            return name in FUNCTIONS and all(map(_computes, [*inner, *node.args]))
        case ast.Attribute(value=value, attr=attr):
            return attr in SIZES and _computes(value)
        case ast.Subscript(value=value, slice=index):
            return _computes(value) and _computes(index)
        case ast.BinOp(left=left, right=right):
            return _computes(left) and _computes(right)
        case ast.UnaryOp(operand=operand):
            return _computes(operand)
        case ast.BoolOp(values=values):
            return all(map(_computes, values))
        case ast.Compare(left=left, comparators=others):
            return all(map(_computes, [left, *others]))
    return False
