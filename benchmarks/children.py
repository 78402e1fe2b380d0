"""Long measurements in small pieces: results in a JSONL file, pieces in child processes.

A run that was stopped goes on where it stopped; a piece that dies or hangs takes only itself along.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Result = dict[str, Any]


def read_results(path: Path) -> dict[str, Result]:
    """Results so far, by name; a line cut short by an interruption is left out."""
    results: dict[str, Result] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            result = json.loads(line)
        except json.JSONDecodeError:
            continue
        results[result["name"]] = result
    return results


def append_results(path: Path, results: Sequence[Result]) -> None:
    """Add lines to the file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(result) + "\n" for result in results)


def run_chunk(command: Sequence[str], names: Sequence[str], timeout: float) -> list[Result]:
    """Results of a child process that prints one JSON line for each of `names`.

    Args:
        command: starts the child; the names are put behind it.
        names: what it works through, in this order.
        timeout: seconds a name.

    Returns:
        One result a name. The name at which the child died or ran out of time fails and is the last
        one; those behind it stay open.
    """
    try:
        done = subprocess.run(
            [*command, *names], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            timeout=timeout * len(names), check=False,
        )  # fmt: skip
        output = done.stdout
        why = f"its process ended with code {done.returncode}: {done.stderr[-200:]}"
    except subprocess.TimeoutExpired as error:
        text = error.stdout or b""
        output, why = text.decode() if isinstance(text, bytes) else text, "took too long"
    results = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    if len(results) < len(names):
        name = names[len(results)]
        results.append({"name": name, "status": "fails", "step": "process", "reason": why})
    return results


def run_open(
    path: Path,
    results: dict[str, Result],
    command: Sequence[str],
    timeout: float,
    next_chunk: Callable[[], Sequence[str]],
) -> None:
    """Run pieces until none is open; each is written to `path`, added to `results` and told in a line a name.

    Args:
        path: file of results.
        results: those so far, by name.
        command, timeout: as in `run_chunk`.
        next_chunk: names of the next piece, by what `results` holds then; empty to stop.
    """
    while chunk := next_chunk():
        new = run_chunk(command, chunk, timeout)
        append_results(path, new)
        for result in new:
            results[result["name"]] = result
            print(f"{result['name']}: {result['status']} {result.get('reason', '')}", flush=True)
