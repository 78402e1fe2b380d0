"""What flows where in a network: the functions that one run calls, and the modules it calls them in.

Functions are seen as Python calls them (`torch.overrides`): whatever reads the output of a layer between two modules is
noticed, be it `x + y`, `torch.cat` or an index. What a TorchScript function does inside is not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from utils.trees import tensors_in

R = TypeVar("R")
Value = tuple[int, int]
"""Identity of a tensor and how often it had been written when it was seen."""

DROPOUTS = (functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d)
LIKE = (Tensor.to, Tensor.type_as)
"""Functions that ask their other tensors for type and device alone."""
PASSING = (*DROPOUTS, *LIKE, torch.dropout, Tensor.contiguous, Tensor.float, Tensor.double)
"""Functions that may give back the very tensor they got, as it was."""
METADATA = frozenset(
    "__get__ __len__ size dim ndimension numel nelement stride is_contiguous".split()
)


class Use(NamedTuple):
    """One call of a function on tensors.

    Attributes:
        number: how many came before it.
        function, name: such as `torch.conv2d`, and "conv2d".
        args, options: its arguments, those given by place and by name.
        reads: values among them.
        writes: values it made.
    """

    number: int
    function: Callable[..., object]
    name: str
    args: tuple[object, ...]
    options: Mapping[str, object]
    reads: tuple[Value, ...]
    writes: tuple[Value, ...]


class Call(NamedTuple):
    """One call of a module.

    Attributes:
        module: the one that was called.
        first, last: numbers of the uses inside are `range(first, last)`.
        input: the only tensor it was given; None if it was given several, or other things.
        output: the only tensor it returned, or None.
        results: values of all tensors that it returned.
    """

    module: nn.Module
    first: int
    last: int
    input: Value | None
    output: Value | None
    results: tuple[Value, ...]


class Record(TorchFunctionMode):
    """The uses of tensors and the calls of modules in one run.

    Attributes:
        calls: in the order in which they ended.
        outputs: values that the network returned.
        makers: value -> the use that made it; inputs, parameters and buffers have none.
        readers: value -> the uses that read it.
        tensors: identity -> tensor; what is kept alive keeps its identity for itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.outputs: frozenset[Value] = frozenset()
        self.makers: dict[Value, Use] = {}
        self.readers: dict[Value, list[Use]] = {}
        self.tensors: dict[int, Tensor] = {}
        self._written: Counter[int] = Counter()
        self._started: list[tuple[int, Value | None]] = []
        self._count = 0

    def value(self, tensor: Tensor) -> Value:
        """The value that `tensor` has now."""
        self.tensors[id(tensor)] = tensor
        return id(tensor), self._written[id(tensor)]

    def __torch_function__(
        self,
        function: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        options = kwargs or {}
        given = list(tensors_in((args, options)))[: 1 if function in LIKE else None]
        reads = tuple(self.value(tensor) for tensor in given)
        result = function(*args, **options)
        made, name = list(tensors_in(result)), getattr(function, "__name__", str(function))
        written = [tensor for tensor in made if id(tensor) in {id(g) for g in given}]
        if (not made and name in METADATA) or (written and function in PASSING):
            return result
        for tensor in given[:1] if name == "__setitem__" else written:
            self._written[id(tensor)] += 1
        writes = tuple(self.value(tensor) for tensor in made)
        use = Use(self._count, function, name, args, options, reads, writes)
        self._count += 1
        for value in set(reads):
            self.readers.setdefault(value, []).append(use)
        for value in writes:
            self.makers.setdefault(value, use)
        return result

    def enter(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Before a module is called."""
        given = (*args, *kwargs.values())
        tensor = given[0] if len(given) == 1 else None
        value = self.value(tensor) if isinstance(tensor, Tensor) else None
        self._started.append((self._count, value))

    def leave(self, module: nn.Module, args: object, kwargs: object, output: object) -> None:
        """Afterwards."""
        first, given = self._started.pop()
        results = tuple(self.value(t) for t in tensors_in(output))
        single = results[0] if isinstance(output, Tensor) else None
        self.calls.append(Call(module, first, self._count, given, single, results))


@torch.no_grad()
def record_run(model: nn.Module, run: Callable[[], object]) -> Record:
    """The record of `run()`, which calls `model` once; the calls of every module inside are noted."""
    record = Record()
    with ExitStack() as stack:
        for module in model.modules():
            before = module.register_forward_pre_hook(record.enter, with_kwargs=True)
            stack.callback(before.remove)
            stack.callback(module.register_forward_hook(record.leave, with_kwargs=True).remove)
        stack.enter_context(record)
        record.outputs = frozenset(record.value(t) for t in tensors_in(run()))
    return record


Prints = list[tuple[nn.Module, list[Tensor]]]


def prints_of(model: nn.Module, run: Callable[[], R], samples: int = 64) -> tuple[R, Prints]:
    """What `run()` gives, and a few numbers of what every module returned in it, call by call, to tell two runs apart."""
    prints: Prints = []

    def leave(module: nn.Module, args: object, output: object) -> None:
        flat = [tensor.detach().flatten() for tensor in tensors_in(output)]
        prints.append((module, [t[:: max(1, t.numel() // samples)].double() for t in flat]))

    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_hook(leave).remove)
        return run(), prints
