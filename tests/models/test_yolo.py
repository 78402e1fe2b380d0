"""The whole model: forward, checkpoints, `--backbone`, and the table that `models/yolo.py` prints."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.meta import evaluating, run_on_meta
from models.table import count_params, format_table, measure
from models.weights.load import load_weights
from models.yolo import (
    build_model,
    describe,
    main,
    model_from_checkpoint,
    parse_options,
)
from utils.checkpoint import save_checkpoint
from utils.errors import CheckpointError, ConfigError
from utils.structures import Targets

SMALL: dict[str, Any] = {
    "nc": 2,
    "anchors": [[10, 13, 16, 30]],
    "backbone": [
        [-1, 1, "Conv", [8, 3, 2], "stem"],
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "Conv", [16, 3, 2]],
    ],
    "head": [
        [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
        [[-1, 1], 1, "Concat", [1]],
        [[-1], 1, "Detect", ["nc", "anchors"]],
    ],
}


def test_rows_are_wired_as_written():
    model = build_model(SMALL, imgsz=(64, 64)).eval()
    rows = model.model
    image = torch.rand(1, 3, 64, 64)
    one = rows[1](rows[0](image))
    expected = rows[5]([rows[4]([rows[3](rows[2](one)), one])])
    assert torch.equal(model(image).levels[0], expected.levels[0])
    assert model.strides == (4,)
    assert model.max_stride == 32


@pytest.mark.parametrize(("height", "width"), [(64, 96), (96, 32), (32, 32)])
def test_any_multiple_of_the_stride_goes_through(height: int, width: int):
    model = build_model(SMALL, imgsz=(64, 64)).eval()
    raw = model(torch.rand(2, 3, height, width))
    assert raw.levels[0].shape == (2, 2, height // 4, width // 4, 7)
    decoded = model.decode(raw)
    assert decoded.boxes.shape == (2, 2 * height * width // 16, 4)
    assert decoded.scores.shape == (2, 2 * height * width // 16, 2)


def test_forward_returns_the_same_type_in_training_and_does_not_change_the_model():
    model = build_model(SMALL, imgsz=(64, 64))
    image = torch.rand(2, 3, 64, 64)
    keys = list(vars(model))
    assert type(model.train()(image)) is type(model.eval()(image))
    assert list(vars(model)) == keys


def test_targets_reach_the_head_only():
    model = build_model(SMALL, imgsz=(64, 64))
    seen: list[Any] = []

    def remember(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args)

    for row in model.model:
        row.register_forward_pre_hook(remember)
    targets = Targets.empty()
    model(torch.rand(1, 3, 64, 64), targets)
    assert [len(args) for args in seen] == [1, 1, 1, 1, 1, 2]
    assert seen[-1][1] is targets


def test_names_and_class_count_follow_the_arguments():
    model = build_model(SMALL, names=("cat", "dog", "cow"), num_classes=3)
    assert model.names == ("cat", "dog", "cow")
    assert model.head.num_classes == 3
    assert build_model(SMALL).names == ("class0", "class1")


def test_a_model_is_rebuilt_from_its_config():
    model = build_model("yolo11s", num_classes=3, imgsz=(64, 64))
    again = build_model(model.config, imgsz=(64, 64))
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }


def checkpoint_of(model: nn.Module, **more: Any) -> dict[str, Any]:
    return {
        "model": model.state_dict(),
        "config": model.config,
        "names": list(model.names),
        "imgsz": list(model.imgsz),
        **more,
    }


def test_a_checkpoint_gives_the_model_back(tmp_path: Path):
    model = build_model(SMALL, names=("cat", "dog"), imgsz=(64, 96)).eval()
    save_checkpoint(tmp_path / "a.pt", checkpoint_of(model))
    again = load_weights(tmp_path / "a.pt").model
    image = torch.rand(1, 3, 64, 96)
    assert torch.equal(again(image).levels[0], model(image).levels[0])
    assert (again.names, again.imgsz, again.training) == (("cat", "dog"), (64, 96), False)


def test_of_a_checkpoint_with_an_average_the_average_is_used():
    model = build_model(SMALL, imgsz=(64, 64))
    average = {key: torch.ones_like(value) for key, value in model.state_dict().items()}
    again = model_from_checkpoint(checkpoint_of(model, ema={"model": average, "updates": 3}))
    assert all(bool((value == 1).all()) for value in again.state_dict().values())


def test_a_checkpoint_needs_no_file_that_its_config_once_named(tmp_path: Path):
    """Weights for the start are read once; the checkpoint has its own."""
    config = {**SMALL, "backbone": [[-1, 1, "EMO_1M", [False]]], "head": [SMALL["head"][-1]]}
    state = checkpoint_of(build_model(config, imgsz=(64, 64)))
    state["config"] = {**config, "backbone": [[-1, 1, "EMO_1M", ["gone.pth"]]]}
    save_checkpoint(tmp_path / "a.pt", state)
    assert load_weights(tmp_path / "a.pt").model.rows[0].module == "EMO_1M"


def test_weights_that_do_not_fit_their_config_are_one_line():
    model = build_model(SMALL, imgsz=(64, 64))
    wrong = {**checkpoint_of(model), "config": {**SMALL, "nc": 5}, "names": list("abcde")}
    with pytest.raises(CheckpointError, match="do not fit their own config") as caught:
        model_from_checkpoint(wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {}),
        (["factor=0.5"], {"factor": 0.5}),
        (["pretrained=true", "depth=3"], {"pretrained": True, "depth": 3}),
        (["weights=a=b.pt"], {"weights": "a=b.pt"}),
        (["x=None"], {"x": None}),
        (["x=__import__('os')"], {"x": "__import__('os')"}),
    ],
)
def test_options_of_a_backbone_are_literals(words: list[str], expected: dict[str, Any]):
    assert parse_options(words) == expected


@pytest.mark.parametrize("word", ["pretrained", "=3", "a b=3", "a.b=3"])
def test_an_option_that_is_none_is_refused(word: str):
    with pytest.raises(ConfigError, match="expected key=value"):
        parse_options([word])


def test_another_backbone_is_put_under_a_config():
    model = build_model("yolov5n", backbone=["EMO_1M"], imgsz=(64, 64), num_classes=2)
    assert model.rows[0].module == "EMO_1M"
    assert model.strides == (8, 16, 32)
    assert model.config["backbone"][0][2] == "EMO_1M"


def test_meta_runs_leave_modes_and_statistics_alone():
    model = build_model(SMALL, imgsz=(64, 64)).train()
    model.model[0].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    raw = run_on_meta(model, torch.empty(1, 3, 64, 64, device="meta"))
    assert torch.equal(torch.rand(3), expected)
    assert raw.levels[0].is_meta
    assert (model.training, model.model[0].training, model.model[1].training) == (True, False, True)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


class Shares(nn.Module):
    """One convolution under two names, and one weight in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Conv2d(3, 3, 1)
        self.other = nn.Conv2d(3, 3, 1)
        self.other.weight = self.first.weight
        self.inner = nn.Sequential(self.first, nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.other(self.second(self.first(x))))


def test_meta_runs_give_shared_tensors_back():
    model = Shares()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert run_on_meta(model, torch.empty(2, 3, 4, 4, device="meta")).is_meta
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert model.other.weight is model.first.weight
    assert model(torch.rand(2, 3, 4, 4)).isfinite().all()


def test_modes_come_back_after_an_error():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout()).train()
    with pytest.raises(RuntimeError, match="inside"), evaluating(model):
        assert not model[1].training
        raise RuntimeError("inside")
    assert model[1].training


def test_parameters_and_gflops_are_those_worked_out_by_hand():
    """Conv 3 -> 8, 3x3, stride 2, at 64x32: 216 weights and 2 x 216 operations at each of 512."""
    conv = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
    assert count_params(conv) == 216
    assert measure(conv, (64, 32)).gflops == pytest.approx(2 * 216 * 32 * 16 / 1e9)


def test_a_shared_parameter_counts_once():
    conv = nn.Conv2d(4, 4, 1)
    assert count_params(nn.Sequential(conv, conv)) == 20


@pytest.mark.parametrize(("cfg", "gflops"), [("yolov5n", 4.47), ("yolo11n", 6.54)])
def test_gflops_at_640_are_the_published_ones(cfg: str, gflops: float):
    with torch.device("meta"):
        model = build_model(cfg)
    assert measure(model, (640, 640)).gflops == pytest.approx(gflops, abs=0.005)


def test_the_description_has_both_forms_and_every_row():
    record = describe(build_model(SMALL, imgsz=(64, 64)), (64, 64))
    assert record["params"] == count_params(build_model(SMALL))
    # three norms of 8, 16 and 16 channels: weight and bias go, a bias comes
    assert record["params"] - record["params_deployed"] == 8 + 16 + 16
    assert record["strides"] == [4]
    assert [row["index"] for row in record["rows"]] == [0, 1, 2, 3, 4, 5]
    assert record["rows"][4] == {
        "index": 4,
        "from": [-1, 1],
        "n": 1,
        "params": 0,
        "module": "Concat",
        "args": "[1]",
        "shape": [[32, 16, 16]],
        "stride": [4],
    }
    assert sum(row["params"] for row in record["rows"]) == record["params"]


def test_the_table_has_a_line_for_every_map_of_a_backbone():
    config = {**SMALL, "backbone": [[-1, 1, "EMO_1M", [False]]], "head": [SMALL["head"][-1]]}
    lines = format_table(build_model(config, imgsz=(64, 64))).splitlines()
    assert len(lines) == 1 + 5 + 1  # its heading, P1 to P5, Detect
    assert re.search(r"32 x 16 x 16\s+4$", lines[2])
    assert re.search(r"^\s+5\s+\[-1\]\s+1\s+[\d,]+\s+Detect", lines[-1])


def test_the_script_prints_the_table_totals_and_one_json_object(
    capsys: pytest.CaptureFixture[str],
):
    main(["--cfg", "yolov5n", "--imgsz", "64", "96", "--nc", "3", "--json"])
    lines = capsys.readouterr().out.splitlines()
    record = json.loads(lines[-1])
    assert set(record) >= {
        "params",
        "params_deployed",
        "gflops",
        "gflops_deployed",
        "strides",
        "rows",
    }
    assert record["imgsz"] == [64, 96]
    assert record["strides"] == [8, 16, 32]
    assert len(record["rows"]) == 25
    assert f"training form: {record['params']:,} parameters" in lines[-3]
    assert f"deployed form: {record['params_deployed']:,} parameters" in lines[-2]
    assert "GFLOPs at 64x96" in lines[-2]


def test_printing_draws_nothing_from_the_data_and_moves_no_statistic():
    model = build_model(SMALL, imgsz=(64, 64))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    describe(model, (64, 64))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training


def test_a_batch_in_channels_last_gives_the_same():
    torch.manual_seed(0)
    model = build_model(SMALL, imgsz=(64, 64)).eval()
    image: Tensor = torch.rand(2, 3, 64, 64)
    expected = model(image).levels[0]
    turned = model.to(memory_format=torch.channels_last)
    found = turned(image.to(memory_format=torch.channels_last)).levels[0]
    torch.testing.assert_close(found, expected)


def test_memory_is_that_of_weights_and_of_the_maps_alive_at_one_time():
    chain = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.Flatten(2))
    weights = sum(p.numel() for p in chain.parameters())
    # While the second convolution runs, its input and its output live; before, two maps of 8; a view takes nothing.
    assert measure(chain, (64, 32)).memory == 4 * (weights + (8 + 16) * 64 * 32) / 2**20
    kept = nn.ModuleList([nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 8, 1, bias=False)])
    assert measure(Joined(kept), (64, 32)).memory == 4 * (24 + 64 + 32 * 64 * 32) / 2**20


class Joined(nn.Module):
    """Two maps that live until they are joined."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x):
        first = self.layers[0](x)
        return torch.cat((first, self.layers[1](first)), 1)
