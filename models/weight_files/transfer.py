"""Giving a model the weights of another: by name, then by position, every shape checked.

Keys of a detector begin with the number of a row, `model.<row>.`, so one inserted or deleted layer
moves every key behind it. The rows of both sides are therefore aligned as two sequences: the
alignment that lets most tensors fit wins, and where two fit equally the one that keeps the numbers.
All other keys go by name.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from utils.errors import CheckpointError

ROW = re.compile(r"^model\.(\d+)\.(.+)$")
KEEPS_NUMBER = 1e-3  # over all rows still less than one tensor
SHIFTED_SHARE = 0.5
BOX_OUTPUTS = 5  # x, y, width, height, objectness
MAX_GROUPS = 6

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class TransferReport:
    """What became of a model's tensors.

    Attributes:
        transferred: keys of the model that got a tensor, some of them in part (`partial`).
        partial: keys of which only the rows that do not depend on the classes were taken.
        missing: keys of the model that the weights have no counterpart for.
        mismatched: (key of the model, shape in the weights, shape in the model).
        unused: keys of the weights that went nowhere.
        moved: row of the model -> row of the weights, where they differ.
        parameters: numbers transferred, and numbers the model has.
    """

    transferred: tuple[str, ...]
    partial: tuple[str, ...]
    missing: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    unused: tuple[str, ...]
    moved: Mapping[int, int] = field(default_factory=dict)
    parameters: tuple[int, int] = (0, 0)

    def summary(self) -> str:
        """The report in one line, and one more for each kind of tensor that was left out."""
        total = len(self.transferred) + len(self.missing) + len(self.mismatched)
        share = 100 * self.parameters[0] / max(self.parameters[1], 1)
        lines = [
            f"transferred {len(self.transferred)} of {total} tensors ({share:.1f}% of the numbers)"
        ]
        if self.moved:
            pairs = ", ".join(
                f"{old} to {new}" for new, old in list(self.moved.items())[:MAX_GROUPS]
            )
            more = (
                f" and {len(self.moved) - MAX_GROUPS} more" if len(self.moved) > MAX_GROUPS else ""
            )
            lines.append(f"rows by position: {pairs}{more}")
        if self.partial:
            lines.append(f"without class rows {len(self.partial)}: {_by_prefix(self.partial)}")
        if self.missing:
            lines.append(f"missing {len(self.missing)}: {_by_prefix(self.missing)}")
        if self.mismatched:
            key, got, expected = self.mismatched[0]
            first = f"first {key} {_cross(got)}, expected {_cross(expected)}"
            groups = _by_prefix(key for key, _, _ in self.mismatched)
            lines.append(f"mismatched {len(self.mismatched)}: {groups}; {first}")
        if self.unused:
            lines.append(f"unused {len(self.unused)}: {_by_prefix(self.unused)}")
        return "\n".join(lines)


def transfer(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    num_anchors: int | None = None,
    allow_empty: bool = False,
) -> TransferReport:
    """Copy into `model` every tensor of `state` that belongs there.

    Args:
        model: changed in place; its devices and types stay.
        state: weights, for instance of `read_weights`.
        num_anchors: anchors of a cell, if the head stacks (5 + classes) outputs for each: with
            another number of classes the first five of each are still taken.
        allow_empty: accept that nothing fits.

    Raises:
        CheckpointError: not one tensor fits, and `allow_empty` is not set.
    """
    target = model.state_dict()
    sources, moved = match_keys(_shapes(state), _shapes(target))
    transferred, partial, missing, mismatched, used, count = [], [], [], [], set(), 0
    for key, value in target.items():
        source = sources.get(key)
        given = state[source] if source is not None else None
        if given is None or source is None:
            missing.append(key)
            continue
        used.add(source)
        copied = _copy(value, given, num_anchors)
        count += copied
        if not copied and given.shape != value.shape:
            mismatched.append((key, tuple(given.shape), tuple(value.shape)))
            continue
        transferred.append(key)
        if given.shape != value.shape:
            partial.append(key)
    unused = tuple(key for key in state if key not in used)
    total = sum(value.numel() for value in target.values())
    report = TransferReport(
        tuple(transferred),
        tuple(partial),
        tuple(missing),
        tuple(mismatched),
        unused,
        moved,
        (count, total),
    )
    if count == 0 and not allow_empty:
        raise CheckpointError(
            f"weights: none of {len(state)} tensors fits the model - got {_example(state)}, "
            f"expected {_example(target)}. Give the weights of the same family and size, or none."
        )
    return report


def match_keys(source: Shapes, target: Shapes) -> tuple[dict[str, str], dict[int, int]]:
    """Which tensors belong together: (key of `target` -> key of `source`, the same for moved rows).

    Shapes of counterparts may still differ where their names say that they are the same tensor.
    """
    source_rows, target_rows = _rows(source), _rows(target)
    rows = dict(align(source_rows, target_rows))
    pairs = {key: key for key in target if key in source and not ROW.match(key)}
    for new, old in rows.items():
        for key in target_rows[new]:
            if key in source_rows[old]:
                pairs[f"model.{new}.{key}"] = f"model.{old}.{key}"
    return pairs, {new: old for new, old in sorted(rows.items()) if new != old}


def align(source: Mapping[int, Shapes], target: Mapping[int, Shapes]) -> list[tuple[int, int]]:
    """Pairs (row of `target`, row of `source`), both rising, that let most tensors fit.

    The classic alignment of two sequences by dynamic programming (Needleman and Wunsch, 1970), gaps
    free.
    """
    old_rows, new_rows = sorted(source), sorted(target)
    best = [[0.0] * (len(old_rows) + 1) for _ in range(len(new_rows) + 1)]
    score = [[_similarity(n, target[n], o, source[o]) for o in old_rows] for n in new_rows]
    for i in range(1, len(new_rows) + 1):
        for j in range(1, len(old_rows) + 1):
            paired = best[i - 1][j - 1] + score[i - 1][j - 1] if score[i - 1][j - 1] else 0.0
            best[i][j] = max(best[i - 1][j], best[i][j - 1], paired)
    pairs = []
    i, j = len(new_rows), len(old_rows)
    while i and j:
        if score[i - 1][j - 1] and best[i][j] == best[i - 1][j - 1] + score[i - 1][j - 1]:
            i, j = i - 1, j - 1
            pairs.append((new_rows[i], old_rows[j]))
        elif best[i][j] == best[i - 1][j]:
            i -= 1
        else:
            j -= 1
    return pairs[::-1]


def _similarity(new: int, target: Shapes, old: int, source: Shapes) -> float:
    """How many tensors of two rows fit; under another number most of them must."""
    fitting = sum(source.get(key) == shape for key, shape in target.items() if shape)
    if new == old:
        return fitting + KEEPS_NUMBER if fitting else 0.0
    counted = max(sum(map(bool, target.values())), sum(map(bool, source.values())))
    return float(fitting) if fitting > SHIFTED_SHARE * counted else 0.0


def _copy(target: Tensor, given: Tensor, num_anchors: int | None) -> int:
    """Copy `given`, or its box outputs if only the classes differ; return how many numbers."""
    with torch.no_grad():
        if given.shape == target.shape:
            target.copy_(given)
            return target.numel()
        if num_anchors and given.shape[1:] == target.shape[1:] and given.dim() in (1, 4):
            outputs = [divmod(tensor.shape[0], num_anchors) for tensor in (given, target)]
            if all(rest == 0 and each > BOX_OUTPUTS for each, rest in outputs):
                boxes = target.unflatten(0, (num_anchors, -1))[:, :BOX_OUTPUTS]
                boxes.copy_(given.unflatten(0, (num_anchors, -1))[:, :BOX_OUTPUTS])
                return boxes.numel()
    return 0


def _rows(shapes: Shapes) -> dict[int, Shapes]:
    """Shapes by row and key within the row."""
    rows: dict[int, Shapes] = {}
    for key, shape in shapes.items():
        match = ROW.match(key)
        if match:
            rows.setdefault(int(match[1]), {})[match[2]] = shape
    return rows


def _shapes(state: Mapping[str, Tensor]) -> Shapes:
    return {key: tuple(value.shape) for key, value in state.items()}


def _by_prefix(keys: Iterable[str]) -> str:
    """`model.24 (6), model.9 (12)`: how many of `keys` begin with what."""
    counts = Counter(".".join(key.split(".")[:2]) for key in keys)
    shown = [f"{prefix} ({count})" for prefix, count in list(counts.items())[:MAX_GROUPS]]
    rest = len(counts) - MAX_GROUPS
    return ", ".join(shown) + (f" and {rest} more places" if rest > 0 else "")


def _cross(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "one number"


def _example(state: Mapping[str, Tensor]) -> str:
    """A key with its shape, for an error."""
    large = max(state.items(), key=lambda item: math.prod(item[1].shape), default=None)
    return f"{large[0]} {_cross(tuple(large[1].shape))}" if large else "nothing"
