"""Running a module on the `meta` device: shapes without arithmetic, memory or random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map


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
    shapes = {
        f"{prefix}.{key}" if prefix else key: torch.empty_like(value, device="meta")
        for prefix, submodule in module.named_modules()  # each once, however many names it has
        for key, value in _own_tensors(submodule)
    }
    with evaluating(module), torch.no_grad():
        try:
            return _call_with(module, shapes, inputs)
        except RuntimeError:  # code that asks for the type of the device, as `torch.autocast` does
            try:
                return _run_as_cpu(module, shapes, inputs)
            except Exception:
                pass
            raise


def _call_with(module: nn.Module, tensors: dict[str, torch.Tensor], inputs: Any) -> Any:
    # Following ties would swap a shared module's tensors once for each of its names, and put the wrong ones back.
    return torch.func.functional_call(module, tensors, inputs, tie_weights=False)


def _run_as_cpu(module: nn.Module, shapes: dict[str, torch.Tensor], inputs: Any) -> Any:
    """The same with tensors without memory that say they are on the CPU; what comes back is on the meta device."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # seldom wanted, slow to import

    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = {key: _fake(value) for key, value in shapes.items()}
        outputs = _call_with(module, fakes, tree_map(_fake, inputs))
    return tree_map(_as_meta, outputs)


def _fake(value: Any) -> Any:
    return torch.empty(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else value


def _as_meta(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers that hang on `module` itself, one parameter under two names twice."""
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    yield from module.named_buffers(recurse=False, remove_duplicate=False)
