"""Building the network that a weights file says it belongs to, no larger than its weights justify."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from models.yolo import DetectionModel, model_from_checkpoint
from utils.errors import CheckpointError, ConfigError

GROWTH, SLACK = 4, 1 << 24  # numbers that a network may take for each one in the file, and besides
MOST_CLASSES = 100_000
LARGEST_SIDE = 1 << 14
FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)


class TensorBudget(TorchFunctionMode):
    """Refuses new tensors, those on the meta device apart, beyond so many numbers together."""

    def __init__(self, path: str | Path, numbers: int) -> None:
        super().__init__()
        self.path, self.numbers = path, numbers
        self.left = GROWTH * numbers + SLACK

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Count what is made, before it is."""
        kwargs = kwargs or {}
        if function in FACTORIES:
            self._take(args[0] if args and isinstance(args[0], (tuple, list)) else args)
        made = function(*args, **kwargs)
        if function in FACTORIES and made.device.type != "meta":
            self.left -= made.numel()
        return made

    def _take(self, size: Iterable[Any]) -> None:
        wanted = math.prod(side for side in size if isinstance(side, int))
        if wanted > self.left:
            raise CheckpointError(
                f"{self.path}: its model asks for tensors of {wanted:.3g} numbers, its weights have {self.numbers}. "
                "Expected a model that fits its weights."
            )


@contextmanager
def claimed(
    path: str | Path, config: Any, state: Any, classes: int | None = None
) -> Iterator[None]:
    """Build the network of a file's own `config` inside the `with` block.

    Args:
        path: the file, named in messages.
        config: what it says that its model is.
        state: its tensors by name.
        classes: how many class names it has.

    Raises:
        CheckpointError: `config` or `state` is no mapping, or the network is far larger than its weights.
        ConfigError: the block raised one; its first problem is told, with the file.
    """
    for name, value in (("config", config), ("weights", state)):
        if not isinstance(value, Mapping):
            raise CheckpointError(
                f"{path}: got {name} of the type {type(value).__name__}, expected a mapping."
            )
    others = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(f"{path}: its weights {others[0]!r} are no tensor, expected one.")
    numbers = sum(value.numel() for value in state.values())
    for count in (config.get("nc"), classes):
        if isinstance(count, (int, float)) and count > min(MOST_CLASSES, numbers):
            raise CheckpointError(
                f"{path}: its config asks for {count:.3g} classes, its weights have {numbers} numbers. Expected a model "
                "that fits its weights."
            )
    try:
        with TensorBudget(path, numbers):
            yield
    except ConfigError as error:
        first = str(error).partition("\n")[0]
        raise ConfigError(f"{path}: its own model cannot be built - {first}") from error


def model_of(path: str | Path, checkpoint: Mapping[str, Any], allow_code: bool) -> DetectionModel:
    """The network of one of our checkpoints, its averaged weights in it.

    Raises:
        CheckpointError, ConfigError: what it says of itself does not fit together.
    """
    ema = checkpoint.get("ema")
    state = ema.get("model") if isinstance(ema, Mapping) else checkpoint.get("model")
    names, imgsz = checkpoint.get("names"), checkpoint.get("imgsz", [640, 640])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path}: its names are {_shown(names)}, expected a list of words.")
    are_sides = isinstance(imgsz, list) and len(imgsz) == 2
    if not are_sides or not all(type(s) is int and 1 <= s <= LARGEST_SIDE for s in imgsz):
        raise CheckpointError(
            f"{path}: its imgsz is {_shown(imgsz)}, expected height and width up to {LARGEST_SIDE}."
        )
    with claimed(path, checkpoint.get("config"), state, len(names)):
        return model_from_checkpoint(checkpoint, allow_code)


def _shown(value: Any) -> str:
    return repr(value)[:60]
