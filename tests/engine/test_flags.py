"""Command lines: the flags that users of YOLOv5 know, defaults, and answers to mistakes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

import detect
from engine.flags import read_flags
from engine.options import DetectOptions, ValOptions, read_training

PARSERS: dict[str, Callable[[list[str]], Any]] = {
    "train": lambda words: read_training(words)[0],
    "val": lambda words: read_flags(ValOptions, words),
    "detect": lambda words: read_flags(DetectOptions, ["--source", "x", *words]),
}
KNOWN = {
    "train": """--weights w.pt --cfg c.yaml --data d.yaml --hyp h.yaml --epochs 3 --batch-size 4 --imgsz 64
        --rect --nosave --noval --noautoanchor --noplots --evolve 300 --evolve_population p
        --resume_evolve r --bucket b --cache ram --image-weights --device cpu --multi-scale --single-cls
        --optimizer Adam --sync-bn --workers 1 --project p --name n --exist-ok --quad --cos-lr
        --label-smoothing 0.1 --patience 5 --freeze 0 1 --save-period 2 --seed 3 --local_rank -1 --entity e
        --upload_dataset val --bbox_interval -1 --artifact_alias latest --close-mosaic 5 --flat-cos-lr
        --fixed-lr --min-items 0""",
    "val": """--data d.yaml --weights a.pt b.pt --batch-size 2 --imgsz 64 --conf-thres 0.002 --iou-thres 0.7
        --max-det 100 --task test --device cpu --workers 0 --single-cls --augment --verbose --save-txt
        --save-hybrid --save-conf --save-json --project p --name n --exist-ok --half --dnn --min-items 0""",
    "detect": """--weights w.pt --data d.yaml --imgsz 64 96 --conf-thres 0.3 --iou-thres 0.5 --max-det 10
        --device cpu --view-img --save-txt --save-format 1 --save-csv --save-conf --save-crop --nosave
        --classes 0 2 --agnostic-nms --augment --update --project p --name n --exist-ok
        --line-thickness 2 --hide-labels --hide-conf --half --dnn --vid-stride 2 --visualize""",
}


@pytest.mark.parametrize("script", KNOWN)
def test_every_flag_that_users_know_is_read(script: str):
    words = KNOWN[script].split()
    options = vars(PARSERS[script](words))
    flags = [word for word in words if re.match(r"--[a-z]", word)]
    assert {flag[2:].replace("-", "_") for flag in flags} <= set(options)


@pytest.mark.parametrize("script", PARSERS)
@pytest.mark.parametrize("flag", ["--imgsz", "--img", "--img-size"])
@pytest.mark.parametrize("sizes", [["320"], ["256", "320"]])
def test_the_size_has_three_names_and_one_or_two_numbers(script: str, flag: str, sizes: list[str]):
    assert PARSERS[script]([flag, *sizes]).imgsz == [int(size) for size in sizes]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (
            "train",
            {
                "batch_size": 16,
                "imgsz": 640,
                "optimizer": None,
                "patience": 100,
                "workers": 8,
                "seed": 0,
                "save_period": -1,
                "project": "runs/train",
                "name": "exp",
                "freeze": [],
                "cache": "auto",
                "resume": False,
                "label_smoothing": 0.0,
            },
        ),
        (
            "val",
            {
                "batch_size": 32,
                "conf_thres": 0.001,
                "iou_thres": 0.6,
                "max_det": 300,
                "task": "val",
                "project": "runs/val",
            },
        ),
        (
            "detect",
            {
                "conf_thres": 0.25,
                "iou_thres": 0.45,
                "max_det": 1000,
                "vid_stride": 1,
                "classes": None,
                "project": "runs/detect",
                "save_format": 0,
            },
        ),
    ],
)
def test_what_is_left_out_has_the_customary_value(script: str, expected: dict[str, Any]):
    options = vars(PARSERS[script]([]))
    assert {name: options[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("words", "name", "expected"),
    [
        (["--cache"], "cache", "ram"),
        (["--cache", "disk"], "cache", "disk"),
        (["--resume"], "resume", True),
        (["--resume", "a/last.pt"], "resume", "a/last.pt"),
        (["--batch-size", "-1"], "batch_size", -1),
        (["--batch", "4"], "batch_size", 4),  # a beginning that fits one flag alone
        (["--freeze", "10"], "freeze", ["10"]),
        (["--freeze", "0"], "freeze", []),  # the customary default of other trees
        (["--freeze", "0", "1"], "freeze", ["0", "1"]),
        (
            ["--backbone", "convnext_tiny", "pretrained=true"],
            "backbone",
            ["convnext_tiny", "pretrained=true"],
        ),
        (["--epochs", "100"], "epochs", 100),
        (["--resume_evolve", "a"], "evolve", 300),
        (["--resume_evolve", "a", "--evolve", "5"], "evolve", 5),
        (["--evolve"], "evolve", 300),
    ],
)
def test_values_of_train_flags(words: list[str], name: str, expected: Any):
    assert vars(read_training(words)[0])[name] == expected


def test_flags_that_stand_on_the_command_line_are_known_from_defaults():
    words = "--resume --workers 8 --imgsz 64 96 --batch 4 --noval --quad --cache".split()
    assert read_training(words)[1] == {"resume", "workers", "imgsz", "batch_size", "noval", "cache"}
    assert read_training([])[1] == set()


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("train", ["--epoch-s", "3"], "unknown argument '--epoch-s'. Did you mean '--epochs'?"),
        ("train", ["--epochs", "0"], "argument --epochs: got 0, expected 1 or more"),
        ("train", ["--epochs", "ten"], "got 'ten', expected a whole number"),
        ("train", ["--batch-size", "0"], "got 0, expected 1 or more or -1"),
        ("train", ["--imgsz", "big"], "got 'big', expected a whole number"),
        ("train", ["--imgsz", "0"], "got 0, expected 1 or more"),
        ("train", ["--label-smoothing", "2"], "got 2, expected 0 to 1"),
        ("train", ["--seed", str(2**64)], f"got {2**64}, expected 0 to {2**31 - 1}"),
        ("train", ["--optimizer", "Lion"], "invalid choice: 'Lion'"),
        ("train", ["--cache", "moon"], "invalid choice: 'moon'"),
        ("val", ["--task", "tset"], "invalid choice: 'tset'"),
        ("val", ["--conf-thres", "1.5"], "got 1.5, expected 0 to 1"),
        ("val", ["--conf-thres", "nan"], "got 'nan', expected a number"),
        ("detect", ["--iou-thres", "-1"], "got -1, expected 0 to 1"),
        ("detect", ["--max-det", "0"], "got 0, expected 1 or more"),
        ("detect", ["--save-format", "2"], "invalid choice: 2"),
        ("detect", ["--vid-stride", "0"], "got 0, expected 1 or more"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    script: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as caught:
        PARSERS[script](words)
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and message in told and told.count("\n") == 1


def test_detect_needs_a_source(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        read_flags(DetectOptions, [])
    assert caught.value.code == 2
    assert "--source" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "words", "line"),
    [
        (
            "train",
            ["--quad", "--bucket", "b"],
            "accepted but without effect here: --bucket, --quad\n",
        ),
        ("val", ["--dnn", "--augment"], "accepted but without effect here: --dnn, --augment\n"),
        ("detect", ["--update"], "accepted but without effect here: --update\n"),
        ("train", ["--epochs", "3"], ""),
    ],
)
def test_flags_without_effect_are_named_once(
    script: str, words: list[str], line: str, capsys: pytest.CaptureFixture[str]
):
    PARSERS[script](words)
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("words", "expected"),
    [(None, None), (["1"], [1]), (["disc", "0"], [1, 0]), (["square"], [0])],
)
def test_classes_are_given_by_index_or_name(words: list[str] | None, expected: list[int] | None):
    assert detect.class_indices(words, ("square", "disc")) == expected


@pytest.mark.parametrize(
    ("words", "expected", "told"),
    [
        (["1"], [0], "--classes 1: the class of this name, index 0\n"),
        (["3", "2"], [2, 1], "--classes 3: the class of this name, index 2\n--classes 2: the class of this name, index 1\n"),
        (["0"], [0], ""),
    ],
)  # fmt: skip
def test_a_class_called_by_a_number_goes_by_its_name(words, expected, told, capsys):
    assert detect.class_indices(words, ("1", "2", "3")) == expected
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("2", "got '2', expected an index below 2 or one of square, disc."),
        ("sqare", "Did you mean 'square'?"),
        ("-1", "got '-1', expected an index below 2"),
    ],
)
def test_a_class_that_is_none_is_refused(word: str, message: str):
    with pytest.raises(detect.ConfigError) as caught:
        detect.class_indices([word], ("square", "disc"))
    assert message in str(caught.value)
