"""What the parser learns of shapes, and what it says where a module breaks its own word."""

from __future__ import annotations

import pytest
import torch
from small_configs import SIZE, build, config, error_of, maps_row
from small_configs import with_maps as with_maps
from torch import Tensor, nn

from models import registry
from models.registry import Plan, backbone, register
from models.table import count_params, measure
from models.yolo import build_model
from utils.channels import as_channels
from utils.errors import ConfigError


class Odd(nn.Module):
    """A backbone of two maps with one of several habits."""

    def __init__(self, habit: str) -> None:
        super().__init__()
        self.habit = habit
        self.a = nn.Conv2d(3, 8, 8, 8)
        self.b = nn.Conv2d(8, 16, 2, 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        if self.habit == "autocast":
            with torch.autocast(x.device.type, enabled=False):
                x = self.a(x)
        else:
            x = self.a(x)
        maps = [x, self.b(x)]
        if self.habit == "channels last":
            return [m.permute(0, 2, 3, 1) for m in maps]
        return [*maps, x] if self.habit == "auxiliary" and self.training else maps


def careless_rule(in_channels, args, scaling) -> Plan:
    return Plan([args[3]], in_channels[0])


@pytest.fixture
def with_odd(monkeypatch: pytest.MonkeyPatch, with_maps):
    monkeypatch.setattr(registry, "_LAYERS", dict(registry._LAYERS))
    register(backbone)(Odd)
    register(careless_rule, name="Careless")(nn.Identity)


HEAD = [[["P3", "P4"], 1, "Detect", ["nc"]]]


def test_code_that_asks_for_the_type_of_the_device_can_be_built(with_odd):
    model = build([[-1, 1, "Odd", ["autocast"]]], HEAD)
    assert model.strides == (8, 16)
    assert not any(p.is_meta for p in model.parameters())


def test_maps_whose_channels_come_last_are_refused(with_odd):
    message = error_of([[-1, 1, "Odd", ["channels last"]]], HEAD)
    assert "expected (C, H, W) with one stride" in message and "permute(0, 3, 1, 2)" in message


def test_a_backbone_that_returns_other_maps_in_training_is_named(with_odd):
    model = build([[-1, 1, "Odd", ["auxiliary"]]], HEAD)
    images = torch.rand(2, 3, *SIZE)
    model.eval()(images)
    with pytest.raises(ConfigError, match=r"backbone\[0\] Odd: got 3 things, expected the 2 maps"):
        model.train()(images)


def test_a_rule_that_stumbles_over_its_arguments_is_one_line(with_odd):
    message = error_of([[-1, 1, "Conv", [8]], [-1, 1, "Careless", [1]]])
    assert "Careless: does not take [1] - IndexError: list index out of range" in message


def test_parameters_of_maps_that_nobody_reads_are_frozen(with_odd):
    model = build([[-1, 1, "Odd", ["plain"]]], [[["P3"], 1, "Detect", ["nc"]]])
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert [name for name in frozen if "model.0." in name] == ["model.0.b.weight", "model.0.b.bias"]
    whole = build([[-1, 1, "Odd", ["plain"]]], HEAD)
    assert all(p.requires_grad for p in whole.model[0].parameters())


def test_strides_are_told_by_the_longer_side(with_maps):
    head = [[["P5", "P6"], 1, "Detect", ["nc"]]]
    model = build_model(config([maps_row([2, 4, 8, 16, 32, 64])], head), imgsz=(64, 640))
    assert model.strides == (32, 64)


def test_a_map_pooled_to_one_cell_does_not_make_images_larger():
    rows = [[-1, 1, "Conv", [8, 3, 8]], [-1, 1, "nn.MaxPool2d", [16]]]
    model = build(rows, [[[0], 1, "Detect", ["nc"]]])
    assert model.max_stride == 32


def test_classes_of_the_head_and_names_are_held_against_nc():
    rows = [[-1, 1, "Conv", [8, 3, 8]]]
    message = error_of(rows, [[[0], 1, "Detect", [5]]])
    assert "got 5 classes, expected the 2 of nc" in message
    with pytest.raises(ConfigError, match="got 3 class names for 2 classes"):
        build_model(config(rows), num_classes=2, names=["a", "b", "c"], imgsz=SIZE)
    assert build_model(config(rows), names=["a", "b", "c"], imgsz=SIZE).head.num_classes == 3


@pytest.mark.parametrize("count", [255, 256, 512])
def test_a_number_of_classes_equal_to_a_width_changes_no_width(count: int):
    few = count_params(build_model("yolo11n", num_classes=254, imgsz=(64, 64)))
    more = count_params(build_model("yolo11n", num_classes=count, imgsz=(64, 64)))
    per_class = (more - few) / (count - 254)
    assert per_class < 1000


def test_a_model_of_one_channel_takes_grey_and_colour():
    colour = build([[-1, 1, "Conv", [8, 3, 8]]])
    grey = build([[-1, 1, "Conv", [8, 3, 8]]], ch=1)
    assert count_params(colour) - count_params(grey) == 2 * 9 * 8
    assert measure(grey, SIZE).gflops < measure(colour, SIZE).gflops
    images = torch.rand(1, 3, *SIZE)
    luma = 0.299 * images[:, :1] + 0.587 * images[:, 1:2] + 0.114 * images[:, 2:]
    grey.eval()
    with torch.no_grad():
        torch.testing.assert_close(grey.decode(grey(images)).scores, grey.decode(grey(luma)).scores)
    with pytest.raises(ConfigError, match="got 3 channels, expected the model's 4"):
        as_channels(images, 4)
