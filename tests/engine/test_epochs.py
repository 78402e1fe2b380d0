"""What an epoch gives the network and says of it: sizes, pictures, objects, patience."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_training import arguments, results
from torch import Tensor

import train
from engine.options import read_training
from engine.recorder import RunRecorder
from engine.run import Run, prepare
from utils.checkpoint import load_checkpoint
from utils.distributed import World
from utils.metrics import Metrics
from utils.structures import Targets


@pytest.fixture
def run(tiny_cfg: Path, shared_data: Path, tmp_path: Path) -> Run:
    torch.manual_seed(0)
    options = read_training(arguments(tiny_cfg, shared_data, tmp_path))[0]
    return prepare(options, tmp_path / "exp", torch.device("cpu"), World())


def test_sizes_that_vary_keep_the_shape_of_rect_batches():
    """64 x 192 becomes a third as high as wide, padded to a multiple of 32 with grey."""
    images = torch.ones(1, 3, 64, 192)
    targets = Targets(torch.tensor([0]), torch.tensor([0]), torch.tensor([[0.0, 0, 192, 64]]))
    shapes = set()
    for iteration in range(20):
        resized, moved = train.resize_randomly(images, targets, 32, iteration)
        width, height = moved.boxes[0, 2:].tolist()
        assert abs(width - 3 * height) <= 1.5, "stretched"
        assert resized.shape[2] == -(-height // 32) * 32 and resized.shape[3] == width
        assert bool((resized[0, :, : int(height)] > 0.999).all())
        below = resized[0, :, int(height) :]
        torch.testing.assert_close(below, torch.full_like(below, 114 / 255))
        shapes.add(tuple(resized.shape[2:]))
    assert shapes <= {(32, 96), (64, 128), (64, 160), (64, 192), (96, 224), (96, 256), (96, 288)}
    assert len(shapes) > 3


def test_patience_ends_a_run_that_stays_the_same_and_the_latest_of_equal_epochs_is_best(
    tiny_cfg: Path, shared_data: Path, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.setattr(Metrics, "fitness", property(lambda self: 0.0))
    words = arguments(tiny_cfg, shared_data, tmp_path, "--patience", "2", "--epochs", "8")
    train.main(words)
    assert len(results(tmp_path / "exp")) == 3
    assert "no better epoch since epoch 1 (--patience 2)" in capsys.readouterr().err
    last = load_checkpoint(tmp_path / "exp" / "weights" / "last.pt")
    assert (last["best_epoch"], last["improved_epoch"]) == (2, 0)
    assert load_checkpoint(tmp_path / "exp" / "weights" / "best.pt")["epoch"] == 2


def test_an_epoch_without_any_object_is_told(run: Run, capsys):
    train.train_one_epoch(run, 0, RunRecorder(run))
    assert "has an object" not in capsys.readouterr().err
    collate = run.train_loader.collate_fn
    run.train_loader.collate_fn = lambda samples: collate(samples)._replace(targets=Targets.empty())
    train.train_one_epoch(run, 1, RunRecorder(run))
    assert "epoch 2: none of its 2 batches has an object" in capsys.readouterr().err


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_training_batches_show_what_the_network_gets(
    tiny_cfg: Path, shared_data: Path, tmp_path: Path, monkeypatch, channels: int
):
    tiny_cfg.write_text(f"ch: {channels}\n" + tiny_cfg.read_text())
    options = read_training(arguments(tiny_cfg, shared_data, tmp_path, "--multi-scale"))[0]
    options = replace(options, noplots=False)
    run = prepare(options, tmp_path / "exp", torch.device("cpu"), World())
    shown: list[tuple[Tensor, Targets]] = []
    monkeypatch.setattr(
        "engine.recorder.plot_batch",
        lambda images, objects, *_, **__: shown.append((images, objects)),
    )
    fed: list[tuple[Tensor, Targets]] = []
    run.wrapped.register_forward_pre_hook(lambda _, inputs: fed.append(inputs))
    train.train_one_epoch(run, 0, RunRecorder(run))
    assert len(shown) == len(fed) == 2 and len({tuple(i.shape) for i, _ in fed}) == 2
    for (picture, objects), (images, targets) in zip(shown, fed, strict=True):
        assert picture.shape == images.shape and torch.equal(objects.boxes, targets.boxes)
        is_grey = bool((picture[:, 0] == picture[:, 2]).all())
        assert is_grey is (channels == 1)
        if channels == 3:
            torch.testing.assert_close(picture.float() / 255, images, atol=0.003, rtol=0)
