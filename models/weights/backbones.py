"""The backbones inside a model, and which tensors of a file are theirs.

Weights of a backbone come under any prefix, from a classifier, a detector of another project or a training of its own. They
go by the longest common suffix of their names, unless its module knows more about them: see the protocols here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from models.head import Head
from models.weights.fitting import cross, fits
from models.weights.matching import ROW, Shapes, match_suffixes, nearest_key

HALF = 0.5
TRANSLATED = "translated: "  # in front of names that stand for no tensor of the file
# Modules of classifiers, by the names that timm, torchvision and papers' code give them.
CLASSIFIER = re.compile(
    r"(^|\.)(fc|heads?|classifier|last|linear|logits|probe|classif|AuxLogits|aux[12]?|(head|fc|classifier)_[^.]*)\."
)


class DetectorRow(Protocol):
    """What is asked of a row."""

    @property
    def section(self) -> str:
        """`backbone` or `head`, of the YAML."""

    @property
    def map_slots(self) -> Sequence[int | None] | None:
        """Where each of its maps goes; None for a row with one output."""

    @property
    def is_neck(self) -> bool:
        """Whether it reads maps of other rows."""


@runtime_checkable
class Detector(Protocol):
    """A network that is made of rows, the last one its head."""

    model: nn.ModuleList

    @property
    def rows(self) -> Sequence[DetectorRow]:
        """What its modules are."""

    @property
    def head(self) -> Head:
        """The last row's module."""


@runtime_checkable
class Sized(Protocol):
    """A network that was built for images of a size (height, width)."""

    imgsz: tuple[int, int]


@runtime_checkable
class NamedElsewhere(Protocol):
    """A backbone that was published under other names."""

    def foreign_names(self) -> dict[str, str]:
        """Its keys -> the names elsewhere."""


@runtime_checkable
class Translator(Protocol):
    """A backbone that can translate a whole file."""

    def read_foreign(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The file's tensors by its own keys, only what is there."""


@runtime_checkable
class Wrapper(Protocol):
    """A backbone around a model of a library, which is what pretrained weights are for."""

    pretrained_prefix: str
    model_name: str
    translator: str


@runtime_checkable
class Listener(Protocol):
    """A backbone that wants to know of weights of a bare backbone."""

    def on_pretrained(self) -> str:
        """They have come in; what it makes of it, in words."""


class Part(NamedTuple):
    """A backbone inside a model.

    Attributes:
        prefix: of its keys in the model, `model.0.`; "" where it is the model.
        module: the backbone; of one that is made of rows, all its rows.
        keys: its keys in the model.
        counted: those of them that a file of this backbone has; the others are ours, or counters.
    """

    prefix: str
    module: nn.Module
    keys: tuple[str, ...]
    counted: frozenset[str]

    @property
    def is_rows(self) -> bool:
        """Whether it is made of rows of a YAML."""
        return isinstance(self.module, nn.ModuleDict)


class PartMatch(NamedTuple):
    """What a file has for a backbone.

    Attributes:
        sources: key of the model -> key of the file, or of `tensors`.
        tensors: tensors that are not in the file as they are.
        fitting: counted keys that get a tensor.
        is_bare: the file is one of the backbone, not of a detector that is made of rows.
        note: how it was read, "" for as it is.
    """

    sources: dict[str, str]
    tensors: dict[str, Tensor]
    fitting: frozenset[str]
    is_bare: bool
    note: str = ""


def backbone_parts(model: nn.Module, state: Mapping[str, Tensor], *, alone: bool) -> list[Part]:
    """The backbones of a detector: modules that make maps from the image, else the rows of its backbone section.

    Args:
        model: a detector, or any network.
        state: its state dict.
        alone: a network that is no detector is a backbone itself.
    """
    if not isinstance(model, Detector):
        return [_part("", model, state)] if alone else []
    rows = [(n, row) for n, row in enumerate(model.rows) if row.section == "backbone"]
    whole = [n for n, row in rows if row.map_slots is not None and not row.is_neck]
    if whole:
        return [_part(f"model.{n}.", model.model[n], state) for n in whole]
    own = nn.ModuleDict({str(n): model.model[n] for n, _ in rows})
    return [_part("", nn.ModuleDict({"model": own}), state)]


def _part(prefix: str, module: nn.Module, state: Mapping[str, Tensor]) -> Part:
    is_rows = isinstance(module, nn.ModuleDict)
    own = set(module.state_dict()) if is_rows else {k for k in state if k.startswith(prefix)}
    keys = tuple(key for key in state if key in own)
    start = prefix + (module.pretrained_prefix if isinstance(module, Wrapper) else "")
    counted = (key for key in keys if key.startswith(start) and state[key].is_floating_point())
    return Part(prefix, module, keys, frozenset(counted))


def match_part(
    part: Part, state: Mapping[str, Tensor], source: Shapes, target: Shapes
) -> PartMatch:
    """What `state` has for `part` by the suffixes of its names, or in a spelling that the module itself knows."""
    module = part.module
    own = {key.removeprefix(part.prefix): key for key in part.keys}
    found = _by_suffixes(part, own, source, target)
    if isinstance(module, NamedElsewhere) and len(found.fitting) < len(part.counted):
        elsewhere = {name: part.prefix + key for key, name in module.foreign_names().items()}
        other = _by_suffixes(part, elsewhere, source, target, is_ours=False)
        found = max(found, other, key=lambda match: len(match.fitting))
    if not isinstance(module, Translator) or len(found.fitting) == len(part.counted):
        return found
    tensors = {part.prefix + key: tensor for key, tensor in module.read_foreign(state).items()}
    fitting = part.counted & tensors.keys()
    if len(fitting) <= len(found.fitting):
        return found
    renamed = {key: f"{TRANSLATED}{key}" for key in tensors}
    by = module.translator if isinstance(module, Wrapper) else "the module"
    made = {renamed[key]: tensor for key, tensor in tensors.items()}
    return PartMatch(renamed, made, fitting, True, f"names and shapes translated by {by}")


def _by_suffixes(
    part: Part, own: Mapping[str, str], source: Shapes, target: Shapes, *, is_ours: bool = True
) -> PartMatch:
    """What goes by the suffixes of names.

    Args:
        own: names of the part's tensors -> their keys in the model.
        is_ours: the names are those that a detector of ours has, too.
    """
    match = match_suffixes(source, {name: target[key] for name, key in own.items()})
    is_row = ROW.match(".".join((*match.prefix, "."))) is not None
    rows = {row[1] for key in source if (row := ROW.match(key))}
    is_bare = not (is_row and (len(rows) > 1 or is_ours and not match.own_prefix))
    sources = {own[name]: given for name, given in match.pairs.items()}
    fitting = part.counted & {own[name] for name in match.fitting}
    return PartMatch(sources, {}, fitting, is_bare)


def by_rows(part: Part, sources: Mapping[str, str], source: Shapes, target: Shapes) -> PartMatch:
    """What the alignment of rows gives to `part`."""
    own = {key: sources[key] for key in part.keys if key in sources}
    fitting = (key for key, given in own.items() if fits(key, source[given], target[key]))
    return PartMatch(own, {}, part.counted & set(fitting), False)


def classifier_keys(keys: Iterable[str]) -> tuple[str, ...]:
    """Those of `keys` that belong to a classifier."""
    return tuple(key for key in keys if CLASSIFIER.search(key))


def is_enough(part: Part, match: PartMatch) -> bool:
    """Whether a file is one of this backbone: half of its tensors are there."""
    return bool(match.fitting) and len(match.fitting) >= HALF * len(part.counted)


def too_few(part: Part, match: PartMatch, source: Shapes, target: Shapes) -> str:
    """Why a file is not one of this backbone, with the names that come nearest."""
    module, advice = part.module, "put the file's own under the model by --backbone, "
    name = module.model_name if isinstance(module, Wrapper) else type(module).__name__
    got, wanted = _nearest(part, match, source, target)
    return (
        f"does not fit {'the backbone' if part.is_rows else name} - has {len(match.fitting)} of its {len(part.counted)} "
        f"tensors, expected at least half; nearest names: got {got} {cross(source[got])}, expected {wanted} "
        f"{cross(target[wanted])}. Give weights of this very backbone, {advice if part.is_rows else ''}or leave them out."
    )


def _nearest(part: Part, match: PartMatch, source: Shapes, target: Shapes) -> tuple[str, str]:
    """Names (of the file, of the model) of a tensor that should be the same: of one name, else nearly so."""
    lacking = [key for key in part.keys if key in part.counted - match.fitting]
    named = [key for key in lacking if match.sources.get(key) in source]
    layers = [key for key in named or lacking if len(target[key]) > 1] or named or lacking
    wanted = layers[0]
    if named:
        return match.sources[wanted], wanted
    alike = [key for key, shape in source.items() if len(shape) == len(target[wanted])]
    return nearest_key(wanted, alike or source), wanted
