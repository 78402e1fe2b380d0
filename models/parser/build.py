"""Rows -> modules: the index rule, names, channel rules and a shape for every row.

A plain row fills one slot. A backbone row fills one slot a pyramid level, P1 to P5 (and P6, P7 where it has them), by stride;
what it does not have is an empty slot. Rows refer to slots by index, by name, or as `P3`. After a module is built it is run on
the meta device, so that every shape, stride and misfit is known before any data is touched.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from models import modules
from models.meta import idle_parameters, run_on_meta
from models.parser.rows import ModelSpec, RowSpec
from models.parser.slots import PYRAMID_SLOTS, backbone_slots, brief, plain_slot, shapes_of
from models.parser.wiring import Row, Slot
from models.registry import (
    Layer,
    LayerError,
    Plan,
    Scaling,
    all_names,
    find_anywhere,
)
from utils.errors import CheckpointError, ConfigError, ForeignError, foreign_code, nearest

IMAGE = -1
BROKEN = "broken"
VALUES_ADVICE = (
    " Shapes are found on torch's meta device, where tensors have no values: leave .item(), .numpy() and decisions on "
    "numbers out of forward, or behind `if self.training`."
)


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
    """Tell every backbone which of its maps are read: no weight that trains is left without a use.

    One that can drop maps (`select_strides`) does so; in another the parameters that serve no map that is read are frozen.
    """
    read = {slot for row in state.rows for slot in row.inputs}
    for number, (row, module) in enumerate(zip(state.rows, state.modules, strict=True)):
        select = getattr(module, "select_strides", None)
        filled = sorted(slot for slot in row.map_slots or () if slot is not None)
        kept = [k for k, slot in enumerate(filled) if slot in read]
        if select is None and kept and len(kept) < len(filled):
            slots = row.map_slots or ()
            _freeze_idle(state, row, module, [slots.index(filled[k]) for k in kept])
        if select is not None and kept:
            select([row.strides[k] for k in kept])
            state.rows[number] = row._replace(
                map_slots=tuple(filled[k] for k in kept),
                shape=tuple(row.shape[k] for k in kept),
                strides=tuple(row.strides[k] for k in kept),
            )


def _freeze_idle(state: _State, row: Row, module: nn.Module, kept: list[int]) -> None:
    value = (state.image() if row.inputs[0] == IMAGE else state.slots[row.inputs[0]]).value
    for name in idle_parameters(module, [value] if row.takes_list else value, kept):
        module.get_parameter(name).requires_grad_(False)


def _leave_broken(state: _State, row: RowSpec) -> None:
    """Fill the slots of a row that failed, so that rows which read them are not reported as well."""
    slots = PYRAMID_SLOTS if _gives_maps(row) else 1
    state.slots.extend(Slot(None, None, 0, BROKEN) for _ in range(slots))
    last = len(state.slots) - 1
    if row.section == "backbone":
        for level in range(1, PYRAMID_SLOTS + 1):
            state.pyramid.setdefault(f"P{level}", last)
    if row.name:
        state.named[row.name] = last


def _gives_maps(row: RowSpec) -> bool:
    """Whether a row that failed is a backbone; an unknown name in the first row is taken for one."""
    try:
        layer = _find_layer(row.module)
    except LayerError:  # two backbones of one name
        return True
    if layer is None:
        return row.section == "backbone" and row.number == 0
    return _is_backbone(layer, row.args)


def _is_backbone(layer: Layer, args: list[Any]) -> bool:
    try:
        return _plan(layer, [3], args, Scaling()).channels is None
    except LayerError:
        return False


def require_backbone(name: str) -> None:
    """Refuse what cannot stand behind `--backbone`.

    Raises:
        LayerError: nothing is called `name`, or it is a layer of another kind.
    """
    layer = _find_layer(name)
    if layer is None:
        raise _unknown(name)
    if not _is_backbone(layer, []):
        raise LayerError(
            f"got {name}, a layer that does not make all maps from the image, expected a backbone "
            "such as EMO_1M, or a timm model such as resnet18."
        )


def _find_layer(name: str) -> Layer | None:
    return modules.find_backbone(name) or find_anywhere(name)


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
    first = len(state.slots)
    layer = _find_layer(row.module)
    if layer is None:
        raise _unknown(row.module)
    inputs = _resolve_sources(state, row)
    sources = [state.image() if i == IMAGE else state.slots[i] for i in inputs]
    scaling = _scaling(state, row, sources)
    plan = _plan(layer, [slot.channels for slot in sources], row.args, scaling)
    module = _module(layer, plan, row, scaling)
    predicts = plan.channels is not None and hasattr(module, "decode")
    takes_list = isinstance(row.source, list) or predicts  # a head of one level may say -1
    values = [slot.value for slot in sources]
    output = _propagate(module, values if takes_list else values[0])
    new, map_slots = (
        backbone_slots(module, output, first, state.imgsz)
        if plan.channels is None
        else ([plain_slot(plan.channels, output, state.imgsz)], None)
    )
    if predicts:  # predictions are no map
        new = [slot._replace(stride=0) for slot in new]
    state.slots.extend(new)
    _remember_names(state, row, first, new, is_backbone=map_slots is not None)
    filled = [slot for slot in new if not slot.reason]
    state.modules.append(module)
    state.rows.append(
        Row(
            index=len(state.slots) - 1,
            inputs=tuple(inputs),
            takes_list=takes_list,
            map_slots=map_slots,
            release=(),
            source=row.source,
            repeats=scaling.repeats,
            module=row.module.removeprefix("nn."),
            args=_printed(plan.args, row.kwargs),
            shape=tuple(shape for slot in filled for shape in shapes_of(slot.value)),
            strides=tuple(slot.stride for slot in filled),
            section=row.section,
            place=row.place,
        )
    )


def _scaling(state: _State, row: RowSpec, sources: list[Slot]) -> Scaling:
    spec, strides = state.spec, tuple(slot.stride for slot in sources)
    repeats = spec.repeats(row.repeats)
    return Scaling(
        spec.width, spec.max_channels, spec.outputs, spec.size, repeats, strides, state.imgsz
    )


def _module(layer: Layer, plan: Plan, row: RowSpec, scaling: Scaling) -> nn.Module:
    """The row's layer, as often in a sequence as its rule leaves the repeats to us."""
    first = _construct(layer, plan, row)
    if plan.repeats_inside or scaling.repeats == 1:
        return first
    same = _plan(layer, [plan.channels], row.args, scaling)  # the first may change the width
    return nn.Sequential(first, *(_construct(layer, same, row) for _ in range(scaling.repeats - 1)))


def _printed(args: list[Any], kwargs: dict[str, Any]) -> str:
    """Arguments as the table prints them: `[64, 3, bias=False]`."""
    return (
        f"[{', '.join([*map(repr, args), *(f'{key}={value!r}' for key, value in kwargs.items())])}]"
    )


def _plan(layer: Layer, channels: list[Any], args: list[Any], scaling: Scaling) -> Plan:
    try:
        with foreign_code(LayerError, users=modules.USER_CODE):
            return layer.rule(channels, args, scaling)
    except ForeignError as error:
        raise LayerError(f"does not take {args} - {error}") from error


def _resolve_sources(state: _State, row: RowSpec) -> list[int]:
    first = len(state.slots)
    items = row.source if isinstance(row.source, list) else [row.source]
    return [_resolve_source(state, item, first) for item in items]


def _resolve_source(state: _State, item: int | str, first: int) -> int:
    if isinstance(item, str):
        table = {**state.pyramid, **state.named}
        if item not in table:
            filled = (name for name, i in table.items() if state.slots[i].reason in ("", BROKEN))
            options = ", ".join(filled) or "none so far"
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
    if slot.reason == BROKEN:
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
            own = ", ".join(
                str(p.replace(annotation=p.empty)) for p in signature.parameters.values()
            )
            raise LayerError(
                f"wrong arguments - got {len(row.args)} {row.args} ({error}), expected ({own})"
                + (f"; the first {inserted} come from the parser." if inserted > 0 else ".")
            ) from error
    try:
        with foreign_code(LayerError, users=modules.USER_CODE):
            module = layer.build(*plan.args, **row.kwargs)
    except (ForeignError, LayerError) as error:
        given = " ".join(str(part) for part in (plan.args, row.kwargs) if part) or "no arguments"
        raise LayerError(f"cannot be built with {given} - {error}") from error
    if not isinstance(module, nn.Module):
        raise LayerError(f"is a {type(module).__name__}, expected a torch.nn.Module.")
    return module


def _propagate(module: nn.Module, value: Any) -> Any:
    try:
        with foreign_code(users=modules.USER_CODE):
            return run_on_meta(module, value)
    except ForeignError as error:
        shapes = [s for v in (value if isinstance(value, list) else [value]) for s in shapes_of(v)]
        advice = VALUES_ADVICE if "meta tensor" in str(error) else ""
        raise LayerError(
            f"does not fit its input of shape {brief(shapes)} - {error}{advice}"
        ) from error


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
