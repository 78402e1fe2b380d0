"""Running a module on the `meta` device: shapes without arithmetic, memory or random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


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
    # Following ties would swap a shared module's tensors once for each of its names, and put the wrong ones back.
    with evaluating(module), torch.no_grad():
        return torch.func.functional_call(module, shapes, inputs, tie_weights=False)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers that hang on `module` itself, one parameter under two names twice."""
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    yield from module.named_buffers(recurse=False, remove_duplicate=False)
