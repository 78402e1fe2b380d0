"""What a user adds, and what a YAML must not do: dropped files, imports, code as arguments."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from small_configs import SIZE, build, config, error_of
from small_configs import with_maps as with_maps

from models import common, modules
from models.yolo import build_model
from utils.errors import ConfigError


@pytest.mark.parametrize(
    "place",
    ["an argument", "a keyword", "a module", "from", "repeats", "activation", "nc", "scale"],
)
def test_python_code_in_a_yaml_runs_nothing(place: str, tmp_path: Path):
    mark = tmp_path / "ran"
    code = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    row = {
        "an argument": [-1, 1, "Conv", [code, 3, 2]],
        "a keyword": [-1, 1, "Conv", [8, {"kernel_size": code}]],
        "a module": [-1, 1, code, [8]],
        "from": [code, 1, "Conv", [8]],
        "repeats": [-1, code, "Conv", [8]],
    }.get(place, [-1, 1, "Conv", [8, 3, 2]])
    keys = {
        "activation": {"activation": code},
        "nc": {"nc": code},
        "scale": {"scales": {"n": [code, 1, 64]}},
    }.get(place, {})
    with pytest.raises(ConfigError):
        build_model({**config([row]), **keys}, imgsz=SIZE)
    assert not mark.exists()


@pytest.mark.parametrize(
    "name", ["os.system", "torch.load", "nn.Module", "nn.Sequential", "eval", "_import_files"]
)
def test_only_layers_can_be_named(name: str):
    assert "unknown layer" in error_of([[-1, 1, name, ["true"]]])


PASTED = """
from torch import nn

class {name}(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.a = nn.Conv2d(3, width, 4, 4)
        self.b = nn.Conv2d(width, 2 * width, 2, 2)
        self.width_list = [width, 2 * width]

    def forward(self, x):
        x = self.a(x)
        return [x, self.b(x)]

def {name}_wide(**options):
    return {name}(32, **options)
"""


@pytest.fixture
def drop_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put files into the folder of backbones for the length of a test."""

    def drop(**texts: str) -> None:
        for name, text in texts.items():
            (tmp_path / f"{name}.py").write_text(text)
            sys.modules.pop(f"models.modules.{name}", None)  # of another test
        monkeypatch.setattr(modules, "_FILES", dict(modules._FILES))
        monkeypatch.setattr(modules, "_BROKEN", {})
        monkeypatch.setattr(modules, "__path__", [*modules.__path__, str(tmp_path)])
        modules._import_files()

    return drop


def test_a_file_dropped_into_the_folder_is_a_backbone(drop_in):
    drop_in(pasted_net=PASTED.format(name="PastedNet"))
    model = build([[-1, 1, "PastedNet", [16]]], [[["P3"], 1, "Detect", ["nc"]]])
    assert model.rows[0].map_slots == (1, 2)
    assert model.rows[0].shape == ((16, 32, 32), (32, 16, 16))
    assert model.strides == (8,)


def test_a_function_that_makes_a_backbone_counts_as_one(drop_in):
    drop_in(pasted_fn=PASTED.format(name="PastedFn"))
    model = build([[-1, 1, "PastedFn_wide", []]], [[["P2"], 1, "Detect", ["nc"]]])
    assert model.rows[0].shape[0] == (32, 32, 32)


def test_what_a_file_keeps_to_itself_cannot_be_named(drop_in):
    drop_in(private_net=PASTED.format(name="_Private"))
    assert "unknown layer '_Private'" in error_of([[-1, 1, "_Private", []]])


def test_a_private_class_is_told_under_its_public_name(drop_in):
    drop_in(private_one=PASTED.format(name="_Hidden"))
    message = error_of([[-1, 1, "Hidden", []]])
    assert (
        "is private in private_one.py, _Hidden, expected a public class. Rename it to Hidden."
        in message
    )


def test_a_file_that_does_not_import_hinders_nothing_and_is_named(drop_in):
    drop_in(broken_net="from nowhere import something\n", whole_net=PASTED.format(name="WholeNet"))
    assert build([[-1, 1, "WholeNet", []]], [[["P3"], 1, "Detect", ["nc"]]]).strides == (8,)
    message = error_of([[-1, 1, "BrokenNet", []]])
    assert "models/modules/broken_net.py could not be imported (ModuleNotFoundError" in message


def test_imports_run_only_when_they_are_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(modules, "_FILES", dict(modules._FILES))
    mark = tmp_path / "ran"
    code = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n{PASTED.format(name='MyNet')}"
    (tmp_path / "my_net.py").write_text(code)
    file = tmp_path / "mine.yaml"
    file.write_text(
        "nc: 2\nimports: my_net.py\nbackbone:\n  - [-1, 1, MyNet, []]\nhead:\n"
        "  - [[P3], 1, Detect, [nc]]\n"
    )
    with pytest.raises(ConfigError, match=r"imports: my_net.py would run code.*--allow-code"):
        build_model(file, imgsz=SIZE)
    assert not mark.exists()
    assert build_model(file, imgsz=SIZE, allow_code=True).strides == (8,)
    assert mark.exists()


def test_an_import_that_fails_is_one_line(tmp_path: Path):
    (tmp_path / "bad.py").write_text("1 +\n")
    for name, told in (
        ("bad.py", "bad.py cannot be imported"),
        ("absent.py", "got absent.py, expected a file"),
    ):
        file = tmp_path / "mine.yaml"
        file.write_text(
            f"imports: {name}\nbackbone: [[-1, 1, Conv, [8]]]\nhead: [[[0], 1, Detect, [nc]]]\n"
        )
        with pytest.raises(ConfigError, match=told) as caught:
            build_model(file, imgsz=SIZE, allow_code=True)
        assert "\n" not in str(caught.value)


FAILING = """
import torch
from torch import nn


class OwnError(Exception):
    pass


class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 8, 8)
        {constructor}

    def forward(self, x):
        y = self.conv(x)
        {forward}
        return [y]
"""


@pytest.mark.parametrize(
    ("place", "code", "told"),
    [
        ("constructor", "raise Exception('width must be even')", "Exception: width must be even (mine.py line 14)"),
        ("constructor", "raise OwnError()", "OwnError (mine.py line 14)"),
        ("constructor", "raise SystemExit(1)", "SystemExit: 1 (mine.py line 14)"),
        ("forward", "y = z", "NameError: name 'z' is not defined (mine.py line 18)"),
        ("forward", "import no_such_library", "ModuleNotFoundError: No module named 'no_such_library' (mine.py line 18)"),
        ("forward", "next(iter([]))", "StopIteration (mine.py line 18)"),
        ("forward", "y = y * torch.from_numpy(y.numpy())", "cannot be trained - Can't call numpy() on Tensor that requires grad"),
        ("forward", "y = y + x", "must match the size of tensor b (128) at non-singleton dimension 3 (mine.py line 18)"),
    ],
)  # fmt: skip
def test_a_users_mistake_is_one_line_with_the_place_in_his_file(
    place: str, code: str, told: str, drop_in, capfd: pytest.CaptureFixture[str]
):
    drop_in(mine=FAILING.format(**{"constructor": "", "forward": "", place: code}))
    message = error_of([[-1, 1, "Mine", []]], [[["P3"], 1, "Detect", ["nc"]]])
    assert told in message
    assert "\n" not in message
    assert capfd.readouterr().err == ""  # nor does a library log its own traceback


@pytest.mark.parametrize(
    "code", ["raise Exception('needs a new driver')", "import sys; sys.exit(3)"]
)
def test_a_file_that_ends_in_any_way_hinders_nothing_and_is_told_once(
    code: str, drop_in, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    modules.tell_broken_files.cache_clear()
    drop_in(boom=code)
    for _ in range(2):
        build([[-1, 1, "Conv", [8, 3, 2]]], [[[0], 1, "Detect", ["nc"]]])
    assert capsys.readouterr().err.count("models/modules/boom.py: could not be imported") == 1


def test_two_backbones_of_one_name_are_refused_and_both_files_are_named(drop_in):
    drop_in(one=PASTED.format(name="Twice"), two=PASTED.format(name="Twice"))
    drop_in(three=PASTED.format(name="EMO_1M"))
    head = [[["P3"], 1, "Detect", ["nc"]]]
    message = error_of([[-1, 1, "Twice", []]], head)
    assert "is defined twice, in models/modules/one.py and models/modules/two.py" in message
    message = error_of([[-1, 1, "EMO_1M", []]], head)
    assert "is defined twice, in models/modules/emo.py and models/modules/three.py" in message
    assert "\n" not in message


def test_an_import_that_is_called_like_a_backbone_is_told_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(modules, "_FILES", dict(modules._FILES))
    file = tmp_path / "mine.py"
    file.write_text(PASTED.format(name="EMO_1M"))
    rows = {"backbone": [[-1, 1, "EMO_1M", []]], "head": [[["P3"], 1, "Detect", ["nc"]]]}
    with pytest.raises(ConfigError) as caught:
        build_model({"nc": 2, "imports": str(file), **rows}, imgsz=SIZE, allow_code=True)
    assert f"is defined twice, in {file} and models/modules/emo.py" in str(caught.value)


def test_a_part_of_a_users_file_may_be_called_like_a_layer(drop_in):
    drop_in(mine=PASTED.format(name="MyNet") + "class Conv(nn.Module):\n    pass\n")
    model = build([[-1, 1, "MyNet", []], ["P3", 1, "Conv", [8]]], [[[5], 1, "Detect", ["nc"]]])
    assert type(model.model[1]) is common.Conv


def test_an_imported_file_imports_what_lies_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(modules, "_FILES", dict(modules._FILES))
    (tmp_path / "my_widths.py").write_text("WIDTH = 24\n")
    code = "from my_widths import WIDTH\n" + PASTED.format(name="Beside")
    (tmp_path / "beside.py").write_text(code.replace("width=8", "width=WIDTH"))
    before = list(sys.path)
    rows = {"backbone": [[-1, 1, "Beside", []]], "head": [[["P3"], 1, "Detect", ["nc"]]]}
    imports = {"imports": str(tmp_path / "beside.py")}
    model = build_model({"nc": 2, **imports, **rows}, imgsz=SIZE, allow_code=True)
    assert model.rows[0].shape[-1][0] == 48
    assert sys.path == before


def test_a_draft_of_a_config_whose_code_needs_values_is_built_all_the_same(drop_in):
    drop_in(values=PASTED.format(name="Values").replace(
        "self.width_list =", "self.rates = [r.item() for r in torch.linspace(0, 1, 3)]\n        self.width_list ="
    ).replace("from torch import nn", "import torch\nfrom torch import nn"))  # fmt: skip
    model = build([[-1, 1, "Values", []]], [[["P3"], 1, "Detect", ["nc"]]])
    grafted = build_model(model.config, backbone=["MobileNetV4ConvSmall"], imgsz=SIZE)
    assert grafted.rows[0].module == "MobileNetV4ConvSmall"


def test_idle_weights_are_frozen_in_code_that_asks_for_the_device_too(drop_in):
    code = PASTED.replace("return [x, self.b(x)]", "return self.maps(x)") + (
        "    def maps(self, x):\n"
        "        with torch.autocast(x.device.type, enabled=False):\n"
        "            return [x, self.b(x)]\n"
    )
    own = code.split("def {name}_wide")
    code = "import torch\n" + own[0] + "    def maps" + own[1].split("    def maps")[1]
    drop_in(casting=code.format(name="Casting"))
    model = build([[-1, 1, "Casting", []]], [[["P2"], 1, "Detect", ["nc"]]])
    frozen = {n for n, p in model.model[0].named_parameters() if not p.requires_grad}
    assert frozen == {"b.weight", "b.bias"}
