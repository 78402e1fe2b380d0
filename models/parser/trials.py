"""What a pasted module can do, found before any data is touched: train, take other sizes, compute in another memory format.

A block that fails here would fail in the first step of a training, or at the first image of another size, far from the row
that named it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models import modules
from models.meta import run_for_real, run_on_meta, train_for_real, train_on_meta
from models.parser.advice import reason_of
from models.parser.slots import brief, is_map, shapes_of, stride_of
from models.parser.wiring import Slot, Style, arguments
from models.registry import LayerError
from utils.errors import ForeignError, foreign_code

LARGER = (2, 1)  # steps that another image has more, in height and width
SMALLEST_STEP = 32  # pixels


class Traits(NamedTuple):
    """What a module can do.

    Attributes:
        any_size: it takes images of other sizes.
        channels_last: it computes in that memory format.
        notes: a sentence for each thing that it cannot.
    """

    any_size: bool = True
    channels_last: bool = True
    notes: tuple[str, ...] = ()


def maps_of(sources: Sequence[Slot]) -> list[Tensor]:
    """The maps of `sources`; none where one of them is no map."""
    maps = [slot.value for slot in sources if is_map(slot.value)]
    return maps if len(maps) == len(sources) else []


def outputs_of(module: nn.Module, *inputs: object) -> object:
    """What comes out on the meta device, or from real numbers where that device does not know the code.

    Raises:
        ForeignError: its code fails on them.
    """
    try:
        with foreign_code(users=modules.USER_CODE):
            return run_on_meta(module, *inputs)
    except ForeignError:
        if _is_draft(module):
            raise
    with foreign_code(users=modules.USER_CODE):
        return run_for_real(module, *inputs)


def _is_draft(module: nn.Module) -> bool:
    """Whether it has no numbers, only shapes."""
    return any(p.device.type == "meta" for p in module.parameters())


def check(
    module: nn.Module, sources: Sequence[Slot], style: Style, output: object, imgsz: tuple[int, int]
) -> Traits:
    """Try `module` as a training and as images of other sizes will.

    Args:
        module: built.
        sources: the maps that it reads.
        style: how its `forward` takes them.
        output: what it gave for them, on the meta device.
        imgsz: (height, width) of the image.

    Raises:
        LayerError: it cannot be trained.
    """
    values = maps_of(sources)
    if isinstance(output, Tensor) and len(values) == 1:
        _check_ratio(values[0], output)
    notes = []
    channels_last = _trains(module, values, style)
    if not channels_last:
        notes.append(
            "does not compute in the channels-last memory format (.view of a permuted map does not; .reshape does): "
            "the model trains in the usual one, which may be slower."
        )
    reason = _why_bound(module, sources, style, output, imgsz)
    if reason:
        height, width = imgsz
        notes.append(
            f"is bound to maps of {brief([tuple(v.shape[2:]) for v in values])}, so to images of {height}x{width} "
            f"({reason}). Train, validate and export with --imgsz {height} {width}."
        )
    return Traits(not reason, channels_last, tuple(notes))


def _check_ratio(value: Tensor, output: Tensor) -> None:
    """Refuse a map that is neither as large as its input, nor a part or a multiple: later rows could not join it.

    Raises:
        LayerError: it is not.
    """
    for given, made in zip(value.shape[2:], output.shape[2:]):
        large, small = max(given, made), max(min(given, made), 1)
        power = 2 ** round(math.log2(large / small))
        parts = (large // power, -(-large // power)) if made <= given else (large // power,)
        if large % small and small not in parts:
            found, expected = brief([tuple(output.shape[2:])]), brief([tuple(value.shape[2:])])
            raise LayerError(
                f"gives a map of {found} for one of {expected}, expected the same size, a part or a multiple of it. Mend its "
                "padding: kernel_size // 2 keeps the size."
            )


def _trains(module: nn.Module, values: Sequence[Tensor], style: Style) -> bool:
    """Whether a step works in the channels-last format; it must work in the usual one."""
    if _is_draft(module):
        return True
    batch = arguments([v.expand(2, *v.shape[1:]).contiguous() for v in values], style)
    works = {}
    for memory_format in (torch.channels_last, torch.contiguous_format):
        works[memory_format] = False
        with suppress(ForeignError), foreign_code(users=modules.USER_CODE):
            train_on_meta(module, batch, memory_format)
            works[memory_format] = True
    if works[torch.contiguous_format]:
        return works[torch.channels_last]
    try:
        with foreign_code(users=modules.USER_CODE):
            train_for_real(module, batch)
    except ForeignError as error:
        raise LayerError(f"cannot be trained - {reason_of(error, '.')}") from error
    return True


def _why_bound(
    module: nn.Module,
    sources: Sequence[Slot],
    style: Style,
    output: object,
    imgsz: tuple[int, int],
) -> str:
    """Why images of another size do not fit; "" where they do."""
    outputs = output if isinstance(output, (list, tuple)) else [output]
    strides = [stride_of(value, imgsz) for value in outputs if isinstance(value, Tensor)]
    step = max(SMALLEST_STEP, *strides)  # sizes of images go in steps of so many pixels
    values = maps_of(sources)
    larger = [
        torch.empty(
            *v.shape[:2],
            *(n + max(k * step // max(slot.stride, 1), 1) for n, k in zip(v.shape[2:], LARGER)),
            device="meta",
        )
        for v, slot in zip(values, sources)
    ]
    try:
        found = shapes_of(outputs_of(module, *arguments(larger, style)))
    except ForeignError as error:
        return str(error).rstrip(".")
    expected = tuple(larger[0].shape[2:])
    ratios = [n / o for n, o in zip(expected, values[0].shape[2:])]
    for old, new in zip(shapes_of(output), found):
        is_far = any(abs(o * r - n) > 1 for o, n, r in zip(old[1:], new[1:], ratios))
        if max(old[1:]) > 1 and is_far:
            return f"gives a map of {brief([new])} for one of {brief([expected])}"
    return ""
