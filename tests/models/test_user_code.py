"""What a user adds, and what a YAML must not do: dropped files, imports, code as arguments."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_configs import SIZE, build, config, error_of
from small_configs import with_maps as with_maps

from models import modules
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
    for name in ("bad.py", "absent.py"):
        file = tmp_path / "mine.yaml"
        file.write_text(
            f"imports: {name}\nbackbone: [[-1, 1, Conv, [8]]]\nhead: [[[0], 1, Detect, [nc]]]\n"
        )
        with pytest.raises(ConfigError, match=f"{name} cannot be imported") as caught:
            build_model(file, imgsz=SIZE, allow_code=True)
        assert "\n" not in str(caught.value)
