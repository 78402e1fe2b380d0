"""Another backbone under a config: which rows go, where references point, and that the result builds."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import yaml

from models.parser.graft import forget_weights, replace_backbone
from models.parser.rows import resolve
from models.parser.wiring import RowSlots
from models.yolo import build_model, parse_options
from utils.config import parse_yaml
from utils.errors import ConfigError

PRINTED = Path(__file__).parent / "printed"
SIZE = (128, 128)


def plain(*strides: int, image: bool = False) -> list[RowSlots]:
    return [RowSlots(i, (s,), is_image=image and i == 0) for i, s in enumerate(strides)]


SMALL = {
    "nc": 3,
    "backbone": [
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "Conv", [32, 3, 2]],
        [-1, 1, "Conv", [64, 3, 2]],
        [-1, 1, "SPPF", [64, 5]],
    ],
    "head": [
        [-1, 1, "Conv", [32, 1, 1]],
        [[-1, 2], 1, "Concat", [1]],
        [[4, 1], 1, "Concat", [1]],
        [[5, 3], 1, "Detect", ["nc"]],
    ],
}
SMALL_SLOTS = plain(2, 4, 8, 8, 8, 8, 8, 8)


def test_rows_and_references_of_a_small_config_are_rewritten_as_worked_out_by_hand():
    before = copy.deepcopy(SMALL)
    new = replace_backbone(SMALL, "convnext_atto", {"pretrained": True}, SMALL_SLOTS)
    assert new == {
        "nc": 3,
        "backbone": [
            [-1, 1, "convnext_atto", [{"pretrained": True}]],
            ["P3", 1, "SPPF", [64, 5], "row3"],
        ],
        "head": [
            [-1, 1, "Conv", [32, 1, 1], "row4"],
            [[-1, "P3"], 1, "Concat", [1], "row5"],
            [["row4", "P2"], 1, "Concat", [1]],
            [["row5", "row3"], 1, "Detect", ["nc"]],
        ],
    }
    assert before == SMALL


def test_the_image_row_stays_first_and_keeps_its_index():
    config = {
        "backbone": [[-1, 1, "Silence", []], [-1, 1, "Conv", [8, 3, 2]]],
        "head": [[0, 1, "Conv", [8, 3, 2]], [[-1, 1, -3], 1, "Concat", [1]]],
    }
    new = replace_backbone(config, "x", {}, plain(1, 2, 2, 2, image=True))
    assert new["backbone"] == [[-1, 1, "Silence", []], [-1, 1, "x", []]]
    assert new["head"] == [[0, 1, "Conv", [8, 3, 2]], [[-1, "P1", 0], 1, "Concat", [1]]]


def test_a_stem_that_widens_the_image_without_downsampling_goes():
    config = {
        "backbone": [[-1, 1, "Conv", [32, 3, 1]], [-1, 1, "Conv", [8, 3, 2]]],
        "head": [[-1, 1, "Conv", [8]]],
    }
    new = replace_backbone(config, "x", {}, plain(1, 2, 2))
    assert new["backbone"] == [[-1, 1, "x", []]]
    assert new["head"] == [["P1", 1, "Conv", [8]]]


def test_what_stands_behind_a_backbone_row_stays_and_its_five_slots_are_known():
    config = {
        "backbone": [[-1, 1, "EMO_1M", [False]], [-1, 1, "SPPF", [64, 5], "context"]],
        "head": [[[-1, 3, "P3", "P5", "context", 5], 1, "Concat", [1]]],
    }
    slots = [
        RowSlots(0, (2, 4, 8, 16, 32), is_backbone=True),
        RowSlots(5, (32,)),
        RowSlots(6, (32,)),
    ]
    new = replace_backbone(config, "x", {}, slots)
    assert new["backbone"] == [[-1, 1, "x", []], ["P5", 1, "SPPF", [64, 5], "context"]]
    assert new["head"] == [[[-1, "P4", "P3", "P5", "context", "context"], 1, "Concat", [1]]]


def test_in_a_plain_config_p5_means_the_last_row_of_its_stride():
    config = {
        "backbone": [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "C3", [8]], [-1, 1, "SPPF", [8, 5]]],
        "head": [["P5", 1, "Conv", [8]]],
    }
    new = replace_backbone(config, "x", {}, plain(32, 32, 32, 32))
    assert new["backbone"] == [[-1, 1, "x", []], ["P5", 1, "SPPF", [8, 5], "row2"]]
    assert new["head"] == [["row2", 1, "Conv", [8]]]


def test_a_row_that_reads_an_odd_stride_is_named():
    config = {"backbone": [[-1, 1, "Conv", [8, 3, 3]]], "head": [[-1, 1, "Conv", [8]]]}
    with pytest.raises(ConfigError, match=r"row 1 \(Conv\) reads row 0.*its stride is 3"):
        replace_backbone(config, "x", {}, plain(3, 3))


# configs of one head family: whatever backbone they had, with the same new one they are the same model
FAMILIES = [
    ("yolov5n", "yolov5n-emo", "yolov5n-revcol"),
    ("yolo11n", "yolo11-mobilenetv4"),
    pytest.param(("yolov9-c", "yolov9-c-mobileone"), marks=pytest.mark.slow),
    pytest.param(("rtdetr-l", "rtdetr-l-emo"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("names", FAMILIES)
def test_configs_of_one_family_become_one_model(names):
    shapes = []
    for name in names:
        with torch.device("meta"):
            model = build_model(name, backbone=["MobileNetV4ConvSmall", "factor=0.5"], imgsz=SIZE)
        assert model.strides == (8, 16, 32)
        shapes.append({key: tuple(value.shape) for key, value in model.state_dict().items()})
    assert all(other == shapes[0] for other in shapes[1:])


@pytest.mark.parametrize(
    "name",
    [
        "yolov5n",
        "gelan-t",
        "gelan-e",
        "yolov9-t",
        "yolov9-c",
        "yolov9-e",
        "yolo11n",
        "rtdetr-l",
        "rtdetr-r18",
        "dfine-s",
    ],
)
def test_every_head_takes_another_backbone(name):
    with torch.device("meta"):
        model = build_model(name, backbone=["EMO_1M", "weights=false"], imgsz=SIZE)
    assert model.strides == (8, 16, 32)
    backbones = [row for row in model.rows if row.map_slots is not None]
    assert [(row.module, row.strides) for row in backbones] == [("EMO_1M", (2, 4, 8, 16, 32))]


def test_a_backbone_grafted_onto_its_own_kind_of_config_changes_nothing():
    """yolov5n with EMO by the flag is the model that `yolov5n-emo.yaml` writes out."""
    with torch.device("meta"):
        grafted = build_model("yolov5n", backbone=["EMO_1M", "weights=false"], imgsz=SIZE)
        written = build_model("yolov5n-emo", imgsz=SIZE)
    assert [row.shape for row in grafted.rows] == [row.shape for row in written.rows]
    assert {k: v.shape for k, v in grafted.state_dict().items()} == {
        k: v.shape for k, v in written.state_dict().items()
    }


def test_a_grafted_model_trains_the_auxiliary_branch_of_yolov9():
    model = build_model(
        "yolov9-t", backbone=["MobileNetV4ConvSmall", "factor=0.25"], num_classes=2, imgsz=SIZE
    ).train()
    raw = model(torch.rand(2, 3, 64, 96))
    tensors = [
        t
        for t in torch.utils._pytree.tree_leaves(raw)
        if isinstance(t, torch.Tensor) and t.requires_grad
    ]
    sum(t.float().square().mean() for t in tensors).backward()
    assert [
        name for name, p in model.named_parameters() if p.requires_grad and p.grad is None
    ] == []


def test_the_rewritten_config_survives_being_saved(tmp_path):
    with torch.device("meta"):
        model = build_model("yolov9-c", backbone=["EMO_1M"], imgsz=SIZE)
        path = tmp_path / "grafted.yaml"
        path.write_text(yaml.safe_dump(model.config))
        again = build_model(path, imgsz=SIZE)
    assert [row.args for row in again.rows] == [row.args for row in model.rows]
    assert [row.inputs for row in again.rows] == [row.inputs for row in model.rows]


def test_a_missing_stride_is_one_line_that_says_which_there_are():
    config = {
        "nc": 2,
        "scales": {"n": [1, 1, 64]},
        "backbone": [
            [-1, 1, "Conv", [16, 3, 2]],
            [-1, 1, "Conv", [32, 3, 2]],
            [-1, 1, "Conv", [64, 3, 2]],
        ],
        "head": [[[0, 1, 2], 1, "Detect", ["nc"]]],
    }
    assert build_model(config, imgsz=SIZE).strides == (2, 4, 8)
    assert build_model(config, backbone=["EMO_1M"], imgsz=SIZE).strides == (2, 4, 8)
    with pytest.raises(ConfigError) as caught:
        build_model(config, backbone=["MobileNetV4ConvSmall"], imgsz=SIZE)
    (line,) = str(caught.value).splitlines()
    assert (
        "head[0] Detect: got from" in line
        and "which is empty: the backbone has no stride 2" in line
    )
    assert "P2 (stride 4), P3 (stride 8)" in line


def test_slots_of_a_built_model_count_as_the_parser_does():
    with torch.device("meta"):
        model = build_model(PRINTED / "002_yolov5n-EMO.yaml", imgsz=SIZE)
    slots = [row.slots for row in model.rows]
    assert slots[0] == RowSlots(0, (2, 4, 8, 16, 32), is_backbone=True)
    assert slots[1] == RowSlots(5, (32,))
    assert slots[-1].first == 20


@pytest.mark.parametrize(("row", "expected"), [
    ([-1, 1, "EMO_1M", ["emo.pth"]], [-1, 1, "EMO_1M", [False]]),
    ([-1, 1, "EMO_1M", []], [-1, 1, "EMO_1M", []]),
    ([-1, 1, "resnet18", [True, {"drop_path_rate": 0.1}]], [-1, 1, "resnet18", [False, {"drop_path_rate": 0.1}]]),
    ([-1, 1, "resnet18", {"weights": "r.pth"}, "net"], [-1, 1, "resnet18", [{"weights": False}], "net"]),
    ([-1, 1, "MobileNetV4ConvSmall", [1, "w.pth"]], [-1, 1, "MobileNetV4ConvSmall", [1, None]]),
    ([-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [16, 3, 2]]),
])  # fmt: skip
def test_weights_are_forgotten_where_others_are_loaded(row, expected):
    config = {"backbone": [row], "head": []}
    assert forget_weights(config)["backbone"] == [expected]


@pytest.mark.parametrize(("words", "expected"), [
    (["factor=0.5", "pretrained=true"], {"factor": 0.5, "pretrained": True}),
    (["widths=[8, 16]", "weights=None", "file=/a b/c.pt"], {"widths": [8, 16], "weights": None, "file": "/a b/c.pt"}),
    (["drop_path_rate=1e-1", "name=x=y"], {"drop_path_rate": 0.1, "name": "x=y"}),
])  # fmt: skip
def test_options_of_a_backbone_are_read_as_in_a_yaml(words, expected):
    assert parse_options(words) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("on", "on"), ("no", "no"), ("010", 10), ("1e-3", 0.001), ("2024-01-02", "2024-01-02"), ("0x1F", "0x1F"), ("~", None)]
    + [("TRUE", True), ("'1'", 1), ("[on, 08]", ["on", 8])],
)  # fmt: skip
def test_a_flag_and_a_file_mean_the_same_by_one_text(text, expected):
    rows = parse_yaml(f"head: [[-1, 1, Conv, {{key: {text}}}]]", "x.yaml").data
    in_file = resolve(rows["head"][0][3]["key"], {})
    assert parse_options([f"key={text}"])["key"] == in_file == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["factor"], "got 'factor', expected key=value"),
        (["mode=\x07"], "expected a value behind the ="),
        (["a=1", "a=2"], "got a twice"),
        (["weights="], "got 'weights=', expected a value"),
        (["widths=[8,"], r"got 'widths=\[8,', expected a value"),
    ],
)
def test_options_of_a_backbone_that_say_nothing_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        parse_options(words)
