"""The index rule, names, channel rules and arguments of the parser, as rows with a reason each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_configs import ALL, CONV, SIZE, build, config, error_of, maps_row
from small_configs import with_maps as with_maps
from torch import nn

from models.meta import run_without_images
from models.parser.build import Row, build_rows
from models.parser.rows import parse_spec, read_model_config
from models.yolo import build_model
from utils.errors import ConfigError

SILENCE = [-1, 1, "Silence", []]


@pytest.mark.parametrize(
    ("rows", "number", "slots", "following"),
    [
        # first row: 0-4, the next row at 5
        ([maps_row(ALL), CONV], 0, (0, 1, 2, 3, 4), 5),
        # behind a row that takes slot 0
        ([SILENCE, maps_row(ALL), CONV], 1, (1, 2, 3, 4, 5), 6),
        # no stride 2: slot 0 stays empty
        ([maps_row([4, 8, 16, 32]), CONV], 0, (1, 2, 3, 4), 5),
        # nor stride 32: the last slot stays empty, the next row still follows five slots
        ([maps_row([4, 8, 16]), [2, 1, "Conv", [16]]], 0, (1, 2, 3), 5),
        # a stride-1 map is dropped
        ([maps_row([1, *ALL]), CONV], 0, (None, 0, 1, 2, 3, 4), 5),
        # of two maps with one stride the later counts
        ([maps_row([4, 4, 8, 16, 16, 32]), CONV], 0, (None, 1, 2, None, 3, 4), 5),
        # strides 64 and 128 are P6 and P7
        ([maps_row([8, 16, 32, 64]), CONV], 0, (2, 3, 4, 5), 6),
        ([maps_row([8, 16, 32, 64, 128]), CONV], 0, (2, 3, 4, 5, 6), 7),
        # a single map
        ([maps_row([8]), [2, 1, "Conv", [16]]], 0, (2,), 5),
        # the order in which maps come does not matter
        ([maps_row([32, 16, 8]), CONV], 0, (4, 3, 2), 5),
        # a mapping of maps
        ([maps_row(ALL, kind="dict"), CONV], 0, (0, 1, 2, 3, 4), 5),
        # two backbones, each with five slots
        ([SILENCE, maps_row(ALL), maps_row(ALL, source=0), CONV], 2, (6, 7, 8, 9, 10), 11),
    ],
)
def test_maps_take_the_slots_of_their_strides(
    rows: list, number: int, slots: tuple, following: int
):
    built = build(rows).rows
    assert built[number].map_slots == slots
    assert built[len(rows) - 1].index == following


def inputs_of(backbone_rows: list, source: Any) -> tuple[tuple[int, ...], Row]:
    rows = build(backbone_rows, [[source, 1, "Conv", [8]], [[-1], 1, "Detect", ["nc"]]]).rows
    return rows[-2].inputs, rows[-2]


NAMED = [SILENCE, [*maps_row(ALL), "trunk"], [-1, 1, "SPPF", [16, 5], "context"]]


@pytest.mark.parametrize(
    ("rows", "source", "slot", "stride"),
    [
        (NAMED, 2, 2, 4),  # an index
        (NAMED, -1, 6, 32),  # back from here
        (NAMED, -3, 4, 16),  # slots count, not rows
        (NAMED, "P3", 3, 8),
        (NAMED, "P5", 5, 32),  # the backbone's own map, not the row on top of it
        (NAMED, "P1", 1, 2),
        (NAMED, "context", 6, 32),
        (NAMED, "trunk", 5, 32),  # a backbone's name means its coarsest slot
        ([maps_row([8, 16, 32, 64])], "P6", 5, 64),
        # without a module that returns a list: the last backbone row of the stride
        ([[-1, 1, "Conv", [8, 3, 2]], CONV, [-1, 1, "Conv", [8, 3, 2]]], "P1", 1, 2),
        ([[-1, 1, "Conv", [8, 3, 2]], CONV, [-1, 1, "Conv", [8, 3, 2]]], "P2", 2, 4),
        # a row may take a level's name for itself
        ([maps_row(ALL), [3, 1, "Conv", [8], "P3"]], "P3", 5, 16),
        # of two backbones the later one names the levels
        ([SILENCE, maps_row(ALL), maps_row(ALL, source=0)], "P3", 8, 8),
    ],
)
def test_from_takes_indices_names_and_levels(rows: list, source: Any, slot: int, stride: int):
    inputs, row = inputs_of(rows, source)
    assert inputs == (slot,)
    assert row.strides == (stride,)


@pytest.mark.parametrize(
    ("rows", "source", "message"),
    [
        (
            [maps_row([4, 8, 16, 32])],
            0,
            "got from 0, which is empty: the backbone has no stride 2, only P2 (stride 4), "
            "P3 (stride 8), P4 (stride 16), P5 (stride 32).",
        ),
        ([maps_row([4, 8])], "P5", "which is empty: the backbone has no stride 32, only P2"),
        ([maps_row([4, 8])], -1, "got from -1, which is empty: the backbone has no stride 32"),
        ([maps_row(ALL)], "P6", "got from 'P6', expected an index or a name: P1, P2, P3, P4, P5."),
        (NAMED, "contxt", "Did you mean 'context'?"),
        (NAMED, 7, "got from 7, which means row 7, expected an index from 0 to 6."),
        (NAMED, -9, "got from -9, which means row -2, expected an index from 0 to 6."),
    ],
)
def test_what_is_not_there_is_told_with_what_is(rows: list, source: Any, message: str):
    with pytest.raises(ConfigError) as caught:
        inputs_of(rows, source)
    assert message in str(caught.value)
    assert str(caught.value).startswith("model head[0] Conv: ")


def test_two_rows_of_one_name_are_refused():
    message = error_of([[*CONV, "a"], [*CONV, "a"]])
    assert message == "model backbone[1] Conv: got name 'a', which row 0 already has."


def test_the_first_row_reads_the_image():
    assert "got from 0 in the first row, expected -1, the image" in error_of([[0, 1, "Conv", [8]]])


@pytest.mark.parametrize(
    ("row", "printed"),
    [
        # width 0.25, most 512 channels, three repeats of nine
        ([-1, 1, "Conv", [64, 3, 2]], "[3, 16, 3, 2]"),
        ([-1, 1, "Conv", [1024, 3, 2]], "[3, 128, 3, 2]"),
        ([-1, 9, "C3", [64]], "[3, 16, 3]"),
        (
            [-1, 1, "Conv", [64, {"kernel_size": 3, "stride": 2}]],
            "[3, 16, kernel_size=3, stride=2]",
        ),
        ([-1, 1, "Conv", ["wide", 3]], "[3, 32, 3]"),  # a key of the file
        ([-1, 1, "Conv", [64, 3, 1, "None", 1, 1, "False"]], "[3, 16, 3, 1, None, 1, 1, False]"),
        ([-1, 1, "torch.nn.Conv2d", [64, 3]], "[3, 64, 3]"),  # torch's own layers are not scaled
        ([-1, 1, "nn.Upsample", ["None", 2, "nearest"]], "[None, 2, 'nearest']"),
    ],
)
def test_arguments_reach_the_constructor(row: list, printed: str):
    model = build(
        [row, [-1, 1, "Conv", [8, 3, 2]]],
        scales={"t": [0.33, 0.25, 512]},
        wide=128,
    )
    assert model.rows[0].args == printed


def test_keyword_arguments_do_what_positional_ones_do():
    by_place = build([[-1, 1, "Conv", [16, 3, 2]]]).model[0]
    by_name = build([[-1, 1, "Conv", [16, {"stride": 2, "kernel_size": 3}]]]).model[0]
    assert str(by_place) == str(by_name)


def test_a_repeated_row_goes_on_with_the_width_of_its_first_copy():
    model = build([[-1, 3, "Conv", [16, 3, 2]]])
    assert [block.conv.in_channels for block in model.model[0]] == [3, 16, 16]
    assert model.strides == (8,)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, [[32, 32]]), (2, [[22.6, 22.6, 45.3, 45.3]])],  # 8 * 2 ** (1 + 2 * (k + 0.5) / count)
)
def test_anchors_may_be_a_number(count: int, expected: list):
    head = [[[2], 1, "Detect", ["nc", "anchors"]]]
    model = build([maps_row([8])], head, anchors=count)
    pixels = model.head.anchors * torch.tensor(model.strides).view(-1, 1, 1)
    torch.testing.assert_close(pixels.flatten(1), torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("nn.ReLU()", nn.ReLU),
        ("nn.ReLU", nn.ReLU),
        ("ReLU", nn.ReLU),
        ("torch.nn.Mish()", nn.Mish),
        ("nn.LeakyReLU(0.1)", nn.LeakyReLU),
        ("nn.Hardswish(inplace=True)", nn.Hardswish),
    ],
)
def test_the_activation_of_a_file_becomes_that_of_its_blocks(said: str, kind: type):
    rows = [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [8, 3, 2, None, 1, 1, False]]]
    model = build([*rows, [-1, 1, "C3", [8]]], activation=said)
    assert type(model.model[0].act) is kind
    assert type(model.model[2].m[0].cv1.act) is kind
    assert type(model.model[1].act) is nn.Identity  # one that a row chose stays


def test_an_activation_keeps_its_number():
    model = build([[-1, 1, "Conv", [8, 3, 2]]], activation="nn.LeakyReLU(0.1)")
    assert model.model[0].act.negative_slope == 0.1


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("nn.ReLu()", "Did you mean 'ReLU'?"),
        ("nn.LeakyReLU(slope=1)", "cannot be built"),
        ("nn.Linear(3, 4)", "got 'nn.Linear(3, 4)', expected one of ReLU"),
        (5, "got 5, expected one of ReLU"),
    ],
)
def test_another_activation_is_refused(said: Any, message: str):
    assert message in error_of([[-1, 1, "Conv", [8, 3, 2]]], activation=said)


def test_a_head_of_one_level_may_read_a_single_index():
    model = build([[-1, 3, "Conv", [8, 3, 2]]], [[-1, 1, "Detect", ["nc"]]])
    assert model.strides == (8,)
    model(torch.rand(1, 3, *SIZE))


def test_building_computes_nothing_and_draws_no_random_number_of_its_own():
    rows = [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [16, 3, 2]]]
    spec_of = read_model_config(config(rows, [[-1, 1, "Conv", [8]]]))
    torch.manual_seed(0)
    built, _ = build_rows(parse_spec(*spec_of), (2**20, 2**20))  # a real image would not fit
    after = torch.get_rng_state()
    torch.manual_seed(0)
    alone = [nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.Conv2d(8, 16, 3, 2, 1, bias=False)]
    alone.append(nn.Conv2d(16, 8, 1, bias=False))
    assert torch.equal(after, torch.get_rng_state())
    for block, conv in zip(built, alone, strict=True):
        assert torch.equal(block.conv.weight, conv.weight)
        assert block.bn.num_batches_tracked == 0 and block.bn.running_mean.abs().max() == 0
        assert block.training


@pytest.mark.parametrize(
    ("size", "strides"),
    [((128, 128), (8, 64)), ((416, 416), (8, 64)), ((96, 160), (8, 64)), ((64, 64), (8, 64))],
)
def test_strides_do_not_depend_on_the_size(size: tuple[int, int], strides: tuple[int, ...]):
    rows = [[-1, 1, "Conv", [8, 3, 2]] for _ in range(6)]
    cfg = config(rows, [[[2, 5], 1, "Detect", ["nc"]]])
    assert build_model(cfg, imgsz=size).strides == strides


def test_a_slot_is_forgotten_after_its_last_reader():
    rows = build(
        [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [8]], [-1, 1, "Conv", [8]]],
        [[[-1, 0], 1, "Concat", [1]], [[-1], 1, "Detect", ["nc"]]],
    ).rows
    assert [set(row.release) for row in rows] == [{-1}, set(), {1}, {2, 0}, {3}]


@pytest.mark.parametrize("name", ["yolov5n", "yolo11n", "yolov9-t"])
def test_what_is_known_to_fit_is_built_alike_without_the_meta_device(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    expected = build_model(name, imgsz=(64, 96))
    monkeypatch.setattr("models.parser.build.outputs_of", None)  # nothing falls back
    found = build_model(name, imgsz=(64, 96), fresh=True)
    assert found.rows == expected.rows and found.strides == expected.strides


def test_outputs_of_no_images_stand_for_those_of_one():
    class Swapped(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.transpose(0, 1)

    inputs = torch.empty(1, 4, 8, 6, device="meta")
    found = run_without_images(nn.Sequential(nn.Conv2d(4, 5, 3, 2, 1), nn.BatchNorm2d(5)), inputs)
    assert found.shape == (1, 5, 4, 3) and found.is_meta
    with pytest.raises(ValueError, match="expected the batch in the first place"):
        run_without_images(Swapped(), inputs)
