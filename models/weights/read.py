"""Weights that other projects wrote: `read_weights(path)` reads the numbers and runs nothing.

A checkpoint of YOLOv5, YOLOv9 or ultralytics is a pickle of whole modules; those of research code
are dictionaries around a state dict. Both end up as one flat state dict with float32 numbers, plus
what the file says of class names, model YAML, anchors and strides. Averaged weights (EMA) are
preferred where the writer kept them beside the raw ones. `transfer` gives such a state dict to a
model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.weights.transfer import TransferReport, transfer
from utils.weight_files.torch_file import TensorFile, open_file
from utils.weight_files.unpickle import PickleError, Stub, shown
from utils.weight_files.unpickle_names import NumpyArray, TensorRef

__all__ = ["ForeignWeights", "TransferReport", "load_backbone_weights", "read_weights", "transfer"]

AVERAGED = ("ema", "model_ema", "ema_model", "state_dict_ema", "ema_state_dict", "net_E")
RAW = ("model", "state_dict", "model_state_dict", "net", "network", "weights", "params", "module")
WRAPPERS = ("module.", "_orig_mod.", "model.model.")
BOOKKEEPING = ("n_averaged", "num_updates", "decay")
NOT_WEIGHTS = ("optim", "scaler", "scheduler", "rng", "state")
MAX_DEPTH = 64
MAX_VISITS = 200_000
MAX_WRAPPING = 5
MAX_PARTS = 32
MAX_STRIDE = 4096
MAX_IMAGE = 65536
# What a carried model YAML may not bring along. Its `imports` run only where code is allowed; `forget_weights` takes
# away what its rows would read or download.
UNTRUSTED = ("weights", "pretrained")


@dataclass(frozen=True)
class ForeignWeights:
    """What a weights file holds.

    Attributes:
        state: tensors by key, floating types as float32.
        names: class names, None if the file has none.
        config: the model YAML it carries, None if it has none; plain data, no file is imported for
            it.
        anchors: (width, height) in pixels by level, None if it has none.
        strides: strides of its levels, None if it has none.
        imgsz: size (height, width) it was trained at, None if it does not say.
        source: where in the file the tensors were, such as `ema` or `model`.
    """

    state: dict[str, Tensor] = field(repr=False)
    names: tuple[str, ...] | None
    config: dict[str, Any] | None = field(repr=False)
    anchors: tuple[tuple[tuple[float, float], ...], ...] | None
    strides: tuple[int, ...] | None
    imgsz: tuple[int, int] | None
    source: str


def read_weights(path: str | Path) -> ForeignWeights:
    """Read a checkpoint of any project: torch's zip and legacy formats, or safetensors.

    Raises:
        CheckpointError: the file is missing, damaged, of another format, holds no tensors, or asks
            for something other than plain data.
    """
    with open_file(path) as file:
        found = _find(file.content)
        if found is None:
            raise PickleError("has no tensors. Expected a checkpoint, a module or a state dict")
        source, holder = found
        source = source or ("module" if isinstance(holder, Stub) else "")
        state = _clean({key: _tensor(file, value) for key, value in _flatten(holder)})
        places = _places(file.content, holder)
        config = _config(places)
        strides = _strides(file, places)
        return ForeignWeights(
            state, _names(places, config), config, _anchors(state, config, strides), strides,
            _imgsz(places), source,
        )  # fmt: skip


def _is_tensor(value: Any) -> bool:
    return isinstance(value, (TensorRef, Tensor)) or (
        isinstance(value, NumpyArray) and value.value is not None
    )


def _find(content: Any, depth: int = 0) -> tuple[str, Any] | None:
    """Where the weights are: (keys on the way, state dict or module)."""
    if isinstance(content, Stub):
        return ("", content) if next(_flatten(content), None) else None
    if not isinstance(content, dict) or depth > MAX_WRAPPING:
        return None
    for key in (*AVERAGED, *RAW):
        if isinstance(content.get(key), (dict, Stub)):
            inner = _find(content[key], depth + 1)
            if inner is not None:
                return ".".join(filter(None, (key, inner[0]))), inner[1]
    if next(_flatten(content), None):
        return "", content
    parts = _parts(content)
    return ("", parts) if parts else None


def _parts(content: dict[Any, Any]) -> dict[str, Any]:
    """State dicts side by side (`student` and `teacher`, `backbone` and `head`) as one, their names in front."""
    holders = [
        (name, holder)
        for name, holder in _items(content)
        if isinstance(holder, (dict, Stub)) and not name.startswith(NOT_WEIGHTS)
    ]
    return {
        f"{name}.{key}": value
        for name, holder in holders[:MAX_PARTS]
        for key, value in _flatten(holder)
    }


def _flatten(holder: Any) -> Iterator[tuple[str, Any]]:
    """Every parameter and persistent buffer under `holder`, with its state-dict key."""
    if isinstance(holder, dict):
        yield from ((key, v) for key, v in holder.items() if isinstance(key, str) and _is_tensor(v))
        return
    pending = [("", holder, 0)]
    for _ in range(MAX_VISITS):
        if not pending:
            return
        prefix, module, depth = pending.pop()
        attributes = module.attributes()
        hidden = attributes.get("_non_persistent_buffers_set")
        hidden = hidden if isinstance(hidden, (list, tuple)) else ()
        for kind in ("_parameters", "_buffers"):
            for key, value in _items(attributes.get(kind)):
                if _is_tensor(value) and (kind == "_parameters" or key not in hidden):
                    yield prefix + key, value
        children = [(f"{prefix}{k}.", c, depth + 1) for k, c in _items(attributes.get("_modules"))]
        if depth >= MAX_DEPTH and children:
            raise PickleError(f"refused: modules are nested deeper than {MAX_DEPTH}")
        pending.extend(item for item in reversed(children) if isinstance(item[1], Stub))
    raise PickleError(f"refused: more than {MAX_VISITS:,} modules")


def _items(value: Any) -> list[tuple[str, Any]]:
    """The items of a dictionary with text keys; nothing for anything else."""
    return (
        [(k, v) for k, v in value.items() if isinstance(k, str)] if isinstance(value, dict) else []
    )


def _tensor(file: TensorFile, value: Any) -> Tensor:
    if isinstance(value, TensorRef):
        return file.tensor(value)
    tensor = torch.from_numpy(value.value) if isinstance(value, NumpyArray) else value
    return tensor.float() if tensor.is_floating_point() else tensor


def _clean(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the prefixes of wrappers (DataParallel, torch.compile, averaging) off every key."""
    for key in state:
        if not key.isprintable():
            raise PickleError(f"damaged: tensor name {shown(key)!r}")
    state = {key: value for key, value in state.items() if key not in BOOKKEEPING}
    stripped = True
    while stripped and state:
        stripped = False
        for prefix in WRAPPERS:
            cut = prefix if prefix != "model.model." else "model."
            if all(key.startswith(prefix) for key in state):
                state = {key[len(cut) :]: value for key, value in state.items()}
                stripped = True
    return state


def _places(content: Any, holder: Any) -> list[dict[Any, Any]]:
    """Where names, YAML and strides may stand: first the module, then its head, the file's top."""
    places = [holder.attributes()] if isinstance(holder, Stub) else []
    inner = places[0].get("_modules") if places else None
    rows = inner.get("model") if isinstance(inner, dict) else None
    if isinstance(rows, Stub):
        modules = _items(rows.attributes().get("_modules"))
        places += (
            [modules[-1][1].attributes()] if modules and isinstance(modules[-1][1], Stub) else []
        )
    return [*places, *([content] if isinstance(content, dict) else [])]


def _config(places: list[dict[Any, Any]]) -> dict[str, Any] | None:
    """The carried model YAML, as plain data."""
    for place in places:
        for key in ("yaml", "config", "cfg"):
            value = place.get(key)
            if isinstance(value, dict) and {"backbone", "head"} <= value.keys():
                return {k: v for k, v in _Plain().copy(value).items() if k not in UNTRUSTED}
    return None


class _Plain:
    """Copies containers, numbers and text; bounded, since a file may share without end."""

    def __init__(self) -> None:
        self.count = 0

    def copy(self, value: Any, depth: int = 0) -> Any:
        self.count += 1
        if self.count > MAX_VISITS or depth > MAX_DEPTH:
            raise PickleError("refused: its model YAML is too large or too deeply nested")
        if isinstance(value, dict):
            keys = (key for key in value if isinstance(key, (str, int)))
            return {key: self.copy(value[key], depth + 1) for key in keys}
        if isinstance(value, (list, tuple)):
            return [self.copy(item, depth + 1) for item in value]
        return value if isinstance(value, (str, int, float)) else None


def _names(
    places: list[dict[Any, Any]], config: Mapping[str, Any] | None
) -> tuple[str, ...] | None:
    """Class names, from a list or from a dictionary by index."""
    for value in [*(place.get("names") for place in places), (config or {}).get("names")]:
        if isinstance(value, dict) and set(value) == set(range(len(value))):
            value = [value[index] for index in range(len(value))]
        if (
            isinstance(value, (list, tuple))
            and value
            and all(isinstance(name, str) for name in value)
        ):
            return tuple(value)
    return None


def _strides(file: TensorFile, places: list[dict[Any, Any]]) -> tuple[int, ...] | None:
    """Strides of the levels, from a tensor or from numbers."""
    for place in places:
        value = place.get("stride", place.get("strides"))
        if _is_tensor(value):
            tensor = _tensor(file, value)
            value = tensor.flatten().tolist() if tensor.numel() <= 16 else None
        numbers = value if isinstance(value, (list, tuple)) else ()
        if numbers and all(isinstance(n, (int, float)) and 0 < n < MAX_STRIDE for n in numbers):
            return tuple(int(number) for number in numbers)
    return None


def _imgsz(places: list[dict[Any, Any]]) -> tuple[int, int] | None:
    """Height and width, where both are sizes."""
    for place in places:
        value = place.get("imgsz")
        if isinstance(value, (list, tuple)) and len(value) == 2:
            height, width = value
            if all(type(n) is int and 0 < n <= MAX_IMAGE for n in (height, width)):
                return height, width
    return None


def _anchors(
    state: Mapping[str, Tensor], config: Mapping[str, Any] | None, strides: tuple[int, ...] | None
) -> tuple[tuple[tuple[float, float], ...], ...] | None:
    """Anchors in pixels: the head's buffer (in strides, perhaps refined), else the YAML's."""
    buffer = next((value for key, value in state.items() if key.endswith(".anchors")), None)
    if (
        buffer is not None
        and strides
        and buffer.dim() == 3
        and buffer.shape[::2] == (len(strides), 2)
    ):
        pixels = (
            buffer.float() * torch.tensor(strides, dtype=torch.float32).view(-1, 1, 1)
        ).tolist()
        return tuple(tuple((w, h) for w, h in level) for level in pixels)
    levels = (config or {}).get("anchors")
    if not isinstance(levels, list) or not levels:
        return None
    if not all(isinstance(level, list) and len(level) % 2 == 0 for level in levels):
        return None
    if not all(isinstance(number, (int, float)) for level in levels for number in level):
        return None
    return tuple(tuple(zip(level[::2], level[1::2], strict=True)) for level in levels)


def load_backbone_weights(model: nn.Module, path: str | Path) -> TransferReport:
    """Give only the backbone of a detection model the numbers of a file.

    The file may hold a backbone alone, under any prefix and with names flattened as timm does
    (`stages.0` or `stages_0`), a classifier, whose last layer is left out, or a whole detector.

    Raises:
        CheckpointError: the file cannot be read, or has less than half of the backbone's tensors.
    """
    return transfer(model, read_weights(path).state, only_backbone=True, source=str(path))
