"""Registering layers, and what each rule makes of a row."""

from __future__ import annotations

import math

import pytest
import torch

from models import registry
from models.parser.lookup import find_layer
from models.registry import (
    Layer,
    LayerError,
    Plan,
    Scaling,
    backbone,
    channels_first,
    concatenation,
    convolution,
    detection_head,
    find,
    names,
    offered,
    register,
    stacked,
    unchanged,
    unscaled,
)
from models.table import count_params
from models.yolo import build_model

HALF = Scaling(width=0.5, repeats=3, strides=(8,))


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the registry that the test may change."""
    monkeypatch.setattr(registry, "_LAYERS", dict(registry._LAYERS))


@pytest.mark.parametrize(
    ("value", "width", "most", "expected"),
    [
        (64, 1.0, math.inf, 64),  # as it is
        (64, 0.25, math.inf, 16),  # scaled
        (100, 0.5, math.inf, 56),  # 50 rounded up to a multiple of 8
        (3, 1.0, math.inf, 8),  # so is what was not scaled
        (1024, 1.0, 512, 512),  # cut before the factor
        (1024, 1.5, 512, 768),
    ],
)
def test_channels_are_scaled(value: int, width: float, most: float, expected: int):
    assert Scaling(width, most).channels(value) == expected


@pytest.mark.parametrize("value", [0, -8, "64", None, True, [64]])
def test_what_is_no_number_of_channels_is_refused(value: object):
    with pytest.raises(LayerError, match="expected a positive integer"):
        Scaling().channels(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rule", "inputs", "args", "expected"),
    [
        (convolution, [3], [64, 3, 2], Plan([3, 32, 3, 2], 32)),
        (stacked, [16], [64, False], Plan([16, 32, 3, False], 32, repeats_inside=True)),
        (unchanged, [16], [None, 2, "nearest"], Plan([None, 2, "nearest"], 16)),
        (channels_first, [16], [7], Plan([16, 7], 16)),
        (unscaled, [16], [10, 3], Plan([16, 10, 3], 10)),
        (concatenation, [16, 8, 4], [1], Plan([1], 28)),
        (backbone, [3], ["x"], Plan(["x"], None, repeats_inside=True)),
        (detection_head, [8, 16], [80], Plan([80, [8, 16]], [8, 16])),
    ],
)
def test_rules_make_constructor_arguments(rule, inputs, args, expected: Plan):
    assert rule(inputs, args, HALF) == expected


@pytest.mark.parametrize(
    ("rule", "inputs", "args", "reason"),
    [
        (convolution, [3, 3], [64], "got 2 inputs, expected 1"),
        (convolution, [3], [], "got no arguments, expected at least the output channels"),
        (
            convolution,
            [[8, 16]],
            [64],
            r"several maps of \[8, 16\] channels, expected one map. Read a row",
        ),
        (stacked, [3], ["wide"], "got 'wide' as a number of channels"),
        (concatenation, [8, [8, 16]], [1], "several maps"),
        (backbone, [64], [], "got an input of 64 channels, expected the image with 3"),
    ],
)
def test_rules_say_what_they_expected(rule, inputs, args, reason: str):
    with pytest.raises(LayerError, match=reason):
        rule(inputs, args, HALF)


@pytest.mark.usefixtures("own_registry")
def test_a_registered_layer_is_found_under_its_own_or_the_given_name():
    class Own:
        pass

    assert register(convolution)(Own) is Own
    register(unchanged, "given")(Own)
    assert find("Own") == Layer("Own", Own, convolution)
    assert find("given") == Layer("given", Own, unchanged)
    assert {"Own", "given"} <= set(names())


@pytest.mark.usefixtures("own_registry")
def test_two_layers_of_one_name_are_refused_and_the_first_stays():
    def make(where: str) -> type:
        return type("Twice", (), {"__module__": where})

    first = register(convolution)(make("here"))
    with pytest.raises(ValueError, match="'Twice' is registered twice: here and there"):
        register(convolution)(make("there"))
    assert find("Twice").build is first
    register(convolution)(make("here"))  # the same class of a file that is imported again


def test_offered_names_and_those_of_timm_are_looked_up_behind_the_registered_ones():
    assert find_layer("Conv") == find("Conv")
    assert find("CBAM") is None and find_layer("CBAM") == offered("CBAM")
    assert {"Conv", "CBAM"} <= set(names())
    with pytest.raises(LayerError, match="unknown layer 'nowhere at all'"):
        find_layer("nowhere at all")


def test_layers_that_run_what_they_are_given_cannot_be_named():
    known = set(names())
    assert "nn.Upsample" in known
    assert not known & {"nn.Module", "nn.Sequential", "nn.ModuleList", "eval", "exec", "open"}


def test_a_width_that_equals_the_heads_outputs_is_scaled_like_any_other():
    """768 = 3 anchors x (251 classes + 5): a row of yolov5n6 has that many channels at full width."""
    with torch.device("meta"):
        counts = [
            count_params(build_model("yolov5n6", num_classes=n, imgsz=(128, 128)))
            for n in (250, 251, 252)
        ]
    assert counts[1] - counts[0] == counts[2] - counts[1]
