"""The layers that a YAML may name, and how channels flow through each of them.

A layer registers with a *rule*: `rule(in_channels, args, scaling) -> Plan`. The rule turns what a YAML row says (`args`, without
input channels) into what the constructor takes, and says which channels come out. The parser calls it and knows nothing else, so
adding a layer never touches the parser:

    @register(convolution)
    class Conv(nn.Module):
        def __init__(self, in_channels, out_channels, kernel_size=1, stride=1): ...
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from torch import nn

T = TypeVar("T", bound=Callable[..., Any])


class LayerError(ValueError):
    """A row asks a layer for what it cannot do; the parser adds file, row and module."""


class HeadForm(NamedTuple):
    """What the keys of a file say of its head.

    Attributes:
        reg_max: bins of each distance, 1: the distance itself.
        end2end: a branch beside it that needs no NMS.
    """

    reg_max: int = 16
    end2end: bool = False


class Scaling(NamedTuple):
    """What a model's size factors make of a row's numbers.

    Attributes:
        width: factor on channels.
        max_channels: channels are cut to this before the factor is applied.
        size: the letter of the chosen entry of `scales` ("" in YAMLs with depth_multiple and width_multiple).
        repeats: how often the row's block is repeated, depth factor applied.
        strides: strides of the row's inputs in input-image pixels.
        imgsz: image size (height, width) the model is built for.
        head: what the file's keys say of its head.
    """

    width: float = 1.0
    max_channels: float = math.inf
    size: str = ""
    repeats: int = 1
    strides: tuple[int, ...] = ()
    imgsz: tuple[int, int] = (640, 640)
    head: HeadForm = HeadForm()

    def channels(self, value: int) -> int:
        """Scaled channel count, rounded up to a multiple of 8."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise LayerError(f"got {value!r} as a number of channels, expected a positive integer")
        return math.ceil(min(value, self.max_channels) * self.width / 8) * 8


class Plan(NamedTuple):
    """What a rule decides for one row.

    Attributes:
        args: constructor arguments, as the table prints them.
        channels: channels that come out; a list for a module with several outputs that stay together in one slot;
            None for a backbone, whose instance knows them.
        repeats_inside: the constructor takes the repeats itself; otherwise the parser chains that many copies.
    """

    args: list[Any]
    channels: int | list[int] | None
    repeats_inside: bool = False


Rule = Callable[[Sequence[Any], Sequence[Any], Scaling], Plan]


class Layer(NamedTuple):
    """A registered layer: how to build it and how channels flow through it."""

    name: str
    build: Callable[..., Any]
    rule: Rule

    @property
    def place(self) -> tuple[str, str]:
        """Where it is defined: module and name."""
        return self.build.__module__, self.build.__qualname__


@runtime_checkable
class SelectsStrides(Protocol):
    """A backbone that can drop maps."""

    def select_strides(self, strides: Sequence[int]) -> None:
        """Return only the maps at `strides` from now on."""


@runtime_checkable
class BoundToSize(Protocol):
    """A module that says whether it takes images of other sizes than it was built for."""

    any_size: bool


@runtime_checkable
class DefaultActivation(Protocol):
    """A convolution block that knows whether its activation is the one of the whole model."""

    has_default_activation: bool
    act: nn.Module


_LAYERS: dict[str, Layer] = {}
_OFFERED: dict[str, Layer] = {}


def register(rule: Rule, name: str | None = None) -> Callable[[T], T]:
    """Register the decorated class or function under `name` (its own name if None).

    Raises:
        ValueError: the name is taken by another layer.
    """

    def add(build: T) -> T:
        layer = Layer(name or build.__name__, build, rule)
        known = _LAYERS.setdefault(layer.name, layer)
        if known.place != layer.place:
            raise ValueError(
                f"layer {layer.name!r} is registered twice: {known.place[0]} and {layer.place[0]}"
            )
        _LAYERS[layer.name] = layer
        return build

    return add


def offer(rule: Rule, name: str | None = None) -> Callable[[T], T]:
    """Like `register`, for a name that others use as well: what a user's file calls so goes before it."""

    def add(build: T) -> T:
        key = name or build.__name__
        _OFFERED[key] = Layer(key, build, rule)
        return build

    return add


def find(name: str) -> Layer | None:
    """The layer registered under `name`, or None."""
    return _LAYERS.get(name)


def offered(name: str) -> Layer | None:
    """The layer offered as `name`, or None."""
    return _OFFERED.get(name)


def names() -> list[str]:
    """Every name that is registered or offered."""
    return sorted({*_LAYERS, *_OFFERED})


def registering_modules() -> set[str]:
    """Python modules that have registered a layer."""
    return {layer.build.__module__ for layer in _LAYERS.values()}


def single(in_channels: Sequence[Any]) -> int:
    """The channels of a row that takes exactly one plain input."""
    if len(in_channels) != 1:
        raise LayerError(f"got {len(in_channels)} inputs, expected 1")
    if not isinstance(in_channels[0], int):
        raise LayerError(
            f"got an input with several maps of {list(in_channels[0])} channels, expected one map. Read a row that gives "
            "one, or join them first, as CBFuse does."
        )
    return in_channels[0]


def first_argument(args: Sequence[Any]) -> Any:
    """The row's leading argument (its output channels, for most layers)."""
    if not args:
        raise LayerError("got no arguments, expected at least the output channels")
    return args[0]


def convolution(in_channels: Sequence[Any], args: Sequence[Any], scaling: Scaling) -> Plan:
    """`[out, ...]` becomes `(in, scaled out, ...)`: layers that map one input to scaled output channels."""
    out = scaling.channels(first_argument(args))
    return Plan([single(in_channels), out, *args[1:]], out)


def stacked(in_channels: Sequence[Any], args: Sequence[Any], scaling: Scaling) -> Plan:
    """`[out, ...]` becomes `(in, scaled out, repeats, ...)`: blocks that repeat inside, such as C3."""
    out = scaling.channels(first_argument(args))
    return Plan([single(in_channels), out, scaling.repeats, *args[1:]], out, repeats_inside=True)


def unchanged(in_channels: Sequence[Any], args: Sequence[Any], scaling: Scaling) -> Plan:
    """Arguments pass as they are, channels too: Upsample, pooling, activations, Identity."""
    return Plan(list(args), single(in_channels))


def channels_first(in_channels: Sequence[Any], args: Sequence[Any], scaling: Scaling) -> Plan:
    """`[...]` becomes `(in, ...)`, channels unchanged: normalisation, attention over one map."""
    channels = single(in_channels)
    return Plan([channels, *args], channels)


def keeping_width(in_channels: Sequence[Any], args: Sequence[Any], scaling: Scaling) -> Plan:
    """`[...]` or `[width, ...]` becomes `(in, ...)`: layers of one width, in rows that say it and in rows that do not."""
    channels = single(in_channels)
    first = args[0] if args else None
    is_number = isinstance(first, int) and not isinstance(first, bool) and first >= 8
    is_width = is_number and channels in (first, scaling.channels(first))  # type: ignore[arg-type]
    return Plan([channels, *args[int(is_width) :]], channels)


def unscaled(in_channels: Sequence[Any], args: Sequence[Any], scaling: Scaling) -> Plan:
    """`[out, ...]` becomes `(in, out, ...)` without scaling: plain torch.nn convolutions."""
    return Plan([single(in_channels), first_argument(args), *args[1:]], first_argument(args))


def concatenation(in_channels: Sequence[Any], args: Sequence[Any], scaling: Scaling) -> Plan:
    """Inputs are joined along the channels: the output has their sum."""
    flat = [single([channels]) for channels in in_channels]
    return Plan(list(args), sum(flat))


def backbone(in_channels: Sequence[Any], args: Sequence[Any], scaling: Scaling) -> Plan:
    """An image goes in, a list of feature maps comes out; the instance tells its `channels` and `strides`.

    The parser gives each map the slot of its stride, so this rule is also what makes a module a backbone.
    """
    channels = single(in_channels)
    if channels != 3:
        is_image = channels < 5  # of a file with `ch: 1` or `ch: 4`
        raise LayerError(
            f"got an input of {channels} channels, expected the image with 3: a backbone makes all its maps from the image. "
            + (
                "Leave `ch` at 3."
                if is_image
                else "Put it first, or behind a Silence row that it reads."
            )
        )
    return Plan(list(args), None, repeats_inside=True)


def by_signature(in_channels: Sequence[Any], args: Sequence[Any], scaling: Scaling) -> Plan:
    """A class that nobody registered: nothing is known of it until the parser has read its constructor and tried it.

    It may be a block, a neck, or a backbone where it reads the image.
    """
    return Plan(list(args), None)


def detection_head(in_channels: Sequence[Any], args: Sequence[Any], scaling: Scaling) -> Plan:
    """`[nc, ...]` becomes `(nc, ..., [channels of each level])`: the last row of a model."""
    levels = [single([channels]) for channels in in_channels]
    return Plan([*args, levels], levels)
