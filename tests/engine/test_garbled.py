"""A last.pt whose parts are not what a training left: one line that names the file and the part."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from shell import TINY_MODEL

import train
from engine.options import read_training
from engine.run import prepare
from engine.state import checkpoint_of
from utils.distributed import World
from utils.errors import UserError

NAN = torch.full((8, 3, 3, 3), torch.nan)


@pytest.fixture(scope="module")
def content(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run leaves after its first step."""
    folder = tmp_path_factory.mktemp("garbled")
    (folder / "tiny.yaml").write_text(TINY_MODEL)
    words = ["--cfg", folder / "tiny.yaml", "--data", shared_data, "--imgsz", 64, "--batch-size", 4]
    words += ["--workers", 0, "--device", "cpu", "--noplots", "--epochs", 2, "--optimizer", "SGD"]
    run = prepare(read_training([str(w) for w in words])[0], folder, torch.device("cpu"), World())
    for parameter in run.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    run.optimizer.step()
    left = checkpoint_of(run, 0)
    state = {"step": 1, "used": 1, "sums": {"box": 1.0}, "objects": 3, "rng": left["rng"]}
    return {**left, "progress": [state], "format": "yoke", "version": 1}


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        (("epoch",), "x", "its epoch is damaged - got 'x'"),
        (("epoch",), 10**18, "its epoch is damaged - got '1000000000000000000'"),
        (("last_step",), None, "its last_step is damaged"),
        (("best_fitness",), "x", "its place in the training is damaged - ValueError"),
        (("skipped",), [1, 2, 3], "its place in the training is damaged"),
        (("progress", 0, "step"), -5, "its place in the training is damaged"),
        (("progress", 0, "sums"), 3, "its place in the training is damaged"),
        (("progress",), 3, "its place in the training is damaged"),
        (("progress", 0, "rng"), {"torch": 1}, "its random state is damaged"),
        (("rng", "torch"), torch.zeros(3), "its random state is damaged"),
        (("rng", "numpy"), [], "its random state is damaged"),
        (("rng", "python", 1), ["a"] * 625, "its random state is damaged"),
        (("hyp", "lr0"), "fast", "its recipe lr0 - got 'fast', expected a number"),
        (("hyp", "momentum"), 7.0, "its recipe momentum - got 7, expected 0 to 0.9999"),
        (("hyp", "lrf"), float("nan"), "its recipe lrf - got nan"),
        (("hyp",), [], "its hyp is damaged - got '[]'"),
        (("opt", "batch_size"), "many", "its flag --batch-size - got 'many'"),
        (("opt", "imgsz"), [0], "its flag --imgsz - got '[0]'"),
        (("opt", "cos_lr"), torch.zeros(3), "its flag --cos-lr - got 'tensor([0., 0., 0.])'"),
        (("opt", "amp"), "maybe", "its flag --amp - got 'maybe'"),
        (("optimizer", "kind"), 7, "optimizer: the checkpoint holds 7, the run uses SGD"),
        (("optimizer", "groups", "bias", "initial_lr"), None, "optimizer bias: initial_lr - got 'None'"),
        (("optimizer", "groups", "bias", "momentum"), "x", "optimizer bias: momentum - got 'x'"),
        (("optimizer", "state"), [], "its optimizer is damaged - AttributeError"),
        (("optimizer", "state", "model.0.conv.weight", "momentum_buffer"), torch.zeros(3), "got shape (3,), expected (8, 3, 3, 3)"),
        (("optimizer", "state", "model.0.conv.weight", "momentum_buffer"), 1e9, "got '1000000000.0', expected a tensor"),
        (("optimizer", "state", "model.0.conv.weight", "momentum_buffer"), NAN, "cannot be used - model.0.conv.weight.momentum"),
        (("optimizer", "pending"), {"model.9.weight": torch.zeros(1)}, "its optimizer is damaged - KeyError"),
        (("optimizer", "pending"), {"model.0.conv.weight": torch.zeros(1)}, "its optimizer is damaged"),
        (("ema", "updates"), "many", "the weights do not fit the run's model"),
        (("ema", "model", "model.0.conv.weight"), "x", "the weights do not fit the run's model"),
        (("names",), ["square", 7], "has the classes square, disc, expected"),
        (("config", "head"), 7, "its own model cannot be built - "),
    ],
)  # fmt: skip
def test_each_part_is_told(
    place: tuple[Any, ...], value: Any, told: str, content: dict[str, Any], tmp_path: Path
):
    garbled = copy.deepcopy(content)
    inner: Any = garbled
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    last = tmp_path / "exp" / "weights" / "last.pt"
    last.parent.mkdir(parents=True)
    torch.save(garbled, last)
    with pytest.raises(UserError) as caught:
        train.main(["--resume", str(last), "--device", "cpu"])
    assert told in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()
    assert str(caught.value).startswith(f"{last}: ")
