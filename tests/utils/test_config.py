"""YAML with lines, hyper-parameters, run folders, sizes, command-line values."""

import logging
import os
from pathlib import Path

import pytest
import yaml

from utils.config import (
    ArgumentParser,
    increment_path,
    integer,
    load_hyp,
    load_yaml,
    number,
    parse_imgsz,
    parse_value,
    parse_yaml,
    read_yaml,
    save_yaml,
)
from utils.errors import ConfigError


@pytest.fixture
def messages(monkeypatch):
    """What is told to the user."""
    told: list[str] = []
    monkeypatch.setattr(
        logging.getLogger("yoke"), "handle", lambda record: told.append(record.getMessage())
    )
    return told


def test_every_value_has_its_line() -> None:
    file = parse_yaml("nc: 3\n\nhead:\n  - [1, 2]\n  # a comment\n  - [3, 4]\n", "x.yaml")
    assert file.data == {"nc": 3, "head": [[1, 2], [3, 4]]}
    assert file.lines[("nc",)] == 1
    assert file.lines[("head", 0)] == 4
    assert file.lines[("head", 1, 1)] == 6


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("5E2", 500.0),
        ("-2", -2),
        ("007", 7),
        (".5", 0.5),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("None", "None"),
        ("~", None),
        ("", None),
        ("'5'", "5"),
    ],
)
def test_scalars_are_what_they_look_like(text: str, value: object) -> None:
    read = parse_yaml(f"key: {text}\n", "x").data["key"]
    assert read == value
    assert type(read) is type(value)


def test_names_may_be_words_that_older_yaml_takes_for_true() -> None:
    assert parse_yaml("names: {0: yes, 1: off}", "x").data == {"names": {0: "yes", 1: "off"}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3\n", "x.yaml:3: key 'a' stands twice, first in line 1"),
        ("h:\n  a: 1\n  a: 2\n", "x.yaml:3: key 'a' stands twice"),
        ("a: [1, 2\nb: 3\n", "x.yaml:2: not valid YAML"),
        ("- 1\n- 2\n", "got a list, expected `key: value` lines"),
        ("a: !!python/object/apply:os.system ['touch planted']\n", "x.yaml:1: not valid YAML"),
        ("? [1, 2]\n: 3\n", "a key must be a word or a number"),
        ("a: &x [*x]\n", "an alias that contains itself"),
    ],
)
def test_faulty_yaml_is_named_with_its_line(text, expected, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "x.yaml")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_empty_file_is_an_empty_mapping_and_a_missing_one_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("# nothing\n")
    assert load_yaml(tmp_path / "a.yaml") == {}
    with pytest.raises(ConfigError, match="cannot be read"):
        load_yaml(tmp_path / "b.yaml")
    (tmp_path / "c.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_yaml(tmp_path / "c.yaml")


def test_saved_yaml_is_read_back_in_order(tmp_path: Path) -> None:
    data = {"z": 1, "a": (320, 640), "path": Path("runs/exp"), "name": "Größe", "lr": 1e-5}
    save_yaml(tmp_path / "opt.yaml", data)
    read = load_yaml(tmp_path / "opt.yaml")
    assert read == {"z": 1, "a": [320, 640], "path": "runs/exp", "name": "Größe", "lr": 1e-5}
    assert list(read) == list(data)


@pytest.mark.parametrize(
    "text", ["1e-3", "on", "no", "010", "08", "1.", "~", "", "2024-01-02", "<<"]
)
def test_text_that_looks_like_something_else_is_saved_as_text(text: str, tmp_path: Path) -> None:
    """In this dialect and in that of other readers."""
    save_yaml(tmp_path / "a.yaml", {"key": text, text or "x": 1})
    assert load_yaml(tmp_path / "a.yaml") == {"key": text, text or "x": 1}
    assert yaml.safe_load((tmp_path / "a.yaml").read_text()) == {"key": text, text or "x": 1}


BASE = "lr0: 0.01\nmosaic: 1\noptimizer: SGD\nflag: false\n"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "yolov5.yaml"
    path.write_text(BASE)
    return path


def test_the_users_file_overlays_the_familys(base: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("lr0: 1e-3\nmosaic: 0.5\n")
    hyp = load_hyp(tmp_path / "mine.yaml", base)
    assert dict(hyp) == {"lr0": 0.001, "mosaic": 0.5, "optimizer": "SGD", "flag": False}
    assert dict(load_hyp(None, base))["lr0"] == 0.01
    with pytest.raises(TypeError):
        hyp["lr0"] = 1.0


def test_all_problems_of_a_hyp_file_are_told_together(base: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("lr0: fast\nmosaik: 1\nflag: 1\nmosaic: true\noptimizer: 3\n")
    with pytest.raises(ConfigError) as caught:
        load_hyp(mine, base)
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    assert f"{mine}:1: lr0 - got 'fast', expected a number such as 0.01." in lines
    assert f"{mine}:2: unknown key 'mosaik'. Did you mean 'mosaic'?" in lines
    assert f"{mine}:3: flag - got 1, expected true or false such as False." in lines
    assert f"{mine}:4: mosaic - got True, expected a number such as 1." in lines
    assert f"{mine}:5: optimizer - got 3, expected a word such as 'SGD'." in lines


def test_a_number_that_is_none_is_a_problem(base: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("lr0: .nan\n")
    with pytest.raises(ConfigError, match="lr0 - got nan"):
        load_hyp(tmp_path / "mine.yaml", base)


def test_known_keys_without_effect_are_said_in_one_line(base, tmp_path, messages) -> None:
    (tmp_path / "mine.yaml").write_text("copy_paste: 0.1\nanchor_t: 4.0\nlr0: 0.02\n")
    hyp = load_hyp(tmp_path / "mine.yaml", base)
    assert "copy_paste" not in hyp
    assert messages == [
        f"{tmp_path / 'mine.yaml'}: without effect for yolov5: copy_paste, anchor_t"
    ]


def test_a_section_is_for_its_family_alone(base: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("lr0: 0.02\nyolov5:\n  lr0: 0.03\nrtdetr:\n  lr0: 0.04\n  num_denoising: 3\n")
    base.with_name("rtdetr.yaml").write_text(BASE)
    assert load_hyp(mine, base)["lr0"] == 0.03
    other = base.with_name("yolo11.yaml")
    other.write_text(BASE)
    assert load_hyp(mine, other)["lr0"] == 0.02
    mine.write_text("yolov5: 3\nyolo11:\n  lr0: fast\n")
    with pytest.raises(ConfigError) as caught:
        load_hyp(mine, other)
    assert str(caught.value).splitlines() == [
        f"{mine}:1: unknown key 'yolov5'.",
        f"{mine}:3: lr0 - got 'fast', expected a number such as 0.01.",
    ]


def test_runs_are_numbered_from_two(tmp_path: Path) -> None:
    assert increment_path(tmp_path, "exp") == tmp_path / "exp"
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp3").mkdir()
    assert increment_path(tmp_path, "exp") == tmp_path / "exp2"
    (tmp_path / "exp2").mkdir()
    assert increment_path(tmp_path, "exp") == tmp_path / "exp4"
    assert increment_path(tmp_path, "exp", exist_ok=True) == tmp_path / "exp"


@pytest.mark.parametrize(
    ("values", "expected", "told"),
    [
        (640, (640, 640), 0),
        ([320], (320, 320), 0),
        ([384, 640], (384, 640), 0),
        ([100, 65], (128, 96), 1),
    ],
)
def test_image_sizes_are_height_then_width(values, expected, told, messages) -> None:
    assert parse_imgsz(values, 32) == expected
    assert len(messages) == told


@pytest.mark.parametrize("values", [[], [1, 2, 3], [0], [-32, 64]])
def test_impossible_image_sizes_are_refused(values: list[int]) -> None:
    with pytest.raises(ConfigError, match="--imgsz"):
        parse_imgsz(values, 32)


def parser() -> ArgumentParser:
    made = ArgumentParser(prog="train.py")
    made.add_argument("--epochs", type=integer(1), default=100)
    made.add_argument("--batch-size", type=integer(1, allowed=(-1,)), default=16)
    made.add_argument("--conf-thres", type=number(0, 1), default=0.25)
    made.add_argument("--quad", action="store_true")
    return made


def test_good_values_are_taken() -> None:
    options = parser().parse_args(["--epochs", "3", "--batch-size", "-1", "--conf-thres", "1"])
    assert (options.epochs, options.batch_size, options.conf_thres) == (3, -1, 1.0)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--epochs", "0"], "argument --epochs: got 0, expected 1 or more"),
        (["--epochs", "1.5"], "got '1.5', expected a whole number"),
        (["--batch-size", "-2"], "got -2, expected 1 or more or -1"),
        (["--conf-thres", "2"], "got 2, expected 0 to 1"),
        (["--conf-thres", "nan"], "got 'nan', expected a number"),
        (["--epoch-s", "3"], "unknown argument '--epoch-s'. Did you mean '--epochs'?"),
    ],
)
def test_bad_values_are_one_line_and_exit_code_two(words, expected, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(words)
    printed = capsys.readouterr()
    assert caught.value.code == 2
    assert expected in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


LISTS = "a0: &a0 [1, 1]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
MAPS = "a0: &a0 {k: 1}\n" + "".join(
    f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(9))}}}\n" for i in range(1, 10)
)
MERGES = "a0: &a0 {k: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}], z{i}: 1}}\n" for i in range(1, 10)
)


@pytest.mark.parametrize("text", [LISTS, MAPS, MERGES])
def test_a_few_lines_of_aliases_do_not_stand_for_billions_of_values(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^x.yaml: its aliases \(\*name\) stand for .*e\+\d+ v"):
        parse_yaml(text, "x.yaml")
    with pytest.raises(ValueError, match="aliases"):
        parse_value("{" + ", ".join(text.replace(": &", " : &").splitlines()) + "}")


def test_aliases_in_reason_are_read_with_the_lines_of_their_values() -> None:
    file = parse_yaml("a: &a [1, 2]\nb: [*a, *a]\nc: {<<: {d: 1}}\n", "x.yaml")
    assert file.data == {"a": [1, 2], "b": [[1, 2], [1, 2]], "c": {"d": 1}}
    assert file.lines[("b", 1, 0)] == 1 and file.lines[("b",)] == 2


def test_what_has_no_end_is_no_yaml_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    (tmp_path / "large.yaml").write_bytes(b"a: 1\n" * (1 << 20))
    for name, told in (
        ("pipe.yaml", "cannot be read - a named pipe, not a file"),
        ("zero.yaml", "cannot be read - a device, not a file"),
        ("large.yaml", "got more than 4 MiB, expected a YAML file."),
    ):
        with pytest.raises(ConfigError) as caught:
            read_yaml(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: {told}")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1\nb: \x00\n", r"x.yaml:2: not valid YAML - the character '\x00'. Remove it."),
        (f"a: {'9' * 19}\n", "x.yaml:1: not valid YAML - a number of 19 digits."),
        (f"a: {'9' * 5000}\n", "x.yaml:1: not valid YAML - a number of 5000 digits."),
    ],
)
def test_what_no_value_can_be_is_told_with_its_line(text: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "x.yaml")
    assert str(caught.value) == told
    with pytest.raises(ValueError, match="not valid YAML"):
        parse_value(text)


def test_a_recipe_has_no_number_beyond_reason(tmp_path: Path) -> None:
    (tmp_path / "family.yaml").write_text("warmup_bias_lr: 0.1\nlr0: 0.01\n")
    (tmp_path / "hyp.yaml").write_text(f"warmup_bias_lr: 1e300\nlr0: '{'x' * 100_000}'\n")
    with pytest.raises(ConfigError) as caught:
        load_hyp(tmp_path / "hyp.yaml", tmp_path / "family.yaml")
    told = str(caught.value).splitlines()
    assert told[0].endswith("hyp.yaml:1: warmup_bias_lr - got 1e+300, expected 0 to 1e+09.")
    assert len(told) == 2 and len(told[1]) < 1300
