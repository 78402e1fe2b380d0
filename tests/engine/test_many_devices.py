"""What only shows on GPUs or with several processes, as far as one CPU can tell."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import train
from engine import batch_size, datasets
from engine.options import read_training
from engine.recorder import whole_val_loader
from engine.resume import load_resumable
from engine.run import Run, prepare
from engine.state import checkpoint_of, restore, save
from engine.step import use_batch
from models.yolo import build_model
from utils.distributed import World
from utils.errors import ConfigError
from utils.layers import BATCH_NORMS, PointwiseConv, memory_format_for, with_shared_norms

CPU = torch.device("cpu")


@pytest.fixture
def run(tiny_cfg: Path, shared_data: Path, tmp_path: Path) -> Run:
    return new_run(tiny_cfg, shared_data, tmp_path)


def new_run(cfg: Path, data: Path, folder: Path) -> Run:
    words = ["--cfg", str(cfg), "--data", str(data), "--imgsz", "64", "--batch-size", "4"]
    options = read_training([*words, "--workers", "0", "--epochs", "2", "--noplots"])[0]
    return prepare(options, folder / "exp", CPU, World())


def test_an_overflow_in_the_forward_pass_does_not_stay_in_the_statistics(run: Run):
    norm = next(m for m in run.model.modules() if isinstance(m, nn.BatchNorm2d))
    norm.running_var[0] = torch.inf
    norm.running_mean[0] = torch.nan
    expected = run.ema.model.state_dict()
    assert not use_batch(run, torch.tensor(torch.inf), {})
    own = run.model.state_dict()
    assert all(torch.equal(own[key], expected[key]) for key in own)


class Scaler:
    """A loss scaler that only knows its factor."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def get_scale(self) -> float:
        return self.scale

    def state_dict(self) -> dict:
        return {}


def test_waiting_gradients_are_kept_without_the_scale_of_the_loss(
    run: Run, tiny_cfg: Path, shared_data: Path, tmp_path: Path
):
    """By hand: true gradient 1, loss scaled by 65536 there and by 8 here."""
    for parameter in run.model.parameters():
        parameter.grad = torch.full_like(parameter, 65536.0)
    run = replace(run, scaler=Scaler(65536.0))
    pending = checkpoint_of(run, 0)["optimizer"]["pending"]
    assert all(bool((gradient == 1).all()) for gradient in pending.values()) and pending
    path = tmp_path / "last.pt"
    save(run, path, 0)
    fresh = replace(new_run(tiny_cfg, shared_data, tmp_path), scaler=Scaler(8.0))
    restore(fresh, load_resumable(path))
    assert all(bool((p.grad == 8).all()) for p in fresh.model.parameters())


def test_shared_norms_keep_the_activation_that_timm_puts_inside_them():
    pytest.importorskip("timm")
    torch.manual_seed(0)
    model = build_model("yolov5n", backbone=["test_efficientnet"], imgsz=(64, 64)).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before = model.decode(model(images))
        keys = list(model.state_dict())
        model = with_shared_norms(model).eval()
        after = model.decode(model(images))
    norms = [m for m in model.modules() if isinstance(m, BATCH_NORMS)]
    assert norms and all(isinstance(m, nn.SyncBatchNorm) for m in norms)
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(after.scores, before.scores)


def test_the_last_measurement_takes_one_process_share_at_a_time(run: Run, monkeypatch):
    sizes = []
    monkeypatch.setattr(datasets, "build_loader", lambda data, size, **_: sizes.append(size))
    options = replace(run.options, batch_size=128)
    whole_val_loader(replace(run, options=options, world=World(0, 0, 8)))
    assert sizes == [32]


def test_a_model_of_which_few_images_fit_gets_a_batch_of_one(monkeypatch: pytest.MonkeyPatch):
    model = nn.Conv2d(3, 1, 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**30))
    for used, expected in (([], None), ([(1, 100)], 1)):
        monkeypatch.setattr(batch_size, "_memory_of_steps", lambda *_, used=used: used)
        if expected is None:
            with pytest.raises(ConfigError, match="not one image of 64x64 fits"):
                batch_size.automatic_batch_size(model, (64, 64), torch.device("cuda"))
        else:
            assert (
                batch_size.automatic_batch_size(model, (64, 64), torch.device("cuda")) == expected
            )


@pytest.mark.parametrize(
    ("convolution", "device", "expected"),
    [
        (nn.Conv2d(3, 16, 1, 2), "cpu", torch.contiguous_format),
        (nn.Conv2d(3, 16, 1, 2), "cuda", torch.channels_last),
        (nn.Conv2d(3, 16, 1, 1), "cpu", torch.channels_last),
        (nn.Conv2d(3, 16, 3, 2), "cpu", torch.channels_last),
        (nn.Conv2d(15, 16, 1, 2), "cpu", torch.contiguous_format),
        (nn.Conv2d(16, 16, 1, 2), "cpu", torch.channels_last),
        (nn.Conv2d(16, 16, 1, 2, groups=16), "cpu", torch.channels_last),
        (PointwiseConv(3, 16, 2), "cpu", torch.channels_last),
    ],
)
def test_a_format_that_the_cpu_computes_wrongly_is_not_chosen(convolution, device, expected):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), convolution)
    assert memory_format_for(model, torch.device(device)) == expected


def test_several_processes_do_not_fetch(monkeypatch: pytest.MonkeyPatch):
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="--download: got several processes"):
        train.main(["--download", "--data", "absent.yaml"])
