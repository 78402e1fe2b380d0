"""How the rows of a model hang together: slots, names, what `from` means, and what a built row reads and fills.

A plain row fills one slot, a backbone one for each pyramid level, a neck one for each of its maps. `P3` means the backbone's
map, `name` the slot of a row that has a name, `name.P3` and `name.0` one map of a row that has several.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import nn

from models.parser.rows import ModelSpec, RowSpec
from models.registry import LayerError
from utils.errors import nearest

IMAGE = -1
PYRAMID_SLOTS = 5
BROKEN = "broken"
T = TypeVar("T")
Style = Literal["map", "list", "spread"]
"""How `forward` takes its inputs: one map, a list of them, or each as an argument of its own."""
Kind = Literal["map", "backbone", "neck"]
"""What a row gives: one map (or predictions), maps made from the image, maps made from maps."""


def arguments(values: Sequence[T], style: Style) -> tuple[T | list[T], ...]:
    """`values` as `forward` takes them."""
    if style == "spread":
        return tuple(values)
    return (list(values) if style == "list" else values[0],)


class RowSlots(NamedTuple):
    """Which slots a row takes.

    Attributes:
        first: index of its first slot.
        strides: stride of each of its slots; None where the slot is empty.
        is_backbone: whether it returns a list of maps made from the image.
        is_image: whether its output is still the image: stride 1, three channels.
    """

    first: int
    strides: tuple[int | None, ...]
    is_backbone: bool = False
    is_image: bool = False


class Row(NamedTuple):
    """A built row: how it is wired, and what the table prints.

    Attributes:
        index: its slot (the last one, for a backbone).
        inputs: slots it reads, -1 being the image.
        style: how its module is called.
        map_slots: for a backbone or a neck, the slot of each map it returns (None: dropped); else None.
        slots: which slots it takes.
        source: `from` as written.
        repeats: after the depth factor.
        module: layer name as the table prints it.
        args: constructor arguments as the table prints them.
        shape: output shape(s) at the built size, without batch.
        strides: stride of each output.
        section: "backbone" or "head".
        place: where the row stands in its file.
        is_neck: its maps are made from maps, not from the image.
        any_size: it takes images of other sizes than it was built for.
        channels_last: it computes in that memory format, too.
        notes: what the row's author should know of how it was read.
        release: slots that no later row reads.
    """

    index: int  # type: ignore[assignment]
    inputs: tuple[int, ...]
    style: Style
    map_slots: tuple[int | None, ...] | None
    slots: RowSlots
    source: int | str | list[int | str]
    repeats: int
    module: str
    args: str
    shape: tuple[tuple[int, ...], ...]
    strides: tuple[int, ...]
    section: str
    place: str
    is_neck: bool = False
    any_size: bool = True
    channels_last: bool = True
    notes: tuple[str, ...] = ()
    release: tuple[int, ...] = ()

    def arguments(self, values: Sequence[T]) -> tuple[T | list[T], ...]:
        """`values` of its inputs as its module takes them."""
        return arguments(values, self.style)


def with_releases(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Note after which row each slot can be forgotten."""
    last = {slot: number for number, row in enumerate(rows) for slot in row.inputs}
    return tuple(
        row._replace(release=tuple(slot for slot, at in last.items() if at == number))
        for number, row in enumerate(rows)
    )


class Slot(NamedTuple):
    """What stands at an index: meta output and its channels and stride, or nothing (`reason` says why)."""

    value: object
    channels: int | list[int] | None
    stride: int
    reason: str = ""


class SkipError(Exception):
    """The row reads a slot whose own row has failed: said once is enough."""


@dataclass
class BuildState:
    """What is built so far.

    Attributes:
        spec: the file.
        imgsz: image size (height, width).
        fits: the model is known to fit together.
        slots: what stands at each index.
        named: name of a row -> all maps of a neck, the last slot of any other row.
        maps: `name.0` and `name.P3` -> slot of that map.
        pyramid: `P3` -> slot of the backbone's map.
        has_backbone: a row has filled the pyramid.
        problems: one line each.
        modules, rows: of the rows that could be built.
    """

    spec: ModelSpec
    imgsz: tuple[int, int]
    fits: bool = False
    slots: list[Slot] = field(default_factory=list)
    named: dict[str, tuple[int, ...]] = field(default_factory=dict)
    maps: dict[str, int] = field(default_factory=dict)
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

    def sources(self, row: RowSpec) -> list[int]:
        """The slots that `from` means; the name of a neck stands for all its maps.

        Raises:
            LayerError: nothing stands there.
            SkipError: the row that should have made it has failed.
        """
        items = row.source if isinstance(row.source, list) else [row.source]
        return [slot for item in items for slot in self._resolve(item)]

    def _resolve(self, item: int | str) -> tuple[int, ...]:
        found = self._by_name(item) if isinstance(item, str) else (self._by_index(item),)
        for index in found:
            reason = self.slot(index).reason
            if reason == BROKEN:
                raise SkipError
            if reason:
                raise LayerError(f"got from {item}, which is empty: {reason}.")
        return found

    def _by_index(self, item: int) -> int:
        first = len(self.slots)
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

    def _by_name(self, item: str) -> tuple[int, ...]:
        if item in self.named:
            return self.named[item]
        one = self.pyramid.get(item, self.maps.get(item))
        if one is not None:
            return (one,)
        name = item.rpartition(".")[0]
        if name in self.named:
            if any(self.slots[slot].reason == BROKEN for slot in self.named[name]):
                raise SkipError
            options = ", ".join(key for key in self.maps if key.startswith(f"{name}."))
            raise LayerError(f"got from {item!r}, expected a map of {name}: {options}.")
        table = {**self.pyramid, **{key: slots[-1] for key, slots in self.named.items()}}
        filled = (key for key, i in table.items() if self.slots[i].reason in ("", BROKEN))
        options = ", ".join(filled) or "none so far"
        raise LayerError(
            f"got from {item!r}, expected an index or a name: {options}.{nearest(item, table)}"
        )

    def add(self, row: RowSpec, new: Sequence[Slot], kind: Kind) -> None:
        """Put a row's slots behind those that are there, and note what they are called.

        Raises:
            LayerError: another row has the name.
        """
        first = len(self.slots)
        self.slots.extend(new)
        if kind == "backbone":
            self.pyramid = {f"P{k + 1}": first + k for k in range(len(new))}
            self.has_backbone = True
        elif kind == "map" and row.section == "backbone" and not self.has_backbone:
            level = level_of(new[0].stride)
            self.pyramid.update({f"P{level}": first} if level else {})
        if not row.name:
            return
        if row.name in self.named:
            raise LayerError(
                f"got name {row.name!r}, which row {self.named[row.name][-1]} already has."
            )
        slots = tuple(range(first, first + len(new)))
        self.named[row.name] = slots if kind == "neck" else slots[-1:]
        maps = [(i, slot) for i, slot in zip(slots, new) if not slot.reason]
        self.maps |= {f"{row.name}.{k}": i for k, (i, _) in enumerate(maps)}
        self.maps |= {f"{row.name}.P{n}": i for i, s in maps if (n := level_of(s.stride))}

    def add_broken(self, row: RowSpec, *, is_backbone: bool) -> None:
        """Fill the slots of a row that failed, so that rows which read them are not reported as well."""
        count = PYRAMID_SLOTS if is_backbone else 1
        self.slots.extend(Slot(None, None, 0, BROKEN) for _ in range(count))
        last = len(self.slots) - 1
        if row.section == "backbone":
            for level in range(1, PYRAMID_SLOTS + 1):
                self.pyramid.setdefault(f"P{level}", last)
        if row.name:
            self.named[row.name] = (last,)


def level_of(stride: int) -> int:
    """3 for stride 8; 0 for what is no power of two above 1."""
    return round(math.log2(stride)) if stride > 1 and stride & (stride - 1) == 0 else 0
