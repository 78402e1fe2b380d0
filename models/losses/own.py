"""A user's own box loss: `my_losses.py:soft_iou`, a file and a function in it.

The function takes predicted and target boxes, (N, 4) each, xyxy in pixels, float32, and gives one
loss per pair, (N,), least for boxes that agree. Coordinates count from the image's corner, in the YOLOv5
family from that of the matched cell, alike for both boxes. It is code: it runs only with `--allow-code`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.pasted.imports import pasted_imports
from utils.boxes import BoxPair
from utils.errors import ConfigError, ForeignError, foreign_code, nearest
from utils.user_code import PREFIX, import_file

TRIAL = ((0.0, 0.0, 10.0, 10.0), (5.0, 5.0, 20.0, 30.0))  # boxes that a function is tried on


def is_own(name: str) -> bool:
    """Whether the name of a box loss is a file and a function in it."""
    return ":" in name


def own_name_problem(name: str) -> str:
    """What is wrong with such a name, as a sentence; empty if nothing."""
    file, _, function = name.rpartition(":")
    if file.endswith(".py") and function.isidentifier():
        return ""
    return (
        f"got {name!r}, expected a Python file and a function in it, such as my_losses.py:soft_iou."
    )


def settle_own(name: str, folders: Sequence[Path]) -> str:
    """The name with the whole path of the user's file, looked for from `folders`; other names as they are.

    Raises:
        ConfigError: the file is in none of them.
    """
    if not is_own(name) or own_name_problem(name):
        return name
    file, _, function = name.rpartition(":")
    places = [*(folder / file for folder in folders), Path(Path(file).name)]
    for place in places:
        if place.is_file():
            return f"{place.resolve()}:{function}"
    looked = dict.fromkeys(str(place.resolve().parent) for place in places)
    raise ConfigError(
        f"box_loss: got {name}, expected the file beside the recipe or in the working folder; it is not in "
        f"{', '.join(looked)}. Put it into one of them."
    )


def own_overlap(name: str, allowed: bool) -> Callable[[BoxPair, Mapping[str, float], Any], Tensor]:
    """A user's loss as an overlap: 1 less what his function gives, for boxes in pixels."""
    if not allowed:
        raise ConfigError(
            f"box_loss: {name} would run code. Read it, then give --allow-code if you trust it."
        )
    file, _, attribute = name.rpartition(":")
    try:
        with pasted_imports():
            module = import_file(Path(file))
    except ForeignError as error:
        raise ConfigError(f"box_loss: {name} cannot be imported - {error}.") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise ConfigError(
            f"box_loss: got {name}, expected a function that {Path(file).name} defines.{nearest(attribute, own)}"
        )

    def overlap(pair: BoxPair, numbers: Mapping[str, float], size: Any) -> Tensor:
        predicted, target = torch.broadcast_tensors(pair.first, pair.second)
        shape = predicted.shape[:-1]
        if predicted.numel() == 0:  # a mean of nothing would be no number
            return 1 - predicted.sum(-1)
        return 1 - _call(name, function, predicted, target).reshape(shape)

    trial = torch.tensor(TRIAL, requires_grad=True)
    with torch.enable_grad():
        overlap(BoxPair(trial, trial.detach().flip(0)), {}, (32, 32))
    return overlap


def _call(
    name: str, function: Callable[[Tensor, Tensor], Any], predicted: Tensor, target: Tensor
) -> Tensor:
    """One loss per pair, (N,), for boxes (..., 4); anything else is told."""
    predicted, target = predicted.reshape(-1, 4), target.reshape(-1, 4)
    try:
        with foreign_code(users=(PREFIX,)):
            loss = function(predicted, target)
    except ForeignError as error:
        raise ConfigError(
            f"box_loss: {name} failed on boxes {tuple(predicted.shape)} - {error}."
        ) from error
    if not isinstance(loss, Tensor) or loss.shape != predicted.shape[:1]:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ConfigError(
            f"box_loss: {name} gave {got} for {len(predicted)} pairs of boxes, expected a tensor "
            f"({len(predicted)},). Return one loss per pair, without a mean or a sum over them."
        )
    if predicted.requires_grad and torch.is_grad_enabled() and not loss.requires_grad:
        raise ConfigError(
            f"box_loss: {name} gave a loss without gradient, expected one that follows the predicted boxes. "
            "Compute it with torch, without detach() or no_grad()."
        )
    return loss
