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
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from utils.errors import CheckpointError
from utils.files import refuse_special
from utils.weight_files.unpickle import Interpreter, PickleError, shown
from utils.weight_files.unpickle_names import (
    REBUILD,
    VALUES,
    StorageRef,
    Storages,
    TensorRef,
    update,
)

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
MAX_HEADER = 1 << 26
GROWTH = 4  # half precision widens by 2, eight-bit floats by 4
SLACK = 1 << 20
ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    ValueError,
    LookupError,
    RuntimeError,
    OverflowError,
    OSError,
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
        path: where it was read.
        content: plain data with a `TensorRef` (safetensors: a tensor) for every tensor.
    """

    def __init__(self, path: Path, size: int, read_storage: Callable[[str], bytes]) -> None:
        self.path = path
        self.content: Any = None
        self._read = read_storage
        self._storages: dict[str, bytearray] = {}
        self._made: dict[tuple[Any, ...], Tensor] = {}
        self._budget = GROWTH * size + SLACK

    def tensor(self, reference: TensorRef) -> Tensor:
        """The tensor that `reference` describes; every floating type becomes float32.

        Raises:
            CheckpointError: it reaches beyond its storage, or the file asks for more memory than
                its size justifies.
        """
        made = self._made.get(reference.identity())
        if made is None:
            made = self._made[reference.identity()] = self._make(reference)
        return made

    def _make(self, reference: TensorRef) -> Tensor:
        key = reference.storage.key
        if key not in self._storages:
            self._storages[key] = bytearray(self._read(key))
        buffer = self._storages[key]
        expected = reference.storage.nbytes
        if len(buffer) < expected:
            raise PickleError(
                f"damaged: storage {shown(key)} has {len(buffer)} bytes, expected {expected}"
            )
        count = math.prod(reference.size)
        wide = reference.dtype.is_floating_point
        self._budget -= count * (4 if wide else reference.dtype.itemsize)
        if self._budget < 0:
            raise PickleError(
                "refused: its tensors take more memory than the size of the file justifies"
            )
        if count == 0:
            return torch.zeros(reference.size, dtype=torch.float32 if wide else reference.dtype)
        values = torch.frombuffer(
            buffer, dtype=reference.dtype, count=len(buffer) // reference.dtype.itemsize
        )
        view = values.as_strided(reference.size, reference.stride, reference.offset)
        return view.to(torch.float32 if wide else reference.dtype, copy=True).contiguous()


@contextmanager
def open_file(path: str | Path) -> Iterator[TensorFile]:
    """Open a weights file; nothing in it is run. Its tensors can be made while it is open.

    Raises:
        CheckpointError: there is no such file, it is damaged, of another format, or holds something
            other than plain data.
    """
    path = Path(path)
    try:
        refuse_special(path)
        with path.open("rb") as stream:
            size = stream.seek(0, io.SEEK_END)
            stream.seek(0)
            yield _read_stream(path, stream, size)
    except PickleError as error:
        raise CheckpointError(f"{path}: {error}.") from None
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
        return _read_zip(path, stream, size)
    if len(start) >= 10 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
        return _read_safetensors(path, stream, size)
    if start[:1] == b"\x80":
        return _read_legacy(path, stream, size)
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


def _read_zip(path: Path, stream: BinaryIO, size: int) -> TensorFile:
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
    file = TensorFile(path, size, lambda key: _entry(archive, folder + key))
    pickled = io.BytesIO(_entry(archive, f"{prefix}/data.pkl"))
    file.content = Interpreter(REBUILD, VALUES, storages, update).load(pickled)
    return file


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
        raise PickleError("refused: compressed entries, which torch.save never writes")
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


class _Clamped(io.RawIOBase):
    """A file that is never asked for more than it has: a read allocates what it is asked for."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self.stream = stream
        self.size = size

    def read(self, count: int = -1) -> bytes:
        left = self.size - self.stream.tell()
        return self.stream.read(left if count < 0 else min(count, left))

    def readline(self, count: int | None = -1) -> bytes:
        return self.stream.readline(-1 if count is None else count)

    def tell(self) -> int:
        return self.stream.tell()


def _read_legacy(path: Path, file_stream: BinaryIO, size: int) -> TensorFile:
    """`torch.save` before 1.6: four pickles, the storage keys, then the storages."""
    stream = _Clamped(file_stream, size)
    storages = Storages(None)
    interpreter = Interpreter(REBUILD, VALUES, storages, update)
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
        blocks[key] = _legacy_block(stream, storages.seen[key], size)
    if missing := storages.seen.keys() - blocks.keys():
        raise PickleError(f"damaged: storage {shown(min(missing))!r} is not in the file")
    file = TensorFile(path, size, blocks.__getitem__)
    file.content = content
    return file


def _legacy_block(stream: _Clamped, storage: StorageRef, size: int) -> bytes:
    """One storage: its number of elements in 8 bytes, then the elements."""
    header = stream.read(8)
    count = int.from_bytes(header, "little", signed=True)
    nbytes = count * storage.dtype.itemsize
    if len(header) < 8 or nbytes < storage.nbytes or nbytes > size - stream.tell():
        raise PickleError(f"damaged or cut short: storage {shown(storage.key)!r} is not whole")
    return stream.read(nbytes)


def _read_safetensors(path: Path, stream: BinaryIO, size: int) -> TensorFile:
    """A safetensors file: tensors by name, and text about them."""
    length = int.from_bytes(stream.read(8), "little")
    if length > MAX_HEADER:
        raise PickleError(f"refused: a header of {length} bytes")
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            keys = list(opened.keys())
            content: dict[str, Any] = {key: _widened(opened.get_tensor(key)) for key in keys}
    except (SafetensorError, ValueError, KeyError, RuntimeError, OSError) as error:
        raise PickleError(f"damaged: not a whole safetensors file ({shown(error)})") from None
    for key in ("config", "names"):
        if key in metadata and key not in content:
            content[key] = _json(metadata[key])
    file = TensorFile(path, size, lambda key: b"")
    file.content = content
    return file


def _widened(tensor: Tensor) -> Tensor:
    """Floating types as float32."""
    return tensor.float() if tensor.is_floating_point() else tensor


def _json(text: str) -> Any:
    """A value from text, JSON or a Python literal; None where it is neither."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None
