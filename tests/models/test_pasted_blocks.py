"""Blocks, fusions and necks as their authors wrote them, before heads that know nothing of them; none is registered."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch_versions import needs_programs

from benchmarks import pasted_blocks
from benchmarks.coupling_matrix import train_step
from benchmarks.pasted_blocks import (
    FORMATS,
    FORMATS_HEAD,
    LIMIT,
    SIZE,
    build,
    check_block,
    check_frozen,
    check_readings,
    check_same,
    known_reason,
    readings,
)
from benchmarks.pasted_places import CLASSES, FOLDER, HEADS, imported_path, site_of
from benchmarks.pasted_table import CONV, FIRST, PASTED, SAME, STACKED
from deploy.exporters.forms import export
from deploy.exporters.network import ExportOptions, blobs
from deploy.exporters.onnx_file import export_onnx
from deploy.exporters.verify import verify
from models import common, modules, registry
from models.registry import register
from models.reparam import fuse
from models.table import count_params
from models.yolo import DetectionModel, build_model, model_from_checkpoint
from utils.errors import ConfigError

onnx = pytest.importorskip("onnx")
for _library in ("timm", "onnxruntime", "einops"):
    pytest.importorskip(_library)

CHAIN: list[list[Any]] = [
    [-1, 1, "SE", [1024]], [-1, 1, "SimAM", []], [-1, 1, "CBAM", [1024]], [-1, 1, "CoordAtt", [1024]],
    [-1, 1, "GhostModule", [512, 3]], [-1, 2, "C2f_Partial", [512, True]], [-1, 1, "RepBlock", [512]], [-1, 1, "LKA", []],
    [-1, 1, "MixBlock", [256]], [-1, 3, "VoVGSCSP", [256]], [-1, 1, "SelfAttention2d", [4]], [-1, 2, "FasterBlock", [256]],
    [-1, 1, "MixerBlock", []], [-1, 1, "Involution", [3]], [-1, 1, "ECA", []],
]  # fmt: skip
"""Fifteen blocks of both kinds of rows, from 256 channels down to 64 under yolo11n."""


CONV_ROW: list[Any] = [-1, 1, "Conv", [512, 1]]
FEW = (
    *("CBAM", "KeywordSE", "ShuffleAttention", "WindowMixer", "DeformBlock", "StripBlock", "LazyBlock", "AnyConv"),
    *("TemperatureGate", "C3k2_SE", "C3SimAM", "DySample", "HaarDown", "Fusion", "TopDown", "FourLevelNeck"),
)  # fmt: skip
"""Blocks that the default suite looks at one by one, of every kind; the others are `slow`."""


def few_of(names: Iterable[str]) -> list[Any]:
    """All of them as parameters of a test, those not in `FEW` marked as slow."""
    return [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.fixture(autouse=True)
def own_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that a test imports are forgotten after it."""
    monkeypatch.setattr(modules, "_FILES", dict(modules._FILES))
    monkeypatch.setattr(registry, "_LAYERS", dict(registry._LAYERS))


# --- the table ------------------------------------------------------------------------------------


def test_every_public_class_of_the_files_that_is_a_block_is_in_the_table():
    files = {p.file for p in PASTED.values()}
    assert files == {path.stem for path in FOLDER.iterdir() if path.stem != "__pycache__"}
    assert len(PASTED) >= 80 and len({p.place for p in PASTED.values()}) == 10


@pytest.mark.parametrize("name", few_of(PASTED))
def test_a_block_is_read_as_its_author_means_it_whichever_way_a_row_names_it(name: str):
    model, *others = (build(name, args, "tiny") for args in PASTED[name].rows)
    check_readings(model, name)
    check_frozen(model, name)
    for other in others:
        check_same(model, other, name)


def test_a_wrong_reading_is_noticed(monkeypatch: pytest.MonkeyPatch):
    model = build("CBAM", [{"reduction": 8}], "tiny")
    with pytest.raises(ValueError, match=r"read as CBAM\(c1=64, reduction=8\), expected CBAM\(c1"):
        check_readings(model, "CBAM")
    with pytest.raises(ValueError, match="gives other parameters"):
        check_same(build("LKA", [], "tiny"), model, "SimAM")


# --- whole models ---------------------------------------------------------------------------------


def chained() -> DetectionModel:
    """yolo11n with `CHAIN` between its coarsest map and its head."""
    site = site_of("yolo11n")
    names = [row[2] for row in CHAIN]
    config = site.config | {"imports": sorted({imported_path(name) for name in names})}
    head = [[*site.maps[:2], -1], *site.head[1:]]
    config["head"] = [*config["head"], *CHAIN, head]
    torch.manual_seed(0)
    return build_model(config, num_classes=CLASSES, imgsz=SIZE, allow_code=True)


def test_a_model_of_fifteen_blocks_trains_fuses_and_exports(tmp_path: Path):
    model = chained()
    train_step(model, SIZE)
    report = fuse(model.eval())
    assert report.difference <= report.tolerance
    options = ExportOptions(imgsz=SIZE)
    for case in verify(export_onnx(model, options, tmp_path / "chain.pt"), model, options):
        assert case.relative <= LIMIT


def test_a_checkpoint_of_a_model_with_pasted_blocks_is_rebuilt_from_its_own_config():
    model = build("C2f_Partial", PASTED["C2f_Partial"].rows[0], "tiny").eval()
    state = {"config": model.config, "names": list(model.names), "imgsz": SIZE}
    again = model_from_checkpoint({**state, "model": model.state_dict()}, allow_code=True).eval()
    assert readings(again, "C2f_Partial") == readings(model, "C2f_Partial")
    image = blobs(1, SIZE, seed=0)
    assert torch.equal(again.decode(again(image)).boxes, model.decode(model(image)).boxes)


@needs_programs
def test_a_form_that_cannot_be_written_is_one_line_with_the_reason(tmp_path: Path):
    model = build("NAM", [], "tiny")  # `.data` in forward, which torch.export does not follow
    with pytest.raises(ConfigError) as caught:
        export(model, ["pt2"], ExportOptions(imgsz=SIZE), tmp_path / "nam.pt")
    line = str(caught.value)
    assert line.startswith("--include pt2: this model cannot be written - ") and "\n" not in line
    assert "Take another form (onnx, torchscript, openvino, safetensors, pt)" in line


@pytest.mark.slow
@pytest.mark.parametrize(("name", "opset"), [("DCNConv", 19), ("HostTable", 18), ("SE", 17)])
def test_what_the_usual_exporter_cannot_do_right_is_written_by_the_other_one(
    name: str, opset: int, tmp_path: Path
):
    """An operator that came with opset 19, and a torch.linspace that would become float64."""
    pytest.importorskip("onnxscript")
    model = build(name, [], "tiny")
    (made,) = export(model, ["onnx"], ExportOptions(imgsz=SIZE), tmp_path / "block.pt")
    opsets = {o.domain: o.version for o in onnx.load(str(made.path)).opset_import}
    assert opsets[""] == opset
    assert made.cases[0].relative <= LIMIT


@pytest.mark.slow
def test_openvino_names_the_operator_that_it_lacks(tmp_path: Path):
    pytest.importorskip("openvino")
    model = build("DCNConv", [], "tiny")
    with pytest.raises(
        ConfigError, match=r"--include openvino: OpenVINO has no DeformConv-19\. Take"
    ):
        export(model, ["openvino"], ExportOptions(imgsz=SIZE), tmp_path / "block.pt")


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", PASTED)
def test_a_block_trains_fuses_and_exports_under_every_family_of_heads(
    name: str, head: str, tmp_path: Path
):
    formats = FORMATS[1:] if head == FORMATS_HEAD else ()
    result = check_block(name, head, tmp_path, formats)
    assert result["status"] == "works", result
    for form, difference in result["formats"].items():
        if reason := known_reason(name, head, form):
            assert reason in str(difference)
        else:
            assert isinstance(difference, float) and difference <= LIMIT, (form, difference)


# --- names and files ------------------------------------------------------------------------------


def model_of(files: list[Path | str], *rows: list[Any]) -> DetectionModel:
    """The small trunk with rows on its coarsest map, which the head reads alone."""
    site = site_of("tiny")
    config = site.config | {"imports": [str(file) for file in files]}
    config["head"] = [*rows, [[-1], *site.head[1:]]]
    return build_model(config, num_classes=CLASSES, imgsz=SIZE, allow_code=True)


def test_helpers_that_share_a_name_stay_those_of_their_own_files():
    files = [imported_path("StripBlock"), imported_path("C3SimAM")]
    model = model_of(files, [-1, 1, "StripBlock", [512]], [-1, 1, "C3SimAM", [512]], CONV_ROW)
    strip, csp, conv = model.model[-4:-1]
    assert type(strip.first).__module__.startswith("yoke_import_own_helpers")
    assert type(csp.cv1) is type(conv) is common.Conv


def test_a_built_in_name_that_a_file_defines_too_is_told_with_the_way_to_mean_either(
    capsys: pytest.CaptureFixture[str],
):
    helpers = imported_path("StripBlock")
    model = model_of([helpers], CONV_ROW, [-1, 1, "own_helpers.Conv", [512, {"k": 3}]])
    told = capsys.readouterr().err
    assert told.count("the built-in Conv is meant, not the one in") == 1
    assert "Write own_helpers.Conv for that" in told
    built_in, own = model.model[-3:-1]
    assert type(built_in) is common.Conv and type(own) is not common.Conv
    assert own.body[0].kernel_size == (3, 3) and own.body[0].in_channels == 64


def test_a_name_in_two_files_is_refused_until_a_row_says_which(tmp_path: Path):
    other = tmp_path / "gates.py"
    other.write_text("from torch import nn\n\n\nclass SE(nn.Identity):\n    pass\n")
    files = [imported_path("SE"), other]
    with pytest.raises(ConfigError, match=r"is defined twice.*Write .*attention\.SE.*gates\.SE"):
        model_of(files, [-1, 1, "SE", []])
    model = model_of(files, [-1, 1, "attention.SE", []], [-1, 1, "gates.SE", []])
    assert [sum(p.numel() for p in m.parameters()) for m in model.model[-3:-1]] == [512, 0]


def test_a_file_dropped_into_the_folder_needs_no_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copy(FOLDER / "attention.py", tmp_path / "dropped_attention.py")
    monkeypatch.setattr(modules, "__path__", [*modules.__path__, str(tmp_path)])
    modules._import_files()
    model = model_of([], [-1, 1, "CBAM", [512]], [-1, 1, "dropped_attention.SE", [512, 8]])
    assert [row.args for row in model.rows[-3:-1]] == [
        "CBAM(c1=64, reduction=16)",
        "SE(channel=64, reduction=8)",
    ]


@pytest.mark.parametrize(
    ("name", "computes"), [("ViewShuffle", True), ("RowFlip", False), ("SE", True)]
)
def test_a_block_that_wants_the_plain_memory_format_is_known_and_told(
    name: str, computes: bool, capsys: pytest.CaptureFixture[str]
):
    model = build(name, PASTED[name].rows[0], "tiny")
    assert model.computes_channels_last is computes
    assert ("channels-last" in capsys.readouterr().err) is not computes
    if computes:
        model(blobs(2, SIZE, seed=0).to(memory_format=torch.channels_last))


# --- registered twins -----------------------------------------------------------------------------

RULES = {
    CONV: registry.convolution,
    STACKED: registry.stacked,
    FIRST: registry.channels_first,
    SAME: registry.unchanged,
}
RULED = [name for name, pasted in PASTED.items() if pasted.rule]


def registered_twin(name: str, model: DetectionModel) -> DetectionModel:
    """The same model, the block registered by a rule under another name."""
    pasted = PASTED[name]
    kind = next(type(m) for m in model.modules() if type(m).__name__ == name)
    twin = f"{name}Registered"
    register(RULES[pasted.rule], twin)(type(twin, (kind,), {"__module__": __name__}))
    has_width = pasted.rule in (CONV, STACKED)
    return build(name, pasted.rows[0 if has_width else -1], "tiny", module=twin)


@pytest.mark.parametrize("name", few_of(RULED))
def test_a_block_that_is_read_equals_the_same_one_registered_by_a_rule(name: str):
    model = build(name, PASTED[name].rows[0], "tiny").eval()
    twin = registered_twin(name, model).eval()
    assert count_params(twin) == count_params(model)
    assert {row.module for row in twin.rows} & {f"{name}Registered"}
    twin.load_state_dict(model.state_dict())
    image = blobs(2, SIZE, seed=5)
    for a, b in zip(model(image), twin(image)):
        assert torch.equal(a, b)


# --- the report -----------------------------------------------------------------------------------

WORKS = {
    "name": "CBAM x yolo11n", "status": "works", "read": "CBAM(c1=256, reduction=16)", "onnx": 8e-7,
    "formats": {"onnx": 8e-7, "torchscript": 9e-8, "openvino": 1e-6, "pt2": "an operator is missing"},
}  # fmt: skip
FAILS = {"name": "CBAM x yolov5n", "status": "fails", "step": "fuse", "reason": "differs"}


def test_the_report_has_a_line_a_block_and_below_it_what_does_not_work():
    results = {r["name"]: r for r in (WORKS, FAILS)}
    wanted = [f"CBAM x {head}" for head in HEADS]
    lines = pasted_blocks.format_table(results, wanted).splitlines()
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells == [
        "CBAM", "[C]", "CBAM(c1=256, reduction=16)", "fails: fuse", "8e-07", "-", "8e-07", "9e-08", "1e-06", "no",
    ]  # fmt: skip
    assert lines[3:] == [
        "fails: CBAM x yolov5n at fuse: differs",
        "cannot: CBAM x yolo11n pt2: an operator is missing",
        "1 of 2 work; 3 wanted",
    ]


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({}, ["CBAM x yolov5n", "CBAM x yolo11n pt2"]),
        ({"CBAM pt2": "an operator"}, ["CBAM x yolov5n"]),
        ({"CBAM pt2": "another reason"}, ["CBAM x yolov5n", "CBAM x yolo11n pt2"]),
        ({"CBAM pt2": "an operator", "CBAM onnx": "x"}, ["CBAM x yolov5n", "CBAM x yolo11n onnx"]),
    ],
)
def test_what_a_format_cannot_is_expected_only_for_the_known_reason(
    known: dict[str, str], expected: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pasted_blocks, "CANNOT", known)
    results = {r["name"]: r for r in (FAILS, WORKS)}
    assert pasted_blocks.unexpected(results, list(results)) == expected


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("A()", []),
        ("A(64, 3)", ["64", "3"]),
        ("A(c=[1, 2], k=(3, 3), n='a')", ["c=(1, 2)", "k=(3, 3)", "n='a'"]),
    ],
)
def test_arguments_are_told_apart_and_lists_look_like_tuples(text: str, parts: list[str]):
    assert pasted_blocks._parts(text) == parts
