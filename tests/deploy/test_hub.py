"""torch.hub from another program, one that has its own `utils.py` and `models.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from deploy.hub import Detector
from deploy.results import Results
from models.yolo import build_model
from utils.checkpoint import save_checkpoint
from utils.errors import CheckpointError, DatasetError

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {
    "nc": 2,
    "depth_multiple": 0.33,
    "width_multiple": 0.25,
    "anchors": [[10, 13, 16, 30, 33, 23]],
    "backbone": [
        [-1, 1, "Conv", [32, 6, 2, 2]],
        [-1, 1, "Conv", [32, 3, 2]],
        [-1, 1, "Conv", [32, 3, 2]],
    ],
    "head": [[[2], 1, "Detect", ["nc", "anchors"]]],
}
NAMES = {0: "ship", 1: "buoy/red"}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """One of our checkpoints."""
    torch.manual_seed(0)
    model = build_model(CONFIG)
    path = tmp_path / "best.pt"
    save_checkpoint(
        path, {"model": model.state_dict(), "config": CONFIG, "names": list(NAMES.values())}
    )
    return path


USER_PROGRAM = """
import json
import sys

import data.loader
import models
import torch
import utils

own = (utils, models, data, data.loader)
path_before = list(sys.path)
weights, root = sys.argv[1:]
model = torch.hub.load(root, "custom", path=weights, source="local", _verbose=False)
second = torch.hub.load(root, "custom", weights, source="local", _verbose=False)
named = torch.hub.load(root, "yolov5n", source="local", classes=3)
model.conf = second.conf = 0.0
results = model("picture.png", size=64)
import data.late  # imported only now, and still the user's

ours = ("engine", "models.yolo", "utils.errors", "data.images", "train")
print(json.dumps({
    "same": own == tuple(sys.modules[n] for n in ("utils", "models", "data", "data.loader")),
    "path": sys.path == path_before,
    "leaked": [name for name in ours if name in sys.modules],
    "late": data.late.VALUE,
    "own": utils.OWN + models.OWN + data.loader.OWN,
    "names": results.names,
    "rows": list(results.pred[0].shape),
    "one class": type(model) is type(second),
    "equal": torch.equal(second("picture.png", size=64).pred[0], results.pred[0]),
    "frame": list(results.pandas().xyxy[0].columns),
    "saved": str(results.save()),
    "parameters": sum(p.numel() for p in named.parameters()),
}))
"""


def test_a_program_with_modules_of_the_same_names_keeps_them(tmp_path: Path, weights: Path) -> None:
    project = tmp_path / "project"
    (project / "data").mkdir(parents=True)
    (project / "utils.py").write_text("OWN = 'u'\n")
    (project / "models.py").write_text("OWN = 'm'\n")
    (project / "data" / "__init__.py").write_text("")
    (project / "data" / "loader.py").write_text("OWN = 'd'\n")
    (project / "data" / "late.py").write_text("VALUE = 3\n")
    (project / "main.py").write_text(USER_PROGRAM)
    Image.fromarray(np.full((48, 64, 3), 90, np.uint8)).save(project / "picture.png")
    done = subprocess.run(
        [sys.executable, "main.py", str(weights), str(ROOT)],
        cwd=project, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    rows = said.pop("rows")
    assert rows[1] == 6 and rows[0] > 0
    assert said == {
        "same": True,
        "path": True,
        "leaked": [],
        "late": 3,
        "own": "umd",
        "names": {"0": "ship", "1": "buoy/red"},
        "one class": True,
        "equal": True,
        "frame": ["xmin", "ymin", "xmax", "ymax", "confidence", "class", "name"],
        "saved": "runs/detect/exp",
        "parameters": 1_763_224,  # of the deployed form
    }
    assert (project / "runs" / "detect" / "exp" / "picture.jpg").is_file()


def test_a_program_in_this_folder_shares_its_modules(weights: Path) -> None:
    model = torch.hub.load(str(ROOT), "custom", path=str(weights), source="local")
    assert type(model) is Detector
    assert sys.modules["models.yolo"].build_model is build_model


def test_pictures_of_one_stem_do_not_overwrite_each_other(tmp_path: Path) -> None:
    image = np.zeros((20, 30, 3), np.uint8)
    rows = torch.tensor([[2.0, 2.0, 12.0, 12.0, 0.9, 0.0]])
    names = ["a.jpg", "b/a.png", "a_2.jpg", "b.jpg"]
    results = Results([image] * 4, [rows] * 4, {0: "cat"}, names)
    folder = results.save(save_dir=tmp_path / "out")
    assert sorted(p.name for p in folder.iterdir()) == ["a.jpg", "a_2.jpg", "a_2_2.jpg", "b.jpg"]
    results.crop(save_dir=tmp_path / "cut")
    assert len(list((tmp_path / "cut" / "crops" / "cat").iterdir())) == 4


def test_loading_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        torch.hub.load(str(ROOT), "custom", path=str(tmp_path / "none.pt"), source="local")
    with pytest.raises(CheckpointError, match="no such file"):
        torch.hub.load(
            str(ROOT), "yolov5n", pretrained=str(tmp_path / "yolov5n.pt"), source="local"
        )
    with pytest.raises(ValueError, match="channels=1 beside weights"):
        torch.hub.load(str(ROOT), "yolov5n", channels=1, pretrained="x.pt", source="local")


@pytest.mark.parametrize(("name", "channels", "levels"), [("yolov5n", 1, 3), ("yolov5n6", 4, 4)])
def test_a_published_name_may_have_other_channels_and_four_levels(
    name: str, channels: int, levels: int, capsys: pytest.CaptureFixture[str]
) -> None:
    model = torch.hub.load(
        str(ROOT), name, channels=channels, classes=2, autoshape=False, source="local"
    )
    assert f"{name}: fresh weights, not trained" in capsys.readouterr().err
    assert model.strides == (8, 16, 32, 64)[:levels]
    decoded = model.decode(model(torch.rand(1, channels, 64, 64)))
    assert decoded.scores.shape == (1, 3 * sum((64 // s) ** 2 for s in model.strides), 2)


@pytest.fixture
def detector() -> Detector:
    torch.manual_seed(0)
    model = build_model(CONFIG, names=list(NAMES.values()))
    for head in model.head.m:
        head.bias.data.zero_()
    made = Detector(model)
    made.conf = 0.02
    return made


def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [
        rng.integers(0, 256, (60, 100, 3), dtype=np.uint8),
        rng.integers(0, 256, (96, 40, 3), dtype=np.uint8),
    ]


def test_pictures_are_fitted_into_the_size_that_the_weights_were_trained_at(
    detector: Detector,
) -> None:
    detector.model.imgsz = (96, 128)
    own = detector(pictures())
    for size, is_same in (((96, 128), True), (64, False)):
        other = detector(pictures(), size=size)
        pairs = zip(own.pred, other.pred, strict=True)
        assert all(len(a) == len(b) and torch.equal(a, b) for a, b in pairs) is is_same


def test_every_kind_of_picture_gives_the_same_detections(
    detector: Detector, tmp_path: Path
) -> None:
    image = pictures()[0]
    file = tmp_path / "a.png"
    Image.fromarray(image).save(file)
    expected = detector(image, size=96)
    assert len(expected.pred[0]) > 0
    for given in (file, str(file), Image.fromarray(image), [image], image.transpose(2, 0, 1)):
        assert torch.equal(detector(given, size=96).pred[0], expected.pred[0])
    assert detector(file, size=96).files == ["a.png"]
    grey = detector(image[..., 0], size=96)
    assert grey.ims[0].shape == (60, 100, 3)


def test_pictures_in_memory_are_read_as_their_files(detector: Detector, tmp_path: Path) -> None:
    """Turned by EXIF, with alpha, of one bit, with a palette, of 16 bits in grey and in colour."""
    image, twelve = pictures()[0], np.random.default_rng(0).integers(0, 4096, (60, 100, 3))
    deep = twelve.astype(np.uint16)
    turned = Image.Exif()
    turned[0x0112] = 6
    alpha = np.dstack((image, image[..., 0]))
    made = {
        "turned": Image.fromarray(image), "alpha": Image.fromarray(alpha),
        "grey alpha": Image.fromarray(alpha[..., 2:]), "bit": Image.fromarray(image[..., 0] > 99),
        "palette": Image.fromarray(image).quantize(16), "deep": Image.fromarray(deep[..., 0]),
    }  # fmt: skip
    arrays = {"alpha": alpha, "grey alpha": alpha[..., 2:], "bit": image[..., 0] > 99}
    arrays |= {"deep": deep[..., 0], "deep colours": deep}
    detector.white = 4095
    for name, picture in made.items():
        picture.save(tmp_path / f"{name}.png", exif=turned if name == "turned" else b"")
    assert cv2.imwrite(str(tmp_path / "deep colours.png"), deep[..., ::-1])
    for name in [*made, "deep colours"]:
        file = tmp_path / f"{name}.png"
        expected = detector(file, size=96)
        given: list[Any] = [Image.open(file)]
        given += [arrays[name]] if name in arrays else []
        for found in (detector(one, size=96) for one in given):
            assert (found.ims[0] == expected.ims[0]).all(), name
            assert torch.equal(found.pred[0], expected.pred[0])
    assert detector(Image.open(tmp_path / "turned.png"), size=96).ims[0].shape == (100, 60, 3)
    assert detector(deep, size=96).ims[0].max() == 255


def test_a_batch_gives_boxes_in_the_pixels_of_each_picture(detector: Detector) -> None:
    results = detector(pictures(), size=96)
    assert len(results) == 2 and [len(r) for r in results] == [1, 1]
    for rows, image in zip(results.pred, pictures()):
        height, width = image.shape[:2]
        assert rows.shape[1] == 6 and len(rows) > 0
        assert (rows[:, :4] >= 0).all()
        assert (rows[:, [0, 2]] <= width).all() and (rows[:, [1, 3]] <= height).all()
        assert (rows[1:, 4] <= rows[:-1, 4]).all() and (rows[:, 4] > 0.02).all()
        assert set(rows[:, 5].tolist()) <= {0.0, 1.0}


def test_a_tensor_is_taken_as_it_is(detector: Detector) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    assert torch.allclose(
        detector(tensor).pred[0], detector(image, size=96).pred[0], rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("https://example.org/a.jpg", "nothing is downloaded"),
        ([], "got none"),
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (np.zeros((5, 5, 7), np.uint8), r"\(5, 5, 7\)"),
        (torch.zeros(1, 3, 33, 64), "multiples of 32"),
        (torch.zeros(1, 4, 32, 64), "expected float"),
        ("missing.jpg", "missing.jpg"),
    ],
)
def test_what_is_no_picture_is_said_so(detector: Detector, given: object, words: str) -> None:
    with pytest.raises(DatasetError, match=words):
        detector(given)


def results() -> Results:
    """Two pictures, one with two detections, worked by hand."""
    image = np.zeros((50, 100, 3), np.uint8)
    rows = torch.tensor([[10.0, 20, 30, 40, 0.9, 1], [0, 0, 100, 50, 0.5, 0]])
    return Results([image, image], [rows, rows[:0]], NAMES, ["a.jpg", "a.jpg"])


def test_rows_come_in_four_formats() -> None:
    found = results()
    assert found.xyxy[0][0, :4].tolist() == [10, 20, 30, 40]
    assert found.xywh[0][0].tolist() == pytest.approx([20, 30, 20, 20, 0.9, 1])
    assert found.xyxyn[0][0].tolist() == pytest.approx([0.1, 0.4, 0.3, 0.8, 0.9, 1])
    assert found.xywhn[0][0].tolist() == pytest.approx([0.2, 0.6, 0.2, 0.4, 0.9, 1])
    frame = found.pandas().xywhn[0]
    assert list(frame.columns) == [
        "xcenter", "ycenter", "width", "height", "confidence", "class", "name",
    ]  # fmt: skip
    assert frame["name"].tolist() == ["buoy/red", "ship"] and frame["class"].tolist() == [1, 0]
    assert len(found.pandas().xyxy[1]) == 0
    assert str(found).splitlines() == [
        "image 1/2: 50x100 1 ship, 1 buoy/red",
        "image 2/2: 50x100 nothing",
    ]
    assert [len(single.pred[0]) for single in found.tolist()] == [2, 0]
    with pytest.raises(IndexError):
        found[2]


def test_pictures_and_crops_are_written_and_nothing_is_overwritten(tmp_path: Path) -> None:
    found = results()
    first, second = (found.save(save_dir=tmp_path / "exp") for _ in range(2))
    assert (first.name, second.name) == ("exp", "exp2")
    assert sorted(p.name for p in first.iterdir()) == ["a.jpg", "a_2.jpg"]
    drawn = found.render()
    assert drawn[0].any() and not drawn[1].any() and not found.ims[0].any()
    crops = found.crop(save_dir=tmp_path / "crops")
    assert [crop["label"] for crop in crops] == ["buoy/red 0.90", "ship 0.50"]
    assert crops[0]["im"].shape == (31, 31, 3) and crops[1]["im"].shape == (50, 100, 3)
    written = sorted(str(p.relative_to(tmp_path)) for p in (tmp_path / "crops").rglob("*.jpg"))
    assert written == ["crops/crops/buoy_red/a_0.jpg", "crops/crops/ship/a_1.jpg"]
    assert len(found.crop(save=False)) == 2


def test_supervision_gets_boxes_scores_and_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, np.ndarray] = {}

    def make(**fields: np.ndarray) -> str:
        given.update(fields)
        return "detections"

    monkeypatch.setitem(sys.modules, "supervision", SimpleNamespace(Detections=make))
    assert results().to_supervision() == "detections"
    assert given["xyxy"].tolist() == [[10, 20, 30, 40], [0, 0, 100, 50]]
    assert given["class_id"].tolist() == [1, 0]
    assert given["data"]["class_name"].tolist() == ["buoy/red", "ship"]
    results().to_supervision(1)
    assert given["xyxy"].shape == (0, 4) and given["data"]["class_name"].shape == (0,)
