"""What flows where in a network: one run, recorded operation by operation.

The record is made below the level of modules, from the operations that really ran, so it holds for
any
code: ours, timm's, pasted. A value is a tensor at a time: an operation that writes in place makes
a new value of the same tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Value = tuple[int, int]
"""Identity of a tensor and how often its memory had been written when it was seen."""

SAMPLES = 64


class Operation(NamedTuple):
    """One operation that ran.

    Attributes:
        name: such as "convolution" or "addmm".
        args: its positional arguments.
        reads: values among all its arguments.
        writes: values it made.
    """

    name: str
    args: tuple[Any, ...]
    reads: tuple[Value, ...]
    writes: tuple[Value, ...]


class Call(NamedTuple):
    """One call of a module.

    Attributes:
        module: the one that was called.
        first, last: the operations that ran inside are `operations[first:last]`.
        input: the only tensor it was given; None if it was given several, or other things.
        output: the only tensor it returned, or None.
        results: values of all tensors that it returned.
        print: a few numbers of each tensor it returned, and the largest magnitude.
    """

    module: nn.Module
    first: int
    last: int
    input: Value | None
    output: Value | None
    results: tuple[Value, ...]
    print: tuple[tuple[Tensor, float], ...]


class Record:
    """The operations and module calls of one run, in the order in which they ended."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.calls: list[Call] = []
        self.outputs: frozenset[Value] = frozenset()
        self.makers: dict[Value, int] = {}
        self.readers: dict[Value, list[int]] = {}
        self.paused = False
        self._alive: dict[int, Tensor] = {}  # what is kept alive keeps its identity for itself
        self._written: dict[int, int] = {}

    def value(self, tensor: Tensor) -> Value:
        """The value that `tensor` has now."""
        self._alive.setdefault(id(tensor), tensor)
        return id(tensor), self._written.get(_memory(tensor), 0)

    def forget_tensors(self) -> None:
        """Let go of the tensors of the run; operations and calls stay to be read, `value` and `shape` are over."""
        self._alive.clear()
        self._written.clear()
        self.operations = [operation._replace(args=()) for operation in self.operations]

    def shape(self, value: Value) -> torch.Size:
        """Shape of the tensor behind `value`."""
        return self._alive[value[0]].shape

    def calls_of(self, module: nn.Module) -> list[Call]:
        """Every call of `module`."""
        return [call for call in self.calls if call.module is module]

    def maker(self, value: Value) -> Operation | None:
        """The operation that made `value`; None for inputs, parameters and buffers."""
        index = self.makers.get(value)
        return None if index is None else self.operations[index]

    def add(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation and note it."""
        if self.paused:
            return function(*args, **kwargs)
        reads = tuple(self.value(t) for t in _tensors((args, kwargs)))
        result = function(*args, **kwargs)
        if function._schema.is_mutable:
            for argument, value in zip(function._schema.arguments, args):
                if argument.is_write and isinstance(value, Tensor):
                    self._written[_memory(value)] = self._written.get(_memory(value), 0) + 1
        writes = tuple(self.value(t) for t in _tensors(result))
        index = len(self.operations)
        self.operations.append(Operation(function._schema.name.split("::")[1], args, reads, writes))
        for value in reads:
            self.readers.setdefault(value, []).append(index)
        for value in writes:
            self.makers.setdefault(value, index)
        return result


class _Recorder(TorchDispatchMode):
    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return self.record.add(function, args, kwargs or {})


def record_run(model: nn.Module, run: Callable[[], Any]) -> tuple[Any, Record]:
    """What `run()` returns, and the record of it; no gradients are kept.

    Args:
        model: the calls of it and of every module inside are recorded.
        run: calls `model`, once.
    """
    record = Record()
    with torch.no_grad(), _watch_calls(model, record), _Recorder(record):
        result = run()
    record.outputs = frozenset(record.value(t) for t in _tensors(result))
    return result, record


@contextmanager
def _watch_calls(model: nn.Module, record: Record) -> Iterator[None]:
    started: list[tuple[int, Value | None]] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = _tensors((args, kwargs))
        only = len(given) == len(args) + len(kwargs) == 1
        started.append((len(record.operations), record.value(given[0]) if only else None))

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        first, given = started.pop()
        results = tuple(record.value(t) for t in _tensors(output))
        single = results[0] if isinstance(output, Tensor) else None
        last = len(record.operations)
        record.paused = True
        prints = tuple(_fingerprint(t) for t in _tensors(output))
        record.paused = False
        record.calls.append(Call(module, first, last, given, single, results, prints))

    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _fingerprint(tensor: Tensor) -> tuple[Tensor, float]:
    """Up to `SAMPLES` numbers spread over `tensor`, and its largest magnitude."""
    flat = tensor.detach().reshape(-1)
    step = max(1, flat.numel() // SAMPLES)
    return flat[::step].double(), float(flat.abs().max()) if flat.numel() else 0.0


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
