"""Which tensors of two networks belong together: rows as sequences, backbones by the ends of names.

Keys of a detector begin with the number of a row, `model.<row>.`, so one inserted or deleted layer moves every key behind
it. The rows of both sides are therefore aligned as two sequences: the alignment that lets most tensors fit wins, and where
two fit equally the one that keeps the numbers. All other keys go by name.

A file of a backbone writes `layer1.0.conv1.weight` with anything in front (`backbone.`, `module.encoder.`, `model.0.`), and
a model may keep it under a prefix of its own (`net.`). One pair of prefixes holds for all tensors: every tensor votes for
the pair that its longest common suffix leaves over, so that `layer1` never takes the tensors of `layer2`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher
from itertools import islice
from typing import NamedTuple

from models.weights.fitting import Shape, fits

Shapes = dict[str, Shape]
Words = tuple[str, ...]

ROW = re.compile(r"^model\.(\d+)\.(.+)$")
KEEPS_NUMBER = 1e-3  # over all rows still less than one tensor
SHIFTED_SHARE = 0.5
CANDIDATES = 16  # pairs of prefixes that are tried, those with most votes
VOTERS = 256  # tensors of a model that vote; all of them know the same prefixes
MOST_ALIKE = 4096  # tensors of a file with one end and shape; no network has more
AVERAGED = {"ema", "teacher", "averaged"}  # of two copies of a network the one that is averaged


def match_keys(source: Shapes, target: Shapes) -> tuple[dict[str, str], dict[int, int]]:
    """Which tensors belong together: (key of `target` -> key of `source`, the same for moved rows).

    Shapes of counterparts may still differ where their names say that they are the same tensor.
    """
    old_rows, new_rows = _rows(source), _rows(target)
    rows = dict(align(old_rows, new_rows))
    old, new = max(old_rows, default=-1), max(new_rows, default=-1)
    if new not in rows and old not in rows.values() and old_rows and new_rows:
        # Two last rows of the same names are one head, also where other classes leave few tensors of equal shape.
        rows |= {new: old} if set(old_rows[old]) == set(new_rows[new]) else {}
    pairs = {key: key for key in target if key in source and not ROW.match(key)}
    for new, old in rows.items():
        for key in new_rows[new]:
            if key in old_rows[old]:
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


def _rows(shapes: Shapes) -> dict[int, Shapes]:
    """Shapes by row and key within the row."""
    rows: dict[int, Shapes] = {}
    for key, shape in shapes.items():
        if match := ROW.match(key):
            rows.setdefault(int(match[1]), {})[match[2]] = shape
    return rows


class SuffixMatch(NamedTuple):
    """Which tensors belong together.

    Attributes:
        pairs: key of the model -> key of the file; their shapes may still differ.
        prefix: what the file has in front of the common names.
        own_prefix: what the model has in front of them.
        fitting: keys of the model whose shapes fit too.
    """

    pairs: dict[str, str]
    prefix: Words
    own_prefix: Words
    fitting: frozenset[str]


def words(key: str) -> Words:
    """The parts of a name; a dot and an underscore part alike, since `stages.0` is also written `stages_0`."""
    return tuple(key.replace("_", ".").split("."))


def match_suffixes(source: Shapes, target: Shapes) -> SuffixMatch:
    """The pair of prefixes under which most tensors of `target` have a fitting one in `source`.

    Args:
        source: shapes of a file by key.
        target: shapes of a model by key.
    """
    table: dict[Words, list[str]] = {}
    for key in source:
        table.setdefault(words(key), []).append(key)
    best = SuffixMatch({}, (), (), frozenset())
    best_rank = (0, False, 0)
    for own_prefix, prefix in _candidates(source, target):
        pairs = {}
        for key in target:
            own = words(key)
            is_under = own[: len(own_prefix)] == own_prefix
            written = table.get(prefix + own[len(own_prefix) :]) if is_under else None
            if written:
                pairs[key] = next((k for k in written if k.endswith(key)), written[0])
        fitting = frozenset(k for k, given in pairs.items() if fits(k, source[given], target[k]))
        rank = (len(fitting), not AVERAGED.isdisjoint(prefix), -len(prefix))
        if rank > best_rank:
            best, best_rank = SuffixMatch(pairs, prefix, own_prefix, fitting), rank
    return best


def _candidates(source: Shapes, target: Shapes) -> list[tuple[Words, Words]]:
    """Pairs (prefix of the model, prefix of the file) with most votes; a vote is a tensor of equal shape."""
    by_end: dict[tuple[str, Shape], list[Words]] = {}
    for key, shape in source.items():
        parts = words(key)
        alike = by_end.setdefault((parts[-1], shape), [])
        if len(alike) < MOST_ALIKE:
            alike.append(parts)
    votes: Counter[tuple[Words, Words]] = Counter()
    for key, shape in [*target.items()][:: -(-len(target) // VOTERS) or 1]:
        own = words(key)
        for parts in by_end.get((own[-1], shape), ()):
            common = _common(own, parts)
            votes[own[: len(own) - common], parts[: len(parts) - common]] += 1
    return [pair for pair, _ in votes.most_common(CANDIDATES)]


def _common(one: Words, other: Words) -> int:
    """How many words both end in."""
    pairs = enumerate(zip(reversed(one), reversed(other)))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def nearest_key(key: str, keys: Iterable[str]) -> str:
    """The one of `keys` that reads most like `key`, told by common ends first."""
    own = words(key)

    def likeness(other: str) -> tuple[int, float]:
        return _common(own, words(other)), SequenceMatcher(None, key, other).ratio()

    return max(islice(keys, MOST_ALIKE), key=likeness)
