"""A training that is killed and resumed ends with the weights of one that was not, bit for bit."""

from __future__ import annotations

import csv
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from shell import TINY_MODEL, draw_data, start_script

from utils.checkpoint import load_checkpoint

# Gradients accumulate over three batches of two, so that an epoch of four ends in between.
HYP = "nbs: 6\nwarmup_epochs: 0\nmixup: 0.5\n"
EPOCHS = 3


def start(folder: Path, *words: object, group: bool = False) -> subprocess.Popen[str]:
    return start_script("train.py", *words, "--device", "cpu", cwd=folder, group=group)


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


class Straight(NamedTuple):
    """A run that nothing stopped: its folder, the flags but `--name`, what it told."""

    folder: Path
    flags: list[Any]
    told: str


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Straight:
    folder = tmp_path_factory.mktemp("whole")
    (folder / "hyp.yaml").write_text(HYP)
    (folder / "tiny.yaml").write_text(
        TINY_MODEL.replace("[-1, 1, C3, [24]]", "[-1, 1, nn.Dropout, [0.5]]")
    )
    words: list[Any] = ["--cfg", folder / "tiny.yaml", "--data", draw_data(folder / "small")]
    words += ["--hyp", folder / "hyp.yaml", "--imgsz", 64, "--batch-size", 2, "--epochs", EPOCHS]
    words += ["--workers", 2, "--noplots", "--multi-scale", "--optimizer", "Adam"]
    told = end(start(folder, *words, "--project", folder, "--name", "run"))
    return Straight(folder / "run", words, told)


@pytest.fixture
def flags(tmp_path: Path, whole: Straight) -> list[Any]:
    return [*whole.flags, "--project", tmp_path / "runs"]


def test_killed_in_the_middle_of_an_epoch_and_resumed(
    tmp_path: Path, whole: Straight, flags: list[Any]
):
    kill_in_epoch(start(tmp_path, *flags, "--name", "killed"), "epoch 2/3 2/4")
    killed = tmp_path / "runs" / "killed"
    left = load_checkpoint(killed / "weights" / "last.pt")
    assert left["epoch"] == 0 and left["optimizer"]["pending"]
    resumed = end(start(tmp_path, "--resume", killed / "weights" / "last.pt"))
    assert "epoch 2 of 3" in resumed and "epoch 1/3" not in resumed

    assert_equal_runs(killed, whole.folder)
    assert last_line(whole.told) == last_line(resumed)


def assert_equal_runs(found: Path, expected: Path) -> None:
    """Weights bit for bit, and results.csv but for the clock."""
    for name in ("last.pt", "best.pt"):
        one, other = (load_checkpoint(folder / "weights" / name) for folder in (found, expected))
        assert one["epoch"] == other["epoch"]
        assert one["model"].keys() == other["model"].keys()
        different = [k for k, v in other["model"].items() if not torch.equal(v, one["model"][k])]
        assert different == []
    assert rows(found) == rows(expected)
    assert [row["epoch"] for row in rows(found)] == ["0", "1", "2"]


def test_a_signal_to_all_processes_lets_the_step_end_and_costs_nothing(
    tmp_path: Path, whole: Straight, flags: list[Any]
):
    """As schedulers (SIGTERM) and terminals (SIGINT) send it: to the workers too, one after the other."""
    weights = tmp_path / "runs" / "stopped" / "weights"
    weights.mkdir(parents=True)
    (weights / ".last.pt.1.tmp").write_bytes(b"half of a file")
    words: list[Any] = [*flags, "--name", "stopped", "--exist-ok"]
    for place, number, where in (
        ("epoch 1/3 1/4", signal.SIGTERM, "epoch 1 of 3 after step "),
        ("epoch 2/3 2/4", signal.SIGINT, "epoch 2 of 3 after step "),
    ):
        process = start(tmp_path, *words, group=True)
        told = signalled(process, place, number, to_group=True)
        assert process.returncode == 128 + number, told
        assert "Traceback" not in told
        assert told.splitlines()[-1].startswith(f"stopped by {number.name} in {where}")
        assert told.endswith(f"go on with: python train.py --resume {weights / 'last.pt'}\n")
        left = load_checkpoint(weights / "last.pt")
        assert left["progress"][0]["step"] > 0
        words = ["--resume", weights / "last.pt"]
    assert [path.name for path in weights.glob(".*")] == []
    end(start(tmp_path, *words))
    assert_equal_runs(tmp_path / "runs" / "stopped", whole.folder)


def test_a_worker_that_the_system_kills_is_told_in_one_line(tmp_path: Path, flags: list[Any]):
    process = start(tmp_path, *flags, "--name", "worker")
    told = signalled(process, "epoch 1/3 2/4", signal.SIGKILL, to_worker=True)
    assert process.returncode == 2
    assert "Traceback" not in told
    last = told.splitlines()[-1]
    assert (
        "is killed by signal: Killed. Most often" in last
        or "exited unexpectedly. Most often" in last
    )
    assert (
        "error: data loader: DataLoader worker (pid" in told.splitlines()[-1]
    )  # behind a bar, maybe


def signalled(
    process: subprocess.Popen[str],
    place: str,
    number: signal.Signals,
    to_group: bool = False,
    to_worker: bool = False,
) -> str:
    """What the process told until its end after a signal as it tells that it is at `place`."""
    assert process.stderr is not None
    told = []
    for line in process.stderr:
        told.append(line)
        if line.startswith(place):
            if to_worker:
                tasks = Path(f"/proc/{process.pid}/task").iterdir()
                children = [c for t in tasks for c in (t / "children").read_text().split()]
                os.kill(int(children[-1]), number)
            elif to_group:
                os.killpg(process.pid, number)
            break
    _, rest = process.communicate(timeout=600)
    return "".join(told) + rest


def rows(folder: Path) -> list[dict[str, str]]:
    """results.csv without the clock."""
    with (folder / "results.csv").open(newline="") as file:
        return [
            {k: v for k, v in row.items() if k.strip() != "time"} for row in csv.DictReader(file)
        ]


def last_line(told: str) -> str:
    """`best epoch 3: mAP50 0.1234, ...`, without the folder."""
    return next(line for line in told.splitlines() if line.startswith("best epoch")).split(";")[0]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_runs_that_are_ended_at_random_moments_again_and_again(
    seed: int, tmp_path: Path, whole: Straight
):
    """Five signals a run, so thirty in all, to the main process or to its workers too."""
    rng = random.Random(seed)
    weights = tmp_path / "runs" / "exp" / "weights"
    fresh = [*whole.flags, "--project", tmp_path / "runs", "--name", "exp", "--exist-ok"]
    told: list[str] = []
    while len(told) < 5:
        if is_finished(weights / "last.pt"):
            assert_equal_runs(weights.parent, whole.folder)
            shutil.rmtree(weights.parent)
        number = rng.choice((signal.SIGTERM, signal.SIGKILL, signal.SIGINT))
        process = start(tmp_path, *way(weights / "last.pt", fresh), group=True)
        text = interrupted(process, rng.randint(2, 15), rng.random(), number, rng.random() < 0.5)
        assert process.returncode in (0, 128 + number, -number), text
        assert "Traceback" not in text
        if process.returncode:
            told.append(f"{number.name}: {text.splitlines()[-1]}")
    print(*told, sep="\n")
    if not is_finished(weights / "last.pt"):
        end(start(tmp_path, *way(weights / "last.pt", fresh)))
    assert_equal_runs(weights.parent, whole.folder)


def is_finished(last: Path) -> bool:
    return last.exists() and bool(load_checkpoint(last).get("finished"))


def way(last: Path, fresh: list[Any]) -> list[Any]:
    """How a run goes on: from its last.pt, or anew where it was stopped before the first."""
    return ["--resume", last] if last.exists() else fresh


def interrupted(
    process: subprocess.Popen[str], lines: int, delay: float, number: signal.Signals, group: bool
) -> str:
    """What the process told, which got a signal `delay` twentieths of a second after so many lines."""
    assert process.stderr is not None
    told = [line for _, line in zip(range(lines), process.stderr, strict=False)]
    time.sleep(delay / 20)
    if process.poll() is None:
        (os.killpg if group else os.kill)(process.pid, number)
    _, rest = process.communicate(timeout=600)
    return "".join(told) + rest
