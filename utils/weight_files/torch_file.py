"""Files of tensors as other projects write them: torch's zip and legacy formats, and safetensors.

`open_file` gives what is inside as plain data in which every tensor is a `TensorRef`, a
description, and `TensorFile.tensor` makes the tensor. No number of a file is believed: storages are
measured against the bytes that are there, shapes and strides against their storage, and no more
memory is taken than a small multiple of the file's size.

Formats after the documentation of `torch.save` (zip: `<name>/data.pkl` and `<name>/data/<key>`,
stored; legacy: magic number, protocol, system info, object, storage keys, storages) and of
safetensors.
"""

from __future__ import annotations

import ast
import io
import json
import math
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from utils.errors import CheckpointError
from utils.files import special_kind
from utils.weight_files.unpickle import Interpreter
from utils.weight_files.unpickle_names import PickleError, StorageRef, Storages, TensorRef, shown

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
MAX_HEADER = 1 << 26
GROWTH = 4  # half precision widens by 2, eight-bit floats by 4
SLACK = 1 << 20
MAX_DEPTH = 64
MAX_VISITS = 1_000_000
ZIP_ERRORS = (
    *(zipfile.BadZipFile, struct.error, EOFError, ValueError, LookupError, RuntimeError),
    *(OverflowError, OSError),
)
KNOWN_STARTS = {
    b"version https://": "a Git LFS pointer: fetch the real file with git lfs pull",
    b"\x89HDF": "an HDF5 file",
    b"<": "a web page: the download went wrong",
    b"\x1f\x8b": "a gzip archive",
    b"\x08": "perhaps an ONNX file",
}


class TensorFile:
    """An opened file: its content as plain data, and a way to its tensors.

    Attributes:
        content: plain data with a `TensorRef` (safetensors: a tensor) for every tensor, and a `Stub`
            for every object of an unknown class.
    """

    def __init__(self, content: object, size: int, read_storage: Callable[[str], bytes]) -> None:
        self.content = content
        self._read = read_storage
        self._storages: dict[str, bytearray] = {}
        self._made: dict[str, Tensor] = {}  # by text, whose hash nobody can choose
        self._budget = GROWTH * size + SLACK

    def tensor(self, reference: TensorRef) -> Tensor:
        """The tensor that `reference` describes.

        Raises:
            PickleError: it reaches beyond its storage, or the file asks for more memory than its
                size justifies.
        """
        made = self._made.get(repr(reference))
        if made is None:
            made = self._made[repr(reference)] = self._make(reference)
        return made

    def _make(self, reference: TensorRef) -> Tensor:
        dtype, key, expected = reference.dtype, reference.storage.key, reference.storage.nbytes
        if key not in self._storages:
            self._storages[key] = bytearray(self._read(key))
        buffer = self._storages[key]
        if len(buffer) < expected:
            raise PickleError(
                f"damaged: storage {shown(key)} has {len(buffer)} bytes, expected {expected}"
            )
        count = math.prod(reference.size)
        self._budget -= count * max(dtype.itemsize, 4 if dtype.is_floating_point else 1)
        if self._budget < 0:
            raise PickleError(
                "refused: its tensors take more memory than the size of the file justifies"
            )
        if count == 0:
            return torch.zeros(reference.size, dtype=dtype)
        values = torch.frombuffer(buffer, dtype=dtype, count=len(buffer) // dtype.itemsize)
        return values.as_strided(reference.size, reference.stride, reference.offset).clone()


def plain(value: object, tensor: Callable[[TensorRef], Tensor] | None = None) -> object:
    """A copy of containers, numbers and text, with None for everything else.

    Args:
        value: a part of a file's content, which may be nested and shared without end.
        tensor: makes the tensors; None leaves them out, too.

    Raises:
        PickleError: it is too large or too deeply nested.
    """
    count = 0

    def copied(value: object, depth: int) -> object:
        nonlocal count
        count += 1
        if count > MAX_VISITS or depth > MAX_DEPTH:
            raise PickleError("refused: its plain data are too large or too deeply nested")
        if isinstance(value, dict):
            keys = [key for key in value if isinstance(key, (str, int))]
            return {key: copied(value[key], depth + 1) for key in keys}
        if isinstance(value, (list, tuple)):
            return [copied(item, depth + 1) for item in value]
        if isinstance(value, TensorRef) and tensor is not None:
            return tensor(value)
        return value if isinstance(value, (str, int, float)) else None

    return copied(value, 0)


@contextmanager
def open_file(path: str | Path) -> Iterator[TensorFile]:
    """Open a weights file; nothing in it is run. Its tensors can be made while it is open.

    Raises:
        PickleError: it is damaged, of another format, or holds something other than plain data; so
            for what goes wrong inside the `with` block.
        CheckpointError: there is no such file, or it cannot be read.
    """
    path = Path(path)
    try:
        if kind := special_kind(path):
            raise CheckpointError(f"{path}: got {kind}, expected a .pt file or .safetensors.")
        with path.open("rb") as stream:
            size = stream.seek(0, io.SEEK_END)
            stream.seek(0)
            yield _read_stream(path, stream, size)
    except PickleError as error:
        raise PickleError(f"{path}: {error}.") from None
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no such file. Nothing is downloaded: put the weights there first."
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read - {shown(error.strerror or error)}."
        ) from None


def _read_stream(path: Path, stream: BinaryIO, size: int) -> TensorFile:
    """Tell the format by the first bytes, and read it."""
    start = stream.read(16)
    stream.seek(0)
    if start[:4] == b"PK\x03\x04":
        return _read_zip(stream, size)
    if len(start) >= 10 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
        return _read_safetensors(path, start)
    if start[:1] == b"\x80":
        return _read_legacy(io.BytesIO(stream.read()))
    raise PickleError(
        f"not a weights file - {_guess(start)}. Expected a .pt of torch.save, or .safetensors"
    )


def _guess(start: bytes) -> str:
    """What a file that is none of ours seems to be."""
    if not start:
        return "the file is empty"
    for head, text in KNOWN_STARTS.items():
        if start.startswith(head):
            return text
    return f"it begins with {start[:8]!r}"


def _read_zip(stream: BinaryIO, size: int) -> TensorFile:
    """`torch.save` since 1.6: a zip of stored entries."""
    try:
        archive = zipfile.ZipFile(stream)
    except ZIP_ERRORS as error:
        raise PickleError(f"damaged or cut short: not a whole zip file ({shown(error)})") from None
    prefix = _check_entries(archive, size)
    sizes = {item.filename: item.file_size for item in archive.infolist()}
    if f"{prefix}/byteorder" in sizes and _entry(archive, f"{prefix}/byteorder") != b"little":
        raise PickleError(
            "refused: written by a big-endian machine. Save it on a little-endian one"
        )
    folder = f"{prefix}/data/"
    storages = Storages({n[len(folder) :]: sizes[n] for n in sizes if n.startswith(folder)})
    pickled = io.BytesIO(_entry(archive, f"{prefix}/data.pkl"))
    content = Interpreter(storages).load(pickled)
    return TensorFile(content, size, lambda key: _entry(archive, folder + key))


def _check_entries(archive: zipfile.ZipFile, size: int) -> str:
    """The folder of a torch.save zip, after making sure that its entries are what torch writes."""
    entries = archive.infolist()
    names = {item.filename for item in entries}
    folders = [n.partition("/")[0] for n in names if n.count("/") == 1 and n.endswith("/data.pkl")]
    if len(folders) != 1:
        raise PickleError("a zip, but not one of torch.save. Expected a .pt file")
    if f"{folders[0]}/constants.pkl" in names:
        raise PickleError("a TorchScript program, not weights. Use the .pt it was exported from")
    if any(item.compress_type or item.file_size != item.compress_size for item in entries):
        raise PickleError("refused: it has compressed parts, which torch.save never writes")
    if len(names) != len(entries) or sum(item.file_size for item in entries) > size:
        raise PickleError("refused: its entries claim more bytes than the file has")
    return folders[0]


def _entry(archive: zipfile.ZipFile, name: str) -> bytes:
    """The bytes of one entry, its checksum verified."""
    try:
        return archive.read(name)
    except ZIP_ERRORS as error:
        raise PickleError(
            f"damaged: entry {shown(name)!r} cannot be read ({shown(error)})"
        ) from None


def _read_legacy(stream: io.BytesIO) -> TensorFile:
    """`torch.save` before 1.6: four pickles, the storage keys, then the storages."""
    storages = Storages()
    interpreter = Interpreter(storages)
    if interpreter.load(stream) != LEGACY_MAGIC:
        raise PickleError("a pickle, but not one of torch.save. Expected a .pt file")
    if interpreter.load(stream) != LEGACY_PROTOCOL:
        raise PickleError("not a weights file of a torch version that is known")
    if interpreter.load(stream) is None:
        raise PickleError("damaged: no system information")
    content = interpreter.load(stream)
    keys = interpreter.load(stream)
    if not isinstance(keys, list):
        raise PickleError("damaged: no list of storages")
    blocks: dict[str, bytes] = {}
    for key in keys:
        if not isinstance(key, str) or key not in storages.seen or key in blocks:
            raise PickleError(
                f"damaged: storage {shown(key)!r} belongs to no tensor, or comes twice"
            )
        blocks[key] = _legacy_block(stream, storages.seen[key])
    if missing := storages.seen.keys() - blocks.keys():
        raise PickleError(f"damaged: storage {shown(min(missing))!r} is not in the file")
    return TensorFile(content, stream.tell(), blocks.__getitem__)


def _legacy_block(stream: io.BytesIO, storage: StorageRef) -> bytes:
    """One storage: its number of elements in 8 bytes, then the elements."""
    header = stream.read(8)
    nbytes = int.from_bytes(header, "little", signed=True) * storage.dtype.itemsize
    left = len(stream.getbuffer()) - stream.tell()
    if len(header) < 8 or not storage.nbytes <= nbytes <= left:
        raise PickleError(f"damaged or cut short: storage {shown(storage.key)!r} is not whole")
    return stream.read(nbytes)


def _read_safetensors(path: Path, start: bytes) -> TensorFile:
    """A safetensors file: tensors by name, and text about them."""
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER:
        raise PickleError(f"refused: a header of {length} bytes")
    content: dict[str, object] = {}
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            for key in opened.keys():  # noqa: SIM118
                content[key] = opened.get_tensor(key)
    except (SafetensorError, ValueError, KeyError, RuntimeError, OSError) as error:
        raise PickleError(f"damaged: not a whole safetensors file ({shown(error)})") from None
    for key in ("config", "names"):
        if key in metadata and key not in content:
            content[key] = _json(metadata[key])
    return TensorFile(content, 0, lambda key: b"")


def _json(text: str) -> object:
    """A value from text, JSON or a Python literal; None where it is neither."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None
