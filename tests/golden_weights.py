"""Weights that depend only on key, shape and kind of each tensor; the image and targets for them.

Two implementations with the same state-dict keys get the same weights and must give the same
numbers.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

from utils.structures import Targets

# Image, class, centre x, centre y, width, height as parts of the image.
OBJECTS = (
    (0, 3, 0.20, 0.30, 0.10, 0.15),
    (0, 17, 0.55, 0.50, 0.30, 0.40),
    (0, 17, 0.60, 0.52, 0.28, 0.38),
    (0, 42, 0.85, 0.80, 0.25, 0.30),
    (0, 79, 0.10, 0.90, 0.05, 0.06),
    (0, 0, 0.50, 0.50, 0.95, 0.90),
    (1, 5, 0.40, 0.40, 0.02, 0.03),
    (1, 63, 0.70, 0.25, 0.45, 0.20),
    (1, 63, 0.30, 0.75, 0.15, 0.45),
)
CONSTANT = ("anchors", "anchor_grid", "dfl.conv.weight", "dfl2.conv.weight", "stride", "valid_mask")
POSITIVE = ("gamma", "alpha")


def _value(key: str, old: Tensor) -> Tensor:
    if not old.is_floating_point() or key.endswith(CONSTANT):
        return old.clone()
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    is_vector = old.ndim <= 1
    is_scale = key.endswith("running_var") or (is_vector and key.endswith("weight"))
    if is_scale or any(word in key for word in POSITIVE):
        return 0.5 + torch.rand(old.shape, generator=generator)
    if is_vector or key.endswith(("running_mean", "bias")):
        return 0.1 * torch.randn(old.shape, generator=generator)
    fan_in = old[0].numel()
    return torch.randn(old.shape, generator=generator) * (1.5 / fan_in) ** 0.5


def fill(model: nn.Module) -> nn.Module:
    """Overwrite every floating tensor of `model`."""
    model.load_state_dict({key: _value(key, old) for key, old in model.state_dict().items()})
    return model


def image(height: int, width: int, batch: int = 1) -> Tensor:
    """The fixed input, (batch, 3, height, width), in [0, 1)."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand((batch, 3, height, width), generator=generator)


def targets(height: int, width: int, *, images: tuple[int, ...] = (0, 1)) -> Targets:
    """The fixed objects of the chosen images, in pixels."""
    rows = torch.tensor([row for row in OBJECTS if row[0] in images]).view(-1, 6)
    size = torch.tensor([width, height])
    centre, half = rows[:, 2:4] * size, rows[:, 4:6] * size / 2
    boxes = torch.cat((centre - half, centre + half), 1)
    return Targets(rows[:, 0].long(), rows[:, 1].long(), boxes)
