"""Mistakes in a model YAML: each is told where it stands, with what was expected instead."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_configs import ALL, CONV, SIZE, build, error_of, maps_row
from small_configs import with_maps as with_maps
from torch import Tensor, nn

from models import registry
from models.registry import register
from models.yolo import build_model
from utils.errors import ConfigError


class Liar(nn.Module):
    """Says 8 channels, gives 4."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            maps_row(ALL, says={"channels": [1, 2, 3, 4, 5]}),
            "Maps: says channels [1, 2, 3, 4, 5], but its outputs have [8, 16, 24, 32, 40].",
        ),
        (maps_row(ALL, says={"strides": [4, 8, 16, 32, 64]}), "says strides [4, 8, 16, 32, 64]"),
        (maps_row(ALL, kind="tensor"), "returns a tensor 8x64x64, expected a list of feature maps"),
        ([-1, 1, "Liar", [8]], "Liar: gives 4 channels, but its rule says 8."),
        ([-1, 1, "Conv", [8, 3, 0]], "does not fit its input of shape 3x128x128"),  # stride 0
        ([-1, 1, "Conv", [8, -1]], "cannot be built with [3, 8, -1]"),
        ([-1, 1, "Conv", [8, 3, 1, 0, 2]], "cannot be built"),  # 3 channels in 2 groups
        ([-1, 1, "Conv", [8, 300, 1, 0]], "does not fit its input"),  # larger than the image
        ([[-1, -1], 1, "Conv", [8]], "got 2 inputs, expected 1"),
        ([-1, 1, "Conv", [8, {"kernel": 3}]], "got an unexpected keyword argument 'kernel'"),
        ([-1, 1, "Conv", [8, 3, {"kernel_size": 3}]], "multiple values for argument 'kernel_size'"),
    ],
)
def test_what_a_layer_cannot_be_is_told(row: list, message: str):
    register(registry.convolution)(Liar)
    found = error_of([row])
    assert message in found and found.startswith("model backbone[0]") and "\n" not in found


@pytest.mark.parametrize("name", ["channels", "width_list", "channel"])
def test_a_pasted_backbone_may_say_its_widths_in_other_words(name: str):
    says = {"channels": None, name: [8, 16, 24, 32, 40]}
    assert build([maps_row(ALL, says=says)]).rows[0].strides == tuple(ALL)
    with pytest.raises(ConfigError, match="says channels"):
        build([maps_row(ALL, says={**says, name: [8, 16, 24, 32, 41]})])


def test_a_backbone_that_says_nothing_is_measured():
    row = build([maps_row([4, 8, 16, 32], says={"channels": None})]).rows[0]
    assert row.strides == (4, 8, 16, 32)
    assert [shape[0] for shape in row.shape] == [8, 16, 24, 32]


def test_only_the_first_cause_is_told():
    """Rows that read a broken row are left out, other mistakes are not."""
    rows = [[-1, 1, "Cnov", [8], "a"], [-1, 1, "Conv", [8]], ["a", 1, "Conv", [8]]]
    lines = error_of([*rows, [-1, 1, "Convv", [8]]]).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "model backbone[0] Cnov",
        "model backbone[3] Convv",
    ]


def test_a_broken_backbone_still_takes_its_slots():
    rows = [maps_row(ALL, says={"channels": [1]}), [-1, 1, "Conv", [8], "six"]]
    lines = error_of(rows, [[5, 1, "Conv", [8]], [[99], 1, "Detect", ["nc"]]]).splitlines()
    assert len(lines) == 2 and "expected an index from 0 to 6" in lines[1]


def yaml_of(tmp_path: Path, **rows: str) -> Path:
    lines = {
        "first": "[-1, 1, Conv, [8, 3, 2]]",
        "second": "[-1, 1, Conv, [16, 3, 2]]",
        "third": "[-1, 1, nn.Upsample, [None, 2, nearest]]",
        "join": "[[-1, 0], 1, Concat, [1]]",
        "head": "[[3, 1], 1, Detect, [nc, anchors]]",
        **rows,
    }
    file = tmp_path / "mine.yaml"
    file.write_text(
        "nc: 2\nanchors:\n  - [10,13]\n  - [30,61]\nbackbone:\n"
        f"  - {lines['first']}\n  - {lines['second']}\nhead:\n"
        f"  - {lines['third']}\n  - {lines['join']}\n  - {lines['head']}\n"
    )
    return file


def test_the_file_behind_the_mistakes_builds_without_them(tmp_path: Path):
    assert build_model(yaml_of(tmp_path), imgsz=SIZE).strides == (2, 4)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (
            {"first": "[-1, 1, Cnov, [8, 3, 2]]"},
            "backbone[0] (line 6) Cnov: unknown layer 'Cnov', expected a registered layer, a class "
            "in models/modules/ or a timm model. Did you mean 'Conv'?",
        ),
        (
            {"join": "[[-1, 17], 1, Concat, [1]]"},
            "head[1] (line 10) Concat: got from 17, which means row 17, expected an index from 0 "
            "to 2.",
        ),
        (
            {"second": "[-1, 1, Conv, [16, 3, 2, None, 1, 1, True, 4]]"},
            "backbone[1] (line 7) Conv: wrong arguments - got 8 [16, 3, 2, None, 1, 1, True, 4] "
            "(too many positional arguments), expected (in_channels, out_channels, kernel_size=1, "
            "stride=1, padding=None, groups=1, dilation=1, activation=True); the first 1 come from "
            "the parser.",
        ),
        (
            {"join": "[[-1, 1], 1, Concat, [1]]"},
            "head[1] (line 10) Concat: got inputs that do not fit each other (16 channels at "
            "stride 2, 16 channels at stride 4), expected one stride",
        ),
        (
            {"head": "[[3, 1, 0], 1, Detect, [nc, anchors]]"},
            "head[2] (line 11) Detect: got 3 inputs and 2 rows of anchors, expected one row an "
            "input",
        ),
    ],
)
def test_a_users_mistake_is_one_line_that_says_where_what_and_what_instead(
    mistake: dict[str, str], message: str, tmp_path: Path
):
    file = yaml_of(tmp_path, **mistake)
    with pytest.raises(ConfigError) as caught:
        build_model(file, imgsz=SIZE)
    assert str(caught.value) == f"{file} {message}"


def test_the_last_row_must_be_a_head():
    message = error_of([CONV], [[-1, 1, "Conv", [8]]])
    assert message == "model head[0] Conv: is the last row, expected a head such as Detect."
