"""A training that is killed and resumed ends with the weights of one that was not, bit for bit."""

from __future__ import annotations

import csv
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from shell import start_script

from utils.checkpoint import load_checkpoint

# Gradients accumulate over three batches of two, so that an epoch of four ends in between.
HYP = "nbs: 6\nwarmup_epochs: 0\nmixup: 0.5\n"
EPOCHS = 3


def start(folder: Path, *words: object) -> subprocess.Popen[str]:
    return start_script("train.py", *words, "--device", "cpu", cwd=folder)


def end(process: subprocess.Popen[str]) -> str:
    """What the script told until its end, which has to be a good one."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-3000:]
    return out + err


def kill_in_epoch(process: subprocess.Popen[str], place: str) -> None:
    """Kill the process as it tells that it is at `place`, such as `epoch 2/3 2/4`."""
    assert process.stderr is not None
    told = []
    for line in process.stderr:
        told.append(line)
        if line.startswith(place):
            process.send_signal(signal.SIGKILL)
            break
    process.wait(timeout=60)
    assert process.returncode == -signal.SIGKILL, "".join(told)
    process.communicate()


@pytest.fixture
def flags(tmp_path: Path, tiny_cfg: Path, small_data: Path) -> list[Any]:
    (tmp_path / "hyp.yaml").write_text(HYP)
    text = tiny_cfg.read_text()
    tiny_cfg.write_text(text.replace("[-1, 1, C3, [24]]", "[-1, 1, nn.Dropout, [0.5]]"))
    words: list[Any] = ["--cfg", tiny_cfg, "--data", small_data, "--hyp", tmp_path / "hyp.yaml"]
    words += ["--imgsz", 64, "--batch-size", 2, "--epochs", EPOCHS, "--workers", 2, "--noplots"]
    return [*words, "--multi-scale", "--optimizer", "Adam", "--project", tmp_path / "runs"]


def test_killed_in_the_middle_of_an_epoch_and_resumed(tmp_path: Path, flags: list[Any]):
    whole = end(start(tmp_path, *flags, "--name", "whole"))
    kill_in_epoch(start(tmp_path, *flags, "--name", "killed"), "epoch 2/3 2/4")
    killed = tmp_path / "runs" / "killed"
    left = load_checkpoint(killed / "weights" / "last.pt")
    assert left["epoch"] == 0 and left["optimizer"]["pending"]
    resumed = end(start(tmp_path, "--resume", killed / "weights" / "last.pt"))
    assert "epoch 2 of 3" in resumed and "epoch 1/3" not in resumed

    for name in ("last.pt", "best.pt"):
        expected = load_checkpoint(tmp_path / "runs" / "whole" / "weights" / name)
        found = load_checkpoint(killed / "weights" / name)
        assert expected["epoch"] == found["epoch"]
        assert expected["model"].keys() == found["model"].keys()
        different = [
            k for k, v in expected["model"].items() if not torch.equal(v, found["model"][k])
        ]
        assert different == []
    assert rows(killed) == rows(tmp_path / "runs" / "whole")
    assert [row["epoch"] for row in rows(killed)] == ["0", "1", "2"]
    assert last_line(whole) == last_line(resumed)


def rows(folder: Path) -> list[dict[str, str]]:
    """results.csv without the clock."""
    with (folder / "results.csv").open(newline="") as file:
        return [
            {k: v for k, v in row.items() if k.strip() != "time"} for row in csv.DictReader(file)
        ]


def last_line(told: str) -> str:
    """`best epoch 3: mAP50 0.1234, ...`, without the folder."""
    return next(line for line in told.splitlines() if line.startswith("best epoch")).split(";")[0]
