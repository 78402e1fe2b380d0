"""Tensors in nested lists, tuples and mappings, such as a network's outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


def tensors_in(tree: object) -> Iterator[Tensor]:
    """The tensors of `tree`, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple, Mapping)):
        for part in tree.values() if isinstance(tree, Mapping) else tree:
            yield from tensors_in(part)


def map_tensors(change: Callable[[Tensor], Tensor], tree: T) -> T:
    """`tree` with every tensor changed; a mapping becomes a dict, named tuples and lists stay what they are."""
    changed: Any = tree
    if isinstance(tree, Tensor):
        changed = change(tree)
    elif isinstance(tree, Mapping):
        changed = {key: map_tensors(change, part) for key, part in tree.items()}
    elif isinstance(tree, (list, tuple)):
        parts = [map_tensors(change, part) for part in tree]
        changed = type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return changed
