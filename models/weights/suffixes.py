"""Tensors of one network under other prefixes: matched by the longest common suffix of their names.

A file of a backbone writes `layer1.0.conv1.weight` with anything in front (`backbone.`, `module.encoder.`, `model.0.`), and
a model may keep it under a prefix of its own (`net.`). One pair of prefixes holds for all tensors: every tensor votes for
the pair that its longest common suffix leaves over, so that `layer1` never takes the tensors of `layer2`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from difflib import SequenceMatcher
from itertools import islice
from typing import NamedTuple

Shape = tuple[int, ...]
Shapes = dict[str, Shape]
Words = tuple[str, ...]
Fits = Callable[[str, Shape, Shape], bool]

CANDIDATES = 16  # pairs of prefixes that are tried, those with most votes
VOTERS = 256  # tensors of a model that vote; all of them know the same prefixes
MOST_ALIKE = 4096  # tensors of a file with one end and shape; no network has more
AVERAGED = {"ema", "teacher", "averaged"}  # of two copies of a network the one that is averaged


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


NOTHING = SuffixMatch({}, (), (), frozenset())


def words(key: str) -> Words:
    """The parts of a name; a dot and an underscore part alike, since `stages.0` is also written `stages_0`."""
    return tuple(key.replace("_", ".").split("."))


def match_suffixes(source: Shapes, target: Shapes, fits: Fits) -> SuffixMatch:
    """The pair of prefixes under which most tensors of `target` have a fitting one in `source`.

    Args:
        source: shapes of a file by key.
        target: shapes of a model by key.
        fits: whether a tensor of the model (its key) takes one of this shape for one of that.
    """
    table: dict[Words, list[str]] = {}
    for key in source:
        table.setdefault(words(key), []).append(key)
    own = {key: words(key) for key in target}
    best, best_rank = NOTHING, (0, False, 0)
    for own_prefix, prefix in _candidates(source, target):
        match = _under(prefix, own_prefix, own, table, source, target, fits)
        rank = (len(match.fitting), not AVERAGED.isdisjoint(prefix), -len(prefix))
        if rank > best_rank:
            best, best_rank = match, rank
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
    count = 0
    for a, b in zip(reversed(one), reversed(other)):
        if a != b:
            break
        count += 1
    return count


def _under(
    prefix: Words,
    own_prefix: Words,
    own: dict[str, Words],
    table: dict[Words, list[str]],
    source: Shapes,
    target: Shapes,
    fits: Fits,
) -> SuffixMatch:
    """What belongs together under one pair of prefixes."""
    pairs, fitting = {}, set()
    depth = len(own_prefix)
    for key, parts in own.items():
        written = table.get(prefix + parts[depth:]) if parts[:depth] == own_prefix else None
        if not written:
            continue
        pairs[key] = next((k for k in written if k.endswith(key)), written[0])
        if fits(key, source[pairs[key]], target[key]):
            fitting.add(key)
    return SuffixMatch(pairs, prefix, own_prefix, frozenset(fitting))


def nearest_key(key: str, keys: Iterable[str]) -> str:
    """The one of `keys` that reads most like `key`, told by common ends first."""
    own = words(key)

    def likeness(other: str) -> tuple[int, float]:
        return _common(own, words(other)), SequenceMatcher(None, key, other).ratio()

    return max(islice(keys, MOST_ALIKE), key=likeness)
