"""Weights that other projects wrote: `read_weights(path)` reads the numbers and runs nothing.

A checkpoint of YOLOv5, YOLOv9 or ultralytics is a pickle of whole modules; those of research code
are dictionaries around a state dict. Both end up as one flat state dict with float32 numbers, plus
what the file says of class names, model YAML and image size. Averaged weights (EMA) are preferred
where the writer kept them beside the raw ones. `transfer` gives such a state dict to a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from utils.weight_files.torch_file import MAX_DEPTH, TensorFile, open_file, plain
from utils.weight_files.unpickle_names import NumpyArray, PickleError, Stub, TensorRef, shown

AVERAGED = ("ema", "model_ema", "ema_model", "state_dict_ema", "ema_state_dict", "net_E")
RAW = ("model", "state_dict", "model_state_dict", "net", "network", "weights", "params", "module")
WRAPPERS = {"module.": "module.", "_orig_mod.": "_orig_mod.", "model.model.": "model."}
BOOKKEEPING = ("n_averaged", "num_updates", "decay")
NOT_WEIGHTS = ("optim", "scaler", "scheduler", "rng", "state")
MAX_VISITS = 200_000
MAX_WRAPPING = 5
MAX_PARTS = 32
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
        imgsz: size (height, width) it was trained at, None if it does not say.
    """

    state: dict[str, Tensor] = field(repr=False)
    names: tuple[str, ...] | None
    config: dict[str, object] | None = field(repr=False)
    imgsz: tuple[int, int] | None


def read_weights(path: str | Path) -> ForeignWeights:
    """Read a checkpoint of any project: torch's zip and legacy formats, or safetensors.

    Raises:
        CheckpointError: the file is missing, damaged, of another format, holds no tensors, or asks
            for something other than plain data.
    """
    with open_file(path) as file:
        holder = _find(file.content)
        if holder is None:
            raise PickleError("has no tensors. Expected a checkpoint, a module or a state dict")
        state = _clean({key: _tensor(file, value) for key, value in _flatten(holder)})
        places = _places(file.content, holder)
        config = _config(places)
        names = _names([*(place.get("names") for place in places), (config or {}).get("names")])
        return ForeignWeights(state, names, config, _imgsz(places))


def _is_tensor(value: object) -> bool:
    is_array = isinstance(value, NumpyArray) and value.value is not None
    return is_array or isinstance(value, (TensorRef, Tensor))


def _find(content: object, depth: int = 0) -> object | None:
    """The state dict or module that holds the weights."""
    if isinstance(content, Stub):
        return content if next(_flatten(content), None) else None
    if not isinstance(content, dict) or depth > MAX_WRAPPING:
        return None
    for key in (*AVERAGED, *RAW):
        if isinstance(content.get(key), (dict, Stub)):
            inner = _find(content[key], depth + 1)
            if inner is not None:
                return inner
    return content if next(_flatten(content), None) else _parts(content) or None


def _parts(content: dict[object, object]) -> dict[str, object]:
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


def _flatten(holder: object) -> Iterator[tuple[str, object]]:
    """Every parameter and persistent buffer under `holder`, with its state-dict key."""
    if not isinstance(holder, Stub):
        yield from ((key, value) for key, value in _items(holder) if _is_tensor(value))
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
        children = _items(attributes.get("_modules"))
        if depth >= MAX_DEPTH and children:
            raise PickleError(f"refused: modules are nested deeper than {MAX_DEPTH}")
        pending += [
            (f"{prefix}{key}.", child, depth + 1)
            for key, child in reversed(children)
            if isinstance(child, Stub)
        ]
    raise PickleError(f"refused: more than {MAX_VISITS:,} modules")


def _items(value: object) -> list[tuple[str, object]]:
    """The items of a dictionary with text keys; nothing for anything else."""
    items = value.items() if isinstance(value, dict) else ()
    return [(key, item) for key, item in items if isinstance(key, str)]


def _tensor(file: TensorFile, value: object) -> Tensor:
    """A tensor of the file, floating types as float32."""
    if isinstance(value, TensorRef):
        value = file.tensor(value)
    elif isinstance(value, NumpyArray):
        value = torch.from_numpy(value.value)
    assert isinstance(value, Tensor)
    return value.float() if value.is_floating_point() else value


def _clean(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the prefixes of wrappers (DataParallel, torch.compile, averaging) off every key."""
    for key in state:
        if not key.isprintable():
            raise PickleError(f"damaged: tensor name {shown(key)!r}")
    state = {key: value for key, value in state.items() if key not in BOOKKEEPING}
    while prefix := next(
        (p for p in WRAPPERS if state and all(k.startswith(p) for k in state)), ""
    ):
        state = {key.removeprefix(WRAPPERS[prefix]): value for key, value in state.items()}
    return state


def _places(content: object, holder: object) -> list[dict[object, object]]:
    """Where names, YAML and size may stand: first the module, then its head, the file's top."""
    places = [holder.attributes()] if isinstance(holder, Stub) else []
    rows = dict(_items(places[0].get("_modules"))).get("model") if places else None
    if isinstance(rows, Stub):
        modules = [module for _, module in _items(rows.attributes().get("_modules"))]
        places += [head.attributes() for head in modules[-1:] if isinstance(head, Stub)]
    return [*places, *([content] if isinstance(content, dict) else [])]


def _config(places: list[dict[object, object]]) -> dict[str, object] | None:
    """The carried model YAML, as plain data."""
    for place in places:
        for value in (place.get("yaml"), place.get("config"), place.get("cfg")):
            if isinstance(value, dict) and {"backbone", "head"} <= value.keys():
                return {key: v for key, v in _items(plain(value)) if key not in UNTRUSTED}
    return None


def _names(given: Iterable[object]) -> tuple[str, ...] | None:
    """The first of them that is class names, as a list or as a dictionary by index."""
    for value in given:
        if isinstance(value, dict) and set(value) == set(range(len(value))):
            value = [value[index] for index in range(len(value))]
        if isinstance(value, (list, tuple)) and value and all(isinstance(n, str) for n in value):
            return tuple(value)
    return None


def _imgsz(places: list[dict[object, object]]) -> tuple[int, int] | None:
    """Height and width, where both are sizes."""
    for place in places:
        match place.get("imgsz"):
            case [int(height), int(width)] if all(0 < n <= MAX_IMAGE for n in (height, width)):
                return height, width
    return None
