"""Going on with a run: which one, with whose flags, and from which moment."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

import train
from engine.options import read_training
from engine.resume import find_resumable, load_resumable, resume
from engine.run import Run, prepare
from engine.state import finish, restore, save
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.device import select_device
from utils.distributed import World
from utils.errors import CheckpointError, ConfigError

CPU = select_device("cpu")
OWN_LAYER = """
from torch import nn
from models.registry import register, unchanged

@register(unchanged)
class OwnLayer(nn.BatchNorm2d):
    pass
"""


class StoppedError(Exception):
    """Stands for a kill."""


def arguments(cfg: Path, data: Path, folder: Path, *words: object) -> list[str]:
    """Flags for a small and quick training."""
    given = ["--cfg", cfg, "--data", data, "--imgsz", 64, "--batch-size", 4, "--workers", 0]
    given += ["--device", "cpu", "--noplots", "--project", folder, "--epochs", 2, *words]
    return [str(word) for word in given]


def stop_at(name: str, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make train.py's function `name` break off at its n-th call, from 1."""
    real, calls = getattr(train, name), []

    def stopping(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            raise StoppedError
        return real(*args, **kwargs)

    monkeypatch.setattr(train, name, stopping)


def resumed(last: Path, *words: object) -> None:
    train.main(["--resume", str(last), "--device", "cpu", *map(str, words)])


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def run(tiny_cfg: Path, shared_data: Path, tmp_path: Path) -> Run:
    """A run that has not begun."""
    options = read_training(arguments(tiny_cfg, shared_data, tmp_path))[0]
    return prepare(options, tmp_path / "exp", CPU, World())


@pytest.fixture
def last(run: Run) -> Path:
    """The last.pt of that run, as if after its first epoch."""
    path = run.folder / "weights" / "last.pt"
    save(run, path, 0)
    return path


def merge(*words: object) -> tuple[Any, dict[str, Any]]:
    given = list(map(str, words))
    return resume(*read_training(given))


def change(path: Path, **values: Any) -> None:
    save_checkpoint(path, {**load_checkpoint(path), **values})


def test_leave_to_run_code_or_to_fetch_never_comes_from_the_file(last: Path):
    own = load_checkpoint(last)["opt"]
    change(last, opt={**own, "allow_code": True, "download": True, "evolve": 5, "no_flag": 1})
    merged, _ = merge("--resume", last)
    assert (merged.allow_code, merged.download, merged.evolve) == (False, False, 0)
    assert not hasattr(merged, "no_flag")
    merged, _ = merge("--resume", last, "--allow-code")
    assert (merged.allow_code, merged.download) == (True, False)


def test_flags_that_change_nothing_learnt_win_and_the_others_are_named(last: Path, capsys):
    words = ["--workers", 3, "--patience", 7, "--imgsz", 96]
    merged, _ = merge("--resume", last, *words, "--batch-size", 4, "--cos-lr", "--data", "o.yaml")
    assert (merged.workers, merged.patience, merged.data) == (3, 7, "o.yaml")
    assert (merged.imgsz, merged.batch_size, merged.cos_lr) == ([64], 4, False)
    told = [line for line in capsys.readouterr().err.splitlines() if "hold" in line]
    assert told == [
        "warning: resume: the run's own values hold, not --cos-lr True (False), --imgsz [96] ([64])"
    ]


def test_the_folder_of_a_run_is_found_from_inside_it(last: Path, monkeypatch):
    monkeypatch.chdir(last.parent)
    assert find_resumable("last.pt", "elsewhere") == last
    monkeypatch.chdir(last.parents[1])
    assert find_resumable(".", "elsewhere") == last
    other = last.rename(last.parents[1] / "last.pt")
    with pytest.raises(ConfigError, match="expected it in the folder `weights` of its run"):
        find_resumable(str(other), "elsewhere")


def test_the_newest_run_that_is_not_finished_is_taken(run: Run, last: Path, tmp_path: Path):
    newer = tmp_path / "exp2" / "weights" / "last.pt"
    save(run, newer, 0)
    assert find_resumable(True, str(tmp_path)) == newer
    finish(newer.parent)
    assert find_resumable(True, str(tmp_path)) == last


def test_a_file_that_lacks_what_a_run_needs_is_refused(last: Path):
    content = load_checkpoint(last)
    save_checkpoint(last, {key: content[key] for key in content if key not in ("hyp", "rng")})
    with pytest.raises(CheckpointError, match="has no hyp, rng, nothing to resume"):
        load_resumable(last)


def test_data_with_other_classes_is_refused_before_the_weights(run: Run, last: Path):
    change(last, names=["square", "disc", "ring"])
    with pytest.raises(CheckpointError) as caught:
        restore(run, load_resumable(last))
    assert str(caught.value).startswith(
        f"{run.options.resume}: {run.options.data} has the classes square, disc, expected those that the run was started "
        "with: square, disc, ring."
    )


def test_weights_that_are_not_the_models_are_refused(run: Run, last: Path):
    change(last, model={"model.0.conv.weight": run.model.model[0].conv.weight[:1]})
    with pytest.raises(CheckpointError, match="the weights do not fit the run's model"):
        restore(run, load_resumable(last))


def test_a_run_keeps_its_recipe_also_when_it_gets_longer(shared_data: Path, tmp_path: Path):
    """What `optimizer: auto` came to with few epochs holds with many."""
    words = arguments(Path("yolo11n"), shared_data, tmp_path)
    first = prepare(read_training(words)[0], tmp_path, CPU, World())
    longer = read_training([*words, "--epochs", "100000", "--hyp", "gone.yaml", "--cos-lr"])[0]
    saved = {key: value for key, value in first.hyp.items() if key != "ema_share"}
    second = prepare(longer, tmp_path, CPU, World(), hyp={**saved, "lr0": 0.125})
    assert first.hyp["optimizer"] == second.hyp["optimizer"] == "AdamW"
    assert (second.hyp["lr0"], second.hyp["schedule"]) == (0.125, "linear")
    assert second.hyp["ema_share"] == first.hyp["ema_share"]  # a key that an old run did not know


@pytest.fixture
def own_cfg(tiny_cfg: Path) -> Path:
    """The tiny model with a layer of a file beside it."""
    (tiny_cfg.parent / "own.py").write_text(OWN_LAYER)
    text = tiny_cfg.read_text().replace("[-1, 1, C3, [24]]", "[-1, 1, OwnLayer, [16]]")
    tiny_cfg.write_text(f"imports: own.py\n{text}")
    return tiny_cfg


def test_a_model_with_code_of_its_own_is_resumed_finished_and_taken_as_weights(
    own_cfg: Path, shared_data: Path, tmp_path: Path, monkeypatch, capsys
):
    hyp = tmp_path / "hyp.yaml"
    hyp.write_text("lr0: 0.03125\n")
    words = arguments(own_cfg, shared_data, tmp_path, "--hyp", hyp, "--allow-code")
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        stop_at("train_one_epoch", 2, patch)
        train.main(words)
    hyp.unlink()  # a run has its recipe in the checkpoint
    exp = tmp_path / "exp"
    with pytest.raises(ConfigError, match="own.py would run code"):
        resumed(exp / "weights" / "last.pt")
    resumed(exp / "weights" / "last.pt", "--allow-code")
    assert [row["epoch"] for row in rows(exp)] == ["0", "1"]
    assert load_checkpoint(exp / "weights" / "best.pt")["hyp"]["lr0"] == 0.03125
    words = ["--weights", exp / "weights" / "best.pt", "--epochs", 1, "--allow-code"]
    capsys.readouterr()
    train.main([*arguments(Path(), shared_data, tmp_path, *words), "--cfg", ""])
    assert "own.py" in (tmp_path / "exp2" / "model.yaml").read_text()
    assert "best.pt: " in capsys.readouterr().err


@pytest.mark.parametrize("words", [("--epochs", 1), ("--patience", 1, "--epochs", 5)])
def test_a_run_killed_in_its_last_measurement_is_resumed_there(
    words: tuple[Any, ...], tiny_cfg: Path, shared_data: Path, tmp_path: Path, monkeypatch, capsys
):
    """With a number of epochs that is reached, and with a patience that is at its end."""
    fitness, validate = iter([0.5, 0.4]), train.validate

    def worse(run: Run) -> Any:
        metrics, losses = validate(run)
        value = next(fitness)
        return metrics._replace(map50=value, map50_95=value), losses

    monkeypatch.setattr(train, "validate", worse)
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        stop_at("conclude", 1, patch)
        train.main(arguments(tiny_cfg, shared_data, tmp_path, *words))
    before = rows(tmp_path / "exp")
    stop_at("train_one_epoch", 1, monkeypatch)
    resumed(tmp_path / "exp" / "weights" / "last.pt")
    assert "best epoch 1: mAP50" in capsys.readouterr().out
    assert rows(tmp_path / "exp") == before
    with pytest.raises(CheckpointError, match=f"finished after {len(before)} epochs"):
        load_resumable(tmp_path / "exp" / "weights" / "last.pt")


def test_a_finished_run_goes_on_when_its_epochs_are_raised(
    tiny_cfg: Path, shared_data: Path, tmp_path: Path
):
    train.main(arguments(tiny_cfg, shared_data, tmp_path, "--epochs", 1))
    last = tmp_path / "exp" / "weights" / "last.pt"
    train.main(["--resume", str(last), "--epochs", "3", "--device", "cpu"])
    assert [row["epoch"] for row in rows(tmp_path / "exp")] == ["0", "1", "2"]
    with pytest.raises(CheckpointError, match="finished after 3 epochs"):
        load_resumable(last)
