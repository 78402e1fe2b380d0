"""A training that is told to stop: a scheduler's SIGTERM, Ctrl-C, a terminal that is closed."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TypeVar

from utils.errors import StoppedError

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))
SAME_SIGNAL = 1.0  # seconds; a launcher passes on what the terminal has sent already
ANSWER = b"\nstopping: the step is finished and last.pt written; the same once more stops at once\n"


def name_of(number: int) -> str:
    """`SIGTERM` of 15."""
    return signal.Signals(number).name


class StopRequest:
    """Remembers the signal that asks for an end, so that the training ends between two steps.

    Attributes:
        number: of the signal that this process got, None as long as there was none.
        is_agreed: whether some process got one, as all of them know.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.is_agreed = False
        self._since = 0.0
        self._before: dict[int, object] = {}

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals for the length of a `with` block, those apart that the process ignores (`nohup`)."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may
            return
        taken = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._take) for number in taken}
        try:
            yield
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)  # type: ignore[arg-type]

    def _take(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.number is None:
            self.number, self._since = number, now
            with contextlib.suppress(OSError):
                os.write(2, ANSWER)  # print is not allowed here: it may be what was interrupted
        elif now - self._since > SAME_SIGNAL:
            signal.signal(number, self._before[number])  # type: ignore[arg-type]
            signal.raise_signal(number)

    def until(self, items: Iterable[T], told: str = "") -> Iterator[T]:
        """The items up to the moment when a signal has come.

        Args:
            items: what is gone through.
            told: how to go on; empty ends without an error.

        Raises:
            StoppedError: a signal has come.
        """
        for item in items:
            if self.number is not None:
                break
            yield item
        if self.number is not None and told:
            raise StoppedError(self.number, f"stopped by {name_of(self.number)}; {told}")
