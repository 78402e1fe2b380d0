"""Numbers that are not finite, in gradients and weights, and statistics of a single value."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import train
from deploy.backends import load_backend
from engine.options import read_training
from engine.recorder import RunRecorder
from engine.run import Run, prepare
from models.weights.load import load_weights
from models.yolo import build_model
from utils.distributed import World
from utils.errors import CheckpointError, UserError
from utils.layers import single_values

CPU = torch.device("cpu")


def arguments(cfg: Path, data: Path, folder: Path, *words: object) -> list[str]:
    given = ["--cfg", cfg, "--data", data, "--imgsz", 64, "--batch-size", 4, "--workers", 0]
    given += ["--device", "cpu", "--noplots", "--project", folder, "--epochs", 1, *words]
    return [str(word) for word in given]


@pytest.fixture
def run(tiny_cfg: Path, shared_data: Path, tmp_path: Path) -> Run:
    torch.manual_seed(0)
    options = read_training(arguments(tiny_cfg, shared_data, tmp_path))[0]
    made = prepare(options, tmp_path / "exp", CPU, World())
    return replace(made, accumulate=1, warmup=type(made.warmup)(0, 0.1, 0.8))


def spoil_gradients(run: Run, *names: str, value: float = torch.inf) -> None:
    """Give parameters a gradient that is not finite, whatever the loss is."""
    for name, parameter in run.model.named_parameters():
        if name in names:
            parameter.register_hook(lambda gradient: torch.full_like(gradient, value))


@pytest.mark.parametrize("clip", [0.0, 10.0])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_costs_the_step_and_is_named(
    run: Run, clip: float, value: float, capsys
):
    run = replace(run, hyp={**run.hyp, "clip_norm": clip})
    spoil_gradients(run, "model.2.conv.weight", value=value)
    before = {key: tensor.clone() for key, tensor in run.model.named_parameters()}
    train.train_one_epoch(run, 0, RunRecorder(run))
    after = dict(run.model.named_parameters())
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert run.ema.updates == 0 and run.place.skipped_steps == 2
    assert all(parameter.grad is None for parameter in run.model.parameters())
    told = [line for line in capsys.readouterr().err.splitlines() if "gradients" in line]
    assert told == [
        f"warning: epoch 1 step {step}: gradients are not finite (model.2.conv.weight) though the loss is; "
        "the optimiser step is left out"
        for step in (1, 2)
    ]


def test_a_norm_beyond_float32_costs_the_step_too(run: Run, capsys):
    spoil_gradients(run, "model.0.conv.weight", value=3e38)
    train.train_one_epoch(run, 0, RunRecorder(run))
    assert "gradients are not finite (model.0.conv.weight)" in capsys.readouterr().err
    assert run.ema.updates == 0


def test_gradients_that_stay_so_end_the_run(run: Run):
    spoil_gradients(run, *(name for name, _ in run.model.named_parameters()))
    with pytest.raises(UserError) as caught:
        for epoch in range(6):
            train.train_one_epoch(run, epoch, RunRecorder(run))
    told = str(caught.value)
    assert "10 steps in a row: gradients are not finite (model.0.conv.weight, " in told
    assert "more). Lower lr0" in told and "\n" not in told


def test_one_good_step_in_between_keeps_the_run(run: Run):
    run.place.skipped_steps = 9
    train.train_one_epoch(run, 0, RunRecorder(run))
    assert run.place.skipped_steps == 0 and run.ema.updates == 2


def test_overflows_of_float16_are_left_to_the_scaler(run: Run, capsys):
    run = replace(run, scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    spoil_gradients(run, "model.2.conv.weight")
    train.train_one_epoch(run, 0, RunRecorder(run))
    assert run.scaler.get_scale() == 256.0
    assert "gradients" not in capsys.readouterr().err


def test_a_batch_of_one_image_trains_where_a_norm_sees_one_value(
    tiny_cfg: Path, small_data: Path, tmp_path: Path
):
    """Five training images in batches of two, at 32 pixels: the trunk of stride 32 ends in a map of 1x1."""
    for number in (5, 6, 7):
        (small_data.parent / "images" / "train" / f"{number}.png").unlink()
    text = tiny_cfg.read_text().replace(
        "[-1, 1, Conv, [24, 3, 2], p4]", "[-1, 1, Conv, [24, 3, 4], p4]"
    )
    tiny_cfg.write_text(
        text.replace("nn.Upsample, [None, 2, nearest]", "nn.Upsample, [None, 4, nearest]")
    )
    words = ["--imgsz", 32, "--batch-size", 2, "--epochs", 2]
    train.main(arguments(tiny_cfg, small_data, tmp_path, *words))
    assert (tmp_path / "exp" / "weights" / "best.pt").exists()


def test_only_norms_of_one_value_take_their_running_statistics():
    wide, single, frozen = (nn.BatchNorm2d(2) for _ in range(3))
    frozen.eval()
    model = nn.Sequential(wide, nn.AdaptiveAvgPool2d(1), single, frozen).train()
    frozen.eval()
    image = torch.tensor([[[[1.0, 3.0]], [[2.0, 4.0]]]])
    with single_values(model, 1):
        out = model(image)
    # The first one normalises to -1 and 1, whose mean is 0; the running mean of the second is 0.
    torch.testing.assert_close(out, torch.zeros(1, 2, 1, 1), atol=1e-5, rtol=0)
    assert wide.running_mean.tolist() == pytest.approx([0.2, 0.3])
    assert single.running_mean.tolist() == [0.0, 0.0]
    assert (wide.training, single.training, frozen.training) == (True, True, False)
    assert not wide._forward_pre_hooks and not single._forward_pre_hooks
    with single_values(model, 2), pytest.raises(ValueError, match="more than 1 value"):
        model(image)


@pytest.fixture
def spoilt(tiny_cfg: Path, tmp_path: Path) -> dict[str, Path]:
    """Files with one number that is not finite: ours, another project's, ours with a variance below zero."""
    model = build_model(str(tiny_cfg), num_classes=2, names=("square", "disc"), imgsz=(64, 64))
    content: dict[str, Any] = {
        "config": model.config,
        "names": list(model.names),
        "imgsz": [64, 64],
    }
    files = {}
    for name, key, value in (
        ("ours", "model.0.conv.weight", torch.nan),
        ("foreign", "model.0.conv.weight", -torch.inf),
        ("variance", "model.0.bn.running_var", -1.0),
    ):
        state = {k: v.clone() for k, v in model.state_dict().items()}
        state[key].view(-1)[3] = value
        files[name] = tmp_path / f"{name}.pt"
        ours = {**content, "model": state, "epoch": 0, "format": "yoke", "version": 1}
        torch.save({"model": state} if name == "foreign" else ours, files[name])
    return files


@pytest.mark.parametrize("name", ["ours", "foreign", "variance"])
def test_weights_that_are_not_finite_are_refused_wherever_they_come_in(
    name: str, spoilt: dict[str, Path], tiny_cfg: Path, shared_data: Path, tmp_path: Path
):
    path = spoilt[name]
    cfg = str(tiny_cfg) if name == "foreign" else ""
    words = arguments(tiny_cfg, shared_data, tmp_path, "--weights", path)
    for start in (
        lambda: load_weights(path, cfg=cfg or None),
        lambda: load_backend(path, cfg=cfg),
        lambda: train.main(words),
    ):
        with pytest.raises(CheckpointError) as caught:
            start()
        assert str(caught.value).startswith(f"{path}: 1 of 65 tensors cannot be used - model.0.")
        assert "numbers that are NaN, infinite or a negative variance" in str(caught.value)
    assert not (tmp_path / "exp").exists()
