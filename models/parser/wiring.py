"""How the rows of a model hang together: what a built row reads and fills, and what stands at an index."""

from __future__ import annotations

from typing import Any, NamedTuple


class Row(NamedTuple):
    """A built row: how it is wired, and what the table prints.

    Attributes:
        index: its slot (the last one, for a backbone).
        inputs: slots it reads, -1 being the image.
        takes_list: whether the module is called with a list.
        map_slots: for a backbone, the slot of each map it returns (None: dropped); else None.
        release: slots that no later row reads.
        source: `from` as written.
        repeats: after the depth factor.
        module: layer name as the table prints it.
        args: constructor arguments as the table prints them.
        shape: output shape(s) at the built size, without batch.
        strides: stride of each output.
        section: "backbone" or "head".
        place: where the row stands in its file.
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


class Slot(NamedTuple):
    """What stands at an index: meta output and its channels and stride, or nothing (`reason` says why)."""

    value: Any
    channels: int | list[int] | None
    stride: int
    reason: str = ""
