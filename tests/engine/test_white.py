"""White of images deeper than 8 bits: told at the scan, said once in a data YAML, kept in every file."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from test_run import options_of, run_of
from tiny_models import tiny_model

from data.config import load_data_config
from data.dataset import LoadOptions, build_dataset
from data.sources import open_source
from deploy.backends import load_backend
from deploy.exporters.network import ExportOptions
from deploy.exporters.onnx_file import export_onnx
from deploy.exporters.torch_files import export_pt, export_safetensors, export_torchscript
from deploy.hub import Detector
from deploy.runtimes.metadata import parse_metadata
from engine.datasets import open_data
from engine.options import DataFlags
from engine.state import save
from utils.errors import CheckpointError


@pytest.fixture
def twelve_bits(small_data: Path) -> Path:
    """The small data set in files of 16 bits a channel, of which 12 are used."""
    for path in small_data.parent.glob("images/*/*.png"):
        picture = cv2.imread(str(path)).astype(np.uint16)
        assert cv2.imwrite(str(path), picture * 16)
    return small_data


def say(file: Path, line: str) -> Path:
    file.write_text(f"{file.read_text()}{line}\n")
    return file


def image_of(file: Path, split: str = "val", **options) -> torch.Tensor:
    dataset = build_dataset(load_data_config(file), split, LoadOptions(imgsz=(96, 96), **options))
    return dataset[0].image


def test_dark_files_are_told_with_what_to_write_and_white_mends_them(twelve_bits: Path, caplog):
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        dark = image_of(twelve_bits)
        assert (
            "val: images of 16 bits whose largest value is 3840 are read as 16 of 256"
            in caplog.text
        )
        assert "Write `white: 4095` into " in caplog.text
    caplog.clear()
    bright = image_of(say(twelve_bits, "white: 4095"))
    assert "WARNING" not in caplog.text
    assert dark.max() <= 16 and bright.max() == round(3840 * 255 / 4095)


@pytest.mark.parametrize(
    ("white", "told"),
    [(1000, "values beyond white are cut, up to 3840 (white: 1000)"), (65535, ""), (4095, "")],
)
def test_a_white_that_cuts_is_told(twelve_bits: Path, white: int, told: str, caplog):
    image_of(say(twelve_bits, f"white: {white}"))
    assert (told in caplog.text) if told else "WARNING" not in caplog.text


def test_a_white_for_files_of_eight_bits_is_told(small_data: Path, caplog):
    plain = image_of(small_data)
    assert torch.equal(image_of(say(small_data, "white: 100")), plain)
    assert "white: 100 is without effect, no image has more than 8 bits" in caplog.text


def test_the_disk_cache_is_of_one_white(twelve_bits: Path):
    dark = image_of(twelve_bits, cache="disk")
    assert image_of(say(twelve_bits, "white: 4095"), cache="disk").max() > 10 * dark.max()


def test_a_checkpoint_keeps_white_and_hands_it_to_what_is_read_later(
    tiny_cfg: Path, twelve_bits: Path, tmp_path: Path, monkeypatch, caplog
):
    plain = twelve_bits.read_text()
    run = run_of(tiny_cfg, say(twelve_bits, "white: 4095"), tmp_path)
    save(run, tmp_path / "best.pt", 0)
    backend = load_backend(tmp_path / "best.pt")
    assert backend.info.white == run.model.config["white"] == 4095.0
    assert Detector(run.model).white == 4095.0
    file = next(twelve_bits.parent.glob("images/val/*.png"))
    assert next(iter(open_source(file, white=backend.info.white))).image.max() > 200

    twelve_bits.write_text(plain)  # a data set that says nothing takes the model's
    options = options_of("", twelve_bits, "--weights", str(tmp_path / "best.pt"))
    assert open_data(options, backend.info.white).white == 4095.0
    again = run_of("", twelve_bits, tmp_path, "--weights", str(tmp_path / "best.pt"))
    assert again.train_set.config.white == again.model.config["white"] == 4095.0
    say(twelve_bits, "white: 1023")  # one that says something else has its way, and is told
    other = run_of("", twelve_bits, tmp_path, "--weights", str(tmp_path / "best.pt"))
    assert other.model.config["white"] == 1023.0


def test_two_whites_are_told(twelve_bits: Path, capsys):
    say(twelve_bits, "white: 1023")
    options = DataFlags(data=str(twelve_bits))
    assert open_data(options, 4095.0).white == 1023.0
    assert "white: 1023, but the model learned with 4095" in capsys.readouterr().err


@pytest.mark.parametrize("write", [export_torchscript, export_safetensors, export_pt, export_onnx])
def test_exported_files_keep_white(write, tmp_path: Path):
    if write is export_onnx:
        pytest.importorskip("onnxruntime")
    model = tiny_model("channels")
    model.config["white"] = 4095.0
    path = write(model, ExportOptions(imgsz=(64, 96)), tmp_path / "m.pt")
    assert load_backend(path).info.white == 4095.0


def test_a_file_that_lies_about_white_is_refused():
    described = {
        "names": "{0: 'a'}", "imgsz": "[64, 64]", "stride": "32", "batch": "1", "dynamic": "all", "family": "yolo11",
        "postprocess": "nms", "layout": "channels", "channels": "3", "half": "False",
    }  # fmt: skip
    assert parse_metadata(described, "x").white is None
    for white in ("bright", "nan", "-1", "inf"):
        with pytest.raises(CheckpointError, match="x: (its )?metadata"):
            parse_metadata({**described, "white": white}, "x")
