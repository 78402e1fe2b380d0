"""Work beside the main thread: order, errors, how far ahead."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import pytest

from utils.threads import InOrder, ahead


def test_items_made_ahead_come_in_order_and_not_too_early():
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(6):
            made.append(number)
            yield number

    found = ahead(items(), depth=2)
    assert next(found) == 0
    assert [*found] == [1, 2, 3, 4, 5] and made == [0, 1, 2, 3, 4, 5]
    made.clear()
    source = ahead(items(), depth=2)
    next(source)
    source.close()  # waits for those under way: the one in use, and two behind it
    assert made == [0, 1, 2]


def test_an_error_comes_where_its_item_would_have_come():
    def items() -> Iterator[int]:
        yield 1
        raise OSError("gone")

    found = ahead(items())
    assert next(found) == 1
    with pytest.raises(OSError, match="gone"):
        next(found)


def test_calls_are_made_in_order_in_another_thread():
    done: list[tuple[int, bool]] = []
    main = threading.current_thread()
    with InOrder(depth=2) as line:
        for number in range(9):
            line.call(lambda n: done.append((n, threading.current_thread() is main)), number)
    assert done == [(number, False) for number in range(9)]


@pytest.mark.parametrize("calls", [1, 9])
def test_an_error_of_a_call_is_raised_at_the_latest_at_the_end(calls: int):
    def fail() -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), InOrder(depth=2) as line:
        for _ in range(calls):
            line.call(fail)


def test_what_was_called_before_another_error_is_still_done():
    done: list[int] = []
    with pytest.raises(ValueError, match="other"), InOrder() as line:
        line.call(done.append, 1)
        line.call(done.append, 2)
        raise ValueError("other")
    assert done == [1, 2]


def test_threads_take_shorter_turns_within_the_block_alone():
    before = sys.getswitchinterval()
    with pytest.raises(ValueError), InOrder():
        assert sys.getswitchinterval() == pytest.approx(5e-4)
        raise ValueError
    assert sys.getswitchinterval() == before
