"""What the parameters of a pasted constructor mean, told by the words that authors use for them.

`CBAM(c1, reduction=16)`, `CoordAtt(inp, oup)`, `Mixer(dim, input_resolution)`: nobody registers these, so the names have to
say which number is a count of channels. A name that says nothing is left to its position; see `readings`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from enum import Enum
from inspect import Parameter
from typing import Any, NamedTuple


class Role(Enum):
    """What a parameter is for."""

    INPUT = "channels of the input"
    OUTPUT = "channels of the output"
    WIDTH = "channels of input and output alike"
    INNER = "channels in between"
    REPEATS = "how often the block is repeated inside"
    SIZE = "height and width of the map"
    HEIGHT = "height of the map"
    EXTENT = "width of the map"
    CELLS = "number of cells of the map"
    OTHER = "anything else"


_COUNT = r"(c|chs?|chans?|channels?|chnls?|planes?|dims?|feats?|features?|filters?|width|maps)"
_IN, _OUT = r"(in|inp|input)", r"(out|ou|oup|output)"
_WORDS = (
    (Role.INPUT, rf"c1|cin|nin|inp|ninp(ut)?|input|{_IN}{_COUNT}(list|num)?|{_COUNT}{_IN}(list)?"),
    (
        Role.OUTPUT,
        rf"c2|cout|nout|{_OUT}|noutput|{_OUT}{_COUNT}(list|num)?|{_COUNT}{_OUT}(list)?|(num)?filters",
    ),
    (Role.INNER, rf"(mid|middle|hidden|hid|inner|internal|inter|squeeze|bottleneck){_COUNT}"),
    (
        Role.WIDTH,
        r"c|ch|chs|nf|dmodel|planes|"
        r"(n|num|gate|feat|feature|emb|embed|embedding|model|input|x)?"
        r"(channels?|chans?|chnls?|dims?|feats?|features?)(num|list)?",
    ),
    (Role.REPEATS, r"n|(n|num)?(blocks?|layers?|repeats?|bottlenecks?)|depth"),
    (
        Role.SIZE,
        r"(input|feat|feature|map|fmap|featmap|spatial|img|image|token)?(resolution|res)|"
        r"(input|feat|feature|map|fmap|featmap|spatial|img|image)(size|shape|sz)|imgsz|hw",
    ),
    (Role.HEIGHT, r"h|height|(feat|map|in|input|img)(h|height)"),
    (Role.EXTENT, r"w|(feat|map|in|input|img)(w|width)|width"),
    (Role.CELLS, r"(num|n)(patches|tokens|positions|pixels|points)|seqlen|sequencelength"),
)
_LIKE_WIDTH = re.compile(
    r"(?!.*(per|head|group|key|value|query|base|stem|growth|min|max|rank|class)).+(channels?|planes)"
)
_PATTERNS = tuple((role, re.compile(words)) for role, words in _WORDS)
FARTHEST, DOUBTFUL = 16, 8
"""A whole number that is so many times the default of its parameter is meant for another; fewer, where it is a width as well."""
CHANNEL_ROLES = (Role.INPUT, Role.OUTPUT, Role.WIDTH)
NEW_PARAMETER = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


class Argument(NamedTuple):
    """One parameter of a constructor.

    Attributes:
        name: as its author wrote it.
        role: what it is for.
        default: `Parameter.empty` where it must be given.
        word: what its name alone says; another argument may have the role.
        wants_list: its name, type or default says that it takes several numbers.
        by_position: it may be given by position.
    """

    name: str
    role: Role
    word: Role
    default: Any
    wants_list: bool
    by_position: bool

    @property
    def is_required(self) -> bool:
        return self.default is Parameter.empty

    def suits(self, value: object, farthest: int = FARTHEST) -> bool:
        """Whether `value` is of the kind of the default: a width of 1024 is no probability, a word is no number, and what is
        `farthest` times the default means another parameter."""
        default = self.default
        if self.is_required or default is None or value is None:
            return True
        if isinstance(default, bool) or isinstance(value, bool):
            return isinstance(default, bool) and (isinstance(value, bool) or value in (0, 1))
        if isinstance(default, float):
            return isinstance(value, float) or (isinstance(value, int) and value < 8)
        if isinstance(default, int):
            is_far = isinstance(value, int) and value > farthest * max(default, 1)
            return isinstance(value, (int, float, list, tuple)) and not is_far
        if isinstance(default, str):
            return isinstance(value, str)
        return True


class Constructor(NamedTuple):
    """The parameters of a class or factory function.

    Attributes:
        arguments: named ones, in their order.
        takes_more: it has `*args`.
        takes_any_name: it has `**kwargs`.
    """

    arguments: tuple[Argument, ...]
    takes_more: bool
    takes_any_name: bool

    def find(self, *roles: Role) -> Argument | None:
        """The first argument with one of `roles`."""
        return next((a for a in self.arguments if a.role in roles), None)


def signature_of(call: Callable[..., object]) -> inspect.Signature | None:
    """The signature of `call`; None for what is built in and has none."""
    try:
        return inspect.signature(call)
    except (TypeError, ValueError):
        return None


def read_constructor(build: Callable[..., Any]) -> Constructor:
    """The parameters of `build`, each with its role."""
    signature = signature_of(build)
    if signature is None:
        return Constructor((), True, True)
    parameters = signature.parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    arguments = [
        Argument(p.name, _role(p), _role(p), p.default, _wants_list(p), p.kind in NEW_PARAMETER)
        for p in named
    ]
    kinds = {p.kind for p in parameters}
    return Constructor(
        tuple(_together(arguments)),
        Parameter.VAR_POSITIONAL in kinds,
        Parameter.VAR_KEYWORD in kinds,
    )


def shown(build: Callable[..., Any]) -> str:
    """`(c1, reduction=16)`: the parameters as their author wrote them, without types."""
    signature = signature_of(build)
    parameters = signature.parameters.values() if signature is not None else ()
    own = ", ".join(str(p.replace(annotation=p.empty)) for p in parameters)
    return f"({own})" if signature is not None else "(...)"


def _role(parameter: Parameter) -> Role:
    if isinstance(parameter.default, (str, bool, float)):
        return Role.OTHER
    word = parameter.name.lower().replace("_", "")
    rest = Role.WIDTH if _LIKE_WIDTH.fullmatch(word) else Role.OTHER
    return next((role for role, words in _PATTERNS if words.fullmatch(word)), rest)


def _wants_list(parameter: Parameter) -> bool:
    annotation = str(parameter.annotation).lower()
    return (
        "list" in parameter.name.lower()
        or isinstance(parameter.default, (list, tuple))
        or any(word in annotation for word in ("list", "sequence", "tuple", "iterable"))
    )


def _together(arguments: list[Argument]) -> list[Argument]:
    """Mend what a name alone cannot say: what stands beside it decides.

    A width in between that is the only one is the input's; one behind an input is the output (`inplanes, planes`); a height
    without a width, and a width without a height, mean something else.
    """
    roles = [a.role for a in arguments]
    if not {Role.HEIGHT, Role.EXTENT} <= set(roles):
        roles = [Role.OTHER if r in (Role.HEIGHT, Role.EXTENT) else r for r in roles]
    if Role.INPUT in roles and Role.OUTPUT not in roles:
        later = (i for i, r in enumerate(roles) if r is Role.WIDTH and i > roles.index(Role.INPUT))
        first = next(later, None)
        if first is not None:
            roles[first] = Role.OUTPUT
    elif Role.WIDTH in roles and Role.INPUT not in roles and Role.OUTPUT in roles:
        roles[roles.index(Role.WIDTH)] = Role.INPUT
    if Role.INNER in roles and not set(CHANNEL_ROLES) & set(roles):  # the only width there is
        roles[roles.index(Role.INNER)] = Role.WIDTH
    seen: set[Role] = set()
    for i, role in enumerate(roles):  # of two inputs or outputs the first is meant
        roles[i] = Role.OTHER if role in seen and role is not Role.INNER else role
        seen.add(role)
    return [a._replace(role=role) for a, role in zip(arguments, roles, strict=True)]


def usage(constructor: Constructor) -> str:
    """`[width, reduction], [reduction] or {reduction: ...}`: what a row may say."""
    own = [
        a.name
        for a in constructor.arguments
        if a.role in (Role.OTHER, Role.INNER) and a.by_position
    ]
    if not own:
        return "[width] or []"
    listed = ", ".join(own)
    return f"[width, {listed}], [{listed}] or names such as {{{own[0]}: ...}}"
