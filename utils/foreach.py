"""Many small tensors in one call: functions that torch's own optimisers are made of, not yet public (seen in torch 2.14)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def norms(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """L2 norm of each."""
    return tuple(torch._foreach_norm(list(tensors))) if tensors else ()


def lerp_(tensors: Sequence[Tensor], ends: Sequence[Tensor], weight: float) -> None:
    """Move each, in place, by the part `weight` of the way to its end."""
    torch._foreach_lerp_(list(tensors), list(ends), weight)
