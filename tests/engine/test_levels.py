"""What pyramid levels respond to, beside the annotated picture."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from tiny_models import tiny_model

import detect
from data.transforms import letterbox
from deploy.backends import model_backend, network_of
from engine.levels import Levels
from utils.checkpoint import save_checkpoint
from utils.errors import ConfigError
from utils.structures import as_float


def test_a_bright_cell_stands_where_it_is_in_the_picture():
    network = network_of(model_backend(tiny_model("channels")))
    levels = Levels(network)
    image = np.full((120, 160, 3), 90, np.uint8)
    fitted, box = letterbox(image, (96, 96))
    batch = torch.from_numpy(fitted).permute(2, 0, 1)[None]
    network(as_float(batch, "cpu"))
    assert [one.shape for one in levels.responses] == [(1, 12, 12), (1, 6, 6), (1, 3, 3)]
    response = np.zeros((2, 12, 12), np.float32)
    response[1, 6, 2] = 5.0  # column 2 of 12: x 16 to 24 of 96, which are pixels 27 to 40 of 160
    levels.responses = [response]
    ((stride, picture),) = levels.pictures(1, image, box)
    assert (stride, picture.shape) == (8, image.shape)
    row, column = np.unravel_index(picture.sum(2).argmax(), picture.shape[:2])
    assert 27 <= column <= 40
    assert 60 <= row <= 74  # row 6 of 12: y 48 to 56 of 96; 12 of padding, so 60 to 73 of 120


def test_detect_writes_a_picture_a_level_and_refuses_exported_files(tmp_path: Path):
    model = tiny_model("channels")
    content = {"model": model.state_dict(), "config": model.config, "names": list(model.names)}
    save_checkpoint(tmp_path / "m.pt", {**content, "imgsz": [64, 96]})
    cv2.imwrite(str(tmp_path / "a.png"), np.random.default_rng(0).integers(0, 255, (50, 70, 3)))
    words = ["--source", str(tmp_path / "a.png"), "--project", str(tmp_path), "--name", "d"]
    detect.main(["--weights", str(tmp_path / "m.pt"), *words, "--visualize", "--device", "cpu"])
    names = {path.name for path in (tmp_path / "d").iterdir()}
    assert names == {"a.png", "a_stride8.jpg", "a_stride16.jpg", "a_stride32.jpg"}
    assert cv2.imread(str(tmp_path / "d/a_stride32.jpg")).shape == (50, 70, 3)
    with pytest.raises(ConfigError, match="--visualize: got m.onnx, expected one .pt"):
        detect.levels_of(object(), "m.onnx")
