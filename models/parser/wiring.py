"""How the rows of a model hang together: what a built row reads and fills, and what stands at an index."""

from __future__ import annotations

from typing import Any, NamedTuple


class Row(NamedTuple):
    """A built row: how it is wired, and what the table prints.

    Attributes:
        index: its slot (the last one, for a backbone).
        inputs: slots it reads, -1 being the image.
        takes_list: whether the module is called with a list.
        map_slots: for a backbone or a neck, the slot of each map it returns (None: dropped); else None.
        release: slots that no later row reads.
        source: `from` as written.
        repeats: after the depth factor.
        module: layer name as the table prints it.
        args: constructor arguments as the table prints them.
        shape: output shape(s) at the built size, without batch.
        strides: stride of each output.
        section: "backbone" or "head".
        place: where the row stands in its file.
        spread: each input is an argument of its own.
        is_neck: its maps are made from maps, not from the image.
        any_size: it takes images of other sizes than it was built for.
        channels_last: it computes in that memory format, too.
        notes: what the row's author should know of how it was read.
    """

    index: int  # type: ignore[assignment]
    inputs: tuple[int, ...]
    takes_list: bool
    map_slots: tuple[int | None, ...] | None
    release: tuple[int, ...]
    source: Any
    repeats: int
    module: str
    args: str
    shape: tuple[tuple[int, ...], ...]
    strides: tuple[int, ...]
    section: str
    place: str
    spread: bool = False
    is_neck: bool = False
    any_size: bool = True
    channels_last: bool = True
    notes: tuple[str, ...] = ()

    def arguments(self, values: list[Any]) -> tuple[Any, ...]:
        """`values` of its inputs as its module takes them."""
        if self.spread:
            return tuple(values)
        return (values if self.takes_list else values[0],)


class Slot(NamedTuple):
    """What stands at an index: meta output and its channels and stride, or nothing (`reason` says why)."""

    value: Any
    channels: int | list[int] | None
    stride: int
    reason: str = ""


def with_releases(rows: list[Row]) -> tuple[Row, ...]:
    """Note after which row each slot can be forgotten."""
    last = {slot: number for number, row in enumerate(rows) for slot in row.inputs}
    return tuple(
        row._replace(release=tuple(slot for slot, at in last.items() if at == number))
        for number, row in enumerate(rows)
    )
