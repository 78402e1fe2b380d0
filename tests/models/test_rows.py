"""Reading model YAMLs: which file, which size, what an argument means, what is wrong."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from models.parser.rows import (
    DETECT_FOLDER,
    find_config,
    parse_spec,
    read_model_config,
    resolve,
)
from utils.errors import ConfigError

HEAD = [[[-1], 1, "Detect", ["nc"]]]


def config(**changes: Any) -> dict[str, Any]:
    """A config of two rows."""
    return {"nc": 4, "backbone": [[-1, 1, "Conv", [8, 3, 2]]], "head": HEAD, **changes}


def problems(**changes: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_spec("my.yaml", config(**changes), {"backbone": [7], "head": [9]})
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("nc", 4),  # a key of the file
        ("anchors", [[10, 13]]),  # whatever its value is
        ("None", None),
        ("True", True),
        ("False", False),
        ("none", None),
        (None, None),
        ("nearest", "nearest"),  # neither: the word itself
        ("0.5", 0.5),
        ("1e-3", 0.001),
        ("12", 12),
        ("-3", -3),
        (["nc", ["None", 2]], [4, [None, 2]]),  # inside lists too
        ("backbone", "backbone"),  # the rows are no value
        ("nc + 1", "nc + 1"),  # nothing is computed
        ("__import__('os')", "__import__('os')"),
        ("nc.bit_length", "nc.bit_length"),
        ("", ""),
        (2.0, 2.0),
    ],
)
def test_an_argument_is_a_key_or_a_literal_or_itself(value: Any, expected: Any):
    found = resolve(value, {"nc": 4, "anchors": [[10, 13]], "backbone": []})
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("args", "positional", "keywords"),
    [
        ([8, 3], [8, 3], {}),
        ([8, {"stride": 2}], [8], {"stride": 2}),  # a mapping at the end
        ({"save_memory": "True"}, [], {"save_memory": True}),  # a mapping alone
        ([{"num_classes": "nc"}], [], {"num_classes": 4}),
        (None, [], {}),
        ([], [], {}),
        ([{"a": 1}, 8], [{"a": 1}, 8], {}),  # not at the end: an argument
    ],
)
def test_arguments_may_be_or_end_in_a_mapping(args: Any, positional: list, keywords: dict):
    row = parse_spec("f", config(backbone=[[-1, 1, "Conv", args]]), {}).rows[0]
    assert (row.args, row.kwargs) == (positional, keywords)


def test_a_row_knows_its_section_number_line_and_name():
    rows = [[-1, 1, "Conv", [8]], [-1, 2, "Conv", [8], "wide"]]
    spec = parse_spec("f", config(backbone=rows), {"backbone": [12, 13], "head": [20]})
    assert [row.place for row in spec.rows] == [
        "backbone[0] (line 12)",
        "backbone[1] (line 13)",
        "head[0] (line 20)",
    ]
    assert [row.name for row in spec.rows] == [None, "wide", None]
    assert spec.rows[1].repeats == 2


@pytest.mark.parametrize(
    ("changes", "depth", "width", "most", "size"),
    [
        ({}, 1.0, 1.0, math.inf, ""),
        ({"depth_multiple": 0.33, "width_multiple": 0.25}, 0.33, 0.25, math.inf, ""),
        ({"depth_multiple": 2}, 2.0, 1.0, math.inf, ""),
        ({"scales": {"n": [0.5, 0.25, 1024]}, "scale": "n"}, 0.5, 0.25, 1024, "n"),
        ({"scales": {"n": [0.5, 0.25]}, "scale": "n"}, 0.5, 0.25, math.inf, "n"),
        # of both dialects in one file the letters count
        ({"scales": {"n": [1, 2, 3]}, "scale": "n", "depth_multiple": 9}, 1.0, 2.0, 3, "n"),
    ],
)
def test_both_dialects_of_scaling_are_read(
    changes: dict, depth: float, width: float, most: float, size: str
):
    spec = parse_spec("f", config(**changes), {})
    assert (spec.depth, spec.width, spec.max_channels, spec.size) == (depth, width, most, size)


@pytest.mark.parametrize(
    ("depth", "count", "expected"),
    [(0.33, 3, 1), (0.33, 9, 3), (0.33, 1, 1), (0.1, 2, 1), (1.33, 6, 8), (2.0, 1, 1), (1.0, 4, 4)],
)
def test_repeats_are_scaled_but_a_single_one_stays(depth: float, count: int, expected: int):
    assert parse_spec("f", config(depth_multiple=depth), {}).repeats(count) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nc": 0}, "my.yaml nc: got 0, expected a whole number of classes"),
        ({"nc": True}, "my.yaml nc: got True"),
        ({"nc": "80"}, "my.yaml nc: got '80'"),
        ({"ch": "three"}, "my.yaml ch: got 'three'"),
        ({"anchors": 0}, "my.yaml anchors: got 0, expected a number of anchors or one list"),
        ({"anchors": [10, 13]}, "my.yaml anchors: got [10, 13]"),  # not one list a level
        ({"anchors": [[10, 13, 16]]}, "my.yaml anchors"),  # a width without a height
        ({"anchors": [[10, -13]]}, "my.yaml anchors"),
        ({"anchors": [[10, 13], [5, 5, 6, 6]]}, "my.yaml anchors"),  # unequal numbers a level
        ({"anchors": [["a", "b"]]}, "my.yaml anchors"),
        ({"imports": 5}, "my.yaml imports: got 5, expected a Python file"),
        ({"depth_multiple": 0}, "my.yaml depth: got 0, expected a number above 0, up to 100."),
        ({"width_multiple": "x"}, "my.yaml width: got 'x'"),
        ({"scales": {"n": [1, 1]}, "scale": "z"}, "got size 'z', expected one of n."),
        ({"scales": {"n": [1]}, "scale": "n"}, "scales n: got [1], expected [depth, width"),
        ({"scales": {"n": "big"}, "scale": "n"}, "scales n: got 'big'"),
        ({"scales": [1, 2], "scale": "1"}, "scales: got [1, 2], expected letters with"),
        ({"backbone": None}, "my.yaml backbone: got None, expected a list of rows"),
        ({"head": []}, "my.yaml head: got [], expected a list of rows"),
        ({"backbone": [[-1, 1, "Conv"]]}, "backbone[0] (line 7): got [-1, 1, 'Conv'], expected [f"),
        ({"backbone": ["Conv"]}, "backbone[0] (line 7): got 'Conv'"),
        ({"backbone": [[None, 1, "Conv", [8]]]}, "got from None, expected an index, a name"),
        ({"backbone": [[True, 1, "Conv", [8]]]}, "got from True"),
        ({"backbone": [[[], 1, "Conv", [8]]]}, "got from []"),
        ({"backbone": [[-1, 0, "Conv", [8]]]}, "got repeats 0, expected a whole number, 1 or more"),
        (
            {"backbone": [[-1, 10**9, "Conv", [8]]]},
            "got repeats 1000000000, expected a whole number, 1 or more, up to 1000",
        ),
        ({"backbone": [[-1, 1, "Conv", [10**9]]]}, "got argument 1e+09, expected 1000000 at most"),
        (
            {"backbone": [[-1, 1, "Conv", [8, [3, -1e300]]]]},
            "got argument -1e+300, expected 1000000 at most",
        ),
        ({"backbone": [[-1, "nc", "Conv", [8]]]}, "got repeats 'nc'"),
        ({"backbone": [[-1, 1, 5, [8]]]}, "got module 5, expected the name of a layer"),
        ({"backbone": [[-1, 1, "Conv", 8]]}, "got arguments 8, expected a list or a mapping"),
        ({"backbone": [[-1, 1, "Conv", [8], 3]]}, "got name 3, expected a word"),
    ],
)
def test_each_mistake_is_told_with_its_place(changes: dict, message: str):
    lines = problems(**changes)
    assert len(lines) == 1 and message in lines[0]


def test_all_mistakes_are_told_together():
    lines = problems(nc=-1, backbone=[[-1, 1, "Conv"]], head=[[None, 1, "Detect", ["nc"]]])
    assert [line.split(":")[0] for line in lines] == [
        "my.yaml nc",
        "my.yaml backbone[0] (line 7)",
        "my.yaml head[0] (line 9)",
    ]


@pytest.mark.parametrize(
    ("asked", "file", "letter"),
    [
        ("yolov5n", "yolov5n.yaml", ""),
        ("yolov5n.yaml", "yolov5n.yaml", ""),
        ("yolo11", "yolo11.yaml", ""),
        ("yolo11s.yaml", "yolo11.yaml", "s"),
        ("yolo11x", "yolo11.yaml", "x"),
        ("yolov5n-emo", "yolov5n-emo.yaml", ""),
        ("models/yolov5s.yaml", "yolov5s.yaml", ""),  # where other trees keep it
    ],
)
def test_a_name_finds_its_file_and_size(asked: str, file: str, letter: str):
    assert find_config(asked) == (DETECT_FOLDER / file, letter)


def test_a_file_of_the_user_goes_before_ours(tmp_path: Path):
    own = tmp_path / "yolov5n.yaml"
    own.write_text("nc: 1\n")
    assert find_config(own) == (own, "")


def test_a_size_letter_works_for_the_users_files_too(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("scales: {b: [1, 1, 64]}\n")
    assert find_config(tmp_path / "mineb.yaml") == (tmp_path / "mine.yaml", "b")


@pytest.mark.parametrize(("asked", "nearest"), [("yolov5q", "yolov5"), ("yolo11z", "yolo11")])
def test_an_unknown_name_is_answered_with_the_nearest(asked: str, nearest: str):
    with pytest.raises(ConfigError, match=f"{asked}: no such model YAML. Did you mean '{nearest}"):
        find_config(asked)


def test_the_size_is_chosen_by_flag_then_file_name_then_order():
    def size(cfg: str, scale: str | None = None) -> str:
        return read_model_config(cfg, scale=scale)[1]["scale"]

    assert (size("yolo11"), size("yolo11s"), size("yolo11s", "m")) == ("n", "s", "m")


def test_a_size_for_a_file_without_sizes_is_refused():
    with pytest.raises(ConfigError, match="got scale 's', but the file has no scales"):
        read_model_config("yolov5n", scale="s")


def test_the_number_of_classes_can_be_chosen_and_the_callers_mapping_stays_as_it_was():
    given = config()
    _, read, _ = read_model_config(given, num_classes=9)
    assert (read["nc"], given["nc"]) == (9, 4)


def test_rows_of_a_file_come_with_their_lines(tmp_path: Path):
    file = tmp_path / "m.yaml"
    file.write_text(
        "nc: 2\n\nbackbone:\n  # a comment\n  - [-1, 1, Conv, [8]]\n  -\n    - -1\n    - 1\n"
        "    - Conv\n    - [8]\nhead:\n  - [[-1], 1, Detect, [nc]]\n"
    )
    _, _, lines = read_model_config(file)
    assert lines == {"backbone": [5, 7], "head": [12]}
