"""Reading files of plain tensors: `.pt`, `.pth`, `.safetensors`. Nothing in them runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import CheckpointError

WRAPPERS = ("state_dict", "model", "model_ema", "state_dict_ema")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file, on the CPU.

    It may be wrapped once, under a customary key such as `state_dict`; names may begin with `module.`.

    Raises:
        CheckpointError: the file is missing, is not made of tensors, or is cut short.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file. Give the path of a .safetensors, .pt or .pth file of weights.")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise CheckpointError(f"{path}: has no tensors - got {type(content).__name__}, expected a state dict.")
    return {key.removeprefix("module."): value for key, value in tensors.items()}


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:150]
        raise CheckpointError(
            f"{path}: is not a file of tensors alone, or is cut short - {reason}. Give a plain state dict."
        ) from error


def _read_safetensors(path: Path) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(f"{path}: needs the package safetensors. Run pip install safetensors.") from error
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: is not a safetensors file, or is cut short - {error}.") from error


def load_strictly(model: nn.Module, state: Mapping[str, Tensor | None], source: str | Path) -> None:
    """Load `state` (our names) into `model`; a missing name or another shape is an error.

    Raises:
        CheckpointError: naming the first few tensors that do not fit.
    """
    own = model.state_dict()
    bad = [
        f"{key} (got {_shape(state.get(key))}, expected {tuple(value.shape)})"
        for key, value in own.items()
        if _shape(state.get(key)) != tuple(value.shape)
    ]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise CheckpointError(
            f"{source}: does not fit {type(model).__name__} - {'; '.join(bad[:3])}{more}. "
            "Give the weights of this very model."
        )
    model.load_state_dict({key: state[key] for key in own})


def _shape(value: Tensor | None) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None
