"""Rows -> modules: the index rule, names, channel rules and a shape for every row.

A plain row fills one slot. A backbone row fills one slot a pyramid level, P1 to P5 (and P6, P7 where it has them), by stride;
what it does not have is an empty slot. Rows refer to slots by index, by name, or as `P3`. After a module is built it is run on
the meta device, so that every shape, stride and misfit is known before any data is touched.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models import modules
from models.meta import run_on_meta
from models.registry import (
    Layer,
    LayerError,
    Plan,
    Scaling,
    all_names,
    find,
    find_anywhere,
)
from models.rows import ModelSpec, RowSpec
from models.wiring import Row, Slot
from utils.errors import CheckpointError, ConfigError, nearest

BUILD_ERRORS = (
    TypeError,
    ValueError,
    RuntimeError,
    AssertionError,
    IndexError,
    KeyError,
    ConfigError,
    NotImplementedError,
    ArithmeticError,
)
IMAGE = -1
PYRAMID_SLOTS = 5
LONGEST_REASON = 300  # characters of a library's own message inside ours


@dataclass
class _State:
    """What the parser knows while it walks the rows."""

    spec: ModelSpec
    imgsz: tuple[int, int]
    slots: list[Slot] = field(default_factory=list)
    named: dict[str, int] = field(default_factory=dict)
    pyramid: dict[str, int] = field(default_factory=dict)
    has_backbone: bool = False
    problems: list[str] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def image(self) -> Slot:
        channels = int(self.spec.config.get("ch", 3))
        return Slot(torch.empty(1, channels, *self.imgsz, device="meta"), channels, 1)


class _SkipError(Exception):
    """The row reads a slot whose own row has failed: said once is enough."""


def build_rows(spec: ModelSpec, imgsz: tuple[int, int]) -> tuple[list[nn.Module], tuple[Row, ...]]:
    """Build every row of `spec` for images of size `imgsz` (height, width).

    Raises:
        ConfigError: with all problems of the file, one line each.
    """
    state = _State(spec, imgsz)
    for row in spec.rows:
        try:
            _build_row(state, row)
        except _SkipError:
            _leave_broken(state, row)
        except CheckpointError:
            raise
        except (LayerError, ConfigError) as error:
            state.problems.append(f"{spec.file} {row.place} {row.module}: {error}")
            _leave_broken(state, row)
    if state.problems:
        raise ConfigError("\n".join(state.problems))
    _select_maps(state)
    return state.modules, _with_releases(state.rows)


def _select_maps(state: _State) -> None:
    """Tell every backbone that can drop maps (`select_strides`) which ones are read: no weight is left without a use."""
    read = {slot for row in state.rows for slot in row.inputs}
    for number, (row, module) in enumerate(zip(state.rows, state.modules, strict=True)):
        select = getattr(module, "select_strides", None)
        filled = sorted(slot for slot in row.map_slots or () if slot is not None)
        kept = [k for k, slot in enumerate(filled) if slot in read]
        if select is not None and kept:
            select([row.strides[k] for k in kept])
            state.rows[number] = row._replace(
                map_slots=tuple(filled[k] for k in kept),
                shape=tuple(row.shape[k] for k in kept),
                strides=tuple(row.strides[k] for k in kept),
            )


def _leave_broken(state: _State, row: RowSpec) -> None:
    """Fill the slots of a row that failed, so that rows which read them are not reported as well."""
    slots = PYRAMID_SLOTS if _gives_maps(row) else 1
    state.slots.extend(Slot(None, None, 0, "broken") for _ in range(slots))
    last = len(state.slots) - 1
    if row.section == "backbone":
        for level in range(1, PYRAMID_SLOTS + 1):
            state.pyramid.setdefault(f"P{level}", last)
    if row.name:
        state.named[row.name] = last


def _gives_maps(row: RowSpec) -> bool:
    """Whether a row that failed is a backbone; an unknown name in the first row is taken for one."""
    layer = _find_layer(row.module)
    if layer is None:
        return row.section == "backbone" and row.number == 0
    try:
        return layer.rule([3], row.args, Scaling()).channels is None
    except LayerError:
        return False


def _find_layer(name: str) -> Layer | None:
    return find(name) or modules.find_unregistered(name) or find_anywhere(name)


def _unknown(name: str) -> LayerError:
    known = [*all_names(), *modules.public_names()]
    broken = "".join(
        f" {file} could not be imported ({why})." for file, why in modules.broken_files().items()
    )
    return LayerError(
        f"unknown layer {name!r}, expected a registered layer, a class in models/modules/ or a timm model."
        f"{nearest(name, known)}{broken}"
    )


def _build_row(state: _State, row: RowSpec) -> None:
    spec, first = state.spec, len(state.slots)
    layer = _find_layer(row.module)
    if layer is None:
        raise _unknown(row.module)
    inputs = _resolve_sources(state, row)
    sources = [state.image() if i == IMAGE else state.slots[i] for i in inputs]
    scaling = Scaling(
        spec.width, spec.max_channels, spec.outputs, spec.size, spec.repeats(row.repeats),
        tuple(slot.stride for slot in sources), state.imgsz,
    )  # fmt: skip
    plan = layer.rule([slot.channels for slot in sources], row.args, scaling)
    copies = 1 if plan.repeats_inside else scaling.repeats
    built = [_construct(layer, plan, row)]
    for _ in range(copies - 1):  # the first may change the width, the others take what it gives
        built.append(_construct(layer, layer.rule([plan.channels], row.args, scaling), row))
    module = built[0] if copies == 1 else nn.Sequential(*built)
    takes_list = isinstance(row.source, list) or hasattr(
        module, "decode"
    )  # a head of one level may say -1
    values = [slot.value for slot in sources]
    output = _propagate(module, values if takes_list else values[0])
    is_backbone = plan.channels is None
    new, map_slots = (
        _backbone_slots(state, module, output, first)
        if is_backbone
        else ([_plain_slot(state, plan, output)], None)
    )
    state.slots.extend(new)
    _remember_names(state, row, first, new, is_backbone)
    shown = ", ".join(f"{key}={value!r}" for key, value in row.kwargs.items())
    printed = str(plan.args)[:-1] + (", " if plan.args and shown else "") + shown + "]"
    filled = [slot for slot in new if not slot.reason]
    state.modules.append(module)
    state.rows.append(Row(
        len(state.slots) - 1, tuple(inputs), takes_list, map_slots, (), row.source, scaling.repeats,
        row.module.removeprefix("nn."), printed, tuple(s for slot in filled for s in _shapes(slot.value)),
        tuple(slot.stride for slot in filled), row.section, row.place,
    ))  # fmt: skip


def _resolve_sources(state: _State, row: RowSpec) -> list[int]:
    first = len(state.slots)
    items = row.source if isinstance(row.source, list) else [row.source]
    return [_resolve_source(state, item, first) for item in items]


def _resolve_source(state: _State, item: int | str, first: int) -> int:
    if isinstance(item, str):
        table = {**state.pyramid, **state.named}
        if item not in table:
            options = ", ".join(table) or "none so far"
            raise LayerError(
                f"got from {item!r}, expected an index or a name: {options}.{nearest(item, table)}"
            )
        index = table[item]
    else:
        index = item if item >= 0 else first + item
        if index == IMAGE and first == 0:
            return IMAGE
        if first == 0:
            raise LayerError(f"got from {item} in the first row, expected -1, the image.")
        if not 0 <= index < first:
            raise LayerError(
                f"got from {item}, which means row {index}, expected an index from 0 to {first - 1}."
            )
    slot = state.slots[index]
    if slot.reason == "broken":
        raise _SkipError
    if slot.reason:
        raise LayerError(f"got from {item}, which is empty: {slot.reason}.")
    return index


def _construct(layer: Layer, plan: Plan, row: RowSpec) -> nn.Module:
    try:
        signature = inspect.signature(layer.build)
    except (TypeError, ValueError):
        signature = None
    if signature is not None:
        try:
            signature.bind(*plan.args, **row.kwargs)
        except TypeError as error:
            inserted = len(plan.args) - len(row.args)
            own = ", ".join(str(p).split(":")[0] + (f"={p.default!r}" if p.default is not p.empty else "")
                            for p in signature.parameters.values())  # fmt: skip
            raise LayerError(
                f"wrong arguments - got {len(row.args)} {row.args} ({error}), expected ({own})"
                + (f"; the first {inserted} come from the parser." if inserted > 0 else ".")
            ) from error
    try:
        return layer.build(*plan.args, **row.kwargs)
    except BUILD_ERRORS as error:
        raise LayerError(
            f"cannot be built with {plan.args} {row.kwargs or ''}- {_one_line(error)}"
        ) from error


def _propagate(module: nn.Module, value: Any) -> Any:
    try:
        return run_on_meta(module, value)
    except (
        RuntimeError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
        AssertionError,
    ) as error:
        shapes = [s for v in (value if isinstance(value, list) else [value]) for s in _shapes(v)]
        raise LayerError(
            f"does not fit its input of shape {_brief(shapes)} - {_one_line(error)}"
        ) from error


def _brief(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 3] + "..."


def _shapes(value: Any) -> list[tuple[int, ...]]:
    if isinstance(value, Tensor):
        return [tuple(value.shape[1:])]
    return (
        [shape for item in value or () for shape in _shapes(item)]
        if isinstance(value, (list, tuple))
        else []
    )


def _stride(state: _State, value: Any) -> int:
    """Stride of a map; a power of two where the size allows it, since sizes that do not divide are rounded."""
    shape = _shapes(value)
    if not shape or len(shape[0]) != 3:
        return 0
    size, extent = state.imgsz[0], shape[0][1]
    power = 2 ** max(round(math.log2(size / extent)), 0)
    return power if abs(size / power - extent) < 1 else max(round(size / extent), 1)


def _plain_slot(state: _State, plan: Plan, output: Any) -> Slot:
    is_map = isinstance(output, Tensor) and isinstance(plan.channels, int) and output.ndim == 4
    if is_map and output.shape[1] != plan.channels:
        raise LayerError(f"gives {output.shape[1]} channels, but its rule says {plan.channels}.")
    return Slot(output, plan.channels, _stride(state, output))


def declared_channels(module: nn.Module) -> list[int] | None:
    """What a backbone says of its widths under any of the customary names."""
    for name in ("channels", "width_list", "channel"):
        value = getattr(module, name, None)
        if isinstance(value, (list, tuple)):
            return [int(c) for c in value]
    return None


def _backbone_slots(
    state: _State, module: nn.Module, output: Any, first: int
) -> tuple[list[Slot], tuple[int | None, ...]]:
    maps = list(output.values()) if isinstance(output, Mapping) else output
    if (
        not isinstance(maps, (list, tuple))
        or not all(isinstance(m, Tensor) and m.ndim == 4 for m in maps)
        or not maps
    ):
        raise LayerError(
            f"returns {type(output).__name__}, expected a list of feature maps (B, C, H, W); a layer with one output "
            "registers with a rule: @register(convolution)."
        )
    found = [m.shape[1] for m in maps]
    declared = declared_channels(module)
    if declared is not None and declared != found:
        raise LayerError(
            f"says channels {declared}, but its outputs have {found}. Mend `channels`."
        )
    strides = [_stride(state, m) for m in maps]
    said = getattr(module, "strides", None)
    if said is not None and list(said) != strides:
        raise LayerError(
            f"says strides {list(said)}, but its outputs have {strides}. Mend `strides`."
        )
    levels = [round(math.log2(s)) if s & (s - 1) == 0 and s > 1 else 0 for s in strides]
    count = max(PYRAMID_SLOTS, *levels)
    has = ", ".join(f"P{level} (stride {2**level})" for level in sorted(set(levels) - {0}))
    slots = [
        Slot(None, None, 0, f"the backbone has no stride {2 ** (k + 1)}, only {has}")
        for k in range(count)
    ]
    chosen: dict[int, int] = {level: position for position, level in enumerate(levels) if level}
    for level, position in chosen.items():
        slots[level - 1] = Slot(maps[position], found[position], strides[position])
    map_slots = tuple(
        first + lv - 1 if chosen.get(lv) == pos else None for pos, lv in enumerate(levels)
    )
    return slots, map_slots


def _remember_names(
    state: _State, row: RowSpec, first: int, new: list[Slot], is_backbone: bool
) -> None:
    if is_backbone:
        state.pyramid = {f"P{k + 1}": first + k for k in range(len(new))}
        state.has_backbone = True
    elif row.section == "backbone" and not state.has_backbone:
        stride = new[0].stride
        if stride > 1 and stride & (stride - 1) == 0:
            state.pyramid[f"P{round(math.log2(stride))}"] = first
    if row.name:
        if row.name in state.named:
            raise LayerError(
                f"got name {row.name!r}, which row {state.named[row.name]} already has."
            )
        state.named[row.name] = len(state.slots) - 1


def _with_releases(rows: list[Row]) -> tuple[Row, ...]:
    """Note after which row each slot can be forgotten."""
    last = {slot: number for number, row in enumerate(rows) for slot in row.inputs}
    return tuple(
        row._replace(release=tuple(slot for slot, at in last.items() if at == number))
        for number, row in enumerate(rows)
    )


def apply_activation(module: nn.Module, make: Callable[[], nn.Module]) -> None:
    """Give every convolution block that has the default activation one made by `make`."""
    for block in module.modules():
        if getattr(block, "has_default_activation", False):
            block.act = make()
