"""Losses by name from the command line and the recipe, and what of them a resumed run needs."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from test_run import ALONE, CPU, options_of, run_of

import train
from engine.options import read_training
from engine.recorder import RunRecorder
from engine.resume import load_resumable
from engine.run import prepare
from engine.state import checkpoint_of, restore, save
from utils.errors import ConfigError

OWN = "def soft(predicted, target):\n    return (predicted - target).abs().sum(-1) / 100\n"


def test_a_flag_goes_over_the_recipe_and_into_the_runs_own(
    tiny_cfg: Path, shared_data: Path, tmp_path: Path
):
    mine = tmp_path / "mine.yaml"
    mine.write_text("box_loss: siou\ncls_loss: focal\nshape_theta: 3\n")
    flags = ["--hyp", str(mine), "--box-loss", "shape-iou"]
    run = run_of(tiny_cfg, shared_data, tmp_path / "run", *flags)
    assert run.criterion.box_loss.numbers == {"shape_theta": 3.0, "shape_scale": 0.0}
    RunRecorder(run).start()
    written = yaml.safe_load((tmp_path / "run" / "hyp.yaml").read_text())
    assert (written["box_loss"], written["cls_loss"]) == ("shape-iou", "focal")


def test_a_flag_that_is_not_known_is_one_line(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        read_training(["--box-loss", "cioux"])[0]
    told = capsys.readouterr().err
    assert caught.value.code == 2 and told.count("\n") == 1
    assert "--box-loss: got 'cioux', expected one of iou" in told and "'ciou'?" in told


def test_names_of_a_recipe_are_told_with_their_lines(
    tiny_cfg: Path, shared_data: Path, tmp_path: Path
):
    mine = tmp_path / "mine.yaml"
    mine.write_text("lr0: 0.01\nbox_loss: cuoi\ncls_loss: bcd\ninner_ratio: 0\nbox_alpha: 0.5\n")
    with pytest.raises(ConfigError) as caught:
        run_of(tiny_cfg, shared_data, tmp_path, "--hyp", str(mine))
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert lines[0].startswith(f"{mine}:2: box_loss - got 'cuoi', expected one of iou, giou")
    assert lines[1].startswith(f"{mine}:3: cls_loss - got 'bcd', expected one of bce, focal")
    assert lines[1].endswith("Did you mean 'bce'?")
    assert lines[2:] == [
        f"{mine}:4: inner_ratio - got 0, expected 0.1 to 10.",
        f"{mine}:5: box_alpha - got 0.5, expected 1 or more.",
    ]


def test_a_users_loss_lies_beside_the_recipe_needs_leave_and_is_found_by_a_resumed_run(
    tiny_cfg: Path, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "my_losses.py").write_text(OWN)
    mine = tmp_path / "mine.yaml"
    mine.write_text("box_loss: my_losses.py:soft\n")
    with pytest.raises(ConfigError, match="my_losses.py:soft would run code.*--allow-code"):
        run_of(tiny_cfg, shared_data, tmp_path, "--hyp", str(mine))
    flags = ["--hyp", str(mine), "--allow-code"]
    run = run_of(tiny_cfg, shared_data, tmp_path / "run", *flags)
    assert run.hyp["box_loss"] == f"{tmp_path / 'my_losses.py'}:soft"
    losses = train.train_one_epoch(run, 0, RunRecorder(run))
    assert losses["box"] > 0
    last = tmp_path / "run" / "weights" / "last.pt"
    save(run, last, 0)
    monkeypatch.chdir(tmp_path / "run")  # elsewhere, and without the recipe
    hyp = load_resumable(last)["hyp"]
    for leave in ([], ["--allow-code"]):
        options = options_of(tiny_cfg, shared_data, *leave)
        if leave:
            assert prepare(options, tmp_path, CPU, ALONE, hyp=hyp).hyp == run.hyp
        else:
            with pytest.raises(ConfigError, match="would run code"):
                prepare(options, tmp_path, CPU, ALONE, hyp=hyp)


def test_a_resumed_run_has_the_running_mean_of_its_box_loss(
    tiny_cfg: Path, shared_data: Path, tmp_path: Path
):
    flags = ["--box-loss", "wiou-v3"]
    run = run_of(tiny_cfg, shared_data, tmp_path, *flags)
    train.train_one_epoch(run, 0, RunRecorder(run))
    train.validate(run)
    mean = run.criterion.box_loss.mean.value
    assert 0 < mean < 1 and run.val_criterion.box_loss.mean.value == 1  # only training moves it
    state = checkpoint_of(run, 0)
    assert state["criterion"] == {"box_loss_mean": mean}
    other = run_of(tiny_cfg, shared_data, tmp_path, *flags)
    restore(other, state)
    assert other.criterion.box_loss.mean.value == mean
    del state["criterion"]  # of a run that did not know it yet
    restore(run_of(tiny_cfg, shared_data, tmp_path, *flags), state)
