"""A whole study in miniature: killed, resumed, with one entry that fails."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from shell import TINY_MODEL, start_script

SIZE = ("--epochs", 2, "--imgsz", 64, "--runtime", "onnx", "torch", "--runs", 2, "--workers", 0)
QUICK = ("--train", "--batch-size", 4, "--noplots")


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 300
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
def test_a_killed_study_goes_on_and_tells_what_failed(
    small_data: Path, tmp_path: Path, run_script: Callable[..., subprocess.CompletedProcess[str]]
):
    configs = [tmp_path / "first.yaml", tmp_path / "second.yaml", tmp_path / "missing.yaml"]
    for path in configs[:2]:
        path.write_text(TINY_MODEL)
    words = ("--cfg", *configs, "--data", small_data, "--project", tmp_path / "out", *SIZE, *QUICK)
    process, folder = start_script("compare.py", *words, cwd=tmp_path, group=True), tmp_path / "out" / "exp"  # fmt: skip
    first = folder / "entries" / "first" / "measured.json"
    wait_for(first, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (folder / "study.csv").exists()
    done = first.stat().st_mtime_ns

    result = run_script("compare.py", "--resume", folder)
    assert result.returncode == 0, result.stderr
    assert first.stat().st_mtime_ns == done
    with (folder / "study.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["name"] for row in rows] == ["first", "first", "second", "second", "missing"]
    assert [row["runtime"] for row in rows] == ["onnx", "torch", "onnx", "torch", ""]
    assert all(row["state"] == "trained" and row["epochs"] == "2" for row in rows[:4])
    assert all(0 < float(row["latency_low"]) <= float(row["latency"]) for row in rows[:4])
    assert all(float(row["map_low"]) <= float(row["map50_95"]) + 0.1 for row in rows[:4])
    assert rows[4]["state"].startswith("failed: ") and "missing.yaml" in rows[4]["state"]
    page = (folder / "study.html").read_text()
    assert len(page) < 1_000_000 and "missing.yaml" in page and "data:image/jpeg" in page
    assert "compare.py" in (folder / "study.md").read_text()
    assert (folder / "model_card.md").read_text().startswith("# ")
