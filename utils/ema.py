"""Exponential moving average of a model's weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from utils.foreach import lerp_

Model = TypeVar("Model", bound=nn.Module)


class ModelEMA(Generic[Model]):
    """Keeps `average = d * average + (1 - d) * model` with `d = decay * (1 - exp(-updates / tau))`.

    The ramp lets the average follow the model in its first steps, when old weights are worth
    little. All floating entries of the state dict are averaged, buffers (BatchNorm statistics)
    included; the others (counters) are copied.

    Attributes:
        model: the average, in eval mode, without gradients; copied once, at construction.
        updates: how often `update` ran.
    """

    def __init__(
        self, model: Model, decay: float = 0.9999, tau: float = 2000.0, updates: int = 0
    ) -> None:
        self.model: Model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.tau = tau
        self.updates = updates
        self._averaged, self._copied = _distinct_keys(self.model.state_dict())

    @property
    def current_decay(self) -> float:
        """The share of the old average that the last update kept; 0 before any."""
        return self.decay * (1 - math.exp(-self.updates / self.tau))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take one step towards `model`, which must have the keys of the model of construction."""
        self.updates += 1
        average, current = self.model.state_dict(), model.state_dict()
        lerp_(
            [average[key] for key in self._averaged],
            [current[key].to(average[key]) for key in self._averaged],
            1 - self.current_decay,
        )
        for key in self._copied:
            average[key].copy_(current[key])

    def state_dict(self) -> dict[str, Any]:
        """`{"model": state dict of the average, "updates": int}`."""
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.model.load_state_dict(state["model"])
        self.updates = int(state["updates"])


def _distinct_keys(state: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Keys to average and keys to copy; a tensor that stands under two names is taken once."""
    averaged: list[str] = []
    copied: list[str] = []
    seen: set[tuple[int, torch.Size]] = set()
    for key, tensor in state.items():
        identity = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and identity in seen:
            continue
        seen.add(identity)
        (averaged if tensor.is_floating_point() else copied).append(key)
    return averaged, copied
