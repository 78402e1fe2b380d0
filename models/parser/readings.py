"""The ways in which a row may be meant for a pasted constructor, the likeliest first; nothing is built here.

Forks write rows for the same block in two ways: with the width in front (`[1024, 16]`, scaled as every width is) and
without (`[16]`). The channels of the input never stand in a row: they are put where the constructor's words want
them (`signature`), or first where its words say nothing. Which of the calls is right shows when it is tried (`pasted`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple, TypeGuard

from models.parser.signature import CHANNEL_ROLES, DOUBTFUL, FARTHEST, Argument, Constructor, Role
from models.registry import LayerError, Scaling

SIZES = (Role.SIZE, Role.HEIGHT, Role.EXTENT, Role.CELLS)
LEAST_WIDTH = 8  # a smaller number is a kernel, a stride or a count


class Inputs(NamedTuple):
    """What a row reads.

    Attributes:
        channels: of each map.
        size: (height, width) of the first map.
    """

    channels: tuple[int, ...]
    size: tuple[int, int]


class Reading(NamedTuple):
    """One call of a constructor.

    Attributes:
        args: by position.
        kwargs: by name.
        width: the row's output width, scaled, if its first number was taken for it.
        written: that number as the row has it.
        drops_width: the constructor takes no output width, so the number went nowhere.
        repeats_inside: the constructor was given the repeats.
        is_guess: wanted only where nothing else fits: by position, or a small number as a width.
        is_doubt: its first number is a width beyond doubt elsewhere; told beside another reading, never taken alone.
        group: readings of one group differ in what fits the constructor, not in what the row means.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    width: int | None = None
    written: object = None
    drops_width: bool = False
    repeats_inside: bool = False
    is_guess: bool = False
    is_doubt: bool = False
    group: int = 0


class RowArguments(NamedTuple):
    """What a row says: its arguments by position and by name, and the factors that scale them."""

    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    scaling: Scaling

    @property
    def text(self) -> str:
        """`[16] {'k': 3}`, as the row has them."""
        return given_text(list(self.args), dict(self.kwargs))


def given_text(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Arguments in an error: `[16] {'k': 3}`."""
    return " ".join(str(part) for part in (args, kwargs) if part) or "no arguments"


def readings(constructor: Constructor, row: RowArguments, inputs: Inputs) -> list[Reading]:
    """Every reading of `row`, the likeliest first, none twice."""
    found: list[Reading] = []
    by_words, by_position = (
        _by_words(constructor, row, inputs),
        _by_position(constructor, row, inputs),
    )
    for reading in (*by_words, *by_position):
        if not any(r[:2] == reading[:2] for r in found):
            found.append(reading)
    return sorted(found, key=lambda r: r.is_guess)


def as_written(row: RowArguments) -> Reading:
    """The row's arguments and nothing else, as a backbone takes them."""
    return Reading(tuple(row.args), dict(row.kwargs))


class _Head(NamedTuple):
    """What the leading numbers of a row are taken for."""

    rest: tuple[Any, ...]
    width: object = None
    is_guess: bool = False
    is_doubt: bool = False


def _heads(constructor: Constructor, row: RowArguments, inputs: Inputs) -> Iterator[_Head]:
    """With a width in front or without; an input in front of it is known already and left out."""
    args = tuple(row.args)
    takes_output = constructor.find(Role.OUTPUT) is not None
    if (
        len(args) > 1
        and takes_output
        and _is_width(args[1])
        and _is_scaled_input(args[0], row.scaling, inputs)
    ):
        later = [a for a in constructor.arguments if a.role is Role.OTHER and a.by_position]
        displaced = later[0].default if later else None
        if not (isinstance(displaced, int) and args[1] <= 4 * displaced):
            yield _Head(args[2:], args[1], is_guess=bool(later) and later[0].is_required)
    if args and _is_width(args[0]):
        yield _Head(args[1:], args[0])
        is_certain = _is_known_input(args[0], row.scaling, inputs)
        yield _Head(args, is_doubt=is_certain and constructor.find(*CHANNEL_ROLES) is not None)
    else:
        yield _Head(args)
    if args and takes_output and _is_count(args[0]) and not _is_width(args[0]):
        yield _Head(args[1:], args[0], is_guess=True)


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_width(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(_is_width(v) for v in value)
    return _is_count(value) and value >= LEAST_WIDTH


def _is_scaled_input(value: object, scaling: Scaling, inputs: Inputs) -> bool:
    return _is_count(value) and scaling.channels(value) == inputs.channels[0]


def _is_known_input(value: object, scaling: Scaling, inputs: Inputs) -> bool:
    """Whether `value`, as it stands or scaled, is what the row reads anyway."""
    values = value if isinstance(value, (list, tuple)) else [value]
    counts = [v for v in values if _is_count(v)]
    wanted = [*inputs.channels] if isinstance(value, (list, tuple)) else [inputs.channels[0]]
    return counts == [*values] and wanted in (counts, [scaling.channels(v) for v in counts])


def as_row_number(argument: Argument, value: object, scaling: Scaling) -> object:
    """What a row says by name so that `argument` gets `value`: widths are written in full."""
    if argument.word not in (*CHANNEL_ROLES, Role.INNER) or not _is_width(value):
        return value
    full = round(value / scaling.width) if _is_count(value) else value
    return full if scaled(full, scaling) == value else value


def scaled(value: object, scaling: Scaling) -> object:
    """A width, or a list of them, times the model's factor."""
    if isinstance(value, (list, tuple)):
        return [scaled(v, scaling) for v in value]
    return scaling.channels(value) if _is_count(value) else value


class _Case(NamedTuple):
    """A row and the constructor that it is meant for; `own` is given by name, `free` is left."""

    constructor: Constructor
    row: RowArguments
    inputs: Inputs
    own: dict[str, Any]
    free: list[Argument]


def _by_words(constructor: Constructor, row: RowArguments, inputs: Inputs) -> Iterator[Reading]:
    named = {a.name: a for a in constructor.arguments}
    own = {k: _keyword(named.get(k), v, row.scaling, inputs) for k, v in row.kwargs.items()}
    free = _with_input([a for a in constructor.arguments if a.name not in own])
    case = _Case(constructor, row, inputs, own, free)
    heads = product(_heads(constructor, row, inputs), (True, False))
    for group, (head, repeats_inside) in enumerate(heads):
        for reading in _filled(case, head, repeats_inside):
            yield reading._replace(group=group, is_guess=head.is_guess, is_doubt=head.is_doubt)


def _with_input(free: list[Argument]) -> list[Argument]:
    """`free` with the next channel word as the input's, where the row has given the first by name."""
    words = (Role.INPUT, Role.WIDTH)
    if any(a.role in words for a in free):
        return free
    place = next((i for i, a in enumerate(free) if a.word in words), None)
    return [a._replace(role=a.word) if i == place else a for i, a in enumerate(free)]


def _keyword(argument: Argument | None, value: object, scaling: Scaling, inputs: Inputs) -> object:
    """What a row gives by name: widths are scaled, the input's is known."""
    if argument is None or argument.role not in (*CHANNEL_ROLES, Role.INNER):
        return value
    if argument.role in (Role.INPUT, Role.WIDTH) and _is_known_input(value, scaling, inputs):
        return list(inputs.channels) if isinstance(value, (list, tuple)) else inputs.channels[0]
    return scaled(value, scaling) if _is_width(value) else value


def _filled(case: _Case, head: _Head, repeats_inside: bool) -> Iterator[Reading]:
    """The readings that put the numbers of `head` and the known ones into the free arguments."""
    scaling = case.row.scaling
    repeats = next((a for a in case.free if _takes_repeats(a)), None)
    if repeats_inside and repeats is None:
        return
    if repeats is not None and not repeats_inside and not head.rest:
        return  # nothing in the row could stand for them
    width = None if head.width is None else scaled(head.width, scaling)
    known = {a.name: values for a in case.free if (values := _values(a, width, case.inputs))}
    if repeats is not None and repeats_inside:
        is_told = scaling.repeats > 1 or repeats.is_required
        known[repeats.name] = [scaling.repeats if is_told else _LEFT_OUT]
    found = _given(case, head, known)
    if found is None:
        return
    given, more = found
    for choice in product(*known.values()):
        chosen = {k: v for k, v in zip(known, choice, strict=True) if v is not _LEFT_OUT}
        yield _call(case.constructor, {**chosen, **given, **case.own}, more)._replace(
            width=width if isinstance(width, int) else None,
            written=head.width,
            drops_width=width is not None and all(a.role is not Role.OUTPUT for a in case.free),
            repeats_inside=repeats is not None and repeats_inside,
        )


def _given(
    case: _Case, head: _Head, known: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[Any, ...]] | None:
    """The row's other numbers, in the order of the arguments that nothing else fills, and what is left for `*args`.

    Where they do not suit, the row may write the size of the map among them, which is measured, or the output's width in the
    constructor's own order. None where nothing suits.
    """
    for also in ((), SIZES, (Role.OUTPUT,)):
        left = [a for a in case.free if (a.role in also or a.name not in known) and a.by_position]
        pairs = list(zip(left, head.rest))
        farthest = DOUBTFUL if head.is_doubt else FARTHEST
        if len(head.rest) > len(left) and not case.constructor.takes_more:
            continue
        if Role.OUTPUT in also and (
            head.width is not None or not all(_is_width(v) for a, v in pairs if a.role in also)
        ):
            continue
        if all(argument.suits(value, farthest) for argument, value in pairs):
            given = {
                a.name: _inner(a, v, case.row.scaling)
                for a, v in pairs
                if a.role not in SIZES or a.role not in also
            }
            return given, tuple(head.rest[len(pairs) :])
    return None


def _inner(argument: Argument, value: object, scaling: Scaling) -> object:
    is_width = argument.role in (Role.INNER, Role.OUTPUT) and _is_width(value)
    return scaled(value, scaling) if is_width else value


_LEFT_OUT = object()


def _takes_repeats(argument: Argument) -> bool:
    return argument.role is Role.REPEATS and not isinstance(argument.default, (list, tuple))


def _values(argument: Argument, width: object, inputs: Inputs) -> list[object]:
    """What an argument may be given without the row saying it, the likeliest first; empty: the row must."""
    height, extent = inputs.size
    if argument.role in (Role.INPUT, Role.WIDTH):
        return _input_values(argument, inputs)
    if argument.role is Role.OUTPUT:
        if width is not None:
            return [width]
        same = inputs.channels[0]
        values: list[object] = [list(inputs.channels), same] if argument.wants_list else [same]
        return values if argument.is_required else [_LEFT_OUT, *values]
    sizes: dict[Role, list[object]] = {
        Role.SIZE: [(height, extent), height] if not isinstance(argument.default, int) else [height, (height, extent)],
        Role.HEIGHT: [height],
        Role.EXTENT: [extent],
        Role.CELLS: [height * extent],
    }  # fmt: skip
    values = sizes.get(argument.role, [])
    if argument.default is None and values:
        return [_LEFT_OUT, *values]
    return values


def _input_values(argument: Argument, inputs: Inputs) -> list[Any]:
    """The channels of one map; of several a list, the common number or the sum."""
    channels = inputs.channels
    if len(channels) == 1:
        return [[channels[0]], channels[0]] if argument.wants_list else [channels[0]]
    first, second = channels[0], sum(channels)
    if len(set(channels)) > 1:
        first, second = second, first
    numbers = dict.fromkeys((first, second, channels[-1]))
    return [list(channels), *numbers] if argument.wants_list else [*numbers, list(channels)]


def _call(constructor: Constructor, chosen: Mapping[str, Any], more: tuple[Any, ...]) -> Reading:
    """`chosen` by name; by position where `*args` come behind."""
    if not more:
        return Reading((), dict(chosen))
    names = [a.name for a in constructor.arguments if a.by_position]
    args = tuple(chosen[name] for name in names if name in chosen)
    return Reading((*args, *more), {k: v for k, v in chosen.items() if k not in names})


def _by_position(constructor: Constructor, row: RowArguments, inputs: Inputs) -> Iterator[Reading]:
    """For words that say nothing: input and output, input, output, neither; the numbers of the row behind."""
    args, kwargs = tuple(row.args), dict(row.kwargs)
    by_words = constructor.find(*CHANNEL_ROLES) is not None
    takes_input = constructor.find(Role.INPUT, Role.WIDTH) is not None
    if takes_input and args and _is_known_input(args[0], row.scaling, inputs):
        return  # the words have a place for it, and no other is meant
    several = len(inputs.channels) > 1
    if several and _is_known_input(list(args[: len(inputs.channels)]), row.scaling, inputs):
        args = args[len(inputs.channels) :]  # the channels of each map, written out
    fronts: list[tuple[Any, ...]] = [inputs.channels] if several else []
    fronts += [(list(inputs.channels),), (sum(inputs.channels),)] if several else []
    fronts.append((inputs.channels[0],))
    guess = Reading((), kwargs, is_guess=True)
    if not by_words and not args:
        yield guess
    if args and _is_width(args[0]):
        try:
            width = scaled(args[0], row.scaling)
        except LayerError:
            return
        found = guess._replace(width=width if isinstance(width, int) else None, written=args[0])
        if not by_words:
            yield found._replace(args=args[1:], drops_width=True)
        for front in fronts:
            yield found._replace(args=(*front, width, *args[1:]))
            yield found._replace(args=(*front, *args[1:]), drops_width=True)
        yield found._replace(args=(width, *args[1:]))
    for front in fronts:
        yield guess._replace(args=(*front, *args))
        if not args and not by_words:
            yield guess._replace(args=(*front, inputs.channels[0]))
    yield guess._replace(args=args)
