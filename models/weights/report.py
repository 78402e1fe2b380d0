"""What became of a model's tensors when weights were given to it, as data and in words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

MAX_GROUPS = 6


@dataclass(frozen=True)
class TransferReport:
    """What became of a model's tensors.

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
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
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
            lines.append(f"without class rows {len(self.partial)}: {by_prefix(self.partial)}")
        if self.classifier:
            counts = Counter(key.rpartition(".")[0] for key in self.classifier)
            told = (f"{name} ({count})" for name, count in counts.items())
            lines.append(f"classifier left out: {_listed(told)}")
        if self.missing:
            lines.append(f"missing {len(self.missing)}: {by_prefix(self.missing)}")
        if self.mismatched:
            key, got, expected = self.mismatched[0]
            first = f"first {key} {cross(got)}, expected {cross(expected)}"
            groups = by_prefix(key for key, _, _ in self.mismatched)
            lines.append(f"mismatched {len(self.mismatched)}: {groups}; {first}")
        if self.unused:
            lines.append(f"unused {len(self.unused)}: {by_prefix(self.unused)}")
        return "\n".join(lines)


def _adapted(changes: Iterable[tuple[str, str]]) -> str:
    """`first convolution summed from 3 to 1 channels (model.0.net.conv1.weight), ...`, equal ones once."""
    keys: dict[str, list[str]] = {}
    for key, how in changes:
        keys.setdefault(how, []).append(key)
    told = (f"{how} ({k[0] if len(k) == 1 else len(k)})" for how, k in keys.items())
    return f"made to fit: {_listed(told)}"


def _listed(items: Iterable[str]) -> str:
    """The first of them, and how many more there are."""
    every = list(items)
    rest = len(every) - MAX_GROUPS
    return ", ".join(every[:MAX_GROUPS]) + (f" and {rest} more" if rest > 0 else "")


def by_prefix(keys: Iterable[str]) -> str:
    """`model.24 (6), neck (12)`: how many of `keys` begin with what, rows of a detector one by one."""
    counts = Counter(
        ".".join(key.split(".")[: 2 if key.startswith("model.") else 1]) for key in keys
    )
    shown = [f"{prefix} ({count})" for prefix, count in list(counts.items())[:MAX_GROUPS]]
    rest = len(counts) - MAX_GROUPS
    return ", ".join(shown) + (f" and {rest} more places" if rest > 0 else "")


def cross(shape: tuple[int, ...]) -> str:
    """`64x3x7x7`."""
    return "x".join(map(str, shape)) or "one number"


def example(state: Mapping[str, Tensor]) -> str:
    """A key with its shape, for an error."""
    large = max(state.items(), key=lambda item: math.prod(item[1].shape), default=None)
    return f"{large[0]} {cross(tuple(large[1].shape))}" if large else "nothing"
