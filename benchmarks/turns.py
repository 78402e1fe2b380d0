"""Whole commands in turn: how long ours takes beside another tool's, or beside itself with other flags.

    python benchmarks/turns.py 'python detect.py --weights best.pt --source a.jpg' 'other predict model=best.pt source=a.jpg'
    python benchmarks/turns.py --runs 9 OURS OTHER

One run of each that is not counted, then A B A B ..., so that a machine that slows down does so for both. Printed are the
medians of wall and processor seconds, and of the ratio A / B pair by pair its median, least and largest.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.tables import aligned
from utils.config import integer


class Taken(NamedTuple):
    """Seconds of one run: on the clock, and of processors, its children's with them."""

    wall: float
    cpu: float


def run(command: Sequence[str]) -> Taken:
    """Run a command to its end; what it prints is thrown away.

    Raises:
        SystemExit: it failed.
    """
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{shlex.join(command)}: ended with code {process.returncode}")
    return Taken(time.perf_counter() - start, used.ru_utime + used.ru_stime)


def table(ours: Sequence[Taken], other: Sequence[Taken]) -> str:
    """Medians of both, and the ratio pair by pair."""
    rows: list[Sequence[str]] = [("seconds", "A", "B", "A / B", "least", "largest")]
    for name, a, b in zip(Taken._fields, zip(*ours), zip(*other)):
        ratios = sorted(x / y for x, y in zip(a, b))
        numbers = (statistics.median(a), statistics.median(b), statistics.median(ratios))
        rows.append((name, *(f"{value:.2f}" for value in (*numbers, ratios[0], ratios[-1]))))
    return "\n".join(aligned(rows))


def main() -> None:
    """Run both in turn and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "commands", nargs=2, metavar="COMMAND", help="A and B, each as typed into a shell"
    )
    parser.add_argument("--runs", type=integer(1), default=5, help="counted runs of each")
    args = parser.parse_args()
    commands = [shlex.split(text) for text in args.commands]
    rounds = [[run(command) for command in commands] for _ in range(args.runs + 1)]
    print(f"{args.runs} rounds, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(table(*zip(*rounds[1:])))


if __name__ == "__main__":
    main()
