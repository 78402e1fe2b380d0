"""What the output of a row's module is worth: one slot for a map, five and more for a backbone's maps.

What a module says of itself (channels, strides) is held against what it gives on the meta device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TypeGuard

from torch import Tensor, nn

from models.parser.wiring import PYRAMID_SLOTS, Slot, level_of
from models.registry import LayerError

CHANNEL_NAMES = ("channels", "width_list", "channel")
MapSlots = tuple[int | None, ...]
"""The slot of each map that a module returns; None for one that has none."""


def is_map(value: object) -> TypeGuard[Tensor]:
    """Whether it is a map (B, C, H, W)."""
    return isinstance(value, Tensor) and value.ndim == 4


def shapes_of(value: object) -> list[tuple[int, ...]]:
    """Shapes of all tensors in `value`, without batch."""
    if isinstance(value, Tensor):
        return [tuple(value.shape[1:])]
    items = value if isinstance(value, (list, tuple)) else ()
    return [shape for item in items for shape in shapes_of(item)]


def brief(shapes: Sequence[tuple[int, ...]]) -> str:
    """`3x64x64, 8x32x32`."""
    return ", ".join("x".join(map(str, shape)) for shape in shapes)


def stride_of(value: object, imgsz: tuple[int, int]) -> int:
    """Stride of a map of images of this size, told by the longer side; a power of two where the size allows it, since
    sizes that do not divide are rounded. 0 for what is not a map."""
    shape = shapes_of(value)
    if not shape or len(shape[0]) != 3:
        return 0
    height, extent = max(zip(imgsz, shape[0][1:]), key=lambda pair: pair[0])
    power = 2 ** max(round(math.log2(height / extent)), 0)
    return power if abs(height / power - extent) < 1 else max(round(height / extent), 1)


def plain_slot(channels: int | list[int] | None, output: object, imgsz: tuple[int, int]) -> Slot:
    """The slot of a layer that is no backbone.

    Raises:
        LayerError: the layer does not give what its rule says.
    """
    is_one = isinstance(channels, int)
    if is_one and is_map(output) and output.shape[1] != channels:
        raise LayerError(f"gives {output.shape[1]} channels, but its rule says {channels}.")
    if is_one and isinstance(output, (list, tuple, Mapping)):
        raise LayerError(
            f"returns {told(output)}, but its rule says one map of {channels} channels. Return one map, or register it "
            "with @register(backbone) if it makes all maps from the image."
        )
    return Slot(output, channels, stride_of(output, imgsz))


def told(value: object) -> str:
    """What `value` is, in words: `a list of (8x32x32, NoneType)`."""
    if isinstance(value, Mapping):
        return told(list(value.values())).replace("a list", "a dictionary", 1)
    if isinstance(value, (list, tuple)):
        items = (brief(shapes_of(v)) if isinstance(v, Tensor) else type(v).__name__ for v in value)
        return f"a list of ({', '.join(items)})"
    if isinstance(value, Tensor):
        return f"a tensor {brief(shapes_of(value))}"
    return type(value).__name__


def backbone_slots(
    module: nn.Module, output: object, first: int, imgsz: tuple[int, int]
) -> tuple[list[Slot], MapSlots]:
    """The slots P1, P2, ... of a backbone from index `first` on, and the index that each of its maps goes to.

    Raises:
        LayerError: the output is no list of maps, or not what the module says of itself.
    """
    maps = _feature_maps(output)
    strides = _common_strides(maps, imgsz)
    _hold_against(module, [m.shape[1] for m in maps], strides)
    levels = [level_of(s) for s in strides]
    has = ", ".join(f"P{level} (stride {2**level})" for level in sorted(set(levels) - {0}))
    slots = [
        Slot(None, None, 0, f"the backbone has no stride {2 ** (k + 1)}, only {has}")
        for k in range(max(PYRAMID_SLOTS, *levels))
    ]
    chosen = {level: position for position, level in enumerate(levels) if level}
    for level, position in chosen.items():
        slots[level - 1] = Slot(maps[position], maps[position].shape[1], strides[position])
    map_slots = tuple(
        first + level - 1 if chosen.get(level) == position else None
        for position, level in enumerate(levels)
    )
    return slots, map_slots


def neck_slots(output: object, first: int, imgsz: tuple[int, int]) -> tuple[list[Slot], MapSlots]:
    """One slot for each map of a neck from index `first` on, in their order, and their indices."""
    maps = _feature_maps(output)
    slots = [Slot(m, m.shape[1], stride_of(m, imgsz)) for m in maps]
    return slots, tuple(range(first, first + len(maps)))


def _feature_maps(output: object) -> list[Tensor]:
    maps = list(output.values()) if isinstance(output, Mapping) else output
    if not isinstance(maps, (list, tuple)) or not maps or not all(map(is_map, maps)):
        raise LayerError(
            f"returns {told(output)}, expected a list of feature maps (B, C, H, W); a layer with one output "
            "registers with a rule: @register(convolution)."
        )
    return list(maps)


def _common_strides(maps: Sequence[Tensor], imgsz: tuple[int, int]) -> list[int]:
    """The stride of each map, which must be the same in height and width."""
    strides = [stride_of(m, imgsz) for m in maps]
    for m, stride in zip(maps, strides):
        if any(abs(side / stride - extent) >= 1 for side, extent in zip(imgsz, m.shape[2:])):
            raise LayerError(
                f"gives a map {brief(shapes_of(m))} for an image of {imgsz[0]}x{imgsz[1]}, expected (C, H, W) with one stride "
                "in height and width. Permute maps whose channels come last: x.permute(0, 3, 1, 2)."
            )
    return strides


def _hold_against(module: nn.Module, channels: list[int], strides: list[int]) -> None:
    """Refuse a module that says other channels, under a customary name, or strides of itself than its maps have."""
    said = {key: getattr(module, key, None) for key in (*CHANNEL_NAMES, "strides")}
    lists = {key: list(value) for key, value in said.items() if isinstance(value, (list, tuple))}
    if name := next((key for key in CHANNEL_NAMES if key in lists), ""):
        if not all(isinstance(c, Real) for c in lists[name]):
            raise LayerError(
                f"says {name} {lists[name]}, expected a number for each map. Mend `{name}`."
            )
        if (declared := [int(c) for c in lists[name]]) != channels:
            raise LayerError(
                f"says channels {declared}, but its outputs have {channels}. Mend `channels`."
            )
    if lists.get("strides", strides) != strides:
        raise LayerError(
            f"says strides {lists['strides']}, but its outputs have {strides}. Mend `strides`."
        )
