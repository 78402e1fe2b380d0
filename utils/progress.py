"""A progress bar that tells losses, instances, image size, memory and time left.

On a terminal it is tqdm's bar; where stderr is a file or a pipe, a few plain lines per pass.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Generic, TextIO, TypeVar

T = TypeVar("T")
PLAIN_LINES = 4


class Progress(Generic[T]):
    """Iterates over `items` and shows how far it is.

    Example:
        for batch in (bar := Progress(loader, len(loader), "epoch 1/100")):
            bar.status(train_status(losses, instances, imgsz, memory))
    """

    def __init__(
        self,
        items: Iterable[T],
        total: int,
        title: str,
        *,
        done: int = 0,
        enabled: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Prepare; nothing is shown before the first item.

        Args:
            items: what is iterated over.
            total: how many there are.
            title: shown in front.
            done: how many were there before those of `items`.
            enabled: False shows nothing (ranks above 0).
            stream: where to write, stderr where None.
            clock: seconds; tests give their own.
        """
        self.items = items
        self.total = total
        self.title = title
        self.done = done
        self.enabled = enabled
        self.stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._status = ""

    def status(self, text: str) -> None:
        """Set what stands beside the bar."""
        self._status = text

    def __iter__(self) -> Iterator[T]:
        if not self.enabled:
            return iter(self.items)
        return self._with_bar() if self.stream.isatty() else self._with_lines()

    def _with_bar(self) -> Iterator[T]:
        from tqdm import tqdm

        layout = (
            "{desc} |{bar:12}| {n_fmt}/{total_fmt}{postfix} [{elapsed}<{remaining}, {rate_fmt}]"
        )
        with tqdm(
            total=self.total,
            initial=self.done,
            desc=self.title,
            file=self.stream,
            bar_format=layout,
            dynamic_ncols=True,
            leave=True,
        ) as bar:
            for item in self.items:
                yield item
                bar.postfix = self._status
                bar.update()

    def _with_lines(self) -> Iterator[T]:
        start = self._clock()
        told = {
            max(1, round(self.total * part / PLAIN_LINES)) for part in range(1, PLAIN_LINES + 1)
        }
        for done, item in enumerate(self.items, start=self.done + 1):
            yield item
            if done in told:
                elapsed = self._clock() - start
                left = elapsed / (done - self.done) * max(self.total - done, 0)
                clock = f"[{format_seconds(elapsed)}<{format_seconds(left)}]"
                parts = (self.title, f"{done}/{self.total}", self._status, clock)
                print(*(part for part in parts if part), file=self.stream, flush=True)


def train_status(
    losses: Mapping[str, float], instances: int, imgsz: tuple[int, int], memory_gib: float
) -> str:
    """`box 0.0512 obj 0.0311 cls 0.0174 instances 213 size 320x320 memory 1.24G`."""
    terms = " ".join(f"{name} {value:.4g}" for name, value in losses.items())
    return f"{terms} instances {instances} size {imgsz[0]}x{imgsz[1]} memory {memory_gib:.2f}G"


def format_seconds(seconds: float) -> str:
    """`0:07`, `12:34`, `1:02:03`."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Parts:
    """How far a whole of several parts is, and the part that is at work: two bars on a terminal, a line a part elsewhere."""

    def __init__(self, total: int, title: str, stream: TextIO | None = None) -> None:
        """Begin.

        Args:
            total: number of parts.
            title: what the whole is called.
            stream: where to write, stderr where None.
        """
        self.total, self.title, self.done = total, title, 0
        self.stream = sys.stderr if stream is None else stream

    @contextmanager
    def part(self, name: str, steps: int) -> Iterator[Callable[[int], None]]:
        """Show a part of so many steps; what it yields is told how many are done."""
        start = time.perf_counter()
        if self.stream.isatty():
            from tqdm import tqdm

            layout = "{desc} |{bar:12}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
            title = f"{self.title} {self.done + 1}/{self.total}: {name}"
            with tqdm(
                total=steps, desc=title, file=self.stream, bar_format=layout, leave=False
            ) as bar:

                def tell(done: int) -> None:
                    bar.update(done - bar.n)

                yield tell
        else:
            yield lambda done: None
        self.done += 1
        taken = format_seconds(time.perf_counter() - start)
        print(
            f"{self.title} {self.done}/{self.total}: {name} [{taken}]", file=self.stream, flush=True
        )
