"""Pickle streams as plain data: an interpreter that can call nothing.

`pickletools.genops` splits a stream into opcodes without acting on them; this file gives the
opcodes a meaning. A name that a stream mentions is never looked up and never imported: it is text,
an object of it a `Stub`, and the few names of `utils/weight_files/unpickle_names.py` are rebuilt by
code of ours into containers, numbers and `TensorRef`s, which only describe a tensor.

The work is bounded: at most `MAX_OPCODES` opcodes, at most `MAX_COPIED` bytes copied by calls (a
few opcodes could ask for the same large list a million times), nothing is allocated by a number
that the stream merely states, no number or tuple chosen to collide is hashed, and nothing here
recurses. `pickle.Unpickler` bounds none of that, however few names its `find_class` lets through.
"""

from __future__ import annotations

import io
import pickletools

from utils.weight_files.unpickle_names import (
    PLAIN_CLASSES,
    REBUILD,
    Name,
    PickleError,
    Storages,
    Stub,
    give_state,
    refused,
    resolve,
    shown,
    store,
)

MAX_OPCODES = 3_000_000  # a checkpoint with 2,000 tensors, its average and optimiser: 0.5 million
MAX_COPIED = 1 << 28
BYTES_PER_ITEM = 64
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
# Sets are kept as lists: nothing has to be hashed.
CONTAINERS = {"TUPLE": tuple, "LIST": list, "FROZENSET": list}
NUMBERS_AND_TEXT = frozenset(
    """
INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES
SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8
""".split()
)


class Interpreter:
    """Reads pickle streams, one after the other.

    Args:
        storages: turns persistent ids into storages of tensors.
    """

    def __init__(self, storages: Storages) -> None:
        self.storages = storages
        self.stack: list[object] = []
        self.below: list[list[object]] = []  # stacks under the marks
        self.memo: dict[int, object] = {}
        self.copied = 0

    def load(self, stream: io.BytesIO) -> object:
        """The object that the stream describes; `stream` is left behind its STOP.

        Raises:
            PickleError: the stream is damaged, too long, or asks for more than plain data.
        """
        self.stack, self.below, self.memo = [], [], {}
        try:
            for count, (opcode, arg, _) in enumerate(pickletools.genops(stream)):
                if count >= MAX_OPCODES:
                    raise PickleError(f"refused: its pickle has more than {MAX_OPCODES} steps")
                if opcode.name in NUMBERS_AND_TEXT:
                    self.stack.append(arg)
                else:
                    self._step(opcode.name, arg)
            return self.stack.pop()
        except (LookupError, ValueError, TypeError, OverflowError) as error:
            raise PickleError(
                f"damaged: pickle stream breaks off or makes no sense ({shown(error)})"
            ) from None

    def _step(self, name: str, arg: object) -> None:
        """Act on one opcode: here those that only move what is there."""
        stack = self.stack
        match name:
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(self.memo[_place(arg)])
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                self.memo[_place(arg)] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "MARK":
                self.below.append(stack)
                self.stack = []
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE":
                stack.append(CONSTANTS[name])
            case "POP" if stack:
                stack.pop()
            case "POP" | "POP_MARK":
                self._pop_mark()
            case "DUP":
                stack.append(stack[-1])
            case "PROTO" | "FRAME" | "STOP":
                pass
            case _:
                self._step_containers(name, arg)

    def _step_containers(self, name: str, arg: object) -> None:
        """Opcodes of tuples, lists and dictionaries."""
        stack = self.stack
        match name:
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [stack.pop() for _ in range(int(name[-1]))]
                stack.append(tuple(items[::-1]))
            case "TUPLE" | "LIST" | "FROZENSET":
                items = self._pop_mark()
                self.stack.append(CONTAINERS[name](items))
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "DICT":
                items = self._pop_mark()
                self.stack.append({})
                self._store(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self._store([key, value])
            case "SETITEMS":
                self._store(self._pop_mark())
            case "APPEND":
                self._extend([stack.pop()])
            case "APPENDS" | "ADDITEMS":
                self._extend(self._pop_mark())
            case _:
                self._step_objects(name, arg)

    def _step_objects(self, name: str, arg: object) -> None:
        """Opcodes of names, calls and states."""
        stack = self.stack
        match name, arg:
            case "GLOBAL", str(dotted):
                stack.append(resolve(*dotted.split(" ", 1)))
            case "STACK_GLOBAL", _:
                what, module = stack.pop(), stack.pop()
                if not isinstance(what, str) or not isinstance(module, str):
                    raise PickleError("damaged: a name that is no text")
                stack.append(resolve(module, what))
            case "REDUCE", _:
                args = stack.pop()
                stack.append(self._call(stack.pop(), args))
            case (("NEWOBJ" | "NEWOBJ_EX"), _):
                if name == "NEWOBJ_EX":  # keywords are left out
                    stack.pop()
                args = stack.pop()
                stack.append(self._call(stack.pop(), args, is_class=True))
            case "INST", str(dotted):
                items = self._pop_mark()
                what = resolve(*dotted.split(" ", 1))
                self.stack.append(self._call(what, tuple(items), is_class=True))
            case "OBJ", _:
                what, *items = self._pop_mark()
                self.stack.append(self._call(what, tuple(items), is_class=True))
            case "BUILD", _:
                self._build(stack.pop())
            case "BINPERSID", _:
                stack.append(self.storages.find(stack.pop()))
            case "PERSID", _:
                raise PickleError(
                    f"damaged: persistent id {shown(arg)!r} is text, expected a storage"
                )
            case _:
                raise PickleError(f"refused: pickle opcode {name}, which weights never need")

    def _pop_mark(self) -> list[object]:
        """Take everything above the last mark off the stack, and the mark."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def _spend(self, *values: object) -> None:
        """Count what is about to be copied."""
        for value in values:
            is_flat = isinstance(value, (str, bytes, bytearray))
            length = (
                len(value) if isinstance(value, (str, bytes, bytearray, list, tuple, dict)) else 1
            )
            self.copied += length if is_flat else BYTES_PER_ITEM * length
        if self.copied > MAX_COPIED:
            raise PickleError(f"refused: the stream copies more than {MAX_COPIED >> 20} MiB")

    def _store(self, items: list[object]) -> None:
        target = self.stack[-1]
        if isinstance(target, Stub):  # a dict subclass of another project
            target.state = target.state if isinstance(target.state, dict) else {}
            target = target.state
        if not isinstance(target, dict):
            raise PickleError(f"damaged: items for {type(target).__name__}")
        store(target, items)

    def _extend(self, items: list[object]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Stub):  # a list subclass's items hold no weights
            raise PickleError(f"damaged: items for {type(target).__name__}")

    def _call(self, what: object, args: object, *, is_class: bool = False) -> object:
        """What a stream's call of `what` gives: something rebuilt by us, or a `Stub` of a class.

        Args:
            is_class: what is called must be a class, though its name may be lower case.

        Raises:
            PickleError: `what` is a function that is not allowed, or is nothing to call.
        """
        if not isinstance(what, Name) or not isinstance(args, tuple):
            raise PickleError(
                f"refused: a call of {type(what).__name__} with {type(args).__name__}"
            )
        if what.dotted in REBUILD:
            self._spend(*args)
            return REBUILD[what.dotted](args)
        looks_like_one = what.dotted.rpartition(".")[2].lstrip("_")[:1].isupper()
        if not (is_class or looks_like_one or what.dotted in PLAIN_CLASSES):
            raise refused(f"a call of {what.dotted}")
        return Stub()

    def _build(self, state: object) -> None:
        target = self.stack[-1]
        if not isinstance(target, Stub):
            self._spend(*state if isinstance(state, tuple) else ())
            give_state(target, state)
        elif isinstance(target.state, dict) and isinstance(state, dict):
            self._spend(state)
            target.state.update(state)
        else:
            target.state = state


def _place(arg: object) -> int:
    """A place in the memo; the numbers of a writer count up from 0."""
    if not isinstance(arg, int) or not 0 <= arg < MAX_OPCODES:
        raise PickleError("damaged: a place in the memo that no writer takes")
    return arg
