"""Rows of a head's outputs that belong to classes: they move by the classes' names.

A head says which of its tensors have a row a class (`class_outputs`, patterns of keys within the head). An anchor head stacks
(5 + C) rows for each anchor of a cell: the first five are the box's.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor

BOX_OUTPUTS = 5  # x, y, width, height, objectness


class ClassRows(NamedTuple):
    """Which rows go where.

    Attributes:
        given: how many classes the file has; None where its names are not known.
        wanted: how many the model has.
        moves: (row of the model, row of the file) of the classes that both know.
        names: names of these, as the model writes them.
        is_same: both have the same classes in the same order.
    """

    given: int | None
    wanted: int
    moves: tuple[tuple[int, int], ...]
    names: tuple[str, ...]
    is_same: bool

    def summary(self) -> str:
        """`person, car (2 of 5)`."""
        shown = ", ".join(self.names[:6]) + (", ..." if len(self.names) > 6 else "")
        return f"{shown or 'none known'} ({len(self.names)} of {self.wanted})"


def match_classes(given: Sequence[str] | None, wanted: Sequence[str]) -> ClassRows:
    """Classes that both lists know; capitals, spaces, dashes and underscores make no difference.

    Names such as `class0`, which stand in for names that nobody gave, count as unknown lists.
    """
    known = given is not None and not (_are_placeholders(given) or _are_placeholders(wanted))
    if given is None or not known:
        return ClassRows(None, len(wanted), (), (), True)
    rows: dict[str, int] = {}
    for row, name in enumerate(given):
        rows.setdefault(plain_name(name), row)
    moves = tuple(
        (row, rows[plain_name(name)]) for row, name in enumerate(wanted) if plain_name(name) in rows
    )
    is_same = len(given) == len(wanted) == len(moves) and all(a == b for a, b in moves)
    return ClassRows(
        len(given), len(wanted), moves, tuple(wanted[row] for row, _ in moves), is_same
    )


def plain_name(name: str) -> str:
    """`Traffic_light` -> `trafficlight`."""
    return "".join(c for c in name.casefold() if c not in " _-")


def _are_placeholders(names: Sequence[str]) -> bool:
    return all(name == f"class{row}" for row, name in enumerate(names))


def class_keys(model: Any, keys: Sequence[str]) -> frozenset[str]:
    """Keys of a detector's tensors that have a row a class."""
    rows: Any = getattr(model, "rows", ())
    patterns: Sequence[str] = getattr(getattr(model, "head", None), "class_outputs", ())
    prefix = f"model.{len(rows) - 1}."
    return frozenset(
        key
        for key in keys
        if key.startswith(prefix) and any(fnmatchcase(key[len(prefix) :], p) for p in patterns)
    )


@torch.no_grad()
def copy_class_rows(target: Tensor, given: Tensor, rows: ClassRows, num_anchors: int | None) -> int:
    """Copy what belongs to boxes and to classes that both know; how many numbers, 0 where the shapes forbid it.

    Args:
        target: (K * (5 + C), ...) of an anchor head with K anchors, else (C, ...).
        given: the same with the file's classes; one row more, for "no object", is left out.
        rows: which classes both know; where the file's are not known the box rows alone are taken.
        num_anchors: K.
    """
    boxes = BOX_OUTPUTS if num_anchors else 0
    split = [
        t.unflatten(0, (num_anchors or 1, -1)) for t in (target, given) if _splits(t, num_anchors)
    ]
    if len(split) != 2 or target.shape[1:] != given.shape[1:]:
        return 0
    new, old = split
    classes = old.shape[1] - boxes
    if new.shape[1] - boxes < 1 or classes < 1:
        return 0
    new[:, :boxes] = old[:, :boxes].to(new)
    copied = new[:, :boxes].numel()
    if rows.given is None or classes not in (rows.given, rows.given + 1):
        return copied
    for to, come_from in rows.moves:
        new[:, boxes + to] = old[:, boxes + come_from].to(new)
        copied += new[:, to].numel()
    return copied


def _splits(tensor: Tensor, num_anchors: int | None) -> bool:
    return tensor.ndim > 0 and tensor.shape[0] > 0 and tensor.shape[0] % (num_anchors or 1) == 0
