"""A second device on a machine that has none: tensors that compute on the CPU and say "meta".

With `other_device()` active, an operation that mixes both kinds fails as it would on an accelerator,
and results stay where their inputs are. Single numbers mix freely, and so do indices on the CPU, as
in PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

OTHER = torch.device("meta")
aten = torch.ops.aten
MOVES = (aten._to_copy.default, aten.copy_.default)
"""They take tensors of both devices."""
INDEXING = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)


class MixedDevicesError(RuntimeError):
    """An operation got tensors of both devices."""


class Elsewhere(Tensor):
    """A tensor of the other device; `inner` holds its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        tensor: Elsewhere = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, layout=inner.layout, device=OTHER,
            requires_grad=inner.requires_grad,
        )  # fmt: skip
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return compute(func, args, kwargs or {})


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return compute(func, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """`torch.tensor([...], device=...)` fills its tensor below the level of operations."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func is Tensor.new_tensor and isinstance(args[0], Elsewhere):
            options.setdefault("dtype", args[0].dtype)
            return Elsewhere(torch.tensor(args[1], **options))
        if func in (torch.tensor, torch.as_tensor) and options.get("device") == OTHER:
            return Elsewhere(func(*args, **{**options, "device": "cpu"}))
        return func(*args, **options)


@contextmanager
def other_device() -> Iterator[None]:
    """While active, tensors can be made on the other device."""
    with _Operations(), _Literals():
        yield


def compute(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run an operation on the numbers, and put what comes out where it belongs."""
    flat = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    elsewhere = [t for t in flat if isinstance(t, Elsewhere)]
    mixing = [t for t in flat if not isinstance(t, Elsewhere) and t.dim() > 0]
    if elsewhere and mixing and func not in MOVES:
        is_index = func in INDEXING and isinstance(args[0], Elsewhere) and all(
            t is not args[-1] for t in mixing
        )  # fmt: skip
        if not is_index:
            shapes = ", ".join(f"{list(t.shape)} on {t.device}" for t in flat)
            raise MixedDevicesError(f"{func}: {shapes}")
    wanted = kwargs.get("device")
    goes_elsewhere = bool(elsewhere) if wanted is None else torch.device(wanted) == OTHER
    if func is aten.copy_.default:
        goes_elsewhere = isinstance(args[0], Elsewhere)
    numbers, options = tree_map(_numbers, (tuple(args), dict(kwargs)))
    if wanted is not None:
        options["device"] = torch.device("cpu")
    result = func(*numbers, **options)
    return tree_map(_same_or_wrapped(args, goes_elsewhere), result)


def _numbers(value: Any) -> Any:
    return value.inner if isinstance(value, Elsewhere) else value


def _same_or_wrapped(args: Sequence[Any], goes_elsewhere: bool) -> Callable[[Any], Any]:
    """An operation in place gives its own argument back; other results are wrapped."""
    inner_of = {id(a.inner): a for a in tree_flatten(args)[0] if isinstance(a, Elsewhere)}

    def place(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in inner_of:
            return inner_of[id(value)]
        return Elsewhere(value) if goes_elsewhere else value

    return place


def send(value: Tensor) -> Tensor:
    """A tensor on the other device with the same numbers; parameters stay parameters."""
    moved = Elsewhere(value.detach().clone())
    if isinstance(value, torch.nn.Parameter):
        return torch.nn.Parameter(moved, value.requires_grad)
    return moved


def send_model(model: nn.Module) -> nn.Module:
    """Put every parameter and buffer of a network on the other device, in place."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, value in tensors.items():
                if value is not None:
                    tensors[name] = send(value)
    return model
