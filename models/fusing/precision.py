"""The floating type in which a network's weights are worked on, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from models.table import count_params

WIDEN_UP_TO = 200_000_000
"""Parameters of the largest network that is checked in float64 (which doubles its memory for a
moment)."""


def own_type(model: nn.Module) -> torch.dtype:
    """The type of the parameters; float32 where there are none."""
    return next((p.dtype for p in model.parameters()), torch.float32)


def widest_type(model: nn.Module) -> torch.dtype:
    """float64 where memory and device allow: rounding then hides no fault, and ranks no query
    anew."""
    parameter = next((p for p in model.parameters()), None)
    if parameter is None:
        return torch.float32
    fits = parameter.dtype == torch.float32 and count_params(model) <= WIDEN_UP_TO
    return torch.float64 if fits and parameter.device.type != "mps" else parameter.dtype


@contextmanager
def in_type(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Run with float32 parameters and buffers widened to `dtype`; they are float32 afterwards.

    Inside another such block nothing changes: what is made there stays wide until the outer one ends. They stay the same
    objects: a record of one run speaks of them in the next.
    """
    if dtype != torch.float64:
        yield
        return
    tensors = [*model.parameters(), *model.buffers()]
    if any(t.dtype == torch.float64 for t in tensors) and not any(
        t.dtype == torch.float32 for t in tensors
    ):
        yield
        return
    stays = {id(t) for t in tensors if t.dtype == torch.float64}
    for tensor in tensors:
        if tensor.dtype == torch.float32:
            tensor.data = tensor.data.double()
    try:
        yield
    finally:
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dtype == torch.float64 and id(tensor) not in stays:
                tensor.data = tensor.data.float()


@contextmanager
def default_type(dtype: torch.dtype) -> Iterator[None]:
    """Layers that foreign code makes meanwhile have `dtype`, so that it rounds nothing."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)
