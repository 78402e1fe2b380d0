"""Building the network that a weights file says it belongs to, no larger than its weights justify."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from models.yolo import DetectionModel, model_from_checkpoint
from utils.errors import CheckpointError, ConfigError

GROWTH, SLACK = 4, 1 << 24  # numbers that a network may take for each one in the file, and besides
MOST_CLASSES = 100_000
LARGEST_SIDE = 1 << 14
FACTORIES: tuple[object, ...] = (
    *(torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn),
)


class TensorBudget(TorchFunctionMode):
    """Refuses new tensors, those on the meta device apart, beyond so many numbers together."""

    def __init__(self, path: str | Path, numbers: int) -> None:
        super().__init__()
        self.path, self.numbers = path, numbers
        self.left = GROWTH * numbers + SLACK
        self.refusal: CheckpointError | None = None

    def __torch_function__(
        self,
        function: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Count what is made, before it is."""
        if function not in FACTORIES:
            return function(*args, **(kwargs or {}))
        size = args[0] if args and isinstance(args[0], (tuple, list)) else args
        wanted = math.prod(side for side in size if isinstance(side, int))
        if wanted > self.left:
            self.refusal = CheckpointError(
                f"{self.path}: its model asks for tensors of {wanted:.3g} numbers, its weights have {self.numbers}. "
                "Expected a model that fits its weights."
            )
            raise self.refusal
        made = function(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and not made.is_meta:
            self.left -= made.numel()
        return made


@contextmanager
def claimed(
    path: str | Path, config: object, state: object, classes: int | None = None
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
    if not isinstance(config, Mapping) or not isinstance(state, Mapping):
        name, value = ("weights", state) if isinstance(config, Mapping) else ("config", config)
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
    budget = TensorBudget(path, numbers)
    try:
        with budget:
            yield
    except CheckpointError:
        if budget.refusal is None:
            raise
        raise budget.refusal from None  # without the row in which it came to light
    except ConfigError as error:
        raise first_problem(path, error) from error


def first_problem(path: str | Path, error: ConfigError) -> ConfigError:
    """What is wrong with the model of a file, in one line."""
    first = str(error).partition("\n")[0]
    return ConfigError(f"{path}: its own model cannot be built - {first}")


def model_of(
    path: str | Path, checkpoint: Mapping[str, object], allow_code: bool
) -> DetectionModel:
    """The network of one of our checkpoints, its averaged weights in it.

    Raises:
        CheckpointError, ConfigError: what it says of itself does not fit together.
    """
    ema = checkpoint.get("ema")
    state = ema.get("model") if isinstance(ema, Mapping) else checkpoint.get("model")
    names, imgsz = checkpoint.get("names"), checkpoint.get("imgsz", [640, 640])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(
            f"{path}: its names are {repr(names)[:60]}, expected a list of words."
        )
    sides = imgsz if isinstance(imgsz, list) and len(imgsz) == 2 else [0]
    if not all(type(side) is int and 1 <= side <= LARGEST_SIDE for side in sides):
        raise CheckpointError(
            f"{path}: its imgsz is {repr(imgsz)[:60]}, expected height and width up to {LARGEST_SIDE}."
        )
    with claimed(path, checkpoint.get("config"), state, len(names)):
        return model_from_checkpoint(checkpoint, allow_code)
