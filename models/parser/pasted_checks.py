"""What a pasted module can do, found before any data is touched: train, take other sizes, compute in another memory format.

A block that fails here would fail in the first step of a training, or at the first image of another size, far from the row
that named it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models import modules
from models.meta import run_for_real, run_on_meta, train_for_real, train_on_meta
from models.parser.advice import advice_for
from models.parser.pasted import Style, arguments
from models.parser.slots import brief, shapes_of, stride_of
from models.parser.wiring import Slot
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


def check(
    module: nn.Module, sources: Sequence[Slot], style: Style, output: Any, imgsz: tuple[int, int]
) -> Traits:
    """Try `module` as a training and as images of other sizes will.

    Args:
        module: built.
        sources: what it reads.
        style: how its `forward` takes them.
        output: what it gave for them, on the meta device.
        imgsz: (height, width) of the image.

    Raises:
        LayerError: it cannot be trained.
    """
    values = [slot.value for slot in sources]
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
    if any(p.device.type == "meta" for p in module.parameters()):  # a draft, for its shapes only
        return True
    batch = arguments([v.expand(2, *v.shape[1:]).contiguous() for v in values], style)
    last, usual = (_failure(module, batch, f) for f in (torch.channels_last, torch.contiguous_format))  # fmt: skip
    if not usual:
        return not last
    try:
        with foreign_code(users=modules.USER_CODE):
            train_for_real(module, batch)
    except ForeignError as error:
        said = f"{str(error).rstrip('.')}.{advice_for(error)}"
        raise LayerError(f"cannot be trained - {said}") from error
    return True


def _failure(module: nn.Module, batch: tuple[Any, ...], memory_format: torch.memory_format) -> str:
    try:
        with foreign_code(users=modules.USER_CODE):
            train_on_meta(module, batch, memory_format)
    except ForeignError as error:
        return str(error)
    return ""


def _why_bound(
    module: nn.Module,
    sources: Sequence[Slot],
    style: Style,
    output: Any,
    imgsz: tuple[int, int],
) -> str:
    """Why images of another size do not fit; "" where they do."""
    outputs = output if isinstance(output, (list, tuple)) else [output]
    strides = [stride_of(value, imgsz) for value in outputs if isinstance(value, Tensor)]
    values = [_larger(slot, max(SMALLEST_STEP, *strides)) for slot in sources]
    shapes, expected = shapes_of(output), [value.shape[2:] for value in values]
    try:
        with foreign_code(ForeignError, users=modules.USER_CODE):
            found = shapes_of(_run(module, arguments(values, style)))
    except ForeignError as error:
        return str(error).rstrip(".")
    ratios = [n / o for n, o in zip(expected[0], sources[0].value.shape[2:])]
    for old, new in zip(shapes, found):
        if max(old[1:]) > 1 and any(
            abs(o * r - n) > 1 for o, n, r in zip(old[1:], new[1:], ratios)
        ):
            return f"gives a map of {brief([new])} for one of {brief([tuple(expected[0])])}"
    return ""


def _run(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
    try:
        with foreign_code(users=modules.USER_CODE):
            return run_on_meta(module, *inputs)
    except ForeignError as error:
        is_draft = any(p.device.type == "meta" for p in module.parameters())
        if is_draft or "meta" not in str(error).lower():
            raise
        return run_for_real(module, *inputs)


def _larger(slot: Slot, step: int) -> Tensor:
    """The slot's map for a larger image; sizes of images go in steps of so many pixels."""
    height, width = slot.value.shape[2:]
    more = [max(count * step // max(slot.stride, 1), 1) for count in LARGER]
    return torch.empty(1, slot.value.shape[1], height + more[0], width + more[1], device="meta")
