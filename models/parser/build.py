"""Rows -> modules: the index rule, channel rules and a shape for every row.

A plain row fills one slot. A backbone row fills one slot a pyramid level, P1 to P5 (and P6, P7 where it has them), by stride;
what it does not have is an empty slot. A neck fills one slot a map. Rows refer to slots by index, by name, or as `P3`. After a
module is built it is run on the meta device, so that every shape, stride and misfit is known before any data is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from torch import Tensor, nn

from models import modules
from models.common import whole_names
from models.head import Head
from models.meta import idle_parameters, run_without_images
from models.parser.advice import reason_of
from models.parser.lookup import UnknownLayerError, find_layer, is_backbone, plan_of
from models.parser.pasted import Settled, materialize, settle
from models.parser.readings import RowArguments, given_text
from models.parser.rows import ModelSpec, RowSpec
from models.parser.signature import shown, signature_of
from models.parser.slots import MapSlots, backbone_slots, brief, neck_slots, plain_slot, shapes_of
from models.parser.trials import Traits, check, maps_of, outputs_of
from models.parser.wiring import (
    BuildState,
    Kind,
    Row,
    RowSlots,
    SkipError,
    Slot,
    Style,
    arguments,
    with_releases,
)
from models.registry import (
    DefaultActivation,
    Layer,
    LayerError,
    Plan,
    Scaling,
    SelectsStrides,
    by_signature,
)
from utils.errors import CheckpointError, ConfigError, ForeignError, foreign_code


def build_rows(
    spec: ModelSpec, imgsz: tuple[int, int], *, fits: bool = False
) -> tuple[list[nn.Module], tuple[Row, ...]]:
    """Build every row of `spec` for images of size `imgsz` (height, width).

    Args:
        spec: what to build.
        imgsz: size of the images.
        fits: it is known to fit together, as what weights were trained with does, so that our own layers are run in the
            quickest way.

    Raises:
        ConfigError: with all problems of the file, one line each.
        CheckpointError: weights that a row asks for cannot be read.
    """
    state = BuildState(spec, imgsz, fits)
    for row in spec.rows:
        where = f"{spec.file} {row.place} {row.module}"
        try:
            _build_row(state, row)
        except SkipError:
            state.add_broken(row, is_backbone=_gives_maps(state, row))
        except CheckpointError as error:
            raise CheckpointError(f"{where}: {error}") from error
        except (LayerError, ConfigError) as error:
            state.problems.append(f"{where}: {error}")
            state.add_broken(row, is_backbone=_gives_maps(state, row))
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
        slots = row.map_slots or ()
        filled = sorted(slot for slot in slots if slot is not None)
        kept = [k for k, slot in enumerate(filled) if slot in read]
        if kept and isinstance(module, SelectsStrides):
            module.select_strides([row.strides[k] for k in kept])
            state.rows[number] = row._replace(
                map_slots=tuple(filled[k] for k in kept),
                shape=tuple(row.shape[k] for k in kept),
                strides=tuple(row.strides[k] for k in kept),
            )
        elif kept and len(kept) < len(filled):
            inputs = row.arguments([state.slot(index).value for index in row.inputs])
            for name in idle_parameters(module, inputs, [slots.index(filled[k]) for k in kept]):
                module.get_parameter(name).requires_grad_(False)


def _gives_maps(state: BuildState, row: RowSpec) -> bool:
    """Whether a row that failed is a backbone; an unknown name in the first row is taken for one."""
    may_be = row.section == "backbone" and not state.slots
    try:
        layer = find_layer(row.module)
    except UnknownLayerError:
        return may_be
    except LayerError:  # two backbones of one name
        return True
    return may_be if layer.rule is by_signature else is_backbone(layer, row.args)


@dataclass(frozen=True)
class _Job:
    """A row about to be built.

    Attributes:
        row: as written.
        layer: what it names.
        sources: what it reads.
        scaling: what the model's size makes of its numbers.
        first: index of its first slot.
        is_image: it reads the image alone.
        fits: its model is known to fit together.
    """

    row: RowSpec
    layer: Layer
    sources: Sequence[Slot]
    scaling: Scaling
    first: int
    is_image: bool
    fits: bool


@dataclass(frozen=True)
class _Built:
    """A row's module and what it fills; `text` is its arguments as the table prints them."""

    module: nn.Module
    slots: Sequence[Slot]
    map_slots: MapSlots | None
    kind: Kind
    text: str
    style: Style
    traits: Traits


def _build_row(state: BuildState, row: RowSpec) -> None:
    layer = find_layer(row.module)
    inputs = state.sources(row)
    sources = [state.slot(i) for i in inputs]
    first, spec = len(state.slots), state.spec
    scaling = Scaling(
        spec.width, spec.max_channels, spec.size, spec.repeats(row.repeats),
        tuple(slot.stride for slot in sources), state.imgsz, spec.head,
    )  # fmt: skip
    is_image = len(inputs) == 1 and state.is_image(inputs[0])
    job = _Job(row, layer, sources, scaling, first, is_image, state.fits)
    built = _by_signature(job) if layer.rule is by_signature else _by_rule(job)
    state.add(row, built.slots, built.kind)
    filled = [slot for slot in built.slots if not slot.reason]
    shape = tuple(shape for slot in filled for shape in shapes_of(slot.value))
    gives_image = built.kind == "map" and built.slots[0].stride == 1 and shape[0][0] == 3
    state.modules.append(built.module)
    state.rows.append(
        Row(
            index=len(state.slots) - 1,
            inputs=tuple(inputs),
            style=built.style,
            map_slots=built.map_slots,
            slots=RowSlots(
                first,
                tuple(slot.stride or None for slot in built.slots),
                built.kind == "backbone",
                gives_image,
            ),
            source=row.source,
            repeats=scaling.repeats,
            module=row.module.removeprefix("nn."),
            args=built.text,
            shape=shape,
            strides=tuple(slot.stride for slot in filled),
            section=row.section,
            place=row.place,
            is_neck=built.kind == "neck",
            **built.traits._asdict(),
        )
    )


def _by_rule(job: _Job) -> _Built:
    """A registered layer: its rule says what the constructor takes and which channels come out."""
    row, imgsz = job.row, job.scaling.imgsz
    plan = plan_of(job.layer, [slot.channels for slot in job.sources], row.args, job.scaling)
    module = _module(job, plan)
    predicts = plan.channels is not None and isinstance(module, Head)
    takes_list = isinstance(row.source, list) or len(job.sources) > 1 or predicts
    style: Style = "list" if takes_list else "map"
    is_users = any(type(m).__module__.startswith(modules.USER_CODE) for m in module.modules())
    values, is_known = [slot.value for slot in job.sources], job.fits and not is_users
    output = _propagate(module, values, style, is_known=is_known)
    if plan.channels is None:
        slots, map_slots = backbone_slots(module, output, job.first, imgsz)
    else:
        slot = plain_slot(plan.channels, output, imgsz)
        slots, map_slots = [slot._replace(stride=0) if predicts else slot], None  # boxes are no map
    is_tried = is_users and bool(maps_of(job.sources))
    traits = check(module, job.sources, style, output, imgsz) if is_tried else Traits()
    words = [*map(repr, plan.args), *(f"{key}={value!r}" for key, value in row.kwargs.items())]
    kind: Kind = "map" if map_slots is None else "backbone"
    return _Built(module, slots, map_slots, kind, f"[{', '.join(words)}]", style, traits)


def _by_signature(job: _Job) -> _Built:
    """A pasted class: its constructor is read, and what comes out says what it is."""
    imgsz, values = job.scaling.imgsz, maps_of(job.sources)
    if not values:
        raise LayerError(
            f"got from {job.row.source}, which is no map (B, C, H, W). Read rows that give maps."
        )
    module, output, settled = _instance(job, values)
    kind: Kind = "map"
    if isinstance(output, Tensor):
        slots, map_slots = [plain_slot(output.shape[1], output, imgsz)], None
    elif job.is_image:
        slots, map_slots = backbone_slots(module, output, job.first, imgsz)
        kind = "backbone"
    else:
        slots, map_slots = neck_slots(output, job.first, imgsz)
        kind = "neck"
    traits = check(module, job.sources, settled.style, output, imgsz)
    notes = tuple(filter(None, (settled.note, *traits.notes)))
    return _Built(
        module, slots, map_slots, kind, settled.text, settled.style, traits._replace(notes=notes)
    )


def _instance(job: _Job, values: Sequence[Tensor]) -> tuple[nn.Module, object, Settled]:
    """A pasted class with weights, as often in a sequence as its constructor leaves the repeats to us; what it gives."""
    said = RowArguments(job.row.args, job.row.kwargs, job.scaling)
    is_list = isinstance(job.row.source, list)
    settled = settle(job.layer, said, values, is_image=job.is_image, is_list=is_list)
    module, output = _with_weights(job.layer, settled, values), settled.output
    repeats = job.scaling.repeats
    if settled.reading.repeats_inside or repeats == 1 or not isinstance(output, Tensor):
        return module, output, settled
    if len(values) > 1:
        raise LayerError(
            f"got repeats {repeats} for {len(values)} inputs, expected 1. Write a row for each."
        )
    # The first may change the width.
    again = settle(job.layer, said, [output], is_image=False, is_list=False)
    others = (_with_weights(job.layer, again, [output]) for _ in range(repeats - 1))
    sequence = nn.Sequential(module, *others)
    return sequence, _propagate(sequence, values, settled.style), settled


def _with_weights(layer: Layer, settled: Settled, values: Sequence[Tensor]) -> nn.Module:
    try:
        with foreign_code(LayerError, users=modules.USER_CODE):
            module: nn.Module = layer.build(*settled.reading.args, **settled.reading.kwargs)
            materialize(module, values, settled.style)
    except ForeignError as error:
        raise LayerError(f"cannot be built as {settled.text} - {error}") from error
    return module


def _module(job: _Job, plan: Plan) -> nn.Module:
    """The row's layer, as often in a sequence as its rule leaves the repeats to us."""
    row, repeats = job.row, job.scaling.repeats
    first = _construct(job.layer, plan, row)
    if plan.repeats_inside or repeats == 1:
        return first
    same = plan_of(
        job.layer, [plan.channels], row.args, job.scaling
    )  # the first may change the width
    return nn.Sequential(first, *(_construct(job.layer, same, row) for _ in range(repeats - 1)))


def _construct(layer: Layer, plan: Plan, row: RowSpec) -> nn.Module:
    signature, kwargs = signature_of(layer.build), row.kwargs
    if signature is not None:
        kwargs = whole_names(layer.build, kwargs)
        try:
            signature.bind(*plan.args, **kwargs)
        except TypeError as error:
            inserted = len(plan.args) - len(row.args)
            raise LayerError(
                f"wrong arguments - got {len(row.args)} {row.args} ({error}), expected {shown(layer.build)}"
                + (f"; the first {inserted} come from the parser." if inserted > 0 else ".")
            ) from error
    try:
        with foreign_code(LayerError, users=modules.USER_CODE):
            module = layer.build(*plan.args, **kwargs)
    except (ForeignError, LayerError) as error:
        given = given_text(plan.args, row.kwargs)
        raise LayerError(f"cannot be built with {given} - {error}") from error
    if not isinstance(module, nn.Module):
        raise LayerError(f"is a {type(module).__name__}, expected a torch.nn.Module.")
    return module


def _propagate(
    module: nn.Module, values: Sequence[object], style: Style, *, is_known: bool = False
) -> object:
    """What comes out for `values`, on the meta device; `is_known`: a layer of ours, whose inputs fit."""
    if is_known:
        with suppress(ForeignError), foreign_code():
            return run_without_images(module, *arguments(values, style))
    try:
        return outputs_of(module, *arguments(values, style))
    except ForeignError as error:
        shape = brief([s for value in values for s in shapes_of(value)])
        raise LayerError(f"does not fit its input of shape {shape} - {reason_of(error)}") from error


def apply_activation(module: nn.Module, make: Callable[[], nn.Module]) -> None:
    """Give every convolution block that has the default activation one made by `make`."""
    for block in module.modules():
        if isinstance(block, DefaultActivation) and block.has_default_activation:
            block.act = make()
