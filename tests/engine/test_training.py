"""The training loop itself: one page, looked at step by step."""

from __future__ import annotations

import csv
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from other_device import OTHER, other_device, send_model
from torch import Tensor

import train
from engine.evaluation import collect
from engine.options import read_training
from engine.pace import Plan
from engine.recorder import RunRecorder
from engine.resume import resume
from engine.run import Run, prepare
from engine.state import save
from models.family import build_criterion
from models.losses.epochs import SameEveryEpoch
from utils.checkpoint import capture_rng, finalize_checkpoint, load_checkpoint
from utils.distributed import World
from utils.errors import ConfigError, UserError
from utils.optim import build_optimizer
from utils.structures import Targets


def arguments(cfg: Path, data: Path, folder: Path, *words: str) -> list[str]:
    """Flags for a small and quick training."""
    given = ["--cfg", cfg, "--data", data, "--imgsz", 64, "--batch-size", 4, "--workers", 0]
    given += ["--device", "cpu", "--noplots", "--project", folder, "--epochs", 2]
    return [*(str(word) for word in given), *words]


@pytest.fixture
def run(tiny_cfg: Path, shared_data: Path, tmp_path: Path) -> Run:
    torch.manual_seed(0)
    options = read_training(arguments(tiny_cfg, shared_data, tmp_path))[0]
    return prepare(options, tmp_path / "exp", torch.device("cpu"), World())


def test_the_last_epochs_go_on_from_the_best_weights(run: Run, capsys):
    """The model and its average are those of best.pt; where nothing was measured they stay."""
    run = replace(run, plan=Plan(range(1), 1))
    train.train_one_epoch(run, 0, RunRecorder(run))
    best = run.last.with_name("best.pt")
    best.parent.mkdir(parents=True)
    save(run, best, 0)
    kept = {"model": run.model.state_dict(), "average": run.ema.model.state_dict()}
    kept = {name: {k: v.clone() for k, v in state.items()} for name, state in kept.items()}
    updates = run.ema.updates
    train.train_one_epoch(replace(run, plan=Plan(range(9), 9)), 1, RunRecorder(run))
    moved = {k: v.clone() for k, v in run.model.state_dict().items()}
    run.place.epoch = 1
    train.begin_epoch(run, 1)
    assert (
        "goes on as it is, since --noval or --nosave leaves no best weights"
        in capsys.readouterr().err
    )
    assert all(map(torch.equal, run.model.state_dict().values(), moved.values()))
    run.place.best_fitness = 0.4
    train.begin_epoch(run, 1)
    assert "epoch 2: goes on from " in capsys.readouterr().err and run.ema.updates == updates
    assert all(map(torch.equal, run.model.state_dict().values(), kept["model"].values()))
    assert all(map(torch.equal, run.ema.model.state_dict().values(), kept["average"].values()))
    finalize_checkpoint(best)  # of a run that was finished and is made longer
    train.begin_epoch(run, 1)
    assert all(map(torch.equal, run.model.state_dict().values(), kept["average"].values()))
    run.place.within = run.place.within._replace(rng=capture_rng())
    run.model.load_state_dict(moved)
    train.begin_epoch(run, 1)  # an epoch that was stopped has been there already
    assert all(map(torch.equal, run.model.state_dict().values(), moved.values()))


def test_the_optimiser_steps_as_often_as_the_accumulation_says(run: Run, monkeypatch):
    steps: list[int] = []
    step = train.optimizer_step

    def count(run: Run) -> None:
        steps.append(1)
        step(run)

    monkeypatch.setattr(train, "optimizer_step", count)
    run = replace(run, accumulate=2, warmup=type(run.warmup)(0, 0.1, 0.8))
    for epoch in range(3):  # two batches an epoch: the step may fall across the border
        train.train_one_epoch(run, epoch, RunRecorder(run))
    assert (len(steps), run.ema.updates, run.place.last_step) == (3, 3, 5)


def test_a_step_forgets_the_gradients_and_moves_the_average(run: Run):
    before = {k: v.clone() for k, v in run.ema.model.state_dict().items()}
    for parameter in run.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for group in run.optimizer.param_groups:
        group["lr"] = 0.1
    train.optimizer_step(run)
    assert all(parameter.grad is None for parameter in run.model.parameters())
    after = run.ema.model.state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before)


def test_gradients_are_clipped_to_the_recipes_norm(run: Run, monkeypatch):
    norms: list[float] = []
    run = replace(run, hyp={**run.hyp, "clip_norm": 0.5})
    step = run.optimizer.step

    def look(*args: Any, **kwargs: Any) -> Any:
        gradients = [p.grad.flatten() for p in run.model.parameters()]
        norms.append(torch.cat(gradients).norm().item())
        return step(*args, **kwargs)

    monkeypatch.setattr(run.optimizer, "step", look)
    for parameter in run.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    train.optimizer_step(run)
    assert norms == pytest.approx([0.5], rel=1e-4)


def spoil(run: Run, when: set[int]) -> Run:
    """The run with losses that are infinite at the given calls."""
    calls: list[int] = []
    criterion = run.criterion

    def spoiled(raw: Any, targets: Targets) -> dict[str, Tensor]:
        losses = criterion(raw, targets)
        calls.append(len(calls))
        factor = float("inf") if calls[-1] in when else 1.0
        return {name: value * factor for name, value in losses.items()}

    wrapper = type(
        "Spoiled", (SameEveryEpoch,), {"__call__": staticmethod(spoiled), "times_batch": True}
    )()
    return replace(run, criterion=wrapper)


def test_a_loss_that_is_not_finite_is_told_and_left_out(run: Run, capsys):
    run = spoil(run, {0})
    train.train_one_epoch(run, 0, RunRecorder(run))
    told = capsys.readouterr().err
    assert "epoch 1 step 1: loss is not finite (box inf, obj inf, cls inf)" in told
    assert "step 2: loss is not finite" not in told
    assert all(bool(p.isfinite().all()) for p in run.model.parameters())
    assert run.place.skipped == 0  # counted in a row, and the second batch was fine


def test_batches_left_out_do_not_count_in_the_means(run: Run):
    """The second batch alone; of an epoch without any good one the terms are there, as nan."""
    run = spoil(run, {0, 2, 3})
    recorder = RunRecorder(run)
    recorder.start()
    means = [train.train_one_epoch(run, epoch, recorder) for epoch in (1, 0)]
    assert all(value > 0 for value in means[0].values())
    assert set(means[0]) == set(means[1]) == {"box", "obj", "cls"}
    assert all(math.isnan(value) for value in means[1].values())
    for epoch, losses in enumerate(reversed(means)):
        recorder.epoch(epoch, losses, {}, None, 0.0)
    rows = results(run.folder)
    assert rows[0]["train/box_loss"] == "nan"
    assert float(rows[1]["train/box_loss"]) == pytest.approx(means[0]["box"], rel=1e-4)


def test_losses_that_stay_so_end_the_run(run: Run):
    run = spoil(run, set(range(100)))
    with pytest.raises(UserError, match="10 losses in a row were not finite"):
        for epoch in range(6):
            train.train_one_epoch(run, epoch, RunRecorder(run))
    assert run.ema.updates == 0


def test_the_mean_losses_of_an_epoch_are_returned(run: Run):
    seen: list[dict[str, float]] = []
    criterion = run.criterion

    def look(raw: Any, targets: Targets) -> dict[str, Tensor]:
        losses = criterion(raw, targets)
        seen.append({name: value.item() for name, value in losses.items()})
        return losses

    wrapper = type(
        "Seen", (SameEveryEpoch,), {"__call__": staticmethod(look), "times_batch": True}
    )()
    run = replace(run, criterion=wrapper)
    means = train.train_one_epoch(run, 0, RunRecorder(run))
    assert len(seen) == 2
    for name, value in means.items():
        assert value == pytest.approx(sum(row[name] for row in seen) / 2)


def test_images_and_boxes_are_resized_together():
    images = torch.zeros(1, 3, 64, 128)
    images[:, :, 16:48, 32:96] = 1
    targets = Targets(
        torch.tensor([0]), torch.tensor([0]), torch.tensor([[32.0, 16.0, 96.0, 48.0]])
    )
    sizes = set()
    for iteration in range(20):
        resized, moved = train.resize_randomly(images, targets, 32, iteration)
        height, width = resized.shape[2:]
        sizes.add((height, width))
        assert height % 32 == width % 32 == 0
        assert 32 <= height <= 96 and 64 <= width <= 192
        bright = (resized[0, 0] > 0.5).nonzero()
        box = [*bright.min(0).values.flip(0).tolist(), *(bright.max(0).values + 1).flip(0).tolist()]
        torch.testing.assert_close(
            moved.boxes[0], torch.tensor(box, dtype=torch.float32), atol=1, rtol=0
        )
    assert len(sizes) > 2
    assert targets.boxes.tolist() == [[32.0, 16.0, 96.0, 48.0]]


def test_an_epoch_is_the_same_again_with_the_same_seed(
    tiny_cfg: Path, shared_data: Path, tmp_path: Path
):
    text = tiny_cfg.read_text().replace("[-1, 1, C3, [24]]", "[-1, 1, nn.Dropout, [0.5]]")
    tiny_cfg.write_text(text)
    states = []
    for seed in ("0", "0", "1"):
        options = read_training(
            arguments(tiny_cfg, shared_data, tmp_path, "--seed", seed, "--multi-scale")
        )[0]
        torch.manual_seed(int(seed))
        run = prepare(options, tmp_path, torch.device("cpu"), World())
        torch.rand(len(states))  # what else drew from the generator does not matter
        train.train_one_epoch(run, 0, RunRecorder(run))
        states.append(torch.cat([p.detach().flatten() for p in run.model.parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def results(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_without_validation_a_run_goes_on_to_its_end(
    tiny_cfg: Path, shared_data: Path, tmp_path: Path
):
    """Patience counts epochs that were measured and not better; here only the last is measured."""
    words = ["--noval", "--patience", "1", "--epochs", "4"]
    train.main(arguments(tiny_cfg, shared_data, tmp_path, *words))
    rows = results(tmp_path / "exp")
    assert [row["epoch"] for row in rows] == ["0", "1", "2", "3"]
    assert [bool(row["metrics/mAP_0.5"]) for row in rows] == [False, False, False, True]


def test_a_run_that_gets_no_better_stops(
    tiny_cfg: Path, shared_data: Path, tmp_path: Path, monkeypatch, capsys
):
    fitness = iter([0.5, 0.4, 0.3, 0.2, 0.1])
    validate = train.validate

    def worse_and_worse(run: Run) -> Any:
        metrics, losses = validate(run)
        value = next(fitness)
        return metrics._replace(map50=value, map50_95=value), losses

    monkeypatch.setattr(train, "validate", worse_and_worse)
    train.main(arguments(tiny_cfg, shared_data, tmp_path, "--patience", "2", "--epochs", "5"))
    assert len(results(tmp_path / "exp")) == 3
    assert "no better epoch since epoch 1 (--patience 2)" in capsys.readouterr().err


def test_checkpoints_are_kept_as_asked(tiny_cfg: Path, shared_data: Path, tmp_path: Path):
    train.main(arguments(tiny_cfg, shared_data, tmp_path, "--save-period", "1"))
    train.main(arguments(tiny_cfg, shared_data, tmp_path, "--nosave"))
    names = [
        sorted(path.name for path in (tmp_path / run / "weights").iterdir())
        for run in ("exp", "exp2")
    ]
    assert names == [["best.pt", "epoch0.pt", "epoch1.pt", "last.pt"], ["best.pt", "last.pt"]]


def test_with_the_last_checkpoint_alone_its_epoch_is_told(
    tiny_cfg: Path, shared_data: Path, tmp_path: Path, monkeypatch, capsys
):
    """Also where an earlier run left a best.pt in the folder, and where an earlier epoch was better."""
    best = tmp_path / "exp" / "weights" / "best.pt"
    best.parent.mkdir(parents=True)
    best.write_text("of another model")
    validate, fitness = train.validate, iter([0.5, 0.25])

    def worse(run: Run) -> Any:
        metrics, losses = validate(run)
        return metrics._replace(map50_95=next(fitness)), losses

    monkeypatch.setattr(train, "validate", worse)
    train.main(arguments(tiny_cfg, shared_data, tmp_path, "--nosave", "--exist-ok"))
    assert "best epoch 2: mAP50" in capsys.readouterr().out
    assert load_checkpoint(best)["epoch"] == 1


@pytest.mark.parametrize(("nbs", "told"), [(64, True), (4, False)])
def test_a_training_without_a_step_is_told(
    nbs: int, told: bool, tiny_cfg: Path, shared_data: Path, tmp_path: Path, capsys
):
    hyp = tmp_path / "hyp.yaml"
    hyp.write_text(f"warmup_epochs: 0\nnbs: {nbs}\n")
    words = ["--hyp", str(hyp), "--noval", "--epochs", "1"]
    train.main(arguments(tiny_cfg, shared_data, tmp_path, *words))
    message = "the weights were never changed: 2 batches, but an optimiser step needs 16"
    assert (message in capsys.readouterr().err) == told


@pytest.mark.parametrize(("given", "expected"), [((), 2), (("--epochs", "3"), 3)])
def test_a_resumed_run_keeps_its_flags_and_may_get_more_epochs(
    given: tuple[str, ...], expected: int, run: Run, tmp_path: Path
):
    run = replace(run, options=replace(run.options, seed=5))
    (tmp_path / "exp" / "weights").mkdir(parents=True)
    save(run, tmp_path / "exp" / "weights" / "last.pt", 0)
    words = ["--resume", str(tmp_path / "exp"), "--batch-size", "9", *given]
    merged, checkpoint = resume(*read_training(words))
    assert (merged.epochs, merged.batch_size, merged.seed) == (expected, 4, 5)
    assert checkpoint["config"] == run.model.config and checkpoint["epoch"] == 0


def test_a_resumed_run_cannot_get_fewer_epochs(run: Run, tmp_path: Path):
    (tmp_path / "exp" / "weights").mkdir(parents=True)
    save(run, tmp_path / "exp" / "weights" / "last.pt", 0)
    given = read_training(["--resume", str(tmp_path / "exp"), "--epochs", "1"])
    with pytest.raises(ConfigError, match="--epochs: got 1, but the run was started for 2"):
        resume(*given)


def test_one_batch_is_learned_by_heart(run: Run):
    """The whole chain: with the same four pictures again and again every loss falls far."""
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 0.2
    boxes = torch.tensor([[8.0, 8.0, 32.0, 32.0], [30.0, 20.0, 54.0, 44.0]]).repeat(2, 1)
    for number, box in enumerate(boxes.int().tolist()):
        images[number, number % 2, box[1] : box[3], box[0] : box[2]] = 1
    targets = Targets(torch.arange(4), torch.tensor([0, 1, 0, 1]), boxes)
    optimizer = torch.optim.Adam(run.model.parameters(), lr=0.01)
    run.model.train()
    history = []
    for _ in range(120):
        losses = run.criterion(run.model(images, targets), targets)
        history.append({name: value.item() for name, value in losses.items()})
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert history[-1]["box"] < 0.35 * history[0]["box"]
    assert history[-1]["cls"] < 0.2 * history[0]["cls"]
    run.model.eval()
    with torch.no_grad():
        found = run.model.decode(run.model(images))
    best = found.scores.flatten(1).argmax(1)
    places, labels = best // 2, best % 2
    assert labels.tolist() == [0, 1, 0, 1]
    centres = torch.stack([found.boxes[i, p] for i, p in enumerate(places)])
    assert (centres - boxes).abs().max() < 6


def test_the_loop_stays_on_its_device(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    send_model(run.model)
    send_model(run.ema.model)
    optimizer = build_optimizer(run.model, "SGD", 0.01, 0.9, 0.0)
    warmup = type(run.warmup)(0, 0.1, 0.8)
    run = replace(run, device=OTHER, accumulate=1, warmup=warmup, optimizer=optimizer)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(train, "collect", torch.no_grad()(collect.__wrapped__))
    with other_device():
        criteria = [build_criterion(m.head, run.hyp, run.imgsz) for m in (run.model, run.ema.model)]
        run = replace(run, criterion=criteria[0], val_criterion=criteria[1])
        train.train_one_epoch(run, 0, RunRecorder(run))
        metrics, _ = train.validate(run)
        save(run, run.folder / "last.pt", 0)
    assert run.ema.updates > 0
    assert metrics.images == len(run.val_set)
    saved = torch.load(run.folder / "last.pt", weights_only=True)
    assert all(t.device.type == "cpu" for t in saved["model"].values())
