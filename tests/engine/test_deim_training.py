"""DEIM's plan from the recipe file to the last epoch, straight and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import train
from engine.run import Place
from models.family import RECIPES
from utils.checkpoint import load_checkpoint

MODEL = """
nc: 2
backbone: [[-1, 1, Conv, [8, 3, 2]], [-1, 1, Conv, [16, 3, 2]], [-1, 1, Conv, [16, 3, 2]], [-1, 1, Conv, [16, 3, 2]]]
head:
  - [[2, 3], 1, DFINEDecoder, [nc, {hidden: 16, num_queries: 20, num_heads: 2, num_layers: 2, feedforward: 16, reg_max: 8}]]
"""


class StoppedError(Exception):
    """Stands for a kill."""


def test_the_last_epoch_goes_on_from_the_best_one_and_a_resumed_run_does_the_same(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
):
    """Six epochs, of which the second is the best: three with mosaics, two without, one of flips alone."""

    def note(place: Place, fitness: float, epoch: int) -> None:
        if epoch == 1:
            place.best_fitness, place.best_epoch = 0.5, 1

    monkeypatch.setattr(Place, "note_fitness", note)
    (tmp_path / "small.yaml").write_text(MODEL)
    words = [
        "--cfg",
        tmp_path / "small.yaml",
        "--hyp",
        RECIPES / "deim.yaml",
        "--data",
        shared_data,
        "--imgsz",
        64,
    ]
    words += [
        "--batch-size",
        4,
        "--workers",
        0,
        "--noplots",
        "--project",
        tmp_path,
        "--device",
        "cpu",
        "--epochs",
        6,
    ]

    def run(*more: object) -> None:
        train.main([str(word) for word in more])

    run(*words, "--name", "straight")
    told = capfd.readouterr().err
    assert "plan: mosaic and mixup until 3, warp and colours until 5, then on from the best" in told
    assert "epoch 6: goes on from " in told and "best.pt, epoch 2; flips alone from here on" in told
    real, calls = train.validate, []

    def stopping(*args: train.Run) -> object:
        calls.append(args)
        if len(calls) == 6:
            raise StoppedError
        return real(*args)

    monkeypatch.setattr(train, "validate", stopping)
    with pytest.raises(StoppedError):
        run(*words, "--name", "stopped")
    run("--resume", tmp_path / "stopped" / "weights" / "last.pt", "--device", "cpu")
    straight, resumed = (
        load_checkpoint(tmp_path / name / "weights" / "last.pt") for name in ("straight", "stopped")
    )
    assert straight["epoch"] == resumed["epoch"] == 5 and straight["hyp"]["cls_loss"] == "mal"
    for key, value in straight["model"].items():
        assert torch.equal(value, resumed["model"][key]), key
    for key, value in straight["ema"]["model"].items():
        assert torch.equal(value, resumed["ema"]["model"][key]), key
