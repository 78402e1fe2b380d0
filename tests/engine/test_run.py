"""The parts of a training, built from flags, and its state as a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import train
from engine.options import TrainOptions, read_training
from engine.recorder import RunRecorder
from engine.resume import find_resumable, load_resumable
from engine.run import Run, prepare
from engine.state import checkpoint_of, finish, restore, save
from models.family import total_loss
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.distributed import World
from utils.errors import CheckpointError, ConfigError, DatasetError

CPU = torch.device("cpu")
ALONE = World()


def options_of(cfg: Path | str, data: Path, *words: str) -> TrainOptions:
    """Flags for a training of 64 x 64 pixels in batches of 4."""
    given = ["--cfg", str(cfg), "--data", str(data), "--imgsz", "64", "--batch-size", "4"]
    given += ["--workers", "0", "--device", "cpu", "--noplots", "--epochs", "2"]
    return read_training([*given, *words])[0]


def run_of(cfg: Path | str, data: Path, folder: Path, *words: str, world: World = ALONE) -> Run:
    torch.manual_seed(0)
    return prepare(options_of(cfg, data, *words), folder, CPU, world)


def as_published(folder: Path, *lines: str) -> list[str]:
    """Flags for a recipe that says itself how many images a step sees, as published."""
    hyp = folder / "hyp.yaml"
    hyp.write_text("\n".join(("nbs: 64", *lines)))
    return ["--hyp", str(hyp)]


def names_of(run: Run, role: str) -> list[str]:
    return next(g["names"] for g in run.optimizer.param_groups if g["role"] == role)


def test_the_model_has_the_classes_of_the_data(tiny_cfg: Path, shared_data: Path, tmp_path: Path):
    run = run_of(tiny_cfg, shared_data, tmp_path)
    assert run.model.names == ("square", "disc") and run.model.head.num_classes == 2
    assert (len(run.train_set), len(run.val_set)) == (8, 4)
    assert (len(run.train_loader), run.imgsz) == (2, (64, 64))
    assert run.val_criterion.head is run.ema.model.head


def test_all_classes_may_count_as_one(tiny_cfg: Path, shared_data: Path, tmp_path: Path):
    run = run_of(tiny_cfg, shared_data, tmp_path, "--single-cls")
    assert run.model.head.num_classes == 1 and run.model.names == run.train_set.names == ("object",)
    assert set(run.train_set.labels.tolist()) == {0}


def test_sizes_are_rounded_up_and_need_not_be_square(
    tiny_cfg: Path, shared_data: Path, tmp_path: Path
):
    assert run_of(tiny_cfg, shared_data, tmp_path, "--imgsz", "50", "70").imgsz == (64, 96)


@pytest.mark.parametrize(
    ("batch", "accumulate", "decay"),
    # nominal batch 64: smaller ones accumulate, and the decay follows what a step really sees
    [(4, 16, 0.0005), (8, 8, 0.0005), (6, 11, 0.0005 * 66 / 64), (128, 1, 0.001)],
)
def test_gradients_accumulate_up_to_the_nominal_batch(
    batch: int, accumulate: int, decay: float, tiny_cfg: Path, shared_data: Path, tmp_path: Path
):
    run = run_of(
        tiny_cfg, shared_data, tmp_path, "--batch-size", str(batch), *as_published(tmp_path)
    )
    assert run.accumulate == accumulate
    decays = {group["role"]: group["weight_decay"] for group in run.optimizer.param_groups}
    assert decays == {"weight": pytest.approx(decay), "norm": 0.0, "bias": 0.0}


def test_frozen_rows_are_neither_trained_nor_in_training_mode(
    tiny_cfg: Path, shared_data: Path, tmp_path: Path
):
    run = run_of(tiny_cfg, shared_data, tmp_path, "--freeze", "backbone")
    trained = [name for role in ("weight", "norm", "bias") for name in names_of(run, role)]
    assert trained and all(int(name.split(".")[1]) >= 5 for name in trained)
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    recorder = RunRecorder(run)
    train.train_one_epoch(run, 0, recorder)
    after = run.model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if int(k.split(".")[1]) < 5)
    assert not torch.equal(before["model.7.bn.running_mean"], after["model.7.bn.running_mean"])


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--optimizer", "AdamW"], "optimizer", "AdamW"),
        (["--cos-lr"], "schedule", "cosine"),
        (["--flat-cos-lr"], "schedule", "flat_cosine"),
        (["--fixed-lr"], "schedule", "fixed"),
        (["--close-mosaic", "1"], "close_mosaic", 1),
        (["--label-smoothing", "0.1"], "label_smoothing", 0.1),
        ([], "schedule", "linear"),
    ],
)
def test_flags_go_over_the_recipe(
    words: list[str], key: str, value: Any, tiny_cfg: Path, shared_data: Path, tmp_path: Path
):
    run = run_of(tiny_cfg, shared_data, tmp_path, *words)
    assert run.hyp[key] == value
    assert type(run.optimizer).__name__ == run.hyp["optimizer"]


@pytest.mark.parametrize(
    ("epochs", "optimizer"), [("3", "AdamW"), ("100000", "SGD")], ids=["short", "long"]
)
def test_an_automatic_optimizer_is_chosen_by_the_length_of_the_training(
    epochs: str, optimizer: str, shared_data: Path, tmp_path: Path
):
    run = run_of("yolo11n", shared_data, tmp_path, "--epochs", epochs)
    assert run.hyp["optimizer"] == type(run.optimizer).__name__ == optimizer


def test_the_backbone_may_have_a_learning_rate_of_its_own(
    tiny_cfg: Path, shared_data: Path, tmp_path: Path
):
    hyp = tmp_path / "hyp.yaml"
    hyp.write_text("backbone_lr: 0.1\nlr0: 0.02\n")
    run = run_of(tiny_cfg, shared_data, tmp_path, "--hyp", str(hyp))
    rates = {
        name: group["initial_lr"] for group in run.optimizer.param_groups for name in group["names"]
    }
    assert len(rates) == len(list(run.model.parameters()))
    backbone = {rate for name, rate in rates.items() if int(name.split(".")[1]) < 5}
    head = {rate for name, rate in rates.items() if int(name.split(".")[1]) >= 5}
    assert (sorted(backbone), sorted(head)) == (pytest.approx([0.002]), [0.02])


def test_a_backbone_without_weights_learns_as_fast_as_the_rest(
    shared_data: Path, tmp_path: Path, capsys
):
    """RT-DETR's recipe has a tenth for its pretrained backbone."""
    words = ("rtdetr-r18", shared_data, tmp_path)
    run = run_of(*words)
    assert run.hyp["backbone_lr"] == 1.0
    assert "backbone_lr: 1, its 0.1 is for backbones with weights" in capsys.readouterr().err
    hyp = tmp_path / "hyp.yaml"
    hyp.write_text("backbone_lr: 0.1\n")
    assert run_of(*words, "--hyp", str(hyp)).hyp["backbone_lr"] == 0.1


def test_images_with_rare_classes_are_drawn_more_often(
    tiny_cfg: Path, shared_data: Path, tmp_path: Path
):
    run = run_of(tiny_cfg, shared_data, tmp_path, "--image-weights")
    counts = np.bincount(run.train_set.labels, minlength=2)
    weights = run.train_loader.sampler.image_weights
    assert weights is not None and len(weights) == 8
    first = run.train_set.labels[run.train_set.offsets[0] : run.train_set.offsets[1]]
    assert weights[7] == pytest.approx(1 / 8)  # the last image has no object
    expected = sum(1 / counts[label] for label in first) / len(np.unique(run.train_set.labels))
    assert weights[0] == pytest.approx(expected * 7 / 8)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--cfg", "yolov5q"], ConfigError, "Did you mean 'yolov5"),
        (["--data", "nowhere.yaml"], DatasetError, "nowhere.yaml"),
        (["--weights", "nowhere.pt"], CheckpointError, "nowhere.pt"),
        (["--freeze", "everything"], ConfigError, "--freeze: got 'everything'"),
        (["--hyp", "nowhere.yaml"], ConfigError, "nowhere.yaml"),
        (["--scale", "s"], ConfigError, "the file has no scales"),
        (["--amp", "fp16"], ConfigError, "--amp fp16"),
        (["--backbone", "EMO_9M"], ConfigError, "EMO_"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_trained(
    words: list[str], error: type, message: str, tiny_cfg: Path, shared_data: Path, tmp_path: Path
):
    with pytest.raises(error) as caught:
        run_of(tiny_cfg, shared_data, tmp_path, *words)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_batch_is_shared_out_evenly(tiny_cfg: Path, shared_data: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="got 4, expected a multiple of the 3 processes"):
        run_of(tiny_cfg, shared_data, tmp_path, world=World(0, 0, 3))


def test_weights_of_an_earlier_run_are_taken_over_and_bring_their_config(
    tiny_cfg: Path, shared_data: Path, tmp_path: Path
):
    first = run_of(tiny_cfg, shared_data, tmp_path)
    with torch.no_grad():
        for parameter in first.model.parameters():
            parameter.add_(1)
    save(first, tmp_path / "a.pt", 0)
    finish_copy(tmp_path / "a.pt", first)
    options = options_of("", shared_data, "--weights", str(tmp_path / "a.pt"))
    second = prepare(options, tmp_path, CPU, World())
    assert all(
        torch.equal(value, second.model.state_dict()[key])
        for key, value in first.model.state_dict().items()
    )


def finish_copy(path: Path, run: Run) -> None:
    """Make the checkpoint's average equal to the run's weights, as if training had gone on long."""
    content = load_checkpoint(path)
    content["ema"]["model"] = content["model"]
    save_checkpoint(path, content)


def trained(run: Run, epochs: int = 1) -> Run:
    recorder = RunRecorder(run)
    for epoch in range(run.place.epoch, run.place.epoch + epochs):
        train.train_one_epoch(run, epoch, recorder)
        run.place.epoch = epoch + 1
    return run


def test_a_checkpoint_is_plain_data_and_brings_a_fresh_run_to_where_it_was(
    tiny_cfg: Path, shared_data: Path, tmp_path: Path
):
    run = trained(run_of(tiny_cfg, shared_data, tmp_path, "--batch-size", "2"))
    run.place.best_fitness, run.place.best_epoch = 0.25, 0
    save(run, tmp_path / "weights" / "last.pt", 0)
    content = load_resumable(tmp_path / "weights" / "last.pt")
    assert content["names"] == ["square", "disc"] and content["strides"] == [8, 16]
    assert content["opt"]["batch_size"] == 2 and content["hyp"]["lr0"] == run.hyp["lr0"]
    fresh = run_of(tiny_cfg, shared_data, tmp_path, "--batch-size", "2")
    restore(fresh, content)
    assert (fresh.place.epoch, fresh.place.last_step, fresh.place.best_fitness) == (
        1,
        run.place.last_step,
        0.25,
    )
    assert same(fresh.model.state_dict(), run.model.state_dict())
    assert same(fresh.ema.state_dict()["model"], run.ema.state_dict()["model"])
    assert fresh.ema.updates == run.ema.updates > 0
    trained(run), trained(fresh)
    assert same(fresh.model.state_dict(), run.model.state_dict())
    assert same(fresh.ema.state_dict()["model"], run.ema.state_dict()["model"])


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_gradients_that_wait_for_the_next_step_are_kept(
    tiny_cfg: Path, shared_data: Path, tmp_path: Path
):
    words = as_published(tmp_path, "warmup_epochs: 0")  # batches gather from the first one on
    run = trained(run_of(tiny_cfg, shared_data, tmp_path, *words))
    pending = checkpoint_of(run, 0)["optimizer"]["pending"]
    assert set(pending) == {name for name, _ in run.model.named_parameters()}
    assert run.place.last_step == -1 and run.ema.updates == 0
    save(run, tmp_path / "last.pt", 0)
    fresh = run_of(tiny_cfg, shared_data, tmp_path, *words)
    restore(fresh, load_resumable(tmp_path / "last.pt"))
    gradients = {name: p.grad for name, p in fresh.model.named_parameters()}
    assert same(gradients, {name: p.grad for name, p in run.model.named_parameters()})


def test_the_best_checkpoint_is_small_and_a_finished_one_goes_on_only_for_more_epochs(
    tiny_cfg: Path, shared_data: Path, tmp_path: Path
):
    run = trained(run_of(tiny_cfg, shared_data, tmp_path))
    best, last = tmp_path / "best.pt", tmp_path / "last.pt"
    for path in (best, last):
        save(run, path, 0)
    before = best.stat().st_size
    finish(tmp_path)
    assert best.stat().st_size < 0.6 * before
    assert same(load_checkpoint(best)["model"], run.ema.state_dict()["model"])
    for path, epochs in ((best, None), (last, None), (last, 1)):
        with pytest.raises(CheckpointError, match="its training is finished after 1 epochs"):
            load_resumable(path, epochs)
    with pytest.raises(CheckpointError, match="has no ema, scaler, rng, nothing to resume"):
        load_resumable(best, 2)
    fresh = run_of(tiny_cfg, shared_data, tmp_path)
    restore(fresh, load_resumable(last, 2))
    assert fresh.place.epoch == 1
    assert same(fresh.model.state_dict(), run.model.state_dict())


def test_the_newest_run_is_the_one_to_go_on_with(tmp_path: Path):
    for name in ("exp", "exp2"):
        (tmp_path / name / "weights").mkdir(parents=True)
        (tmp_path / name / "weights" / "last.pt").touch()
    os.utime(tmp_path / "exp2" / "weights" / "last.pt", (1, 1))
    newest = tmp_path / "exp" / "weights" / "last.pt"
    assert find_resumable(True, str(tmp_path)) == newest
    assert find_resumable(str(tmp_path / "exp"), "elsewhere") == newest
    assert find_resumable(str(newest), "elsewhere") == newest


@pytest.mark.parametrize("given", [True, "exp9/weights/last.pt", "exp"])
def test_where_there_is_nothing_to_resume_it_is_said(given: Any, tmp_path: Path):
    with pytest.raises(ConfigError, match="--resume: "):
        find_resumable(given, str(tmp_path))


def test_a_model_alone_on_its_process_is_not_wrapped(
    tiny_cfg: Path, shared_data: Path, tmp_path: Path
):
    run = run_of(tiny_cfg, shared_data, tmp_path)
    assert run.wrapped is run.model and isinstance(run.wrapped, nn.Module)


def with_queries(cfg: Path, denoising: int) -> Path:
    """The tiny detector under RT-DETR's head."""
    options = "hidden: 16, num_queries: 20, num_heads: 2, num_layers: 1, feedforward: 16"
    head = f"RTDETRDecoder, [nc, {{{options}, num_denoising: {denoising}}}]"
    cfg.write_text(cfg.read_text().replace("Detect, [nc, anchors]", head))
    return cfg


@pytest.mark.parametrize("batch", ["4", "16", "32"])
def test_the_decay_of_a_loss_that_is_a_mean_does_not_follow_the_batch(
    batch: str, tiny_cfg: Path, shared_data: Path, tmp_path: Path
):
    run = run_of(with_queries(tiny_cfg, 0), shared_data, tmp_path, "--batch-size", batch)
    decays = {
        g["weight_decay"] for g in run.optimizer.param_groups if g["role"].startswith("weight")
    }
    assert decays == {0.0001}  # of the recipe


def test_two_batches_that_make_one_step_give_the_mean_of_their_gradients():
    """A loss that is a mean over objects stays one; one that counts images adds up."""
    criterion = SimpleNamespace(times_batch=False)
    losses = {"a": torch.tensor(2.0), "b": torch.tensor(1.0)}
    assert total_loss(criterion, losses, 4, batches=2).item() == 1.5
    assert total_loss(SimpleNamespace(times_batch=True), losses, 4, batches=2).item() == 12


@pytest.mark.parametrize(("denoising", "expected"), [(0, 0), (10, 100)])
def test_a_head_built_without_denoising_keeps_it_off(
    denoising: int, expected: int, tiny_cfg: Path, shared_data: Path, tmp_path: Path
):
    with_queries(tiny_cfg, denoising)
    run = run_of(tiny_cfg, shared_data, tmp_path)
    assert (run.model.head.num_denoising, run.hyp["num_denoising"]) == (expected, 100)
    trained(run)
    assert run.place.skipped == 0
