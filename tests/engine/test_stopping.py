"""A run that is told to stop, at every kind of moment: what is left, and that nothing is lost."""

from __future__ import annotations

import csv
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from engine import recorder
from engine.recorder import RunRecorder
from engine.stopping import StopRequest
from utils.checkpoint import load_checkpoint
from utils.errors import StoppedError


def arguments(cfg: Path, data: Path, folder: Path, *words: object) -> list[str]:
    """Flags for a small and quick training of two epochs of four batches; Dropout draws in each."""
    text = cfg.read_text().replace("[-1, 1, C3, [24]]", "[-1, 1, nn.Dropout, [0.5]]")
    cfg.write_text(text)
    given = ["--cfg", cfg, "--data", data, "--imgsz", 64, "--batch-size", 2, "--workers", 0]
    given += ["--device", "cpu", "--noplots", "--project", folder, "--epochs", 2, *words]
    return [str(word) for word in given]


def signal_at(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, call: int, number: int):
    """Send a signal to this process as it calls a function for the n-th time, from 1."""
    real, calls = getattr(place, name), []

    def signalled(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    monkeypatch.setattr(place, name, signalled)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "time"} for row in csv.DictReader(file)]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("place", "name", "call", "number", "told", "left"),
    [
        (RunRecorder, "batch", 2, signal.SIGTERM, "epoch 1 of 2 after step 2 of 4", (-1, 2)),
        (train, "optimizer_step", 8, signal.SIGHUP, "epoch 2 of 2 after step 4 of 4", (0, 4)),
        (train, "share_buffers", 1, signal.SIGINT, "epoch 1 of 2 after step 4 of 4", (-1, 4)),
        (RunRecorder, "epoch", 1, signal.SIGTERM, "epoch 2 of 2 after step 1 of 4", (0, 1)),
        (recorder, "whole_val_loader", 1, signal.SIGTERM, "stopped by SIGTERM; go on", (1, None)),
    ],
    ids=["in a step", "last step", "in the validation", "between epochs", "last measurement"],
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    place: Any, name: str, call: int, number: int, told: str, left: tuple[int, int | None],
    tiny_cfg: Path, shared_data: Path, tmp_path: Path, monkeypatch,
):  # fmt: skip
    hyp = tmp_path / "hyp.yaml"
    hyp.write_text("nbs: 2\nwarmup_epochs: 0\n")
    words = arguments(tiny_cfg, shared_data, tmp_path, "--hyp", hyp)
    train.main([*words, "--name", "straight"])
    with monkeypatch.context() as patch, pytest.raises(StoppedError) as caught:
        signal_at(patch, place, name, call, number)
        train.main([*words, "--name", "stopped"])
    last = tmp_path / "stopped" / "weights" / "last.pt"
    assert caught.value.number == number and told in str(caught.value)
    assert str(caught.value).endswith(f"go on with: python train.py --resume {last}")
    saved = load_checkpoint(last)
    step = saved["progress"][0]["step"] if "progress" in saved else None
    assert (saved["epoch"], step) == left
    train.main(["--resume", str(last), "--device", "cpu"])
    straight = tmp_path / "straight" / "weights" / "last.pt"
    one, other = load_checkpoint(last), load_checkpoint(straight)
    assert same(one["model"], other["model"]) and same(one["ema"]["model"], other["ema"]["model"])
    assert one["ema"]["updates"] == other["ema"]["updates"] == 8
    assert rows(tmp_path / "stopped") == rows(tmp_path / "straight")


def test_without_checkpoints_of_epochs_a_stop_leaves_one(
    tiny_cfg: Path, shared_data: Path, tmp_path: Path, monkeypatch
):
    signal_at(monkeypatch, RunRecorder, "batch", 6, signal.SIGTERM)
    with pytest.raises(StoppedError):
        train.main(arguments(tiny_cfg, shared_data, tmp_path, "--nosave"))
    assert [p.name for p in (tmp_path / "exp" / "weights").iterdir()] == ["last.pt"]


def test_the_second_signal_is_the_systems_unless_it_is_the_first_once_more(monkeypatch):
    clock = iter([10.0, 10.5, 12.0])
    monkeypatch.setattr("engine.stopping.time.monotonic", lambda: next(clock))
    request = StopRequest()
    with request.listening(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # as a launcher passes it on
        assert request.number == signal.SIGINT
        assert list(request.until([1, 2])) == []
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the third one comes through")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    request = StopRequest()
    with request.listening():
        os.kill(os.getpid(), signal.SIGHUP)
    signal.signal(signal.SIGHUP, before)
    assert request.number is None and list(request.until([1, 2])) == [1, 2]
