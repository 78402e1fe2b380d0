"""Running a module on the `meta` device: shapes without arithmetic, memory or random numbers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from utils.errors import ForeignError, foreign_code


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put `module` in eval mode for a while; every submodule gets its own mode back."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes.items():
            submodule.training = training


def run_on_meta(module: nn.Module, *inputs: Any) -> Any:
    """The outputs of `module` for meta tensors `inputs`, in eval mode.

    Parameters and buffers are replaced by meta tensors for the call: nothing is computed, no running
    statistic moves and no random number is drawn.
    """
    shapes = _meta_tensors(module)
    with evaluating(module), torch.no_grad():
        try:
            return _call_with(module, shapes, inputs)
        except RuntimeError:  # code that asks for the type of the device, as `torch.autocast` does
            with suppress(ForeignError), foreign_code(), _fake_tensors():
                outputs = _call_with(module, _faked(shapes), tree_map(_fake, inputs))
                return tree_map(_as_meta, outputs)
            raise


def run_for_real(module: nn.Module, *inputs: Any) -> Any:
    """As `run_on_meta`, for code that asks for values: a copy of `module` computes on random numbers on the CPU."""
    with evaluating(module), torch.no_grad(), torch.random.fork_rng(devices=[]):
        outputs = copy.deepcopy(module)(*tree_map(_random, inputs))
    return tree_map(_as_meta, outputs)


def idle_parameters(module: nn.Module, inputs: tuple[Any, ...], kept: Sequence[int]) -> list[str]:
    """Names of the parameters that the outputs number `kept` of `module` do not depend on.

    Found by a backward pass of meta tensors in eval mode; empty for code that cannot be run so.
    """
    shapes = _meta_tensors(module)
    with suppress(ForeignError), foreign_code(), evaluating(module):
        return _without_gradient(module, shapes, inputs, kept)
    with suppress(ForeignError), foreign_code(), _fake_tensors(), evaluating(module):
        return _without_gradient(module, _faked(shapes), tree_map(_fake, inputs), kept)
    return []


def train_on_meta(
    module: nn.Module, inputs: tuple[Any, ...], memory_format: torch.memory_format
) -> None:
    """One forward and backward pass in training mode on the meta device; `module` is not changed.

    Raises:
        Whatever its code raises.
    """

    def laid_out(value: Any) -> Any:
        is_map = isinstance(value, torch.Tensor) and value.ndim == 4
        return value.to(memory_format=memory_format) if is_map else value

    modes = {m: m.training for m in module.modules()}
    try:
        tensors = {key: laid_out(value) for key, value in _meta_tensors(module).items()}
        _without_gradient(module.train(), tensors, tree_map(laid_out, inputs), None)
    finally:
        for submodule, training in modes.items():
            submodule.training = training


def train_for_real(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """As `train_on_meta`, with random numbers on the CPU and a copy of `module`."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        outputs = copy.deepcopy(module).train()(*tree_map(_random, inputs))
        _total(outputs, None).backward()


def _without_gradient(
    module: nn.Module,
    tensors: dict[str, torch.Tensor],
    inputs: tuple[Any, ...],
    kept: Sequence[int] | None,
) -> list[str]:
    parameters = {
        key: tensors[key].requires_grad_()
        for key, p in module.named_parameters()
        if p.requires_grad
    }
    with torch.enable_grad():
        total = _total(_call_with(module, tensors, inputs), kept)
        if total.requires_grad:  # without, all of them are idle
            total.backward()
    return [key for key, tensor in parameters.items() if tensor.grad is None]


def _total(outputs: Any, kept: Sequence[int] | None) -> torch.Tensor:
    """The sum of the maps number `kept`, or of all."""
    maps = list(outputs.values()) if isinstance(outputs, Mapping) else outputs
    maps = [maps] if isinstance(maps, torch.Tensor) else maps
    return torch.stack([maps[k].sum() for k in (range(len(maps)) if kept is None else kept)]).sum()


def _meta_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}.{key}" if prefix else key: torch.empty_like(value, device="meta")
        for prefix, submodule in module.named_modules()  # each once, however many names it has
        for key, value in _own_tensors(submodule)
    }


def _call_with(module: nn.Module, tensors: dict[str, torch.Tensor], inputs: Any) -> Any:
    # Following ties would swap a shared module's tensors once for each of its names, and put the wrong ones back.
    return torch.func.functional_call(module, tensors, inputs, tie_weights=False)


@contextmanager
def _fake_tensors() -> Iterator[None]:
    """New tensors have no memory and say that they are on the CPU; what fails is raised, not logged as well."""
    from torch._subclasses import fake_tensor  # seldom wanted, slow to import

    log = logging.getLogger(fake_tensor.__name__)
    was_disabled, log.disabled = log.disabled, True
    try:
        with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        log.disabled = was_disabled


def _faked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: _fake(value) for key, value in tensors.items()}


def _fake(value: Any) -> Any:
    return torch.empty(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else value


def _random(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.rand(value.shape, dtype=value.dtype)


def _as_meta(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers that hang on `module` itself, one parameter under two names twice."""
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    yield from module.named_buffers(recurse=False, remove_duplicate=False)
