"""The names that a weights file may mention, and what code of ours makes of each.

Tensors become `TensorRef`s: descriptions, every number of which is checked against the storage.
Containers become dicts, lists and tuples, NumPy scalars become numbers. Whatever is not in these
tables is a stub or is refused (`utils/weight_files/unpickle.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from utils.weight_files.unpickle import Name, PickleError, Stub, check_key, refused, shown

MAX_DIMENSIONS = 16
STORAGE_TYPES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Byte": torch.uint8,
    "Char": torch.int8,
    "Short": torch.int16,
    "Int": torch.int32,
    "Long": torch.int64,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
}
DTYPES = [
    *("half", "float", "double", "short", "int", "long", "bool", "complex64", "complex128"),
    *("float16", "float32", "float64", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
    *("float8_e4m3fnuz", "float8_e5m2fnuz", "int8", "int16", "int32", "int64"),
    *("uint8", "uint16", "uint32", "uint64"),
]
NUMPY_TYPES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")


class StorageRef(NamedTuple):
    """A storage of the file: its key and how many bytes its owner says it has."""

    key: str
    dtype: torch.dtype
    nbytes: int
    view_offset: int = 0  # in elements; legacy files may store views of a storage


class TensorRef:
    """A tensor of the file, not read yet. Sizes and strides are in elements."""

    __slots__ = ("storage", "dtype", "offset", "size", "stride")

    def __init__(
        self,
        storage: StorageRef,
        dtype: torch.dtype,
        offset: int,
        size: tuple[int, ...],
        stride: tuple[int, ...],
    ) -> None:
        self.storage = storage
        self.dtype = dtype
        self.offset = offset
        self.size = size
        self.stride = stride

    def identity(self) -> tuple[Any, ...]:
        """Equal for references to the same numbers in the same shape."""
        return (self.storage.key, self.dtype, self.offset, self.size, self.stride)


class NumpyType(NamedTuple):
    """A NumPy dtype of the file, as text such as `f8`; its byte order arrives separately."""

    text: str


class NumpyArray:
    """A NumPy array whose numbers arrive with its state; what it is made with says nothing."""

    __slots__ = ("value",)

    def __init__(self, _: tuple[Any, ...] = ()) -> None:
        self.value: np.ndarray[Any, Any] | None = None


def _pairs(args: tuple[Any, ...]) -> dict[Any, Any]:
    """A dictionary of what an OrderedDict or a dict was given: nothing, pairs, or another one."""
    given = args[0] if args else ()
    if isinstance(given, dict):
        return dict(given)
    if not isinstance(given, (list, tuple)):
        raise PickleError(f"damaged: a dictionary of {type(given).__name__}")
    pairs = [
        (pair[0], pair[1]) for pair in given if isinstance(pair, (list, tuple)) and len(pair) == 2
    ]
    if len(pairs) != len(given):
        raise PickleError("damaged: a dictionary of something other than pairs")
    for key, _ in pairs:
        check_key(key)
    return dict(pairs)


def _sequence(args: tuple[Any, ...]) -> Any:
    """The items of a list, set or tuple that was given."""
    if len(args) > 1 or (args and not isinstance(args[0], (list, tuple))):
        raise PickleError("damaged: a sequence of something other than items")
    return args[0] if args else []


def _factory_dict(args: tuple[Any, ...]) -> dict[Any, Any]:
    """A defaultdict without its factory."""
    return _pairs(args[1:])


def _encode(args: tuple[Any, ...]) -> bytes:
    """Bytes, which protocol 2 writes as text in Latin-1."""
    if (
        len(args) not in (1, 2)
        or not isinstance(args[0], str)
        or args[1:] not in ((), ("latin1",), ("latin-1",))
    ):
        raise PickleError("damaged: bytes of something other than Latin-1 text")
    return args[0].encode("latin-1")


def _bytes(args: tuple[Any, ...]) -> bytes:
    """`bytes()`, `bytearray(b'..')` or `bytearray('..', 'latin-1')`."""
    if not args:
        return b""
    return args[0] if isinstance(args[0], bytes) else _encode(args)


def _reconstruct(args: tuple[Any, ...]) -> Stub:
    """`copyreg._reconstructor(class, base, state)`."""
    if not args or not isinstance(args[0], Name):
        raise PickleError("damaged: an object without a class")
    return Stub(str(args[0]), args[1:])


def _integers(value: Any, what: str) -> tuple[int, ...]:
    """`value` as a short tuple of sane non-negative integers."""
    if not isinstance(value, (tuple, list)) or len(value) > MAX_DIMENSIONS:
        raise PickleError(f"damaged: {what} is no short list of numbers")
    if not all(type(item) is int and 0 <= item < 1 << 48 for item in value):
        raise PickleError(f"damaged: {what} holds something other than sizes")
    return tuple(value)


def _tensor(args: tuple[Any, ...], dtype: torch.dtype | None = None) -> TensorRef:
    """`(storage, offset, size, stride, ...)` as a reference that stays inside the storage."""
    if len(args) < 4 or not isinstance(args[0], StorageRef):
        raise PickleError("damaged: a tensor without a storage")
    storage = args[0]
    dtype = dtype or storage.dtype
    size, stride = _integers(args[2], "a tensor's shape"), _integers(args[3], "a tensor's stride")
    offset = _integers([args[1]], "a tensor's offset")[0] + storage.view_offset
    if len(size) != len(stride):
        raise PickleError("damaged: a tensor's shape and stride differ in length")
    count, available = math.prod(size), storage.nbytes // dtype.itemsize
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count and (last >= available or count > available):
        raise PickleError(
            f"damaged: a tensor of shape {size} reaches beyond its storage of {available} elements"
        )
    return TensorRef(storage, dtype, offset, size, stride)


def _typed_tensor(args: tuple[Any, ...]) -> TensorRef:
    """A tensor of an untyped storage: `(storage, offset, size, stride, grad, hooks, dtype)`."""
    if len(args) < 7 or not isinstance(args[6], torch.dtype):
        raise PickleError("damaged: a tensor without a type")
    return _tensor(args, args[6])


def _first(args: tuple[Any, ...]) -> Any:
    """What a Parameter wraps."""
    if not args or not isinstance(args[0], (TensorRef, Stub)):
        raise PickleError("damaged: a parameter without a tensor")
    return args[0]


def _subclass_tensor(args: tuple[Any, ...]) -> TensorRef:
    """`(function, class, arguments, state)`: a tensor that carries attributes."""
    if len(args) < 3 or not isinstance(args[0], Name) or not isinstance(args[2], tuple):
        raise PickleError("damaged: a tensor without a storage")
    name = str(args[0])
    if name not in TENSORS:
        raise refused(f"a call of {name}")
    return TENSORS[name](args[2])


def _numpy_type(args: tuple[Any, ...]) -> NumpyType:
    """A numeric dtype such as `f8`; any other has no text, its arrays no value."""
    text = args[0] if args else None
    return NumpyType(text if text in NUMPY_TYPES else "")


def _from_buffer(kind: Any, data: Any) -> np.ndarray[Any, Any]:
    """The numbers in `data`, little-endian."""
    if not isinstance(kind, NumpyType) or not isinstance(data, (bytes, str)):
        raise PickleError("damaged: a NumPy array without numbers")
    raw = data.encode("latin-1") if isinstance(data, str) else data
    return np.frombuffer(raw, dtype=np.dtype(kind.text).newbyteorder("<"))


def _numpy_scalar(args: tuple[Any, ...]) -> Any:
    """A NumPy scalar as a Python number; text and dates stay stubs."""
    if len(args) != 2:
        raise PickleError("damaged: a NumPy scalar without its value")
    if args[0] == NumpyType(""):
        return Stub("numpy.scalar", args)
    values = _from_buffer(args[0], args[1])
    if values.size != 1:
        raise PickleError("damaged: a NumPy scalar without its number")
    return values.item()


def update(target: Any, state: Any) -> None:
    """Give a rebuilt object its state; containers and tensors carry their content elsewhere."""
    if isinstance(target, NumpyArray):
        if not isinstance(state, tuple) or len(state) != 5:
            raise PickleError("damaged: a NumPy array without its state")
        if state[2] == NumpyType(""):
            return
        shape, values = _integers(state[1], "an array's shape"), _from_buffer(state[2], state[4])
        if math.prod(shape) != values.size:
            raise PickleError(f"damaged: an array of shape {shape} with {values.size} numbers")
        target.value = values.reshape(shape, order="F" if state[3] is True else "C").copy()
    elif isinstance(target, NumpyType) and isinstance(state, tuple) and len(state) > 1:
        if isinstance(state[1], str) and state[1] == ">":
            raise PickleError(
                "refused: a big-endian NumPy array. Write it with a little-endian machine"
            )
    elif not isinstance(target, (dict, list, TensorRef, NumpyType)):
        raise PickleError(f"damaged: a state for {type(target).__name__}")


TENSORS: dict[str, Callable[[tuple[Any, ...]], TensorRef]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
}
REBUILD: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    **TENSORS,
    "torch._tensor._rebuild_from_type_v2": _subclass_tensor,
    "torch.Size": lambda args: tuple(_sequence(args)),
    "torch.device": lambda args: str(args[0]) if args and isinstance(args[0], str) else "cpu",
    "collections.OrderedDict": _pairs,
    "collections.Counter": _pairs,
    "collections.defaultdict": _factory_dict,
    "collections.deque": lambda args: _sequence(args[:1]),
    "_codecs.encode": _encode,
    "copyreg._reconstructor": _reconstruct,
    "copy_reg._reconstructor": _reconstruct,
    **{
        f"{b}.{name}": _sequence
        for b in ("builtins", "__builtin__")
        for name in ("set", "frozenset", "list", "tuple")
    },
    **{
        f"{b}.{name}": _bytes
        for b in ("builtins", "__builtin__")
        for name in ("bytes", "bytearray")
    },
    **{f"{b}.dict": _pairs for b in ("builtins", "__builtin__")},
    "numpy.dtype": _numpy_type,
    **{f"numpy.{c}.multiarray.scalar": _numpy_scalar for c in ("core", "_core")},
    **{f"numpy.{c}.multiarray._reconstruct": lambda _: NumpyArray() for c in ("core", "_core")},
}
# Classes of the standard library that hold plain values: objects of them are stubs.
PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
PLAIN_CLASSES = {
    "argparse": ("Namespace",),
    "builtins": ("object", "slice", "range", "complex"),
    "__builtin__": ("object", "slice", "xrange", "complex"),
    "datetime": ("datetime", "date", "timedelta", "timezone"),
    "pathlib": PATHS,
    "pathlib._local": PATHS,
    "types": ("SimpleNamespace",),
}
for _module, _names in PLAIN_CLASSES.items():
    for _dotted in (f"{_module}.{_name}" for _name in _names):
        REBUILD[_dotted] = partial(Stub, _dotted)
VALUES: dict[str, Any] = {
    f"torch.{name}": getattr(torch, name) for name in DTYPES if hasattr(torch, name)
}
VALUES |= {f"torch.{name}Storage": dtype for name, dtype in STORAGE_TYPES.items()}
VALUES |= {f"torch.cuda.{name}Storage": dtype for name, dtype in STORAGE_TYPES.items()}
VALUES |= {
    "torch.storage.UntypedStorage": torch.uint8,
    "torch.storage._UntypedStorage": torch.uint8,
}
VALUES |= {"torch.UntypedStorage": torch.uint8}


def _storage(identity: Any) -> Any:
    """A persistent id `('storage', type, key, device, elements[, view])` as a reference."""
    if not isinstance(identity, tuple) or len(identity) < 2:
        raise PickleError("damaged: a persistent id that names no storage")
    if identity[0] == "module":  # legacy files carry source text beside a class
        return identity[1]
    if identity[0] != "storage" or len(identity) not in (5, 6):
        raise PickleError("damaged: a persistent id that names no storage")
    dtype, key = identity[1], identity[2]
    if not isinstance(dtype, torch.dtype) or not isinstance(key, str) or len(key) > 64:
        raise PickleError("damaged: a persistent id without type and key")
    view = identity[5] if len(identity) == 6 else None
    offset = (
        _integers([view[1]], "a view's offset")[0]
        if isinstance(view, tuple) and len(view) == 3
        else 0
    )
    return StorageRef(
        key, dtype, _integers([identity[4]], "a storage's size")[0] * dtype.itemsize, offset
    )


class Storages:
    """Persistent ids of one stream, each checked against the bytes that the file has for it."""

    def __init__(self, sizes: dict[str, int] | None) -> None:
        self.sizes = sizes
        self.seen: dict[str, StorageRef] = {}

    def __call__(self, identity: Any) -> Any:
        found = _storage(identity)
        if not isinstance(found, StorageRef):
            return found
        if self.sizes is not None and found.key not in self.sizes:
            raise PickleError(f"damaged: storage {shown(found.key)!r} is not in the file")
        if self.sizes is not None and found.nbytes > self.sizes[found.key]:
            got = self.sizes[found.key]
            raise PickleError(
                f"damaged: storage {shown(found.key)!r} has {got} bytes, expected {found.nbytes}"
            )
        self.seen[found.key] = found
        return found
