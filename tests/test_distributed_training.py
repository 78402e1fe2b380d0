"""Two processes over gloo: the same step as one process takes, and a whole training from the shell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import two_ranks
from shell import NAMES, ROOT, TINY_MODEL, start_script

from models.yolo import build_model
from utils.checkpoint import load_checkpoint
from utils.config import parse_yaml

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
HYP = """
nbs: 4
lr0: 3
warmup_epochs: 0
mosaic: 0
hsv_h: 0
hsv_s: 0
hsv_v: 0
translate: 0
scale: 0
fliplr: 0
"""


def draw_even_data(folder: Path) -> Path:
    """Pictures whose one object always has as many matches.

    The box and class terms are means over the matches of a process, so only then is the sum of the
    processes' losses that of the joint batch. The object is moved by whole cells of both levels.
    """
    for split in ("train", "val"):
        (folder / "images" / split).mkdir(parents=True)
        (folder / "labels" / split).mkdir(parents=True)
        for number in range(8):
            rng = np.random.default_rng((len(split), number))
            picture = rng.integers(60, 200, (64, 64, 3), dtype=np.uint8)
            left, top = 16 * int(rng.integers(1, 3)), 16 * int(rng.integers(1, 3))
            picture[top : top + 12, left : left + 12] = (240, 30, 30)
            cv2.imwrite(str(folder / "images" / split / f"{number}.png"), picture)
            row = f"{number % 2} {(left + 6) / 64} {(top + 6) / 64} {12 / 64} {12 / 64}\n"
            (folder / "labels" / split / f"{number}.txt").write_text(row)
    path = folder / "data.yaml"
    path.write_text(f"train: images/train\nval: images/val\nnames: [{', '.join(NAMES)}]\n")
    return path


def run_python(*words: object, cwd: Path) -> str:
    """Run Python with `words` and return what it told; it has to end well."""
    first, *rest = words
    process = start_script(first, *rest, cwd=cwd, PYTHONPATH=str(ROOT))
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-3000:]
    return out + err


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What one process, and each of two, came to."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "tiny.yaml").write_text(TINY_MODEL)
    (folder / "hyp.yaml").write_text(HYP)
    data = draw_even_data(folder / "even")
    words = (
        ROOT / "tests" / "two_ranks.py",
        folder / "tiny.yaml",
        data,
        folder / "hyp.yaml",
        folder,
    )
    two_ranks.main(*map(str, words[1:]))
    run_python(*TORCHRUN, *words, cwd=folder)
    names = {"alone": "rank1_0", "first": "rank2_0", "second": "rank2_1"}
    return {
        key: torch.load(folder / f"{name}.pt", weights_only=True) for key, name in names.items()
    }


def test_both_processes_end_with_the_same_weights(results: dict[str, dict[str, Any]]):
    first, second = results["first"]["model"], results["second"]["model"]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_two_processes_take_the_steps_that_one_takes(results: dict[str, dict[str, Any]]):
    alone, first = results["alone"], results["first"]
    assert alone["updates"] == first["updates"] == 2
    for key, value in alone["model"].items():
        torch.testing.assert_close(first["model"][key], value, rtol=1e-4, atol=1e-6, msg=key)


def test_the_steps_were_worth_comparing(results: dict[str, dict[str, Any]]):
    """Weights have moved by far more than the tolerance."""
    torch.manual_seed(0)
    moved = [
        (results["alone"]["model"][f"model.{i}.conv.weight"] - w).abs().max().item()
        for i, w in started().items()
    ]
    assert min(moved) > 1e-3


def started() -> dict[int, torch.Tensor]:
    """First convolutions of the model before the training."""
    torch.manual_seed(0)
    model = build_model(parse_yaml(TINY_MODEL, "tiny").data, imgsz=(64, 64))
    return {i: model.model[i].conv.weight.detach() for i in range(3)}


def test_validation_is_shared_out_and_everyone_has_the_whole_of_it(
    results: dict[str, dict[str, Any]],
):
    for part in ("images", "predictions"):
        assert results["first"][part] == results["second"][part] == results["alone"][part]
    assert results["alone"]["images"] == 8 and results["alone"]["predictions"] > 0
    for part in ("scores", "places"):
        assert results["first"][part] == results["second"][part]
        assert results["first"][part] == pytest.approx(results["alone"][part], rel=1e-4)


def test_torchrun_finishes_a_training(tmp_path: Path, tiny_cfg: Path, small_data: Path):
    words = ["--cfg", tiny_cfg, "--data", small_data, "--imgsz", 64, "--epochs", 1, "--noplots"]
    words += ["--batch-size", 4, "--workers", 1, "--device", "cpu", "--project", tmp_path / "runs"]
    told = run_python(*TORCHRUN, ROOT / "train.py", *words, cwd=tmp_path)
    assert told.count("best epoch 1: mAP50") == 1
    assert "loss is not finite" not in told
    weights = tmp_path / "runs" / "exp" / "weights"
    assert sorted(path.name for path in weights.iterdir()) == ["best.pt", "last.pt"]
    assert (tmp_path / "runs" / "exp" / "results.csv").read_text().count("\n") == 2
    assert not (tmp_path / "runs" / "exp2").exists()


@pytest.mark.slow
def test_torchrun_that_a_scheduler_stops_goes_on_as_if_it_had_not_been(
    tmp_path: Path, tiny_cfg: Path, small_data: Path
):
    """The launcher passes the signal on, and ends with a code of its own."""
    words = [*TORCHRUN, ROOT / "train.py", "--cfg", tiny_cfg, "--data", small_data, "--imgsz", 64]
    words += ["--epochs", 2, "--batch-size", 2, "--workers", 1, "--device", "cpu", "--noplots"]
    words += ["--project", tmp_path]
    run_python(*words, "--name", "straight", cwd=tmp_path)
    process = start_script(*words, "--name", "stopped", cwd=tmp_path)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("epoch 2/2 1/4"):
            process.terminate()
            break
    told = process.communicate(timeout=600)[1]
    assert process.returncode == 1
    assert told.count("stopped by SIGTERM in epoch 2 of 2 after step ") == 2, told
    last = tmp_path / "stopped" / "weights" / "last.pt"
    progress = load_checkpoint(last)["progress"]
    assert len(progress) == 2 and progress[0]["step"] == progress[1]["step"] < 4
    run_python(*TORCHRUN, ROOT / "train.py", "--resume", last, "--device", "cpu", cwd=tmp_path)
    one, other = (
        load_checkpoint(tmp_path / name / "weights" / "last.pt")["model"]
        for name in ("stopped", "straight")
    )
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
