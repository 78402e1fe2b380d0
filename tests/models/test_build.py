"""The index rule, names, channel rules and errors of the parser, as rows with a reason each."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import modules, registry
from models.build import build_rows
from models.registry import backbone, register
from models.rows import parse_spec, read_model_config
from models.wiring import Row
from models.yolo import DetectionModel, build_model
from utils.errors import ConfigError

SIZE = (128, 128)
ALL = [2, 4, 8, 16, 32]


class Maps(nn.Module):
    """A backbone with a map at each of the given strides, 8 channels times its place."""

    def __init__(self, strides: list[int], kind: str = "list", says: dict[str, Any] | None = None):
        super().__init__()
        self.sizes, self.kind = strides, kind
        self.widths = [8 * (place + 1) for place in range(len(strides))]
        self.convs = nn.ModuleList(nn.Conv2d(3, width, 1) for width in self.widths)
        for key, value in {"channels": self.widths, **(says or {})}.items():
            setattr(self, key, value)

    def forward(self, x: Tensor) -> Any:
        maps = [c(F.avg_pool2d(x, s)) for c, s in zip(self.convs, self.sizes, strict=True)]
        if self.kind == "dict":
            return OrderedDict((str(i), m) for i, m in enumerate(maps))
        return maps[0] if self.kind == "tensor" else maps


@pytest.fixture(autouse=True)
def with_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Maps` may be named in a YAML for the length of a test."""
    monkeypatch.setattr(registry, "_LAYERS", dict(registry._LAYERS))
    register(backbone)(Maps)


def config(backbone_rows: list, head: list | None = None, **keys: Any) -> dict[str, Any]:
    """A config that ends in YOLO11's head on the row before it, unless told otherwise."""
    rows = [[[-1], 1, "Detect", ["nc"]]] if head is None else head
    return {"nc": 2, "backbone": backbone_rows, "head": rows, **keys}


def build(backbone_rows: list, head: list | None = None, **keys: Any) -> DetectionModel:
    return build_model(config(backbone_rows, head, **keys), imgsz=SIZE)


def error_of(backbone_rows: list, head: list | None = None, **keys: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        build(backbone_rows, head, **keys)
    return str(caught.value)


def maps_row(strides: list[int], source: Any = -1, **kwargs: Any) -> list:
    return [source, 1, "Maps", [strides, kwargs] if kwargs else [strides]]


SILENCE = [-1, 1, "Silence", []]
CONV = [-1, 1, "Conv", [16]]


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
        (maps_row(ALL, kind="tensor"), "returns Tensor, expected a list of feature maps"),
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


def test_a_head_of_one_level_may_read_a_single_index():
    model = build([[-1, 3, "Conv", [8, 3, 2]]], [[-1, 1, "Detect", ["nc"]]])
    assert model.strides == (8,)
    model(torch.rand(1, 3, *SIZE))


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
