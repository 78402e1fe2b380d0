"""Rows -> modules: the index rule, channel rules and a shape for every row.

A plain row fills one slot. A backbone row fills one slot a pyramid level, P1 to P5 (and P6, P7 where it has them), by stride;
what it does not have is an empty slot. A neck fills one slot a map. Rows refer to slots by index, by name, or as `P3`. After a
module is built it is run on the meta device, so that every shape, stride and misfit is known before any data is touched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from models import modules
from models.common import whole_names
from models.head import Head
from models.meta import idle_parameters, run_for_real, run_on_meta
from models.parser.advice import advice_for
from models.parser.naming import (
    BuildState,
    SkipError,
    leave_broken,
    remember_names,
    resolve_sources,
)
from models.parser.pasted import Settled, Style, arguments, materialize, settle
from models.parser.pasted_checks import Traits, check
from models.parser.readings import RowArguments
from models.parser.rows import ModelSpec, RowSpec
from models.parser.slots import backbone_slots, brief, neck_slots, plain_slot, shapes_of
from models.parser.wiring import Row, Slot, with_releases
from models.registry import (
    Layer,
    LayerError,
    Plan,
    Scaling,
    all_names,
    by_signature,
    find_anywhere,
)
from utils.errors import CheckpointError, ConfigError, ForeignError, foreign_code, nearest


def build_rows(spec: ModelSpec, imgsz: tuple[int, int]) -> tuple[list[nn.Module], tuple[Row, ...]]:
    """Build every row of `spec` for images of size `imgsz` (height, width).

    Raises:
        ConfigError: with all problems of the file, one line each.
    """
    state = BuildState(spec, imgsz)
    for row in spec.rows:
        try:
            _build_row(state, row)
        except SkipError:
            leave_broken(state, row, is_backbone=_gives_maps(state, row))
        except CheckpointError:
            raise
        except (LayerError, ConfigError) as error:
            state.problems.append(f"{spec.file} {row.place} {row.module}: {error}")
            leave_broken(state, row, is_backbone=_gives_maps(state, row))
    if state.problems:
        raise ConfigError(*state.problems)
    _select_maps(state)
    return state.modules, with_releases(state.rows)


def _select_maps(state: BuildState) -> None:
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


def _freeze_idle(state: BuildState, row: Row, module: nn.Module, kept: list[int]) -> None:
    values = [state.slot(index).value for index in row.inputs]
    for name in idle_parameters(module, row.arguments(values), kept):
        module.get_parameter(name).requires_grad_(False)


def _gives_maps(state: BuildState, row: RowSpec) -> bool:
    """Whether a row that failed is a backbone; an unknown name in the first row is taken for one."""
    try:
        layer = _find_layer(row.module)
    except LayerError:  # two backbones of one name
        return True
    if layer is None or layer.rule is by_signature:
        return row.section == "backbone" and not state.slots
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
    return modules.find_pasted(name) or find_anywhere(name)


def _unknown(name: str) -> LayerError:
    known = [*all_names(), *modules.public_names()]
    inside = modules.names_in_file(name)
    if inside:
        ways = " or ".join(f"{name}.{own}" for own in inside)
        return LayerError(f"is the name of a file, expected that of a class in it. Write {ways}.")
    if place := modules.private_place(name):
        return LayerError(
            f"is private in {place}, _{name}, expected a public class. Rename it to {name}."
        )
    broken = "".join(
        f" {file} could not be imported ({why})." for file, why in modules.broken_files().items()
    )
    return LayerError(
        f"unknown layer {name!r}, expected a registered layer, a class in models/modules/ or a timm model."
        f"{nearest(name, known)}{broken}"
    )


class _Built(NamedTuple):
    """A row's module and what came out of it."""

    module: nn.Module
    output: Any
    slots: list[Slot]
    map_slots: tuple[int | None, ...] | None
    kind: str
    args: str
    style: Style
    traits: Traits = Traits()


def _build_row(state: BuildState, row: RowSpec) -> None:
    layer = _find_layer(row.module)
    if layer is None:
        raise _unknown(row.module)
    inputs = resolve_sources(state, row)
    sources = [state.slot(i) for i in inputs]
    scaling = _scaling(state, row, sources)
    first = len(state.slots)
    if layer.rule is by_signature:
        is_image = len(inputs) == 1 and state.is_image(inputs[0])
        built = _by_signature(layer, row, sources, scaling, first, is_image, state.imgsz)
    else:
        built = _by_rule(layer, row, sources, scaling, first, state.imgsz)
    state.slots.extend(built.slots)
    remember_names(state, row, first, built.slots, kind=built.kind)
    filled = [slot for slot in built.slots if not slot.reason]
    state.modules.append(built.module)
    state.rows.append(
        Row(
            index=len(state.slots) - 1,
            inputs=tuple(inputs),
            takes_list=built.style == "list",
            map_slots=built.map_slots,
            release=(),
            source=row.source,
            repeats=scaling.repeats,
            module=row.module.removeprefix("nn."),
            args=built.args,
            shape=tuple(shape for slot in filled for shape in shapes_of(slot.value)),
            strides=tuple(slot.stride for slot in filled),
            section=row.section,
            place=row.place,
            spread=built.style == "spread",
            is_neck=built.kind == "neck",
            any_size=built.traits.any_size,
            channels_last=built.traits.channels_last,
            notes=built.traits.notes,
        )
    )


def _by_rule(
    layer: Layer,
    row: RowSpec,
    sources: Sequence[Slot],
    scaling: Scaling,
    first: int,
    imgsz: tuple[int, int],
) -> _Built:
    """A registered layer: its rule says what the constructor takes and which channels come out."""
    plan = _plan(layer, [slot.channels for slot in sources], row.args, scaling)
    module = _module(layer, plan, row, scaling)
    predicts = plan.channels is not None and isinstance(module, Head)
    takes_list = isinstance(row.source, list) or len(sources) > 1 or predicts
    values = [slot.value for slot in sources]
    output = _propagate(module, values if takes_list else values[0])
    slots, map_slots = (
        backbone_slots(module, output, first, imgsz)
        if plan.channels is None
        else ([plain_slot(plan.channels, output, imgsz)], None)
    )
    if predicts:  # predictions are no map
        slots = [slot._replace(stride=0) for slot in slots]
    kind = "map" if map_slots is None else "backbone"
    style: Style = "list" if takes_list else "map"
    are_maps = all(isinstance(value, Tensor) and value.ndim == 4 for value in values)
    traits = (
        check(module, sources, style, output, imgsz) if are_maps and _is_users(module) else Traits()
    )
    printed = _printed(plan.args, row.kwargs)
    return _Built(module, output, slots, map_slots, kind, printed, style, traits)


def _by_signature(
    layer: Layer,
    row: RowSpec,
    sources: Sequence[Slot],
    scaling: Scaling,
    first: int,
    is_image: bool,
    imgsz: tuple[int, int],
) -> _Built:
    """A pasted class: its constructor is read, and what comes out says what it is."""
    values = _maps(row, sources)
    said = RowArguments(row.args, row.kwargs, scaling)
    is_list = isinstance(row.source, list)
    settled = settle(layer, said, values, is_image=is_image, is_list=is_list)
    is_maps = isinstance(settled.output, (list, tuple, Mapping))
    module, output = _instance(layer, settled, values, 1 if is_maps else scaling.repeats, said)
    if is_maps and is_image:
        slots, map_slots = backbone_slots(module, output, first, imgsz)
    elif is_maps:
        slots, map_slots = neck_slots(output, first, imgsz)
    else:
        slots, map_slots = [plain_slot(output.shape[1], output, imgsz)], None
    traits = check(module, sources, settled.style, output, imgsz)
    notes = tuple(note for note in (settled.note, *traits.notes) if note)
    kind = "map" if map_slots is None else "backbone" if is_image else "neck"
    return _Built(
        module, output, slots, map_slots, kind, settled.text, settled.style,
        traits._replace(notes=notes),
    )  # fmt: skip


def _maps(row: RowSpec, sources: Sequence[Slot]) -> list[Tensor]:
    """The maps that a pasted class reads."""
    values = [slot.value for slot in sources]
    if not all(isinstance(value, Tensor) and value.ndim == 4 for value in values):
        raise LayerError(
            f"got from {row.source}, which is no map (B, C, H, W). Read rows that give maps."
        )
    return values


def _instance(
    layer: Layer, settled: Settled, values: Sequence[Tensor], repeats: int, said: RowArguments
) -> tuple[nn.Module, Any]:
    """The settled module with weights, as often in a sequence as its constructor leaves the repeats to us."""
    module, output = _with_weights(layer, settled, values), settled.output
    if settled.reading.repeats_inside or repeats == 1:
        return module, output
    if len(values) > 1:
        raise LayerError(
            f"got repeats {repeats} for {len(values)} inputs, expected 1. Write a row for each."
        )
    chain = [module]
    again = settle(
        layer, said, [output], is_image=False, is_list=False
    )  # the first may change the width
    chain += [_with_weights(layer, again, [output]) for _ in range(repeats - 1)]
    sequence = nn.Sequential(*chain)
    return sequence, _propagate(sequence, *arguments(values, settled.style))


def _with_weights(layer: Layer, settled: Settled, values: Sequence[Tensor]) -> nn.Module:
    try:
        with foreign_code(LayerError, users=modules.USER_CODE):
            module: nn.Module = layer.build(*settled.reading.args, **settled.reading.kwargs)
            if any(is_lazy(p) for p in module.parameters()):
                materialize(module, values, settled.style)
    except ForeignError as error:
        raise LayerError(f"cannot be built as {settled.text} - {error}") from error
    return module


def _scaling(state: BuildState, row: RowSpec, sources: list[Slot]) -> Scaling:
    spec, strides = state.spec, tuple(slot.stride for slot in sources)
    sizes = (spec.width, spec.max_channels, spec.size, spec.repeats(row.repeats))
    return Scaling(*sizes, strides, state.imgsz, spec.head)


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


def _construct(layer: Layer, plan: Plan, row: RowSpec) -> nn.Module:
    kwargs = row.kwargs
    try:
        signature = inspect.signature(layer.build)
        kwargs = whole_names(layer.build, kwargs)
    except (TypeError, ValueError):
        signature = None
    if signature is not None:
        try:
            signature.bind(*plan.args, **kwargs)
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
            module = layer.build(*plan.args, **kwargs)
    except (ForeignError, LayerError) as error:
        given = " ".join(str(part) for part in (plan.args, row.kwargs) if part) or "no arguments"
        raise LayerError(f"cannot be built with {given} - {error}") from error
    if not isinstance(module, nn.Module):
        raise LayerError(f"is a {type(module).__name__}, expected a torch.nn.Module.")
    return module


def _propagate(module: nn.Module, value: Any) -> Any:
    """What comes out on the meta device, or from real numbers where that device does not know the code."""
    try:
        with foreign_code(users=modules.USER_CODE):
            return run_on_meta(module, value)
    except ForeignError as error:
        reason = error
    try:
        with foreign_code(users=modules.USER_CODE):
            return run_for_real(module, value)
    except ForeignError as error:
        if not any(p.device.type == "meta" for p in module.parameters()):  # a draft has no numbers
            reason = error
    shapes = [s for v in (value if isinstance(value, list) else [value]) for s in shapes_of(v)]
    advice = advice_for(reason)
    said = f"{str(reason).rstrip('.')}.{advice}" if advice else str(reason)
    raise LayerError(f"does not fit its input of shape {brief(shapes)} - {said}") from reason


def _is_users(module: nn.Module) -> bool:
    return any(type(m).__module__.startswith(modules.USER_CODE) for m in module.modules())


def apply_activation(module: nn.Module, make: Callable[[], nn.Module]) -> None:
    """Give every convolution block that has the default activation one made by `make`."""
    for block in module.modules():
        if getattr(block, "has_default_activation", False):
            block.act = make()
