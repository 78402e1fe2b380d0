"""Giving a model the weights of another: rows by number or position, backbones by name under any prefix.

A detector's file goes row by row. What it does not have for a backbone, or all of it where the file is one of a backbone
alone, goes by the suffixes of names (`matching`). Every shape is checked; some that differ are made to fit, and class rows
move by the classes' names (`fitting`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.blocks.input_norm import InputNorm
from models.weights.backbones import (
    Detector,
    Listener,
    Part,
    PartMatch,
    Sized,
    backbone_parts,
    by_rows,
    classifier_keys,
    is_enough,
    match_part,
    too_few,
)
from models.weights.fitting import (
    ClassRows,
    Shape,
    copy_class_rows,
    cross,
    kind_of_change,
    made_to_fit,
    match_classes,
    told,
)
from models.weights.matching import ROW, Shapes, match_keys
from models.weights.read import read_weights
from utils.errors import CheckpointError

COUNTER = "num_batches_tracked"
MAX_GROUPS = 6


@dataclass(frozen=True)
class TransferReport:
    """What became of a model's tensors when weights were given to it.

    Attributes:
        transferred: keys of the model that got a tensor, some of them in part (`partial`).
        partial: keys of which only rows that both sides know were taken.
        missing: keys of the model that the weights have no counterpart for.
        mismatched: (key of the model, shape in the weights, shape in the model).
        unused: keys of the weights that went nowhere.
        moved: row of the model -> row of the weights, where they differ.
        parameters: numbers transferred, and numbers the model has.
        adapted: (key of the model, what was done to the file's tensor).
        classifier: keys of the weights that belong to a classifier, which a detector has no use for.
        classes: which class rows moved by name, in words; "" where none had to.
        notes: what else should be known.
        backbone_only: the weights are those of a backbone, the rest of the model keeps its own.
    """

    transferred: tuple[str, ...]
    partial: tuple[str, ...]
    missing: tuple[str, ...]
    mismatched: tuple[tuple[str, Shape, Shape], ...]
    unused: tuple[str, ...]
    moved: Mapping[int, int] = field(default_factory=dict)
    parameters: tuple[int, int] = (0, 0)
    adapted: tuple[tuple[str, str], ...] = ()
    classifier: tuple[str, ...] = ()
    classes: str = ""
    notes: tuple[str, ...] = ()
    backbone_only: bool = False

    def summary(self) -> str:
        """The report in one line, and one more for each kind of tensor that was changed or left out."""
        total = len(self.transferred) + len(self.missing) + len(self.mismatched)
        share = 100 * self.parameters[0] / max(self.parameters[1], 1)
        of = "the backbone's numbers" if self.backbone_only else "the numbers"
        first = f"transferred {len(self.transferred)} of {total} tensors ({share:.1f}% of {of})"
        lines = [f"weights for the backbone only: {first}" if self.backbone_only else first]
        lines += self.notes
        if self.moved:
            pairs = (f"{old} to {new}" for new, old in self.moved.items())
            lines.append(f"rows by position: {_listed(pairs)}")
        if self.adapted:
            lines.append(_adapted(self.adapted))
        if self.classes:
            lines.append(f"class rows by name: {self.classes}")
        elif self.partial:
            lines.append(f"without class rows {len(self.partial)}: {_by_prefix(self.partial)}")
        if self.classifier:
            counts = Counter(key.rpartition(".")[0] for key in self.classifier)
            groups = _listed(f"{name} ({count})" for name, count in counts.items())
            lines.append(f"classifier left out: {groups}")
        if self.missing:
            lines.append(f"missing {len(self.missing)}: {_by_prefix(self.missing)}")
        if self.mismatched:
            key, got, expected = self.mismatched[0]
            first = f"first {key} {cross(got)}, expected {cross(expected)}"
            groups = _by_prefix(key for key, _, _ in self.mismatched)
            lines.append(f"mismatched {len(self.mismatched)}: {groups}; {first}")
        if self.unused:
            lines.append(f"unused {len(self.unused)}: {_by_prefix(self.unused)}")
        return "\n".join(lines)


def _adapted(changes: Iterable[tuple[str, str]]) -> str:
    """`first convolution summed from 3 to 1 channels (model.0.net.conv1.weight), ...`, equal ones once."""
    keys: dict[str, list[str]] = {}
    for key, how in changes:
        keys.setdefault(how, []).append(key)
    groups = (f"{how} ({k[0] if len(k) == 1 else len(k)})" for how, k in keys.items())
    return f"made to fit: {_listed(groups)}"


def _by_prefix(keys: Iterable[str]) -> str:
    """`model.24 (6), neck (12)`: how many of `keys` begin with what, rows of a detector one by one."""
    starts = (key.split(".")[: 2 if key.startswith("model.") else 1] for key in keys)
    counts = Counter(map(".".join, starts))
    return _listed((f"{prefix} ({count})" for prefix, count in counts.items()), "more places")


def _listed(items: Iterable[str], more: str = "more") -> str:
    """The first of them, and how many more there are."""
    every = list(items)
    rest = len(every) - MAX_GROUPS
    return ", ".join(every[:MAX_GROUPS]) + (f" and {rest} {more}" if rest > 0 else "")


def load_backbone_weights(model: nn.Module, path: str | Path) -> TransferReport:
    """Give only the backbone of a detection model, or a backbone alone, the numbers of a file.

    The file may hold a backbone alone, under any prefix and with names flattened as timm does
    (`stages.0` or `stages_0`), a classifier, whose last layer is left out, or a whole detector.

    Raises:
        CheckpointError: the file cannot be read, or has less than half of the backbone's tensors.
    """
    return transfer(model, read_weights(path).state, only_backbone=True, source=path)


def transfer(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    names: tuple[Sequence[str] | None, Sequence[str]] = (None, ()),
    only_backbone: bool = False,
    source: str | Path = "weights",
) -> TransferReport:
    """Copy into `model` every tensor of `state` that belongs there.

    Args:
        model: changed in place; its devices and types stay.
        state: weights, for instance of `read_weights`.
        names: class names of the file and of the model, by which class rows move. None takes the rows as they stand; with
            another number of classes only the box rows of heads that stack both are taken.
        only_backbone: leave the rest of the model as it is; a network that is no detector is a backbone itself.
        source: what errors call the weights.

    Raises:
        CheckpointError: not one tensor fits, or less than half of a backbone's where the file has nothing else.
    """
    target = {**model.state_dict(), **_optional_tensors(model)}
    plan = _plan(model, target, state, only_backbone)
    _require_enough(plan, target, state, source, only_backbone)
    report = _Copier(model, target, plan, match_classes(*names)).run(state)
    if report.parameters[0] == 0:
        raise CheckpointError(
            f"{source}: none of {len(state)} tensors fits the model - got {_example(state)}, expected {_example(target)}. "
            "Give the weights of the same family and size, or none."
        )
    told_by = (
        part.module.on_pretrained()
        for part, match in plan.used
        if match.is_bare and isinstance(part.module, Listener)
    )
    return replace(report, notes=(*report.notes, *filter(None, told_by)))


def _example(state: Mapping[str, Tensor]) -> str:
    """A key with its shape, for an error."""
    large = max(state.items(), key=lambda item: math.prod(item[1].shape), default=None)
    return f"{large[0]} {cross(tuple(large[1].shape))}" if large else "nothing"


class _Plan(NamedTuple):
    """What goes where.

    Attributes:
        sources: key of the model -> key in `given`.
        given: tensors of the file, and those that were made of them.
        moved: rows that go by position.
        keys: keys of the model that are looked for.
        matches: what each backbone could get.
        used: those of them that are enough.
        outside: whether the file has something for the rest of the model.
        backbone_only: the rest of the model keeps its own weights.
    """

    sources: dict[str, str]
    given: Mapping[str, Tensor]
    moved: dict[int, int]
    keys: Sequence[str]
    matches: list[tuple[Part, PartMatch]]
    used: list[tuple[Part, PartMatch]]
    outside: bool
    backbone_only: bool


def _plan(
    model: nn.Module, target: Mapping[str, Tensor], state: Mapping[str, Tensor], only_backbone: bool
) -> _Plan:
    """Rows go by alignment; a backbone that gets more by the suffixes of its names goes by those."""
    given, wanted = _shapes(state), _shapes(target)
    sources, moved = match_keys(given, wanted)
    if only_backbone and isinstance(model, Detector):
        rows = [n for n, row in enumerate(model.rows) if row.section == "backbone"]
        starts = tuple(f"model.{n}." for n in rows)
        sources = {key: old for key, old in sources.items() if key.startswith(starts)}
    parts = backbone_parts(model, target, alone=only_backbone)
    matches = []
    for part in parts:
        match = by_rows(part, sources, given, wanted)
        if len(match.fitting) < len(part.counted):
            found = match_part(part, state, given, wanted)
            match = found if len(found.fitting) > len(match.fitting) else match
        matches.append((part, match))
    used = [(part, match) for part, match in matches if is_enough(part, match)]
    made: dict[str, Tensor] = {}
    for part, match in used:
        sources = {k: v for k, v in sources.items() if k not in part.keys} | match.sources
        made |= match.tensors
    inside = {key for part in parts for key in part.keys}
    outside = any(key not in inside and given.get(sources[key]) == wanted[key] for key in sources)
    backbone_only = only_backbone or not outside and any(match.is_bare for _, match in used)
    keys: Sequence[str] = list(target)
    if backbone_only:
        counted = frozenset().union(*(part.counted for part, _ in used or matches))
        keys = [key for key in target if key in sources or key in counted]
    rows_of = ((ROW.match(key), ROW.match(old)) for key, old in sources.items())
    pairs = {(int(new[1]), int(old[1])) for new, old in rows_of if new and old}
    moved = {new: old for new, old in moved.items() if (new, old) in pairs}
    return _Plan(sources, {**state, **made}, moved, keys, matches, used, outside, backbone_only)


def _require_enough(
    plan: _Plan,
    target: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    source: str | Path,
    only_backbone: bool,
) -> None:
    """Refuse weights of another backbone: some names and shapes are alike everywhere."""
    if plan.used or plan.outside or not plan.matches or not state:
        return
    part, best = max(plan.matches, key=lambda item: len(item[1].fitting))
    if only_backbone or best.is_bare and best.fitting:
        raise CheckpointError(f"{source}: {too_few(part, best, _shapes(state), _shapes(target))}")


class _Copier:
    """Copies what a plan says, and keeps account.

    Attributes:
        optional: keys of the model that older weights do not have; their absence changes nothing.
    """

    def __init__(
        self, model: nn.Module, target: Mapping[str, Tensor], plan: _Plan, rows: ClassRows
    ) -> None:
        self.model, self.target, self.plan, self.rows = model, target, plan, rows
        self.optional = _optional_tensors(model).keys()
        self.class_keys = _class_keys(model)
        self.transferred: list[str] = []
        self.partial: list[str] = []
        self.missing: list[str] = []
        self.mismatched: list[tuple[str, Shape, Shape]] = []
        self.adapted: list[tuple[str, str]] = []
        self.count = self.counters = 0
        self.by_name = False

    def run(self, state: Mapping[str, Tensor]) -> TransferReport:
        """Copy everything; `state` is the file as it is."""
        plan = self.plan
        for key in plan.keys:
            old = plan.sources.get(key)
            if old is not None:
                self._take(key, plan.given[old])
            elif key.endswith(COUNTER):
                self.counters += 1
            elif key not in self.optional:
                self.missing.append(key)
        for module in self.model.modules():
            if isinstance(module, InputNorm):
                module.refresh()
        used = set(plan.sources.values())
        left = [key for key in state if key not in used and not key.endswith(COUNTER)]
        if any(match.tensors for _, match in plan.matches):
            left = [*classifier_keys(state)]  # of translated files nobody can tell more
        classifier = classifier_keys(left) if plan.backbone_only else ()
        notes = [match.note for _, match in plan.matches if match.note]
        if self.counters:
            notes.append(f"{self.counters} counters of BatchNorm are not in the file")
        return TransferReport(
            transferred=tuple(self.transferred),
            partial=tuple(self.partial),
            missing=tuple(self.missing),
            mismatched=tuple(self.mismatched),
            unused=tuple(key for key in left if key not in classifier),
            moved=plan.moved,
            parameters=(
                self.count,
                sum(self.target[key].numel() for key in {*plan.keys} - self.optional),
            ),
            adapted=tuple(self.adapted),
            classifier=classifier,
            classes=self.rows.summary() if self.by_name else "",
            notes=tuple(notes),
            backbone_only=plan.backbone_only,
        )

    @torch.no_grad()
    def _take(self, key: str, given: Tensor) -> None:
        """Copy one tensor, as it is or made to fit, or those of its rows that are known."""
        value, shapes = self.target[key], (tuple(given.shape), tuple(self.target[key].shape))
        if key in self.class_keys and not (self.rows.is_same and given.shape == value.shape):
            self._take_rows(key, value, given)
            return
        kind = "" if key in self.class_keys else kind_of_change(key, *shapes)
        made: Tensor | None = given
        if kind:
            owner = self.model.get_submodule(key.rpartition(".")[0])
            imgsz = self.model.imgsz if isinstance(self.model, Sized) else None
            made = made_to_fit(kind, given, value, owner, imgsz)
        if made is None or made.shape != value.shape:
            self.mismatched.append((key, *shapes))
            return
        if kind:
            self.adapted.append((key, told(kind, *shapes)))
        value.copy_(made)
        self.transferred.append(key)
        self.count += value.numel() if key not in self.optional else 0

    def _take_rows(self, key: str, value: Tensor, given: Tensor) -> None:
        anchors = self.model.head.num_anchors if isinstance(self.model, Detector) else 0
        copied = copy_class_rows(value, given, self.rows, anchors)
        is_known = self.rows.given is not None and given.shape[1:] == value.shape[1:]
        self.count += copied
        self.by_name |= is_known
        if copied:
            self.transferred.append(key)
            if copied < value.numel():
                self.partial.append(key)
        elif is_known:  # and not one class of the file is among the model's
            self.missing.append(key)
        else:
            self.mismatched.append((key, tuple(given.shape), tuple(value.shape)))


def _class_keys(model: nn.Module) -> frozenset[str]:
    """Keys of a detector's tensors that have a row a class."""
    if not isinstance(model, Detector):
        return frozenset()
    patterns = [f"model.{len(model.rows) - 1}.{pattern}" for pattern in model.head.class_outputs]
    return frozenset(k for k in model.state_dict() if any(fnmatchcase(k, p) for p in patterns))


def _optional_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Tensors that a model may have and older weights do not, by key."""
    return {
        f"{name}.{key}": tensor
        for name, module in model.named_modules()
        if isinstance(module, InputNorm)
        for key, tensor in module.named_buffers()
    }


def _shapes(state: Mapping[str, Tensor]) -> Shapes:
    return {key: tuple(value.shape) for key, value in state.items()}
