"""What compare.py says of a config, a checkpoint and an exported file beside one another."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from shell import TINY_MODEL

import compare
from deploy.exporters.network import ExportOptions
from deploy.exporters.onnx_file import export_onnx
from models.table import count_params
from models.yolo import build_model
from utils.checkpoint import save_checkpoint
from utils.config import parse_yaml
from utils.errors import ConfigError

SIZE = ["--imgsz", "64", "--runs", "2", "--device", "cpu"]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """The same untrained model as a YAML, as a run's checkpoint and as an ONNX file."""
    torch.manual_seed(0)
    model = build_model(parse_yaml(TINY_MODEL, "tiny").data, imgsz=(64, 64))
    (tmp_path / "tiny.yaml").write_text(TINY_MODEL)
    weights = tmp_path / "exp" / "weights" / "best.pt"
    weights.parent.mkdir(parents=True)
    content = {"model": model.state_dict(), "config": model.config, "names": ["square", "disc"]}
    save_checkpoint(weights, {**content, "imgsz": [64, 64]})
    return (
        tmp_path / "tiny.yaml",
        weights,
        export_onnx(model, ExportOptions(imgsz=(64, 64)), weights),
    )


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "compare.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_three_forms_of_a_model_are_a_row_each(
    files: tuple[Path, Path, Path],
    shared_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    words = ["--models", *map(str, files), *SIZE, "--data", str(shared_data), "--workers", "0"]
    compare.main([*words, "--project", str(tmp_path / "out")])
    config, checkpoint, exported = rows(tmp_path / "out" / "exp")
    assert checkpoint["name"] == "exp/best.pt" and exported["name"] == "best.onnx"
    size = count_params(build_model(files[0]))
    assert config["params"] == checkpoint["params"] == str(size)
    for column in ("params_deployed", "gflops", "memory"):
        assert config[column] == checkpoint[column] and float(config[column]) > 0
        assert exported[column] == ""
    assert config["map50"] == ""  # no weights, nothing to measure
    assert all(0 <= float(row["map50"]) <= 1 for row in (checkpoint, exported))
    assert all(float(row["latency"]) > 0 for row in (config, checkpoint, exported))
    assert "MiB" in capsys.readouterr().out
    assert (tmp_path / "out" / "exp" / "compare.png").stat().st_size > 5000


def test_a_backbone_goes_under_every_config_and_not_under_weights(
    files: tuple[Path, Path, Path], tmp_path: Path
):
    words = [*SIZE, "--project", str(tmp_path / "out"), "--backbone", "MobileNetV4ConvSmall"]
    compare.main(["--models", "yolov5n", "yolo11n", *words])
    names = [row["name"] for row in rows(tmp_path / "out" / "exp")]
    assert names == ["yolov5n + MobileNetV4ConvSmall", "yolo11n + MobileNetV4ConvSmall"]
    with pytest.raises(ConfigError, match="--backbone: belongs to configs"):
        compare.main(["--models", str(files[1]), *words])


def test_weights_are_measured_at_their_own_size_unless_a_flag_says_another(
    files: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["--weights", *map(str, files[1:]), "--runs", "1", "--device", "cpu"]
    compare.main([*words, "--project", str(tmp_path / "out")])
    assert "at 64x64 on cpu" in capsys.readouterr().err
    compare.main(
        [*words[:2], *words[3:], "--project", str(tmp_path / "out"), "--imgsz", "96", "64"]
    )
    assert "at 96x64 on cpu" in capsys.readouterr().err


def test_flags_of_a_study_are_not_lost_without_one():
    with pytest.raises(
        ConfigError, match=r"^--seeds, --train: belongs to a study. Give --epochs too"
    ):
        compare.main(["--cfg", "yolov5n", "--seeds", "3", "--train", "--amp", "off"])
    with pytest.raises(ConfigError, match="--data: got nothing"):
        compare.main(["--cfg", "yolov5n", "--epochs", "3"])
