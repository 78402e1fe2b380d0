"""The backbones inside a model, and which tensors of a file are theirs.

Weights of a backbone come under any prefix, from a classifier, a detector of another project or a training of its own. They
go by the longest common suffix of their names; a module that knows other spellings of its weights may translate them
(`read_foreign`), or tell the names that they have elsewhere (`foreign_names`), and is told when it got weights of a bare
backbone (`on_pretrained`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from models.weights.alignment import ROW
from models.weights.fitting import kind_of_change
from models.weights.report import cross
from models.weights.suffixes import Shapes, match_suffixes, nearest_key

HALF = 0.5
TRANSLATED = "translated: "  # in front of names that stand for no tensor of the file
# Modules of classifiers, by the names that timm, torchvision and papers' code give them.
CLASSIFIERS = {
    *("fc", "head", "heads", "classifier", "last", "linear", "logits", "probe", "classif"),
    *("AuxLogits", "aux", "aux1", "aux2"),
}


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


def fits(key: str, given: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a tensor of shape `given` serves for one of shape `wanted`."""
    return given == wanted or bool(kind_of_change(key, given, wanted))


def backbone_parts(model: Any, state: Mapping[str, Tensor], *, is_backbone: bool) -> list[Part]:
    """The backbones of a detector: modules that make maps from the image, else the rows of its backbone section.

    Args:
        model: a detector with `rows`, or any network.
        state: its state dict.
        is_backbone: a network without rows is a backbone itself.
    """
    rows: Any = getattr(model, "rows", ())
    if not rows:
        return [_part("", model, state)] if is_backbone else []
    numbers = [n for n, row in enumerate(rows) if row.section == "backbone"]
    whole = [n for n in numbers if rows[n].map_slots is not None and not rows[n].is_neck]
    if whole:
        return [_part(f"model.{n}.", model.model[n], state) for n in whole]
    made = nn.ModuleDict({"model": nn.ModuleDict({str(n): model.model[n] for n in numbers})})
    return [_part("", made, state)]


def _part(prefix: str, module: Any, state: Mapping[str, Tensor]) -> Part:
    own = {key for key in state if key.startswith(prefix)} if prefix else set(state)
    if isinstance(module, nn.ModuleDict):
        own = set(module.state_dict())
    keys = tuple(key for key in state if key in own)
    pretrained = prefix + getattr(module, "pretrained_prefix", "")
    counted = (key for key in keys if key.startswith(pretrained) and state[key].is_floating_point())
    return Part(prefix, module, keys, frozenset(counted))


def match_part(
    part: Part, state: Mapping[str, Tensor], source: Shapes, target: Shapes
) -> PartMatch:
    """What `state` has for `part` by the suffixes of its names, or in a spelling that the module itself knows."""
    own = {key[len(part.prefix) :]: key for key in part.keys}
    found = _by_suffixes(part, own, source, target)
    names = getattr(part.module, "foreign_names", None)
    if names is not None and len(found.fitting) < len(part.counted):
        elsewhere = {written: part.prefix + key for key, written in names().items()}
        other = _by_suffixes(part, elsewhere, source, target, is_ours=False)
        found = other if len(other.fitting) > len(found.fitting) else found
    read = getattr(part.module, "read_foreign", None)
    if read is None or len(found.fitting) == len(part.counted):
        return found
    tensors = {part.prefix + key: tensor for key, tensor in read(dict(state)).items()}
    if len(part.counted & tensors.keys()) <= len(found.fitting):
        return found
    renamed = {key: f"{TRANSLATED}{key}" for key in tensors}
    note = f"names and shapes translated by {getattr(part.module, 'translator', 'the module')}"
    made = {renamed[key]: tensor for key, tensor in tensors.items()}
    return PartMatch(renamed, made, part.counted & tensors.keys(), True, note)


def _by_suffixes(
    part: Part, own: Mapping[str, str], source: Shapes, target: Shapes, *, is_ours: bool = True
) -> PartMatch:
    """What goes by the suffixes of names.

    Args:
        own: names of the part's tensors -> their keys in the model.
        is_ours: the names are those that a detector of ours has, too.
    """
    match = match_suffixes(source, {name: target[key] for name, key in own.items()}, fits)
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
    return tuple(key for key in keys if _is_classifier(key))


def _is_classifier(key: str) -> bool:
    parts = key.split(".")[:-1]
    return any(p in CLASSIFIERS or p.startswith(("head_", "fc_", "classifier_")) for p in parts)


def is_enough(part: Part, match: PartMatch) -> bool:
    """Whether a file is one of this backbone: half of its tensors are there."""
    return bool(match.fitting) and len(match.fitting) >= HALF * len(part.counted)


def too_few(part: Part, match: PartMatch, source: Shapes, target: Shapes) -> str:
    """Why a file is not one of this backbone, with the names that come nearest."""
    is_rows = isinstance(part.module, nn.ModuleDict)
    name = getattr(part.module, "model_name", None) or type(part.module).__name__
    advice = "put the file's own under the model by --backbone, " if is_rows else ""
    got, wanted = _nearest(part, match, source, target)
    return (
        f"does not fit {'the backbone' if is_rows else name} - has {len(match.fitting)} of its {len(part.counted)} tensors, "
        f"expected at least half; nearest names: got {got} {cross(source[got])}, expected {wanted} "
        f"{cross(target[wanted])}. Give weights of this very backbone, {advice}or leave them out."
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
