"""Work beside the main thread that stays in order and whose errors are not lost."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
SHORT_TURN = 5e-4
"""Seconds that a thread may keep the interpreter while another one waits, instead of Python's 5e-3: a network asks for it
after each of its layers, so that the other threads' turns add up to a twentieth of its time."""


def ahead(items: Iterator[T], depth: int = 2) -> Iterator[T]:
    """The same items, each made in a thread while earlier ones are in use.

    Args:
        items: an error of theirs is raised where the item would have come.
        depth: how many are made before they are asked for.
    """
    end = object()
    with ThreadPoolExecutor(1, "ahead") as pool:
        waiting = deque(pool.submit(next, items, end) for _ in range(depth))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, items, end))
            yield item  # type: ignore[misc]


class InOrder:
    """Calls in a thread of their own, one after the other, a few of them waiting at most.

    An error of a call is raised by a later one, or at the end of the `with` block; what was called before the block was
    left by another error is still done. Within the block threads take shorter turns.
    """

    def __init__(self, depth: int = 4) -> None:
        self.pool, self.depth = ThreadPoolExecutor(1, "in-order"), depth
        self.waiting: deque[Future[None]] = deque()
        self.turn_before = sys.getswitchinterval()

    def __enter__(self) -> InOrder:
        sys.setswitchinterval(min(SHORT_TURN, self.turn_before))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.pool.shutdown()
        sys.setswitchinterval(self.turn_before)
        if kind is None:
            for call in self.waiting:
                call.result()

    def call(self, function: Callable[..., None], *arguments: object) -> None:
        """Call `function` as soon as those before are done."""
        if len(self.waiting) == self.depth:
            self.waiting.popleft().result()
        self.waiting.append(self.pool.submit(function, *arguments))
