"""The scripts from the shell, tiny, the way a user runs them; and what they answer to mistakes."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from shell import SIDE, TINY_MODEL, start_script

import detect
import export
import train
import val
from models.yolo import build_model
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.config import parse_yaml
from utils.errors import run_cli

# Learns the eight pictures in a few seconds: plain pictures, an average that follows at once.
HYP = """
optimizer: Adam
lr0: 0.01
warmup_epochs: 0
nbs: 4
obj: 40
mosaic: 0
hsv_h: 0
hsv_s: 0
hsv_v: 0
translate: 0
scale: 0
ema_tau: 20
"""
LEFT_BY_A_RUN = {
    *("weights/last.pt", "weights/best.pt", "opt.yaml", "hyp.yaml", "model.yaml", "results.csv"),
    *(
        "results.png",
        "labels.jpg",
        "labels_correlogram.jpg",
        "train_batch0.jpg",
        "train_batch1.jpg",
    ),
    *("val_batch0_labels.jpg", "val_batch0_pred.jpg", "confusion_matrix.png", "PR_curve.png"),
    *("P_curve.png", "R_curve.png", "F1_curve.png"),
}


def run(folder: Path, *words: object) -> str:
    """Run a script to its good end; everything it told."""
    process = start_script(*words, cwd=folder)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-3000:]
    assert "Traceback" not in err
    return out + err


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the user's with the model's YAML and a recipe."""
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "tiny.yaml").write_text(TINY_MODEL)
    (folder / "hyp.yaml").write_text(HYP)
    return folder


@pytest.fixture(scope="module")
def trained(place: Path, shared_data: Path) -> tuple[Path, str]:
    """The folder of a training, and what it told."""
    words = ["--cfg", "tiny.yaml", "--data", shared_data, "--hyp", "hyp.yaml", "--imgsz", SIDE]
    words += ["--batch-size", 4, "--epochs", 60, "--noval", "--nosave", "--workers", 0]
    return place / "runs" / "train" / "exp", run(place, "train.py", *words, "--device", "cpu")


@pytest.fixture(scope="module")
def best(trained: tuple[Path, str]) -> Path:
    return trained[0] / "weights" / "best.pt"


@pytest.fixture(scope="module")
def onnx_file(place: Path, best: Path) -> Path:
    pytest.importorskip("onnxruntime")
    told = run(place, "export.py", "--weights", best, "--include", "onnx", "--imgsz", SIDE)
    assert str(best.with_suffix(".onnx")) in told
    return best.with_suffix(".onnx")


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_a_training_leaves_what_users_know(trained: tuple[Path, str]):
    folder, told = trained
    left = {name for name in files(folder) if not name.startswith("events.out.tfevents")}
    assert left == LEFT_BY_A_RUN
    assert all((folder / name).stat().st_size > 0 for name in files(folder))
    assert "recipe: hyp.yaml over data/hyps/yolov5.yaml" in told
    assert "8 training and 4 validation images at 96x96, 2 classes" in told
    assert f"results in {Path('runs/train/exp')}" in told


def test_a_training_learns(trained: tuple[Path, str]):
    lines = (trained[0] / "results.csv").read_text().splitlines()
    header, *rows = [line.split(",") for line in lines]
    assert len(rows) == 60
    first, last = (dict(zip(header, row, strict=True)) for row in (rows[0], rows[-1]))
    assert float(last["train/box_loss"]) < 0.6 * float(first["train/box_loss"])
    assert float(last["metrics/mAP_0.5"]) > 0.02


def test_a_checkpoint_is_for_use_and_says_what_it_is(best: Path):
    content = load_checkpoint(best)
    assert "optimizer" not in content and content["names"] == ["square", "disc"]
    assert content["imgsz"] == [SIDE, SIDE] and content["epoch"] == 59


def validated(place: Path, weights: Path, data: Path, name: str) -> tuple[list[str], list[dict]]:
    """Numbers of the `all` line, and the predictions."""
    words = ["--weights", weights, "--data", data, "--save-json", "--save-txt", "--save-conf"]
    told = run(place, "val.py", *words, "--workers", 0, "--device", "cpu", "--name", name)
    line = next(line for line in told.splitlines() if line.split()[:1] == ["all"])
    folder = place / "runs" / "val" / name
    json_file = folder / f"{weights.stem}_predictions.json"
    assert {"confusion_matrix.png", "val_batch0_pred.jpg", "labels/0.txt"} <= files(folder)
    return line.split()[1:], json.loads(json_file.read_text())


def test_the_exported_model_measures_as_the_trained_one(
    place: Path, trained: tuple[Path, str], best: Path, onnx_file: Path, shared_data: Path
):
    expected, predicted = validated(place, best, shared_data, "torch")
    found, again = validated(place, onnx_file, shared_data, "onnx")
    assert expected[:2] == found[:2] == ["4", "11"]
    difference = [abs(float(a) - float(b)) for a, b in zip(expected, found, strict=True)]
    assert max(difference) <= 0.001
    assert f"mAP50 {float(expected[4]):.4f}, mAP50-95 {float(expected[5]):.4f}" in trained[1]
    assert float(expected[4]) > 0.02
    assert len(predicted) == len(again) > 50
    assert all(has_twin(row, again) for row in predicted)


def has_twin(row: dict[str, Any], others: list[dict[str, Any]]) -> bool:
    """Whether the same image has the same class at the same place with the same score."""
    return any(
        (other["image_id"], other["category_id"]) == (row["image_id"], row["category_id"])
        and abs(other["score"] - row["score"]) < 1e-3
        and np.abs(np.array(other["bbox"]) - row["bbox"]).max() < 0.5
        for other in others
    )


def detected(place: Path, weights: Path, source: Path, name: str) -> dict[str, list[list[float]]]:
    """Boxes of each image, as class, corners and score, best first."""
    words = ["--weights", weights, "--source", source, "--conf-thres", 0.004, "--save-txt"]
    words += ["--save-format", 1, "--save-conf", "--save-csv", "--save-crop", "--device", "cpu"]
    told = run(place, "detect.py", *words, "--name", name)
    folder = place / "runs" / "detect" / name
    assert {f"{number}.png" for number in range(4)} | {"predictions.csv"} <= files(folder)
    assert "objects in 4 images" in told
    return {
        path.stem: [
            [float(word) for word in line.split()] for line in path.read_text().splitlines()
        ]
        for path in sorted((folder / "labels").glob("*.txt"))
    }


def test_the_exported_model_finds_the_same_boxes(
    place: Path, best: Path, onnx_file: Path, shared_data: Path
):
    source = shared_data.parent / "images" / "val"
    expected = detected(place, best, source, "torch")
    found = detected(place, onnx_file, source, "onnx")
    assert list(expected) == list(found) == ["0", "1", "2", "3"]
    assert sum(len(rows) for rows in expected.values()) >= 4
    for name, rows in expected.items():
        assert [row[0] for row in rows] == [row[0] for row in found[name]]
        for one, other in zip(rows, found[name], strict=True):
            assert np.abs(np.array(one[1:5]) - other[1:5]).max() < 0.5
            assert abs(one[5] - other[5]) < 1e-3


def test_a_published_config_trains_with_its_own_recipe(place: Path, shared_data: Path):
    words = ["--cfg", "yolov5n", "--data", shared_data, "--imgsz", 64, 96, "--epochs", 1]
    words += ["--batch-size", 4, "--workers", 1, "--noplots", "--device", "cpu", "--name", "v5"]
    told = run(place, "train.py", *words)
    assert "recipe: data/hyps/yolov5.yaml, the yolov5 family's own" in told
    assert "at 64x96" in told
    left = {name for name in files(place / "runs/train/v5") if "tfevents" not in name}
    assert left == {name for name in LEFT_BY_A_RUN if not name.endswith((".jpg", ".png"))}


def test_the_table_of_a_model_is_printed_from_anywhere(place: Path):
    told = run(place, "models/yolo.py", "--cfg", "tiny.yaml", "--imgsz", 64, "--json")
    record = json.loads(told.splitlines()[-1])
    assert record["strides"] == [8, 16] and len(record["rows"]) == 9


@pytest.mark.parametrize("script", ["train.py", "detect.py"])
def test_an_unknown_flag_is_one_line_and_exit_code_2(script: str, place: Path):
    process = start_script(script, "--no-such-flag", cwd=place)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 2
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1


Told = Callable[..., str]


@pytest.fixture
def told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Told:
    """Run a script in this process, expecting a mistake to be told; the line that tells it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY_MODEL)

    def tell(script: ModuleType, *words: object) -> str:
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            run_cli(script.main)
        assert caught.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert sum(line.startswith("error: ") for line in lines) == 1
        assert lines[-1].startswith("error: ") and "Traceback" not in "".join(lines)
        assert not (tmp_path / "runs").exists()
        return lines[-1]

    return tell


QUICK = ("--cfg", "tiny.yaml", "--imgsz", 64, "--workers", 0, "--epochs", 1, "--device", "cpu")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--data", "nowhere.yaml"), "nowhere.yaml: no such data YAML or folder"),
        (("--cfg", "yolov5q"), "yolov5q: no such model YAML. Did you mean 'yolov5"),
        (("--weights", "nowhere.pt"), "nowhere.pt"),
        (("--hyp", "nowhere.yaml"), "nowhere.yaml: cannot be read"),
        (("--device", "gpu"), "--device: got 'gpu', expected cpu"),
        (("--device", "99"), "--device 99: GPU 99 is not here"),
        (("--imgsz", 64, 64, 64), "--imgsz: got [64, 64, 64], expected one size or two"),
        (("--imgsz", "big"), "got 'big', expected a whole number"),
        (("--epochs", 0), "got 0, expected 1 or more"),
        (("--freeze", "everything"), "--freeze: got 'everything'"),
        (("--backbone", "EMO_9M"), "unknown layer 'EMO_9M'"),
        (("--backbone", "EMO_1M", "weights"), "--backbone: got 'weights', expected key=value"),
        (("--resume",), "--resume: no last.pt under runs/train"),
        (("--resume", "gone/last.pt"), "--resume: gone/last.pt is not there"),
        (("--rect", "--image-weights"), "--image-weights: cannot be used with --rect"),
    ],
)
def test_a_mistake_in_the_flags_of_a_training(
    words: tuple[object, ...], message: str, told: Told, shared_data: Path
):
    assert message in told(train, *QUICK, "--data", shared_data, *words)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("7 0.5 0.5 0.2 0.2", "expected 0 to 1"),  # beyond `names`
        ("0.5 0.5 0.2 0.2", "expected"),  # no class
        ("0 0.5 0.5 wide 0.2", "got 'wide'"),  # no number
    ],
)
def test_a_mistake_in_a_label_file_names_file_and_line(
    row: str, message: str, told: Told, small_data: Path
):
    label = small_data.parent / "labels" / "train" / "0.txt"
    label.write_text(f"{row}\n")
    line = told(train, *QUICK, "--data", small_data)
    assert f"{label} line 1: " in line and message in line


@pytest.mark.parametrize("what", ["images", "split", "names", "yaml"])
def test_a_mistake_in_the_data_is_one_line(what: str, told: Told, small_data: Path):
    if what == "images":
        shutil.rmtree(small_data.parent / "images" / "train")
    text = {
        "images": small_data.read_text(),
        "split": "val: images/val\nnames: [a, b]\n",
        "names": "train: images/train\nval: images/val\n",
        "yaml": "train: [unclosed\n",
    }[what]
    small_data.write_text(text)
    assert str(small_data.parent) in told(train, *QUICK, "--data", small_data)


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        (val, ("--weights", "nowhere.pt"), "nowhere.pt: no such file"),
        (val, ("--weights", "nowhere.onnx"), "nowhere.onnx: no such file"),
        (val, ("--weights", "notes.txt"), "unknown kind of file '.txt'"),
        (val, ("--weights", "broken.pt"), "broken.pt: "),
        (val, ("--weights", "broken.onnx"), "broken.onnx: "),
        (detect, ("--weights", "nowhere.pt", "--source", "."), "nowhere.pt: no such file"),
        (detect, ("--source", "."), "best.pt: no such file"),
        (export, ("--weights", "nowhere.pt"), "nowhere.pt"),
        (export, (), "--weights: got nothing, expected a checkpoint"),
        (export, ("--no-such-flag",), "unknown argument '--no-such-flag'"),
        (val, ("--weigths", "a.pt"), "unknown argument '--weigths'"),
    ],
)
def test_weights_that_are_none_are_told(
    script: ModuleType, words: tuple[str, ...], message: str, told: Told, tmp_path: Path
):
    for name in ("notes.txt", "broken.pt", "broken.onnx"):
        (tmp_path / name).write_bytes(b"nothing of the kind" * 20)
    assert message in told(script, *words)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """An untrained checkpoint of three classes."""
    torch.manual_seed(0)
    model = build_model(parse_yaml(TINY_MODEL, "tiny").data, num_classes=3, imgsz=(64, 64))
    content = {"model": model.state_dict(), "config": model.config, "names": ["a", "b", "c"]}
    save_checkpoint(tmp_path / "three.pt", {**content, "imgsz": [64, 64]})
    return tmp_path / "three.pt"


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        (val, ("--data", "DATA"), "got a model of 3 classes for"),
        (val, ("--data", "nowhere.yaml"), "nowhere.yaml"),
        (val, ("--data", "DATA", "--device", "moon"), "--device: got 'moon'"),
        (detect, ("--source", "nowhere.jpg"), "nowhere.jpg"),
        (detect, ("--source", "IMAGES", "--classes", "d"), "--classes: got 'd', expected an index"),
        (detect, ("--source", "IMAGES", "--imgsz", 64, 64, 64), "expected one size or two"),
        (detect, ("--source", "IMAGES", "--device", "7"), "GPU 7 is not here"),
        (export, ("--include", "onxx"), "Did you mean 'onnx'"),
    ],
)
def test_what_does_not_fit_the_weights_is_told(
    script: ModuleType,
    words: tuple[Any, ...],
    message: str,
    told: Told,
    weights: Path,
    shared_data: Path,
):
    places = {"DATA": shared_data, "IMAGES": shared_data.parent / "images" / "val"}
    words = tuple(places.get(str(word), word) for word in words)
    assert message in told(script, "--weights", weights, *words)


def test_nothing_is_fetched_without_the_flag(told: Told, tmp_path: Path):
    """A data set that is not there is told, with the flag that fetches it; no address is asked."""
    (tmp_path / "far.yaml").write_text(
        "path: far\ntrain: images/train\nval: images/val\nnames: [a]\n"
        "sources:\n  - {url: 'http://127.0.0.1:9/far.zip'}\n"
    )
    assert "--download" in told(train, *QUICK, "--data", "far.yaml")


def test_an_interrupt_is_a_word_and_no_traceback(capsys: pytest.CaptureFixture[str]):
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        run_cli(interrupted)
    assert (caught.value.code, capsys.readouterr().err) == (130, "interrupted\n")
