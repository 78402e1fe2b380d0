"""Models whose YAML imports a user's file, and weights that fill a model only in part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from deploy.backends import load_backend
from deploy.exporters.network import ExportOptions
from deploy.exporters.torch_files import export_safetensors
from models import modules
from models.parser.graft import forget_weights
from models.parser.rows import DETECT_FOLDER
from models.weights.load import load_weights
from models.yolo import DetectionModel, build_model, model_from_checkpoint
from utils.checkpoint import save_checkpoint
from utils.errors import CheckpointError, ConfigError

CODE = """
from __future__ import annotations
from dataclasses import dataclass
from torch import nn

@dataclass
class Widths:
    first: int

class Mine(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        widths = Widths(width)
        self.a = nn.Conv2d(3, widths.first, 4, 4)
        self.b = nn.Conv2d(widths.first, 2 * width, 2, 2)

    def forward(self, x):
        x = self.a(x)
        return [x, self.b(x)]
"""
SIZE = (64, 64)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A YAML with `imports:`."""
    monkeypatch.setattr(modules, "_FILES", dict(modules._FILES))
    (tmp_path / "mine.py").write_text(CODE)
    path = tmp_path / "mine.yaml"
    path.write_text(
        "nc: 2\nimports: mine.py\nbackbone:\n  - [-1, 1, Mine, [16]]\nhead:\n  - [[P3], 1, Detect, [nc]]\n"
    )
    return path


def saved(yaml: Path) -> Path:
    model = build_model(yaml, names=("a", "b"), imgsz=SIZE, allow_code=True)
    path = yaml.with_suffix(".pt")
    save_checkpoint(
        path,
        {"model": model.state_dict(), "config": model.config, "names": ["a", "b"], "imgsz": SIZE},
    )
    export_safetensors(model, ExportOptions(imgsz=SIZE), path)
    return path


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_model_that_imports_code_is_loaded_where_that_is_allowed(mine: Path, suffix: str):
    path = saved(mine).with_suffix(suffix)
    with pytest.raises(ConfigError, match=r"mine\.py would run code.*--allow-code"):
        load_backend(path)
    decoded = load_backend(path, allow_code=True)(torch.rand(1, 3, *SIZE))
    assert decoded.boxes.shape == (1, 64, 4)


def test_arguments_of_a_class_that_is_not_imported_yet_are_kept():
    rows = {"backbone": [[-1, 1, "NotYetImported", [16, {"pretrained": True}]]], "head": []}
    assert forget_weights(rows)["backbone"] == [
        [-1, 1, "NotYetImported", [16, {"pretrained": False}]]
    ]


@pytest.mark.parametrize("section", ["backbone", "head"])
def test_no_row_keeps_a_wish_for_weights(section: str):
    row = [
        -1,
        1,
        "resnet18",
        [True, "/etc/hostname", {"checkpoint_path": "/x", "pretrained": True}],
    ]
    fresh = forget_weights({section: [row]})[section][0][3]
    assert fresh == [False, False, {"checkpoint_path": False, "pretrained": False}]


def test_a_file_fails_in_whatever_way_and_is_one_line(tmp_path: Path):
    for number, code in enumerate(
        ("{}['X']\n", "raise RuntimeError('no device')\n", "open('/no')\n")
    ):
        (tmp_path / f"bad{number}.py").write_text(code)
        config = {
            "imports": str(tmp_path / f"bad{number}.py"),
            "backbone": [[-1, 1, "Conv", [8]]],
            "head": [[[0], 1, "Detect", ["nc"]]],
        }
        with pytest.raises(ConfigError, match=f"bad{number}.py cannot be imported - ") as caught:
            build_model(config, imgsz=SIZE, allow_code=True)
        assert "\n" not in str(caught.value)


def tiny(width: int) -> dict:
    return {
        "nc": 2,
        "backbone": [[-1, 1, "Conv", [8, 3, 4]], [-1, 1, "Conv", [width, 3, 2]]],
        "head": [[[1], 1, "Detect", ["nc"]]],
    }


def test_weights_that_fill_little_of_a_model_are_refused_and_gaps_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = build_model(tiny(16), imgsz=SIZE)
    path = tmp_path / "foreign.pt"
    state = model.state_dict()
    torch.save({"state_dict": state}, path)
    other = tmp_path / "other.yaml"
    other.write_text(json.dumps(tiny(64)))
    with pytest.raises(CheckpointError, match=r"fills only .* of the model.*--cfg"):
        load_backend(path, cfg=str(other))
    own = tmp_path / "own.yaml"
    own.write_text(json.dumps(tiny(16)))
    torch.save({"state_dict": {k: v for k, v in state.items() if k != "model.0.bn.bias"}}, path)
    capsys.readouterr()
    load_backend(path, cfg=str(own))
    told = capsys.readouterr().err
    assert told.startswith("warning: ") and "missing 1: model.0" in told


def test_a_models_size_and_names_are_read_from_its_weights(tmp_path: Path):
    model = build_model(tiny(16), names=("cat", "dog"), imgsz=(64, 96))
    path = tmp_path / "own.pt"
    save_checkpoint(
        path,
        {
            "model": model.state_dict(),
            "config": model.config,
            "names": ["cat", "dog"],
            "imgsz": [64, 96],
        },
    )
    again = load_weights(path, cfg=tiny(16)).model
    assert again.imgsz == (64, 96) and again.names == ("cat", "dog")
    export_safetensors(model, ExportOptions(imgsz=(64, 96)), path)
    assert load_weights(path.with_suffix(".safetensors")).model.names == ("cat", "dog")


def test_tied_weights_can_be_written(tmp_path: Path):
    model = build_model(tiny(8), imgsz=SIZE)
    twin = model.model[0].conv.weight
    model.register_parameter("twin", twin)
    path = export_safetensors(model, ExportOptions(imgsz=SIZE), tmp_path / "tied.pt")
    with safe_open(str(path), "pt") as file:
        assert torch.equal(file.get_tensor("twin"), twin)
    with pytest.raises(RuntimeError):
        save_file(model.state_dict(), str(path))


ROW = {"backbone": [[-1, 1, "EMO_1M", []]], "head": [[["P3"], 1, "Detect", ["nc"]]], "nc": 2}


def rebuilt(config: dict) -> DetectionModel:
    model = build_model(config, imgsz=SIZE, allow_code=True)
    record = {"config": model.config, "names": model.names, "imgsz": SIZE}
    again = model_from_checkpoint({**record, "model": model.state_dict()}, allow_code=True)
    assert [*again.state_dict()] == [*model.state_dict()]
    return again


@pytest.mark.parametrize(
    "args", [[], [None], ["None"], [False], [{"weights": None}], {"weights": False}]
)
def test_a_layer_that_has_two_ways_to_say_no_weights_is_rebuilt_as_it_was(args):
    se = rebuilt({**ROW, "backbone": [[-1, 1, "EMO_1M", args]]})
    has_se = any("stage1" in key and ".se." in key for key in se.state_dict())
    assert has_se == (args in ([], [None], ["None"], [{"weights": None}]))


@pytest.mark.parametrize("args", [[8, "FILE"], [{"weights": "FILE"}]])
def test_a_users_weights_are_read_once_and_not_again_for_a_checkpoint(
    mine: Path, args: list, tmp_path: Path
):
    reader = """
class Reader(Mine):
    def __init__(self, width=8, weights=None):
        super().__init__(width)
        if weights is not None:
            self.load_state_dict(__import__("torch").load(weights, weights_only=True))
"""
    (tmp_path / "mine.py").write_text(CODE + reader)
    config = {**ROW, "imports": str(tmp_path / "mine.py")}
    plain = build_model(
        {**config, "backbone": [[-1, 1, "Reader", []]]}, imgsz=SIZE, allow_code=True
    )
    file = tmp_path / "w.pt"
    torch.save(plain.model[0].state_dict(), file)
    text = json.loads(json.dumps(args).replace("FILE", str(file)))
    again = build_model(
        {**config, "backbone": [[-1, 1, "Reader", text]]}, imgsz=SIZE, allow_code=True
    )
    assert torch.equal(again.model[0].a.weight, plain.model[0].a.weight)
    file.unlink()
    rebuilt_from(again)


def rebuilt_from(model: DetectionModel) -> None:
    record = {"config": model.config, "names": model.names, "imgsz": SIZE}
    model_from_checkpoint({**record, "model": model.state_dict()}, allow_code=True)


def test_a_relative_import_is_found_from_any_folder(mine: Path, monkeypatch: pytest.MonkeyPatch):
    (mine.parent / "elsewhere").mkdir()
    monkeypatch.chdir(mine.parent)
    model = build_model(Path("mine.yaml"), imgsz=SIZE, allow_code=True)
    monkeypatch.chdir(mine.parent / "elsewhere")
    rebuilt_from(model)
    (mine.parent / "mine.py").unlink()
    with pytest.raises(
        ConfigError, match=r"got mine\.py, expected a file beside the YAML"
    ) as caught:
        rebuilt_from(model)
    assert str(mine.parent) in str(caught.value)


def test_foreign_weights_of_a_grafted_model_are_filled_by_cfg_and_backbone(tmp_path: Path):
    model = build_model(
        "yolov5n", num_classes=2, backbone=["MobileNetV4ConvSmall"], imgsz=SIZE
    ).eval()
    path = tmp_path / "plain.pt"
    torch.save(model.state_dict(), path)
    images = torch.rand(1, 3, *SIZE)
    cfg = tmp_path / "two.yaml"
    cfg.write_text((DETECT_FOLDER / "yolov5n.yaml").read_text().replace("nc: 80", "nc: 2"))
    backend = load_backend(path, cfg=str(cfg), backbone=["MobileNetV4ConvSmall"], fuse=False)
    with torch.no_grad():
        torch.testing.assert_close(backend(images).boxes, model.decode(model(images)).boxes)
    with pytest.raises(ConfigError, match=r"--backbone: belongs to --cfg"):
        load_backend(path, backbone=["MobileNetV4ConvSmall"])
    with pytest.raises(CheckpointError, match="fills only"):
        load_backend(path, cfg=str(cfg), backbone=["EMO_5M"])
