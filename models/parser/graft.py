"""`--backbone NAME`: the same config with another backbone, as a new mapping.

What leads the rows without downsampling (`Silence`) stays, what stands on the coarsest map (`SPPF`, `C2PSA`, ...) stays, the
rows between become one row. Every reference to a removed row becomes `P3`, `P4`, ... by the stride of what it meant;
references among the rows that stay become names, since a backbone may take more slots than the rows it replaces.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from inspect import Parameter
from typing import Any

from models.parser.lookup import find_layer
from models.parser.rows import SECTIONS, resolve
from models.parser.wiring import RowSlots, level_of
from models.registry import LayerError, by_signature, find
from models.registry import backbone as backbone_rule
from models.timm.features import is_timm_model
from utils.errors import ConfigError

CONTEXT_MODULES = ("SPP", "SPPF", "SPPELAN", "C2PSA", "PSA", "AIFI")
WEIGHT_PARAMETERS = (
    *("pretrained", "weights", "checkpoint_path"),
    *("pretrained_path", "pretrained_weights", "weights_path", "ckpt", "ckpt_path"),
)


def replace_backbone(
    config: Mapping[str, Any], name: str, kwargs: Mapping[str, Any], slots: Sequence[RowSlots]
) -> dict[str, Any]:
    """A copy of `config` whose backbone is `name` with keyword arguments `kwargs`.

    Args:
        config: a model YAML as a mapping; it is not changed.
        name: a registered backbone, a class in `models/modules/`, or a timm model.
        kwargs: its arguments.
        slots: of each row of `config`, backbone rows first, then head rows.

    Raises:
        ConfigError: a row that stays refers to a removed one whose stride is not a power of two.
    """
    sections = [[list(row) for row in config[key]] for key in SECTIONS]
    rows, in_backbone = [*sections[0], *sections[1]], len(sections[0])
    before, after = _removed_range(sections[0], slots)
    writer = _Writer(rows, slots, before, after, in_backbone)
    new_row = [-1, 1, name, [dict(kwargs)] if kwargs else []]
    kept = {i: writer.rewrite(i) for i in range(len(rows)) if not before <= i < after}
    for i, label in writer.labels.items():
        kept[i][4:] = [label]
    tail = [kept[i] for i in range(after, in_backbone)]
    return {
        **config,
        "backbone": [*(kept[i] for i in range(before)), new_row, *tail],
        "head": [kept[i] for i in range(in_backbone, len(rows))],
    }


def _removed_range(backbone: Sequence[Sequence[Any]], slots: Sequence[RowSlots]) -> tuple[int, int]:
    """Rows `before <= i < after` of the backbone section go."""
    count = len(backbone)
    before = next((i for i in range(count) if not slots[i].is_image), count)
    lists = [i for i in range(count) if slots[i].is_backbone]
    if lists:
        return before, lists[-1] + 1
    coarsest = max((slot.strides[0] or 0 for slot in slots[:count]), default=0)
    on_coarsest = (
        i for i in range(before, count)
        if slots[i].strides[0] == coarsest and str(backbone[i][2]).split(".")[-1] in CONTEXT_MODULES
    )  # fmt: skip
    return before, next(on_coarsest, count)


@dataclass
class _Writer:
    """Rewrites the `from` of rows that stay; collects the names that this makes necessary.

    Attributes:
        rows: of both sections.
        slots: of each row.
        before, after: rows `before <= i < after` go.
        in_backbone: number of rows of the backbone section.
        labels: row -> the name that it gets.
    """

    rows: Sequence[Sequence[Any]]
    slots: Sequence[RowSlots]
    before: int
    after: int
    in_backbone: int
    labels: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.row_of_slot = {
            slot.first + k: i for i, slot in enumerate(self.slots) for k in range(len(slot.strides))
        }
        self.taken = {row[4] for row in self.rows if len(row) > 4}

    def rewrite(self, i: int) -> list[Any]:
        """Row `i` as it stands in the new config."""
        source, *rest = self.rows[i]
        items = source if isinstance(source, list) else [source]
        new = [self._reference(item, i) for item in items]
        return [new if isinstance(source, list) else new[0], *rest]

    def _reference(self, item: int | str, i: int) -> int | str:
        slot = self._slot(item, i)
        if slot is None:
            return item
        target = self.row_of_slot[slot]
        if target < self.before:
            return item if i < self.before else slot
        if target < self.after:
            return self._level(slot, target, i)
        is_stable = (
            isinstance(item, str) and item in self.taken or isinstance(item, int) and item < 0
        )
        if is_stable:
            return item
        label, own = self._label(target), self.slots[target]
        return f"{label}.{slot - own.first}" if len(own.strides) > 1 else label

    def _slot(self, item: int | str, i: int) -> int | None:
        """The original slot that `item` means in row `i`; None for the image itself and for what does not exist."""
        if isinstance(item, int):
            slot = item if item >= 0 else self.slots[i].first + item
            return slot if slot in self.row_of_slot else None
        for k in range(i):
            if len(self.rows[k]) > 4 and self.rows[k][4] == item:
                return self.slots[k].first + len(self.slots[k].strides) - 1
        return self._pyramid(i).get(item)

    def _pyramid(self, i: int) -> dict[str, int]:
        """What `P3` and the like mean to row `i`: the maps of the last backbone, else the last plain row of the stride."""
        levels: dict[str, int] = {}
        has_backbone = False
        for slot in self.slots[: min(i, self.in_backbone)]:
            if slot.is_backbone:
                levels, has_backbone = {}, True
            elif has_backbone:
                continue
            for k, stride in enumerate(slot.strides):
                if level := level_of(stride or 0):
                    levels[f"P{level}"] = slot.first + k
        return levels

    def _level(self, slot: int, target: int, i: int) -> str:
        stride = self.slots[target].strides[slot - self.slots[target].first]
        level = level_of(stride or 0)
        name = f"P{level}"
        if level and name not in self.taken:
            return name
        why = f"a row of the config is called {name}" if level else f"its stride is {stride}"
        raise ConfigError(
            f"--backbone: row {self.slots[i].first} ({self.rows[i][2]}) reads row {slot}, which goes, and nothing "
            f"can take its place - {why}. Write a YAML for this pair."
        )

    def _label(self, target: int) -> str:
        """The name of row `target`, made from its old index if it has none."""
        row = self.rows[target]
        if len(row) > 4:
            return str(row[4])
        label = f"row{self.slots[target].first + len(self.slots[target].strides) - 1}"
        while label in self.taken:
            label += "_"
        return self.labels.setdefault(target, label)


def forget_weights(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `config` whose backbones start from fresh weights.

    For building a model whose weights come from elsewhere (a checkpoint, a resumed run): nothing is read or downloaded
    for it. A path or a true for `pretrained` and `weights`, given by name or by position, becomes what the layer takes
    for no weights; what asks for none stays as it is.
    """
    sections = {key: config[key] for key in ("backbone", "head") if key in config}
    fresh = {
        key: [_without_weights(row) for row in rows]
        for key, rows in sections.items()
        if isinstance(rows, Sequence)  # else a mistake, which the parser will tell
    }
    return {**config, **fresh}


def _without_weights(row: object) -> object:
    if not isinstance(row, Sequence) or len(row) < 4:
        return row
    args = row[3]
    positional = list(args) if isinstance(args, list) else []
    keywords = dict(args) if isinstance(args, Mapping) else {}
    if positional and isinstance(positional[-1], Mapping):
        keywords = dict(positional.pop())
    if not any(map(_asks, [*(keywords.get(key) for key in WEIGHT_PARAMETERS), *positional])):
        return row
    parameters = _parameters(str(row[2]))
    for key in WEIGHT_PARAMETERS:
        if _asks(keywords.get(key)):
            keywords[key] = _no_weights(key, parameters.get(key))
    for position, key in enumerate([*parameters][: len(positional)]):
        if key in WEIGHT_PARAMETERS and _asks(positional[position]):
            positional[position] = _no_weights(key, parameters[key])
    return [*row[:3], [*positional, keywords] if keywords else positional, *row[4:]]


def _asks(value: object) -> bool:
    """Whether an argument as written asks for weights."""
    return bool(resolve(value, {}))


def _no_weights(key: str, parameter: Parameter | None) -> object:
    """What says "none" to the layer: false where it takes a true, or else its own default."""
    if key == "pretrained" or parameter is None or "bool" in str(parameter.annotation):
        return False
    return None if parameter.default is Parameter.empty else parameter.default or None


def _parameters(name: str) -> Mapping[str, Parameter | None]:
    """The arguments that a backbone row may give by position."""
    with suppress(LayerError):  # an unknown name, or one for two things: the parser will tell
        layer = find_layer(name)
        if layer.rule in (backbone_rule, by_signature):
            return inspect.signature(layer.build).parameters
        if find(name) is None and is_timm_model(name):  # timm takes long to import
            return dict.fromkeys(WEIGHT_PARAMETERS[:2])  # its models take these two by position
    return {}
