"""Which rows of two detectors belong together.

Keys of a detector begin with the number of a row, `model.<row>.`, so one inserted or deleted layer moves every key behind
it. The rows of both sides are therefore aligned as two sequences: the alignment that lets most tensors fit wins, and where
two fit equally the one that keeps the numbers. All other keys go by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from models.weights.suffixes import Shapes

ROW = re.compile(r"^model\.(\d+)\.(.+)$")
KEEPS_NUMBER = 1e-3  # over all rows still less than one tensor
SHIFTED_SHARE = 0.5


def match_keys(source: Shapes, target: Shapes) -> tuple[dict[str, str], dict[int, int]]:
    """Which tensors belong together: (key of `target` -> key of `source`, the same for moved rows).

    Shapes of counterparts may still differ where their names say that they are the same tensor.
    """
    source_rows, target_rows = _rows(source), _rows(target)
    rows = dict(align(source_rows, target_rows))
    _pair_heads(rows, source_rows, target_rows)
    pairs = {key: key for key in target if key in source and not ROW.match(key)}
    for new, old in rows.items():
        for key in target_rows[new]:
            if key in source_rows[old]:
                pairs[f"model.{new}.{key}"] = f"model.{old}.{key}"
    return pairs, {new: old for new, old in sorted(rows.items()) if new != old}


def _pair_heads(
    rows: dict[int, int], source: Mapping[int, Shapes], target: Mapping[int, Shapes]
) -> None:
    """Two last rows of the same names are one head, also where other classes leave few tensors of equal shape."""
    if not source or not target:
        return
    old, new = max(source), max(target)
    if new not in rows and old not in rows.values() and set(source[old]) == set(target[new]):
        rows[new] = old


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


def _rows(shapes: Shapes) -> dict[int, Shapes]:
    """Shapes by row and key within the row."""
    rows: dict[int, Shapes] = {}
    for key, shape in shapes.items():
        match = ROW.match(key)
        if match:
            rows.setdefault(int(match[1]), {})[match[2]] = shape
    return rows
