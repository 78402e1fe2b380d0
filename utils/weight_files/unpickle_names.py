"""The names that a weights file may mention, and what code of ours makes of each.

Tensors become `TensorRef`s: descriptions, every number of which is checked against the storage.
Containers become dicts, lists and tuples, NumPy scalars become numbers. Of other names classes
become `Stub`s; functions, and names of the standard library, are refused.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from utils.errors import CheckpointError

MAX_DIMENSIONS = 16
MAX_KEY_ITEMS = 8
MAX_TEXT = 100
LARGEST_NUMBER = 1 << 60
LARGEST_SHAPE = 1 << 40
STORAGE_TYPES = {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Byte": torch.uint8, "Char": torch.int8, "Short": torch.int16, "Int": torch.int32, "Long": torch.int64,
    "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
    "Untyped": torch.uint8, "_Untyped": torch.uint8,
}  # fmt: skip
DTYPES = [
    *("half", "float", "double", "short", "int", "long", "bool", "complex64", "complex128"),
    *("float16", "float32", "float64", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
    *("float8_e4m3fnuz", "float8_e5m2fnuz", "int8", "int16", "int32", "int64"),
    *("uint8", "uint16", "uint32", "uint64"),
]
NUMPY_TYPES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")
# Other names of modules whose names are known below.
SAME_MODULES = {
    "__builtin__": "builtins",
    "copy_reg": "copyreg",
    "numpy._core.multiarray": "numpy.core.multiarray",
    "pathlib._local": "pathlib",
    "torch.cuda": "torch",
    "torch.storage": "torch",
}
# What Python 2 called modules of the standard library, and their twins in C.
OLD_STANDARD_NAMES = """
__builtin__ copy_reg cPickle commands exceptions Queue StringIO cStringIO urllib2 imp distutils
asyncore posix nt os2 ce popen2 new sets sitecustomize
""".split()
STANDARD_NAMES = frozenset(sys.stdlib_module_names).union(OLD_STANDARD_NAMES)
# Classes of the standard library that hold plain values: objects of them are stubs.
PLAIN_CLASSES = frozenset(
    """
argparse.Namespace types.SimpleNamespace builtins.object builtins.slice builtins.range builtins.xrange
builtins.complex datetime.datetime datetime.date datetime.timedelta datetime.timezone pathlib.Path
pathlib.PosixPath pathlib.WindowsPath pathlib.PurePath pathlib.PurePosixPath pathlib.PureWindowsPath
""".split()
)


class PickleError(CheckpointError):
    """A pickle stream is refused or damaged; the reader of the file puts its path in front."""


@dataclass(frozen=True)
class Name:
    """A dotted name that a stream mentions; it is text, nothing stands behind it."""

    dotted: str


class Stub:
    """An object of a class that is not known here.

    Attributes:
        state: what its `__setstate__` or `__dict__` would have been given, or None.
    """

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state: object = None

    def attributes(self) -> dict[object, object]:
        """The attributes that the object would have; empty when its state is no dictionary."""
        state = self.state
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[0], dict):
            state = state[0]
        return state if isinstance(state, dict) else {}


class StorageRef(NamedTuple):
    """A storage of the file: its key and how many bytes its owner says it has."""

    key: str
    dtype: torch.dtype
    nbytes: int
    view_offset: int = 0  # in elements; legacy files may store views of a storage


@dataclass(frozen=True)
class TensorRef:
    """A tensor of the file, not read yet. Offset, size and stride are in elements."""

    storage: StorageRef
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class NumpyArray:
    """A NumPy array; its numbers arrive with its state, those of other types than numbers never."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: np.ndarray | None = None


def shown(text: object) -> str:
    """`text` from a file, fit for a one-line message: printable and short."""
    plain = isinstance(text, (str, int, float, BaseException))
    clean = ascii(str(text))[1:-1] if plain else type(text).__name__
    return clean if len(clean) <= MAX_TEXT else f"{clean[:MAX_TEXT]}..."


def refused(name: object) -> PickleError:
    """The error for a name that must not occur in a weights file."""
    return PickleError(
        f"refused: the file asks for {shown(name)}, which weights never need. Nothing in it was run"
    )


def resolve(module: str, name: str) -> object:
    """What a mentioned name stands for: an allowed value, or a `Name`.

    Raises:
        PickleError: a name of the standard library that is not allowed.
    """
    known = f"{SAME_MODULES.get(module, module)}.{name}"
    if known in VALUES:
        return VALUES[known]
    if known in REBUILD or known in PLAIN_CLASSES:
        return Name(known)
    dotted = f"{module}.{name}"
    inner = name.partition(".")[0] if "." in name else ""
    if not STANDARD_NAMES.isdisjoint((module.partition(".")[0], inner)):
        raise refused(dotted)
    return Name(dotted)


def store(target: dict[object, object], items: Sequence[object]) -> None:
    """Put keys and values, in turn, into a dictionary.

    Values under a tuple are left out: weights have none, and hashes of tuples can be chosen to collide.

    Raises:
        PickleError: a value without key, or a key that is not cheap to hash, or that can be chosen
            to collide with others.
    """
    if len(items) % 2:
        raise PickleError("damaged: a key without a value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        for part in key if isinstance(key, tuple) and len(key) <= MAX_KEY_ITEMS else (key,):
            if isinstance(part, int) and abs(part) >= LARGEST_NUMBER:
                raise PickleError("refused: it has numbers beyond 2**60 as keys of a dictionary")
            if not isinstance(part, (str, bytes, int, float, type(None), Name, Stub)):
                raise PickleError(f"damaged: {type(part).__name__} as a dictionary key")
        if not isinstance(key, tuple):
            target[key] = value


Arguments = tuple[object, ...]


def _pairs(args: Arguments) -> dict[object, object]:
    """A dictionary of what an OrderedDict or a dict was given: nothing, pairs, or another one."""
    given = args[0] if args else ()
    if isinstance(given, dict):
        return dict(given)
    pairs = given if isinstance(given, (list, tuple)) else (None,)
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise PickleError("damaged: a dictionary of something other than pairs")
    made: dict[object, object] = {}
    store(made, [*chain.from_iterable(pairs)])
    return made


def _sequence(args: Arguments) -> list[object]:
    """The items of a list, set or tuple that was given."""
    match args:
        case ():
            return []
        case ((list() | tuple()) as items,):
            return [*items]
    raise PickleError("damaged: a sequence of something other than items")


def _encode(args: Arguments) -> bytes:
    """Bytes, which protocol 2 writes as text in Latin-1."""
    match args:
        case (str() as text,) | (str() as text, "latin1" | "latin-1"):
            return text.encode("latin-1")
    raise PickleError("damaged: bytes of something other than Latin-1 text")


def _bytes(args: Arguments) -> bytes:
    """`bytes()`, `bytearray(b'..')` or `bytearray('..', 'latin-1')`."""
    match args:
        case ():
            return b""
        case (bytes() as data, *_):
            return data
    return _encode(args)


def _object(args: Arguments) -> Stub:
    """`copyreg._reconstructor(class, base, state)`."""
    if not args or not isinstance(args[0], Name):
        raise PickleError("damaged: an object without a class")
    return Stub()


def _integers(value: object, what: str) -> tuple[int, ...]:
    """`value` as a short tuple of sane non-negative integers."""
    if not isinstance(value, (tuple, list)) or len(value) > MAX_DIMENSIONS:
        raise PickleError(f"damaged: {what} is no short list of numbers")
    if not all(type(item) is int and 0 <= item < 1 << 48 for item in value):
        raise PickleError(f"damaged: {what} holds something other than sizes")
    return tuple(value)


def _tensor(args: Arguments, dtype: torch.dtype | None = None) -> TensorRef:
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
    is_beyond = count and (last >= available or count > available)
    if is_beyond or math.prod(n or 1 for n in size) > LARGEST_SHAPE:  # so that no shapes collide
        raise PickleError(f"damaged: it has a tensor {size} that is not stored whole")
    return TensorRef(storage, dtype, offset, size, stride)


def _typed_tensor(args: Arguments) -> TensorRef:
    """A tensor of an untyped storage: `(storage, offset, size, stride, grad, hooks, dtype)`."""
    if len(args) < 7 or not isinstance(args[6], torch.dtype):
        raise PickleError("damaged: a tensor without a type")
    return _tensor(args, args[6])


def _parameter(args: Arguments) -> TensorRef | Stub:
    """What a Parameter wraps."""
    if not args or not isinstance(args[0], (TensorRef, Stub)):
        raise PickleError("damaged: a parameter without a tensor")
    return args[0]


def _subclass_tensor(args: Arguments) -> object:
    """`(function, class, arguments, state)`: a tensor that carries attributes."""
    match args:
        case (Name(dotted), _, tuple() as inner, *_):
            if dotted not in TENSORS:
                raise refused(f"a call of {dotted}")
            return TENSORS[dotted](inner)
    raise PickleError("damaged: a tensor without a storage")


def _numpy_type(args: Arguments) -> np.dtype | Stub:
    """A numeric dtype such as `f8`; its byte order arrives with its state. Others have no numbers."""
    text = args[0] if args else None
    return np.dtype(text) if isinstance(text, str) and text in NUMPY_TYPES else Stub()


def _from_buffer(kind: object, data: object) -> np.ndarray:
    """The numbers in `data`, little-endian."""
    if not isinstance(kind, np.dtype) or not isinstance(data, (bytes, str)):
        raise PickleError("damaged: a NumPy array without numbers")
    raw = data.encode("latin-1") if isinstance(data, str) else data
    return np.frombuffer(raw, dtype=kind.newbyteorder("<"))


def _numpy_scalar(args: Arguments) -> object:
    """A NumPy scalar as a Python number; text and dates stay stubs."""
    match args:
        case (Stub(), _):
            return Stub()
        case (kind, data) if (values := _from_buffer(kind, data)).size == 1:
            return values.item()
    raise PickleError("damaged: a NumPy scalar without its number")


def give_state(target: object, state: object) -> None:
    """Give an object that we rebuilt its state; containers and tensors carry their content elsewhere."""
    match target, state:
        case NumpyArray(), (_, _, Stub(), _, _):
            return
        case NumpyArray(), (_, size, kind, order, data):
            shape, values = _integers(size, "an array's shape"), _from_buffer(kind, data)
            if math.prod(shape) != values.size:
                raise PickleError(f"damaged: an array of shape {shape} with {values.size} numbers")
            target.value = values.reshape(shape, order="F" if order is True else "C").copy()
        case np.dtype(), (_, ">", *_):
            raise PickleError(
                "refused: a big-endian NumPy array. Write it with a little-endian machine"
            )
        case ((dict() | list() | TensorRef() | np.dtype()), _):
            return
        case _:
            raise PickleError(f"damaged: a state for {type(target).__name__}")


TENSORS: dict[str, Callable[[Arguments], object]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
REBUILD: dict[str, Callable[[Arguments], object]] = {
    **TENSORS,
    "torch._tensor._rebuild_from_type_v2": _subclass_tensor,
    "torch.Size": lambda args: tuple(_sequence(args)),
    "torch.device": lambda args: str(args[0]) if args and isinstance(args[0], str) else "cpu",
    "collections.OrderedDict": _pairs,
    "collections.Counter": _pairs,
    "collections.defaultdict": lambda args: _pairs(args[1:]),
    "collections.deque": lambda args: _sequence(args[:1]),
    "_codecs.encode": _encode,
    "copyreg._reconstructor": _object,
    **dict.fromkeys(
        (f"builtins.{name}" for name in ("set", "frozenset", "list", "tuple")), _sequence
    ),
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytes,
    "builtins.dict": _pairs,
    "numpy.dtype": _numpy_type,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy.core.multiarray._reconstruct": lambda _: NumpyArray(),
}
VALUES: dict[str, torch.dtype] = {
    **{f"torch.{name}": vars(torch)[name] for name in DTYPES if name in vars(torch)},
    **{f"torch.{name}Storage": dtype for name, dtype in STORAGE_TYPES.items()},
}


class Storages:
    """Persistent ids of one stream, each checked against the bytes that the file has for it.

    Args:
        sizes: bytes of the storages by key; None where the file tells them behind the stream.
    """

    def __init__(self, sizes: dict[str, int] | None = None) -> None:
        self.sizes = sizes
        self.seen: dict[str, StorageRef] = {}

    def find(self, identity: object) -> object:
        """What `('storage', type, key, device, elements[, view])` names, as a `StorageRef`."""
        match identity:
            case ("module", code, *_):  # legacy files carry source text beside a class
                return code
            case ("storage", torch.dtype() as dtype, str() as key, _, count, *rest) if (
                len(key) <= 64 and len(rest) < 2
            ):
                view = rest[0] if rest else None
                start = view[1] if isinstance(view, tuple) and len(view) == 3 else 0
                nbytes = _integers([count], "a storage's size")[0] * dtype.itemsize
                found = StorageRef(key, dtype, nbytes, _integers([start], "a view's offset")[0])
            case _:
                raise PickleError("damaged: a persistent id that names no storage")
        has = nbytes if self.sizes is None else self.sizes.get(key)
        if has is None:
            raise PickleError(f"damaged: storage {shown(key)!r} is not in the file")
        if nbytes > has:
            raise PickleError(f"damaged: storage {shown(key)!r} has {has} bytes, expected {nbytes}")
        self.seen[key] = found
        return found
