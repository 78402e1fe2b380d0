"""Pickle streams as plain data: an interpreter that can call nothing.

`pickletools.genops` splits a stream into opcodes without acting on them; this file gives the
opcodes a meaning. A name that a stream mentions is never looked up and never imported. It becomes a
`Name`, an object of it becomes a `Stub` (its name, its arguments, its state), and the few names of
`utils/weight_files/unpickle_names.py` are rebuilt by code of ours into containers, numbers and `TensorRef`s,
which only describe a tensor. Names of the standard library, and calls of functions, are refused.

The work is bounded: at most `MAX_OPCODES` opcodes, at most `MAX_COPIED` bytes copied by calls (a
few opcodes could ask for the same large list a million times), nothing is allocated by a number
that the stream merely states, and nothing here recurses.
"""

from __future__ import annotations

import io
import pickletools
import sys
from collections.abc import Callable
from typing import IO, Any, cast

from utils.errors import CheckpointError

MAX_OPCODES = 3_000_000  # a checkpoint with 2,000 tensors, its average and optimiser: 0.5 million
MAX_COPIED = 1 << 28
BYTES_PER_ITEM = 64
MAX_KEY_ITEMS = 8
MAX_TEXT = 100
# What Python 2 called modules of the standard library, and their twins in C.
OLD_STANDARD_NAMES = frozenset(
    {
        "__builtin__",
        "copy_reg",
        "cPickle",
        "commands",
        "exceptions",
        "Queue",
        "StringIO",
        "cStringIO",
    }
    | {
        "urllib2",
        "imp",
        "distutils",
        "asyncore",
        "posix",
        "nt",
        "os2",
        "ce",
        "popen2",
        "new",
        "sets",
        "sitecustomize",
    }
)
STANDARD_NAMES = frozenset(sys.stdlib_module_names) | OLD_STANDARD_NAMES


class PickleError(CheckpointError):
    """A pickle stream is refused or damaged; the reader of the file puts its path in front."""


class Name:
    """A dotted name that a stream mentions; it is text, nothing stands behind it."""

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str) -> None:
        self.module = module
        self.name = name

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Stub:
    """An object of a class that is not known here.

    Attributes:
        name: dotted name of the class.
        args: what its constructor would have been given.
        state: what its `__setstate__` or `__dict__` would have been given, or None.
    """

    __slots__ = ("name", "args", "state")

    def __init__(self, name: str, args: tuple[Any, ...] = ()) -> None:
        self.name = name
        self.args = args
        self.state: Any = None

    def attributes(self) -> dict[Any, Any]:
        """The attributes that the object would have; empty when its state is no dictionary."""
        state = self.state
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[0], dict):
            state = state[0]
        return state if isinstance(state, dict) else {}


class Mark:
    """Marks a place on the interpreter's stack."""

    __slots__ = ()


Rebuild = Callable[[tuple[Any, ...]], Any]
MARK = Mark()
LITERALS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
NUMBERS_AND_TEXT = frozenset(
    {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
    | {
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
    }
    | {"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
)


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


def size_of(value: Any) -> int:
    """Bytes that a copy of `value`, without what it contains, may take."""
    if isinstance(value, (str, bytes, bytearray)):
        return len(value)
    return BYTES_PER_ITEM * len(value) if isinstance(value, (list, tuple, dict)) else BYTES_PER_ITEM


def check_key(key: Any) -> None:
    """Raise unless `key` is cheap to hash, and cannot be chosen to collide with others."""
    parts = key if isinstance(key, tuple) and len(key) <= MAX_KEY_ITEMS else (key,)
    for part in parts:
        if isinstance(part, int) and abs(part) >= 1 << 60:
            raise PickleError("damaged: a dictionary key is too large a number")
        if not isinstance(part, (str, bytes, int, float, type(None), Name, Stub)):
            raise PickleError(f"damaged: {type(part).__name__} as a dictionary key")


class Interpreter:
    """Reads one pickle stream.

    Args:
        rebuild: what the allowed names make of their arguments, by dotted name.
        values: allowed names that stand for a value rather than something to call, by dotted name.
        persistent: turns a persistent id into an object (a storage of a tensor).
        update: stores a state in an object that `rebuild` made.
    """

    def __init__(
        self,
        rebuild: dict[str, Rebuild],
        values: dict[str, Any],
        persistent: Callable[[Any], Any],
        update: Callable[[Any, Any], None],
    ) -> None:
        self.rebuild = rebuild
        self.values = values
        self.persistent = persistent
        self.update = update
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0

    def load(self, stream: IO[bytes] | io.RawIOBase) -> Any:
        """The object that the stream describes; `stream` is left behind its STOP.

        Args:
            stream: must not allocate for more bytes than it has, as `BytesIO` does not.

        Raises:
            PickleError: the stream is damaged, too long, or asks for more than plain data.
        """
        self.stack, self.memo = [], {}
        try:
            for count, (opcode, arg, _) in enumerate(pickletools.genops(cast(IO[bytes], stream))):
                if count >= MAX_OPCODES:
                    raise PickleError(f"refused: more than {MAX_OPCODES:,} pickle opcodes")
                self._step(opcode.name, arg)
            return self._pop()
        except (IndexError, KeyError, ValueError, TypeError, OverflowError) as error:
            raise PickleError(
                f"damaged: pickle stream breaks off or makes no sense ({shown(error)})"
            ) from None

    def _spend(self, *values: Any) -> None:
        """Count what is about to be copied."""
        self.copied += sum(map(size_of, values))
        if self.copied > MAX_COPIED:
            raise PickleError(f"refused: the stream copies more than {MAX_COPIED >> 20} MiB")

    def _pop(self) -> Any:
        """Take the topmost object off the stack."""
        item = self.stack.pop()
        if item is MARK:
            raise PickleError("damaged: pickle stack is out of order")
        return item

    def _pop_mark(self) -> list[Any]:
        """Take everything above the last mark off the stack, and the mark."""
        stack = self.stack
        at = len(stack) - 1
        while stack[at] is not MARK:
            at -= 1
            if at < 0:
                raise PickleError("damaged: pickle stack has no mark")
        items = stack[at + 1 :]
        del stack[at:]
        return items

    def _step(self, name: str, arg: Any) -> None:
        """Act on one opcode."""
        if name in NUMBERS_AND_TEXT:
            self.stack.append(arg)
        elif name in LITERALS:
            self.stack.append(LITERALS[name])
        elif name in ("PROTO", "FRAME", "STOP"):
            return
        else:
            handler = HANDLERS.get(name)
            if handler is None:
                raise PickleError(f"refused: pickle opcode {name}, which weights never need")
            handler(self, arg)

    def resolve(self, module: str, name: str) -> Any:
        """What a mentioned name stands for: an allowed value, or a `Name`.

        Raises:
            PickleError: a name of the standard library that is not allowed.
        """
        found = Name(module, name)
        dotted = str(found)
        if dotted in self.values:
            return self.values[dotted]
        if dotted in self.rebuild:
            return found
        if module.partition(".")[0] in STANDARD_NAMES:
            raise refused(dotted)
        if "." in name and name.partition(".")[0] in STANDARD_NAMES:
            raise refused(dotted)
        return found

    def call(self, what: Any, args: Any) -> Any:
        """What a stream's call of `what` gives: something rebuilt by us, or a `Stub` of a class.

        Raises:
            PickleError: `what` is a function that is not allowed, or is nothing to call.
        """
        if not isinstance(what, Name) or not isinstance(args, tuple):
            raise PickleError(
                f"refused: a call of {type(what).__name__} with {type(args).__name__}"
            )
        dotted = str(what)
        if dotted in self.rebuild:
            self._spend(*args)
            return self.rebuild[dotted](args)
        if not what.name.rpartition(".")[2].lstrip("_")[:1].isupper():
            raise refused(f"a call of {dotted}")
        return Stub(dotted, args)

    def create(self, what: Any, args: Any) -> Any:
        """What a new object of class `what` gives; its name may be lower case here."""
        if isinstance(what, Name) and isinstance(args, tuple) and str(what) not in self.rebuild:
            return Stub(str(what), args)
        return self.call(what, args)

    # What the opcodes do; those of one line stand in HANDLERS.

    def _tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise PickleError("damaged: pickle stack is too short")
        items = tuple(self.stack[-count:])
        if any(item is MARK for item in items):
            raise PickleError("damaged: pickle stack is out of order")
        self.stack[-count:] = [items]

    def _dict(self, _: Any) -> None:
        items = self._pop_mark()
        self.stack.append({})
        self._store_all(items)

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(
            target, Stub
        ):  # a list subclass of another project: its items hold no weights
            raise PickleError(f"damaged: items for {type(target).__name__}")

    def _set_item(self, _: Any) -> None:
        value = self._pop()
        self._store_all([self._pop(), value])

    def _store_all(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Stub):  # a dict subclass of another project
            target.state = target.state if isinstance(target.state, dict) else {}
            target = target.state
        if not isinstance(target, dict) or len(items) % 2:
            raise PickleError(f"damaged: items for {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            check_key(key)
            target[key] = value

    def _get(self, index: Any) -> None:
        self.stack.append(self.memo[int(index)])

    def _put(self, index: Any) -> None:
        if self.stack[-1] is MARK:
            raise PickleError("damaged: pickle stack is out of order")
        self.memo[int(index)] = self.stack[-1]

    def _memoize(self, _: Any) -> None:
        self._put(len(self.memo))

    def _global(self, arg: str) -> None:
        module, _, name = arg.partition(" ")
        self.stack.append(self.resolve(module, name))

    def _stack_global(self, _: Any) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise PickleError("damaged: a name that is no text")
        self.stack.append(self.resolve(module, name))

    def _reduce(self, _: Any) -> None:
        args = self._pop()
        self.stack.append(self.call(self._pop(), args))

    def _new_object(self, _: Any) -> None:
        args = self._pop()
        self.stack.append(self.create(self._pop(), args))

    def _new_object_keywords(self, _: Any) -> None:
        self._pop()
        self._new_object(None)

    def _instance(self, arg: str) -> None:
        args = tuple(self._pop_mark())
        module, _, name = arg.partition(" ")
        self.stack.append(self.create(self.resolve(module, name), args))

    def _object(self, _: Any) -> None:
        what, *args = self._pop_mark()
        self.stack.append(self.create(what, tuple(args)))

    def _build(self, _: Any) -> None:
        state = self._pop()
        target = self.stack[-1]
        if isinstance(target, Stub):
            if isinstance(target.state, dict) and isinstance(state, dict):
                self._spend(state)
                target.state.update(state)
            else:
                target.state = state
        else:
            self._spend(*state if isinstance(state, tuple) else ())
            self.update(target, state)

    def _persistent_text(self, arg: str) -> None:
        raise PickleError(f"damaged: persistent id {shown(arg)!r} is text, expected a storage")


Handler = Callable[[Interpreter, Any], object]
HANDLERS: dict[str, Handler] = {
    "MARK": lambda self, _: self.stack.append(MARK),
    "POP": lambda self, _: self.stack.pop(),
    "POP_MARK": lambda self, _: self._pop_mark(),
    "DUP": lambda self, _: self.stack.append(self.stack[-1]),
    "EMPTY_LIST": lambda self, _: self.stack.append([]),
    "EMPTY_DICT": lambda self, _: self.stack.append({}),
    "EMPTY_TUPLE": lambda self, _: self.stack.append(()),
    "EMPTY_SET": lambda self, _: self.stack.append(
        []
    ),  # sets are kept as lists: nothing has to be hashed
    "LIST": lambda self, _: self.stack.append(self._pop_mark()),
    "FROZENSET": lambda self, _: self.stack.append(self._pop_mark()),
    "TUPLE": lambda self, _: self.stack.append(tuple(self._pop_mark())),
    "TUPLE1": lambda self, _: self._tuple_of(1),
    "TUPLE2": lambda self, _: self._tuple_of(2),
    "TUPLE3": lambda self, _: self._tuple_of(3),
    "DICT": Interpreter._dict,
    "APPEND": lambda self, _: self._extend([self._pop()]),
    "APPENDS": lambda self, _: self._extend(self._pop_mark()),
    "ADDITEMS": lambda self, _: self._extend(self._pop_mark()),
    "SETITEM": Interpreter._set_item,
    "SETITEMS": lambda self, _: self._store_all(self._pop_mark()),
    "GET": Interpreter._get,
    "BINGET": Interpreter._get,
    "LONG_BINGET": Interpreter._get,
    "PUT": Interpreter._put,
    "BINPUT": Interpreter._put,
    "LONG_BINPUT": Interpreter._put,
    "MEMOIZE": Interpreter._memoize,
    "GLOBAL": Interpreter._global,
    "STACK_GLOBAL": Interpreter._stack_global,
    "REDUCE": Interpreter._reduce,
    "NEWOBJ": Interpreter._new_object,
    "NEWOBJ_EX": Interpreter._new_object_keywords,
    "INST": Interpreter._instance,
    "OBJ": Interpreter._object,
    "BUILD": Interpreter._build,
    "PERSID": Interpreter._persistent_text,
    "BINPERSID": lambda self, _: self.stack.append(self.persistent(self._pop())),
}
