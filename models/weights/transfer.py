"""Giving a model the weights of another: rows by number or position, backbones by name under any prefix.

A detector's file goes row by row (`alignment`). What it does not have for a backbone, or all of it where the file is one of a
backbone alone, goes by the suffixes of names (`suffixes`). Every shape is checked; some that differ are made to fit
(`fitting`), and class rows move by the classes' names (`classes`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.weights.alignment import ROW, align, match_keys
from models.weights.backbones import (
    Part,
    PartMatch,
    backbone_parts,
    by_rows,
    classifier_keys,
    is_enough,
    match_part,
    too_few,
)
from models.weights.classes import ClassRows, class_keys, copy_class_rows, match_classes
from models.weights.fitting import kind_of_change, made_to_fit, told
from models.weights.report import TransferReport, example
from models.weights.suffixes import Shapes
from utils.errors import CheckpointError

__all__ = ["ROW", "TransferReport", "align", "match_keys", "transfer"]

COUNTER = "num_batches_tracked"


class _Plan(NamedTuple):
    """What goes where.

    Attributes:
        sources: key of the model -> key in `given`.
        given: tensors of the file, and those that were made of them.
        moved: rows that go by position.
        keys: keys of the model that are looked for.
        matches: what each backbone gets.
        outside: whether the file has something for the rest of the model.
        backbone_only: the rest of the model keeps its own weights.
    """

    sources: dict[str, str]
    given: Mapping[str, Tensor]
    moved: dict[int, int]
    keys: Sequence[str]
    matches: list[tuple[Part, PartMatch]]
    outside: bool
    backbone_only: bool


def transfer(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    num_anchors: int | None = None,
    allow_empty: bool = False,
    names: tuple[Sequence[str] | None, Sequence[str]] | None = None,
    only_backbone: bool = False,
    source: str = "weights",
) -> TransferReport:
    """Copy into `model` every tensor of `state` that belongs there.

    Args:
        model: changed in place; its devices and types stay.
        state: weights, for instance of `read_weights`.
        num_anchors: anchors of a cell, if the head stacks (5 + classes) outputs for each: with
            another number of classes the first five of each are still taken.
        allow_empty: accept that nothing fits.
        names: class names of the file and of the model, by which class rows move; None takes the rows as they stand.
        only_backbone: leave the rest of the model as it is; a network without rows is a backbone itself.
        source: what errors call the weights.

    Raises:
        CheckpointError: not one tensor fits, or less than half of a backbone's where the file has nothing else;
            not where `allow_empty` is set.
    """
    target = {**model.state_dict(), **dict(_optional_tensors(model))}
    plan = _plan(model, target, state, only_backbone)
    if not allow_empty:
        _require_enough(plan, target, state, source, only_backbone)
    rows = match_classes(*names) if names else match_classes(None, ())
    report = _Copier(model, target, plan, rows, num_anchors).run(state)
    if report.parameters[0] == 0 and not allow_empty:
        raise CheckpointError(_nothing_fits(state, target, source))
    return replace(report, notes=(*report.notes, *_tell_backbones(plan)))


def _tell_backbones(plan: _Plan) -> Iterator[str]:
    """Let backbones know that they got weights of a bare backbone; what they make of it, in words."""
    for part, match in plan.matches:
        arrived = getattr(part.module, "on_pretrained", None)
        if arrived is not None and match.is_bare and is_enough(part, match):
            note = arrived()
            if note:
                yield str(note)


def _plan(
    model: nn.Module, target: Mapping[str, Tensor], state: Mapping[str, Tensor], only_backbone: bool
) -> _Plan:
    """Rows go by alignment; a backbone that gets more by the suffixes of its names goes by those."""
    given, wanted = _shapes(state), _shapes(target)
    sources, moved = match_keys(given, wanted)
    if only_backbone:
        sources = _of_backbone(model, sources)
    parts = backbone_parts(model, target, is_backbone=only_backbone)
    matches = [(part, _match(part, sources, state, given, wanted)) for part in parts]
    made: dict[str, Tensor] = {}
    for part, match in matches:
        if is_enough(part, match):
            sources = {k: v for k, v in sources.items() if k not in part.keys} | match.sources
            made |= match.tensors
    inside = {key for part in parts for key in part.keys}
    outside = any(key not in inside and given.get(sources[key]) == wanted[key] for key in sources)
    used = [(part, match) for part, match in matches if is_enough(part, match)]
    backbone_only = only_backbone or not outside and any(match.is_bare for _, match in used)
    keys: Sequence[str] = list(target)
    if backbone_only:
        counted = frozenset().union(*(part.counted for part, _ in used or matches))
        keys = [key for key in target if key in sources or key in counted]
    return _Plan(
        sources, {**state, **made}, _still_moved(moved, sources), keys, matches, outside, backbone_only
    )  # fmt: skip


def _match(
    part: Part,
    sources: Mapping[str, str],
    state: Mapping[str, Tensor],
    given: Shapes,
    wanted: Shapes,
) -> PartMatch:
    """What a backbone gets: by rows, or by suffixes where that is more."""
    aligned = by_rows(part, sources, given, wanted)
    if len(aligned.fitting) == len(part.counted):
        return aligned
    found = match_part(part, state, given, wanted)
    return found if len(found.fitting) > len(aligned.fitting) else aligned


def _of_backbone(model: nn.Module, sources: Mapping[str, str]) -> dict[str, str]:
    """The pairs of a detector's backbone section; all of them for a network without rows."""
    rows: Sequence[Any] = getattr(model, "rows", ())
    kept = tuple(f"model.{n}." for n, row in enumerate(rows) if row.section == "backbone")
    return {key: old for key, old in sources.items() if not rows or key.startswith(kept)}


def _still_moved(moved: Mapping[int, int], sources: Mapping[str, str]) -> dict[int, int]:
    """The rows of `moved` that nothing else has replaced since."""
    pairs = {
        (int(new[1]), int(old[1]))
        for key, source in sources.items()
        if (new := ROW.match(key)) and (old := ROW.match(source))
    }
    return {new: old for new, old in moved.items() if (new, old) in pairs}


def _require_enough(
    plan: _Plan,
    target: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    source: str,
    only_backbone: bool,
) -> None:
    """Refuse weights of another backbone: some names and shapes are alike everywhere."""
    enough = any(is_enough(part, match) for part, match in plan.matches)
    if enough or plan.outside or not plan.matches or not state:
        return
    part, best = max(plan.matches, key=lambda item: len(item[1].fitting))
    by_suffix = best.is_bare or only_backbone
    if by_suffix and (best.fitting or only_backbone):
        raise CheckpointError(f"{source}: {too_few(part, best, _shapes(state), _shapes(target))}")


def _nothing_fits(state: Mapping[str, Tensor], target: Mapping[str, Tensor], source: str) -> str:
    return (
        f"{source}: none of {len(state)} tensors fits the model - got {example(state)}, expected {example(target)}. Give "
        "the weights of the same family and size, or none."
    )


class _Copier:
    """Copies what a plan says, and keeps account.

    Attributes:
        optional: keys of the model that older weights do not have; their absence changes nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        target: Mapping[str, Tensor],
        plan: _Plan,
        rows: ClassRows,
        num_anchors: int | None,
    ) -> None:
        self.model, self.target, self.plan = model, target, plan
        self.rows, self.num_anchors = rows, num_anchors
        self.class_keys = class_keys(model, plan.keys)
        self.optional = {key for key, _ in _optional_tensors(model)}
        self.transferred: list[str] = []
        self.partial: list[str] = []
        self.missing: list[str] = []
        self.mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
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
            refresh = getattr(module, "refresh", None)
            if getattr(module, "is_optional", False) and callable(refresh):
                refresh()
        left = self._left(state)
        classifier = classifier_keys(left) if plan.backbone_only else ()
        total = sum(self.target[key].numel() for key in set(plan.keys) - self.optional)
        return TransferReport(
            tuple(self.transferred), tuple(self.partial), tuple(self.missing), tuple(self.mismatched),
            tuple(key for key in left if key not in classifier), plan.moved, (self.count, total),
            tuple(self.adapted), classifier, self.rows.summary() if self.by_name else "",
            self._notes(), plan.backbone_only,
        )  # fmt: skip

    def _notes(self) -> tuple[str, ...]:
        notes = [match.note for _, match in self.plan.matches if match.note]
        if self.counters:
            notes.append(f"{self.counters} counters of BatchNorm are not in the file")
        return tuple(notes)

    def _left(self, state: Mapping[str, Tensor]) -> list[str]:
        """Keys of the file that went nowhere; where a module translated them nobody can tell but for the classifier."""
        used = set(self.plan.sources.values())
        if any(match.tensors for _, match in self.plan.matches):
            return list(classifier_keys(state))
        return [key for key in state if key not in used and not key.endswith(COUNTER)]

    @torch.no_grad()
    def _take(self, key: str, given: Tensor) -> None:
        """Copy one tensor, as it is or made to fit, or those of its rows that are known."""
        value = self.target[key]
        kind = "" if key in self.class_keys else kind_of_change(key, given.shape, value.shape)
        if key in self.class_keys and not (self.rows.is_same and given.shape == value.shape):
            self._take_rows(key, value, given)
            return
        made = self._made(kind, key, given) if kind else given
        if made is None or made.shape != value.shape:
            self.mismatched.append((key, tuple(given.shape), tuple(value.shape)))
            return
        if kind:
            self.adapted.append((key, told(kind, tuple(given.shape), tuple(value.shape))))
        value.copy_(made)
        self.transferred.append(key)
        self.count += value.numel() if key not in self.optional else 0

    def _take_rows(self, key: str, value: Tensor, given: Tensor) -> None:
        copied = copy_class_rows(value, given, self.rows, self.num_anchors)
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

    def _made(self, kind: str, key: str, given: Tensor) -> Tensor | None:
        owner = self.model.get_submodule(key.rpartition(".")[0])
        imgsz: Any = getattr(self.model, "imgsz", None)
        return made_to_fit(kind, given, self.target[key], owner, imgsz)


def _optional_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that a model may have and older weights do not, by key."""
    for name, module in model.named_modules():
        if getattr(module, "is_optional", False):
            yield from ((f"{name}.{key}", tensor) for key, tensor in module.named_buffers())


def _shapes(state: Mapping[str, Tensor]) -> Shapes:
    return {key: tuple(value.shape) for key, value in state.items()}
