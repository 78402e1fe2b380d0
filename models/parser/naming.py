"""What the parser knows while it walks the rows: slots, names, and what `from` means in each row.

A plain row fills one slot, a backbone one for each pyramid level, a neck one for each of its maps. `P3` means the backbone's
map, `name` the slot of a row that has a name, `name.P3` and `name.0` one map of a row that has several.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from models.parser.rows import ModelSpec, RowSpec
from models.parser.slots import PYRAMID_SLOTS
from models.parser.wiring import Row, Slot
from models.registry import LayerError
from utils.errors import nearest

IMAGE = -1
BROKEN = "broken"


class SkipError(Exception):
    """The row reads a slot whose own row has failed: said once is enough."""


class Named(NamedTuple):
    """A row that has a name.

    Attributes:
        slots: what the name stands for: all maps of a neck, the last slot of any other row.
        maps: slot of each of its maps by position, if it has several.
    """

    slots: tuple[int, ...]
    maps: tuple[int, ...] = ()


@dataclass
class BuildState:
    """What is built so far.

    Attributes:
        spec: the file.
        imgsz: image size (height, width).
        slots: what stands at each index.
        named: rows with a name.
        pyramid: `P3` -> slot of the backbone's map.
        has_backbone: a row has filled the pyramid.
        problems: one line each.
        modules, rows: of the rows that could be built.
    """

    spec: ModelSpec
    imgsz: tuple[int, int]
    slots: list[Slot] = field(default_factory=list)
    named: dict[str, Named] = field(default_factory=dict)
    pyramid: dict[str, int] = field(default_factory=dict)
    has_backbone: bool = False
    problems: list[str] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def slot(self, index: int) -> Slot:
        """What stands at `index`; -1 is the image."""
        if index != IMAGE:
            return self.slots[index]
        channels = int(self.spec.config.get("ch", 3))
        return Slot(torch.empty(1, channels, *self.imgsz, device="meta"), channels, 1)

    def is_image(self, index: int) -> bool:
        """Whether the image itself stands there, or what passes it on."""
        slot, image = self.slot(index), self.slot(IMAGE)
        return slot.stride == 1 and slot.channels == image.channels


def resolve_sources(state: BuildState, row: RowSpec) -> list[int]:
    """The slots that `from` means; the name of a neck stands for all its maps."""
    items = row.source if isinstance(row.source, list) else [row.source]
    return [slot for item in items for slot in _resolve(state, item)]


def _resolve(state: BuildState, item: int | str) -> tuple[int, ...]:
    found = _named_slots(state, item) if isinstance(item, str) else (_index(state, item),)
    for index in found:
        reason = state.slots[index].reason if index != IMAGE else ""
        if reason == BROKEN:
            raise SkipError
        if reason:
            raise LayerError(f"got from {item}, which is empty: {reason}.")
    return found


def _index(state: BuildState, item: int) -> int:
    first = len(state.slots)
    index = item if item >= 0 else first + item
    if index == IMAGE and first == 0:
        return IMAGE
    if first == 0:
        raise LayerError(f"got from {item} in the first row, expected -1, the image.")
    if not 0 <= index < first:
        raise LayerError(
            f"got from {item}, which means row {index}, expected an index from 0 to {first - 1}."
        )
    return index


def _named_slots(state: BuildState, item: str) -> tuple[int, ...]:
    if item in state.named:
        return state.named[item].slots
    if item in state.pyramid:
        return (state.pyramid[item],)
    name, _, level = item.rpartition(".")
    if name in state.named:
        if any(state.slots[slot].reason == BROKEN for slot in state.named[name].slots):
            raise SkipError
        maps = _levels(state, state.named[name].maps or state.named[name].slots)
        if level in maps:
            return (maps[level],)
        options = ", ".join(f"{name}.{key}" for key in maps)
        raise LayerError(f"got from {item!r}, expected a map of {name}: {options}.")
    table = {**state.pyramid, **{key: named.slots[-1] for key, named in state.named.items()}}
    filled = (key for key, i in table.items() if state.slots[i].reason in ("", BROKEN))
    options = ", ".join(filled) or "none so far"
    raise LayerError(
        f"got from {item!r}, expected an index or a name: {options}.{nearest(item, table)}"
    )


def _levels(state: BuildState, slots: Sequence[int]) -> dict[str, int]:
    """The maps of one row by position and by level: `0`, `1`, `P3`, `P4`; of one stride the later counts."""
    by_position = {str(position): slot for position, slot in enumerate(slots)}
    by_level = {
        f"P{level}": slot for slot in slots if (level := level_of(state.slots[slot].stride))
    }
    return by_position | by_level


def level_of(stride: int) -> int:
    """3 for stride 8; 0 for what is no power of two above 1."""
    return round(math.log2(stride)) if stride > 1 and stride & (stride - 1) == 0 else 0


def remember_names(
    state: BuildState, row: RowSpec, first: int, new: Sequence[Slot], *, kind: str
) -> None:
    """Note what a row's slots, from index `first` on, are called; `kind` is "backbone", "neck" or "map"."""
    if kind == "backbone":
        state.pyramid = {f"P{k + 1}": first + k for k in range(len(new))}
        state.has_backbone = True
    elif kind == "map" and row.section == "backbone" and not state.has_backbone:
        level = level_of(new[0].stride)
        state.pyramid.update({f"P{level}": first} if level else {})
    if row.name:
        if row.name in state.named:
            raise LayerError(
                f"got name {row.name!r}, which row {state.named[row.name].slots[-1]} already has."
            )
        slots = tuple(range(first, first + len(new)))
        maps = tuple(slot for slot, made in zip(slots, new) if not made.reason)
        state.named[row.name] = Named(slots if kind == "neck" else slots[-1:], maps)


def leave_broken(state: BuildState, row: RowSpec, *, is_backbone: bool) -> None:
    """Fill the slots of a row that failed, so that rows which read them are not reported as well."""
    slots = PYRAMID_SLOTS if is_backbone else 1
    state.slots.extend(Slot(None, None, 0, BROKEN) for _ in range(slots))
    last = len(state.slots) - 1
    if row.section == "backbone":
        for level in range(1, PYRAMID_SLOTS + 1):
            state.pyramid.setdefault(f"P{level}", last)
    if row.name:
        state.named[row.name] = Named((last,))
