"""Mistakes in putting a backbone under a head, from the shell: one line each, exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from models import modules, registry
from models.yolo import main
from utils.errors import run_cli

SMALL = "[-1, 1, MobileNetV4ConvSmall, [0.25]]"
HEAD = ["[[P3, P4, P5], 1, Detect, [nc]]"]
ONLY = "only P2 (stride 4), P3 (stride 8), P4 (stride 16), P5 (stride 32)."
NOT_FIRST = (
    "expected the image with 3: a backbone makes all its maps from the image. Put it first, or behind a Silence row "
    "that it reads."
)
UNKNOWN = "expected a registered layer, a class in models/modules/ or a timm model."
FACTOR = "expected a number of at least 0.0312, such as 0.5"
MINE = """
from torch import nn

class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.maps = nn.ModuleList(nn.Conv2d(3, width, s, s) for width, s in ((8, 8), (16, 16), (24, 32)))
        {says}

    def forward(self, x):
        maps = [conv(x) for conv in self.maps]
        return {gives}
"""
PAIR = """
from models.registry import convolution, register
from torch import nn

@register(convolution)
class Pair(nn.Conv2d):
    def forward(self, x):
        return [super().forward(x), x]
"""


@pytest.fixture(autouse=True)
def without_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imported files are forgotten after the test."""
    monkeypatch.setattr(modules, "_FILES", dict(modules._FILES))
    monkeypatch.setattr(registry, "_LAYERS", dict(registry._LAYERS))


@pytest.fixture
def told(tmp_path: Path, capsys: pytest.CaptureFixture):
    """What the table printer says of a YAML: the one line behind the file's name."""

    def run(
        backbone: list[str], head: list[str], code: str = "", flags: tuple[str, ...] = ()
    ) -> str:
        (tmp_path / "mine.py").write_text(code)
        file = tmp_path / "model.yaml"
        rows = {"backbone": backbone, "head": head}
        text = "".join(f"{key}:\n" + "".join(f"  - {r}\n" for r in rows[key]) for key in rows)
        file.write_text(f"nc: 2\nimports: mine.py\n{text}")
        words = ["--cfg", str(file), "--imgsz", "128", "--allow-code", *flags]
        with pytest.raises(SystemExit) as ended:
            run_cli(lambda: main(words))
        out, err = capsys.readouterr()
        assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
        return err.strip().removeprefix("error: ").removeprefix(f"{file} ")

    return run


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("0", f"Conv: got from 0, which is empty: the backbone has no stride 2, {ONLY}"),
        ("P1", f"Conv: got from P1, which is empty: the backbone has no stride 2, {ONLY}"),
        ("P6", "Conv: got from 'P6', expected an index or a name: P2, P3, P4, P5."),
    ],
)
def test_a_head_row_asks_for_a_stride_that_the_backbone_does_not_have(source, message, told):
    found = told([SMALL], [f"[{source}, 1, Conv, [8]]", *HEAD])
    assert found.startswith(f"head[0] (line 6) {message}")


def test_the_same_under_a_flag_names_the_flag_and_the_line_of_the_head(told):
    backbone = [f"[-1, 1, Conv, [{width}, 3, 2]]" for width in (8, 16, 16)]
    found = told(
        backbone, ["[[0, 1, 2], 1, Detect, [nc]]"],
        flags=("--backbone", "MobileNetV4ConvSmall", "factor=0.25"),
    )  # fmt: skip
    assert found == (
        "(--backbone MobileNetV4ConvSmall) head[0] (line 8) Detect: got from P1, which is empty: "
        f"the backbone has no stride 2, {ONLY}"
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (SMALL, f"head[1] (line 7) MobileNetV4ConvSmall: got an input of 8 channels, {NOT_FIRST}"),
        ("[-1, 1, test_resnet, []]", f"head[1] (line 7) test_resnet: got an input of 8 channels, {NOT_FIRST}"),
        (
            "[-1, 1, Pair, [8, 1]]",
            "head[1] (line 7) Pair: returns a list of (8x4x4, 8x4x4), but its rule says one map of 8 "
            "channels. Return one map, or register it with @register(backbone) if it makes all maps "
            "from the image.",
        ),
        (
            "[-1, 1, CBLinear, [[8, 16]]]",
            "head[2] (line 8) Conv: got an input with several maps of [8, 16] channels, expected one "
            "map. Read a row that gives one, or join them first, as CBFuse does.",
        ),
    ],
)  # fmt: skip
def test_a_module_with_a_list_of_outputs_stands_in_the_middle_of_a_head(row, message, told):
    head = ["[-1, 1, Conv, [8]]", row, "[-1, 1, Conv, [8]]", *HEAD]
    assert told([SMALL], head, PAIR) == message


@pytest.mark.parametrize("factor", ["0", "0.0", "-1", "half"])
def test_a_factor_that_leaves_nothing(factor, told):
    shown = repr({"0": 0, "0.0": 0.0, "-1": -1}.get(factor, factor))
    assert told([f"[-1, 1, MobileNetV4ConvSmall, [{factor}]]"], HEAD) == (
        f"backbone[0] (line 4) MobileNetV4ConvSmall: cannot be built with [{shown}] - got factor {shown}, {FACTOR}"
    )
    flags = ("--backbone", "MobileNetV4ConvSmall", f"factor={factor}")
    assert told([SMALL], HEAD, flags=flags) == (
        "(--backbone MobileNetV4ConvSmall) backbone[0] MobileNetV4ConvSmall: cannot be built with "
        f"{{'factor': {shown}}} - got factor {shown}, {FACTOR}"
    )


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("test_resnet_", "test_resnet"), ("timm/test_resnett", "test_resnet"), ("EMO_1N", "EMO_1M")],
)
def test_a_wrong_name(name, nearest, told):
    message = f"unknown layer {name!r}, {UNKNOWN} Did you mean {nearest!r}?"
    assert told([f"[-1, 1, {name}, []]"], HEAD) == f"backbone[0] (line 4) {name}: {message}"
    assert told([SMALL], HEAD, flags=("--backbone", name)) == f"--backbone: {message}"


@pytest.mark.parametrize("name", ["Conv", "MobileOne", "Detect", "nn.Upsample"])
def test_a_layer_that_is_no_backbone_stands_behind_the_flag(name, told):
    assert told([SMALL], HEAD, flags=("--backbone", name)) == (
        f"--backbone: got {name}, a layer that does not make all maps from the image, expected a "
        "backbone such as EMO_1M, or a timm model such as resnet18."
    )


MAPS = "expected a list of feature maps (B, C, H, W); a layer with one output registers with a rule: @register(convolution)."


@pytest.mark.parametrize(
    ("says", "gives", "message"),
    [
        ("self.channels = [8, 16, 32]", "maps", "says channels [8, 16, 32], but its outputs have [8, 16, 24]. Mend `channels`."),
        ("self.channels = [8, 16]", "maps", "says channels [8, 16], but its outputs have [8, 16, 24]. Mend `channels`."),
        ("self.width_list = ['a', 'b']", "maps", "says width_list ['a', 'b'], expected a number for each map. Mend `width_list`."),
        ("self.strides = [4, 8, 16]", "maps", "says strides [4, 8, 16], but its outputs have [8, 16, 32]. Mend `strides`."),
        ("pass", "[None, *maps]", f"returns a list of (NoneType, 8x16x16, 16x8x8, 24x4x4), {MAPS}"),
        ("pass", "[m.flatten(1) for m in maps]", f"returns a list of (2048, 1024, 384), {MAPS}"),
        ("pass", "maps[0].flatten(1)", "returns a tensor 2048, expected a map (B, C, H, W) or a list of maps. Return one map, "
     "or a list of maps."),
        ("self.nothing()", "maps", "cannot be built as Mine() - "
     "AttributeError: 'Mine' object has no attribute 'nothing' (mine.py line 8)"),
        ("import no_such_library", "maps", "cannot be built as Mine() - "
     "ModuleNotFoundError: No module named 'no_such_library' (mine.py line 8). Install no_such_library, "
     "put no_such_library.py beside the file, or leave the import out."),
        ("pass", "self.nothing(x)", "does not fit its input of shape 3x128x128 - "
     "AttributeError: 'Mine' object has no attribute 'nothing' (mine.py line 12)"),
    ],
)  # fmt: skip
def test_a_users_module_does_not_do_what_it_says(says, gives, message, told):
    found = told(["[-1, 1, Mine, []]"], HEAD, MINE.format(says=says, gives=gives))
    assert found == f"backbone[0] (line 4) Mine: {message}"


def test_a_thing_that_is_no_module_is_told(told):
    found = told(["[-1, 1, Mine, []]"], HEAD, "class Mine:\n    pass\n")
    assert (
        found
        == "backbone[0] (line 4) Mine: cannot be built as Mine() - is a Mine, expected a torch.nn.Module."
    )


@pytest.mark.parametrize("says", ["strides = 8", "channels = 64", "channels = len"])
def test_attributes_that_mean_something_else_hinder_nothing(says, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(MINE.format(says=f"self.{says}", gives="maps"))
    file = tmp_path / "model.yaml"
    file.write_text(f"nc: 2\nimports: mine.py\nbackbone: [[-1, 1, Mine, []]]\nhead: [{HEAD[0]}]\n")
    main(["--cfg", str(file), "--imgsz", "128", "--allow-code"])
    assert "training form" in capsys.readouterr().out


def test_a_config_that_imports_takes_another_backbone(tmp_path, capsys):
    """Its own layers, and the one behind the flag, are known before rows are rewritten."""
    (tmp_path / "mine.py").write_text(MINE.format(says="pass", gives="maps"))
    file = tmp_path / "model.yaml"
    file.write_text(f"nc: 2\nimports: mine.py\nbackbone: [[-1, 1, Mine, []]]\nhead: [{HEAD[0]}]\n")
    words = ["--cfg", str(file), "--imgsz", "128", "--allow-code", "--backbone"]
    main([*words, "MobileNetV4ConvSmall", "factor=0.25"])
    assert "MobileNetV4ConvSmall" in capsys.readouterr().out
    file.write_text(f"nc: 2\nimports: mine.py\nbackbone: [{SMALL}]\nhead: [{HEAD[0]}]\n")
    main([*words, "Mine"])
    assert "Mine" in capsys.readouterr().out
