"""Checkpoints of other projects: what is read, what is transferred."""

from __future__ import annotations

import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from models.weights.load import dual_to_single, load_single, load_weights
from models.weights.matching import align, match_keys
from models.weights.read import read_weights
from models.weights.transfer import load_backbone_weights, transfer
from models.yolo import build_model
from utils.checkpoint import save_checkpoint
from utils.errors import CheckpointError, ConfigError


@pytest.fixture
def foreign() -> types.ModuleType:
    """A module of another project, gone again when the files are read."""
    module = types.ModuleType("otherproject.models.yolo")

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = nn.Conv2d(4, 2, 1)
            self.register_buffer("anchors", torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]))
            self.register_buffer("grid", torch.zeros(7), persistent=False)
            self.stride = torch.tensor([8.0, 16.0])

    class DetectionModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Head())
            self.names = {0: "ship", 1: "buoy"}
            self.yaml = {
                "nc": 2,
                "anchors": [[8, 16], [48, 64]],
                "backbone": [[-1, 1, "Conv", [4, 3]]],
                "head": [[[0], 1, "Detect", ["nc", "anchors"]]],
                "imports": ["evil.py"],
            }
            self.save = {4, 6}

    for made in (Head, DetectionModel):
        made.__module__ = module.__name__
        made.__qualname__ = made.__name__
        setattr(module, made.__name__, made)
    names = ("otherproject", "otherproject.models", module.__name__)
    for name in names:
        sys.modules[name] = module
    yield module
    for name in names:
        sys.modules.pop(name, None)


def forget(module: types.ModuleType) -> None:
    """Make the other project impossible to import."""
    for name in [n for n in sys.modules if n.startswith("otherproject")]:
        del sys.modules[name]
    assert module.__name__ not in sys.modules


def equal(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return set(state) == set(expected) and all(
        torch.equal(
            value, expected[key].float() if expected[key].is_floating_point() else expected[key]
        )
        for key, value in state.items()
    )


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrap", ["module", "model", "ema"])
def test_pickled_modules_of_another_project_are_read(
    tmp_path: Path, foreign: types.ModuleType, zipped: bool, wrap: str
) -> None:
    torch.manual_seed(0)
    model, raw = foreign.DetectionModel().half(), foreign.DetectionModel()
    content = {"module": model, "model": {"model": model, "ema": None}}.get(
        wrap, {"model": raw, "ema": model, "updates": 3}
    )
    path = tmp_path / "other.pt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    forget(foreign)
    weights = read_weights(path)
    assert equal(weights.state, model.state_dict())
    assert all(v.dtype in (torch.float32, torch.int64) for v in weights.state.values())
    assert "model.2.grid" not in weights.state
    assert weights.names == ("ship", "buoy")
    assert weights.config is not None and weights.config["nc"] == 2
    with pytest.raises(ConfigError, match="would run code"):
        build_model(weights.config)
    assert "otherproject" not in sys.modules


@pytest.mark.parametrize(
    ("content", "source"),
    [
        (lambda state: state, ""),
        (lambda state: {"state_dict": state, "epoch": 3}, "state_dict"),
        (lambda state: {"ema": {"module": state, "updates": 3}, "model": {}}, "ema.module"),
        (lambda state: {"model": {"w": torch.zeros(1)}, "model_ema": state}, "model_ema"),
        (lambda state: {f"module.{key}": value for key, value in state.items()}, ""),
        (lambda state: {f"_orig_mod.module.{k}": v for k, v in state.items()}, ""),
        (lambda state: {f"model.{key}": value for key, value in state.items()}, ""),
    ],
)
def test_state_dicts_are_found_under_their_customary_wrappings(
    tmp_path: Path, content: object, source: str
) -> None:
    state = OrderedDict([("model.0.weight", torch.randn(3, 2)), ("model.0.count", torch.tensor(4))])
    torch.save(content(state), tmp_path / "w.pth")
    weights = read_weights(tmp_path / "w.pth")
    assert equal(weights.state, state)
    assert weights.names is None and weights.config is None


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_tensors_keep_their_numbers_whatever_their_type_and_layout(
    tmp_path: Path, zipped: bool
) -> None:
    base = torch.arange(24.0).view(2, 3, 4)
    kinds = [torch.float16, torch.bfloat16, torch.float64, torch.float32]
    state = {f"model.{i}.weight": base.to(kind) for i, kind in enumerate(kinds)}
    whole = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool]
    state |= {f"model.{i}.count": base.to(kind) for i, kind in enumerate(whole)}
    state["turned"] = base.permute(2, 0, 1)
    state["slice"] = base[1, 1:, ::2]
    state["empty"] = torch.zeros(0, 3)
    state["parameter"] = nn.Parameter(base)
    torch.save(state, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    assert equal(read_weights(tmp_path / "w.pt").state, {k: v.detach() for k, v in state.items()})


def test_eight_bit_floats_are_widened(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(8.0).to(torch.float8_e4m3fn)}, tmp_path / "w.pt")
    assert read_weights(tmp_path / "w.pt").state["w"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.skipif(torch.__version__.startswith("2.4."), reason="torch 2.4 does not save them")
def test_unsigned_sixteen_bits_are_read(tmp_path: Path) -> None:
    torch.save({"u": torch.arange(4).to(torch.uint16)}, tmp_path / "w.pt")
    assert read_weights(tmp_path / "w.pt").state["u"].tolist() == [0, 1, 2, 3]


def test_numbers_dates_and_paths_beside_the_weights_do_no_harm(tmp_path: Path) -> None:
    import argparse
    import collections
    import datetime as dt

    content = {
        "model": {"w": torch.ones(2), "from_numpy": np.arange(6.0).reshape(2, 3).T},
        "best_fitness": np.float64(0.25),
        "name": np.str_("x"),
        "objects": np.array(["a", None], dtype=object),
        "opt": argparse.Namespace(save_dir=Path("runs"), cfg=None),
        "date": dt.datetime(2026, 1, 1),
        "counts": collections.defaultdict(list, {"a": [1]}),
        "rng": np.random.get_state(),
        "set": {1, 2},
        "bytes": b"\x00\xff",
    }
    for protocol in (2, 4):
        torch.save(content, tmp_path / "w.pt", pickle_protocol=protocol)
        state = read_weights(tmp_path / "w.pt").state
        assert state["w"].tolist() == [1, 1]
        assert state["from_numpy"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_safetensors_and_our_own_checkpoints_are_read(tmp_path: Path) -> None:
    state = {"model.0.weight": torch.randn(3, 2), "model.0.half": torch.ones(2).half()}
    config = {"nc": 1, "backbone": [], "head": []}
    save_file(state, tmp_path / "w.safetensors", metadata={"names": '["ship"]'})
    weights = read_weights(tmp_path / "w.safetensors")
    assert equal(weights.state, state) and weights.names == ("ship",)
    averaged = {key: value + 1 for key, value in state.items()}
    save_checkpoint(
        tmp_path / "last.pt",
        {
            "model": state,
            "ema": {"model": averaged, "updates": 1},
            "config": config,
            "names": ["ship"],
        },
    )
    weights = read_weights(tmp_path / "last.pt")
    assert equal(weights.state, averaged) and weights.names == ("ship",)
    assert weights.config == config


def test_a_file_without_tensors_is_an_error(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "names": ["a"]}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="has no tensors"):
        read_weights(tmp_path / "w.pt")


# Transfer.

CONV = {"weight": (8, 4), "bias": (8,)}
WIDE = {"weight": (16, 8), "bias": (16,)}


@pytest.mark.parametrize(
    ("source", "target", "pairs"),
    [
        ({0: CONV, 1: WIDE}, {0: CONV, 1: WIDE}, [(0, 0), (1, 1)]),
        ({0: CONV, 1: WIDE}, {0: CONV, 1: CONV, 2: WIDE}, [(0, 0), (2, 1)]),  # inserted
        ({0: CONV, 1: CONV, 2: WIDE}, {0: CONV, 1: WIDE}, [(0, 0), (1, 2)]),  # deleted
        ({0: CONV, 3: WIDE}, {2: WIDE, 5: CONV}, [(2, 3)]),  # order is kept: only one can fit
        ({0: CONV}, {0: WIDE}, []),
        ({}, {0: WIDE}, []),
    ],
)
def test_rows_are_aligned_so_that_most_tensors_fit(
    source: dict, target: dict, pairs: list[tuple[int, int]]
) -> None:
    assert align(source, target) == pairs


def test_a_row_under_its_own_number_may_fit_in_part_but_under_another_it_must_fit_mostly() -> None:
    head = {"box.weight": (4, 4), "cls.weight": (80, 4), "cls.bias": (80,)}
    fewer = {"box.weight": (4, 4), "cls.weight": (3, 4), "cls.bias": (3,)}
    assert align({7: head}, {7: fewer}) == [(7, 7)]
    assert align({7: head}, {8: fewer}) == []
    pairs, moved = match_keys(
        {f"model.7.{k}": s for k, s in head.items()}, {f"model.7.{k}": s for k, s in fewer.items()}
    )
    assert len(pairs) == 3 and moved == {}


V5 = {
    "nc": 80,
    "depth_multiple": 0.33,
    "width_multiple": 0.25,
    "anchors": [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119]],
    "backbone": [
        [-1, 1, "Conv", [32, 6, 2, 2]],
        [-1, 1, "Conv", [64, 3, 2]],
        [-1, 1, "Conv", [64, 3, 2]],
        [-1, 3, "C3", [64]],
        [-1, 1, "Conv", [128, 3, 2]],
        [-1, 3, "C3", [128]],
    ],
    "head": [[[3, 5], 1, "Detect", ["nc", "anchors"]]],
}


def test_other_classes_leave_only_the_class_rows_behind() -> None:
    torch.manual_seed(0)
    source, target = build_model(V5), build_model(V5, num_classes=3)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    report = transfer(target, source.state_dict())
    after, given = target.state_dict(), source.state_dict()
    heads = {f"model.6.m.{level}.{kind}" for level in (0, 1) for kind in ("weight", "bias")}
    assert set(report.partial) == heads and not report.missing and not report.mismatched
    assert not report.unused and not report.moved
    for key, value in after.items():
        if key not in heads:
            assert torch.equal(value, given[key]), key
            continue
        new, old, theirs = (t.unflatten(0, (3, -1)) for t in (value, before[key], given[key]))
        assert torch.equal(new[:, :5], theirs[:, :5]) and torch.equal(new[:, 5:], old[:, 5:]), key
    assert "without class rows 4: model.6 (4)" in report.summary()


def test_without_anchors_a_head_with_other_classes_is_reported_as_mismatched() -> None:
    config = {**V5, "head": [[[3, 5], 1, "Detect", ["nc"]]]}
    source, target = build_model(config, num_classes=10), build_model(config, num_classes=3)
    report = transfer(target, source.state_dict())
    assert len(report.mismatched) == 4 and len(report.transferred) == len(target.state_dict()) - 4
    assert (
        "mismatched 4: model.6 (4); first model.6.cv3.0.2.weight 10x16x1x1, expected 3x16x1x1"
        in (report.summary())
    )


def test_an_inserted_layer_shifts_rows_but_loses_nothing() -> None:
    longer = {**V5, "backbone": [*V5["backbone"][:2], [-1, 1, "C3", [64]], *V5["backbone"][2:]]}
    longer["head"] = [[[4, 6], 1, "Detect", ["nc", "anchors"]]]
    source, target = build_model(V5), build_model(longer)
    report = transfer(target, source.state_dict())
    assert report.moved == {3: 2, 4: 3, 5: 4, 6: 5, 7: 6}
    assert not report.unused and not report.mismatched
    assert {key.split(".")[1] for key in report.missing} == {"2"}
    for key, value in source.state_dict().items():
        row, rest = key.split(".")[1], key.split(".", 2)[2]
        new = int(row) + (int(row) >= 2)
        assert torch.equal(target.state_dict()[f"model.{new}.{rest}"], value), key
    assert "rows by position: 2 to 3, 3 to 4" in report.summary()


def test_a_changed_backbone_leaves_the_rest_to_be_transferred() -> None:
    changed = {
        **V5,
        "backbone": [*V5["backbone"][:3], [-1, 1, "Conv", [64, 3, 1]], *V5["backbone"][4:]],
    }
    report = transfer(build_model(changed), build_model(V5).state_dict())
    assert {key.split(".")[1] for key in report.missing} == {"3"}
    assert {key.split(".")[1] for key in report.unused} == {"3"}
    assert not report.moved


def test_nothing_transferred_is_an_error() -> None:
    model = build_model(V5)
    with pytest.raises(CheckpointError, match="none of 1 tensors fits") as error:
        transfer(model, {"fc.weight": torch.zeros(3, 3)})
    assert "\n" not in str(error.value)


def test_a_model_is_built_from_the_yaml_that_the_file_carries(tmp_path: Path) -> None:
    source = build_model(V5, num_classes=2).eval()
    torch.save(
        {"model": source.state_dict(), "config": {**V5, "nc": 2}, "names": ["a", "b"]},
        tmp_path / "w.pt",
    )
    loaded = load_weights(tmp_path / "w.pt")
    assert loaded.model.names == ("a", "b") and loaded.report is not None
    image = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        expected, got = (m.decode(m(image)) for m in (source, loaded.model))
    assert torch.equal(expected.boxes, got.boxes) and torch.equal(expected.scores, got.scores)
    torch.save(source.state_dict(), tmp_path / "bare.pt")
    with pytest.raises(CheckpointError, match="carries no model YAML"):
        load_weights(tmp_path / "bare.pt")
    assert load_weights(tmp_path / "bare.pt", cfg=V5, num_classes=2).report.missing == ()


def test_a_backbone_gets_its_weights_and_the_head_keeps_its_own(tmp_path: Path) -> None:
    config = {
        "nc": 2,
        "scales": {"n": [1, 0.25, 1024]},
        "backbone": [[-1, 1, "MobileNetV4ConvSmall", [0.25]]],
        "head": [[[2, 3, 4], 1, "Detect", ["nc"]]],
    }
    torch.manual_seed(0)
    source, target = build_model(config), build_model(config)
    head = {k: v.clone() for k, v in target.state_dict().items() if k.startswith("model.1.")}
    backbone = source.model[0].state_dict()
    for number, state in enumerate(
        (
            backbone,
            {f"backbone.{key}": value for key, value in backbone.items()},
            {
                **{k.replace("_", ".", 1): v for k, v in backbone.items()},
                "fc.weight": torch.ones(9),
            },
            source.state_dict(),
        )
    ):
        fresh = build_model(config)
        fresh.load_state_dict(target.state_dict())
        torch.save(state, tmp_path / f"{number}.pt")
        report = load_backbone_weights(fresh, tmp_path / f"{number}.pt")
        assert not report.missing and len(report.transferred) == len(backbone), number
        assert all(torch.equal(fresh.model[0].state_dict()[k], v) for k, v in backbone.items())
        assert all(torch.equal(fresh.state_dict()[k], v) for k, v in head.items())


def test_rows_of_a_plain_backbone_get_their_weights_from_a_detector(tmp_path: Path) -> None:
    source, target = build_model(V5), build_model(V5)
    before = {k: v.clone() for k, v in target.state_dict().items() if k.startswith("model.6.")}
    torch.save(source.state_dict(), tmp_path / "w.pt")
    report = load_backbone_weights(target, tmp_path / "w.pt")
    assert not report.missing and {k.split(".")[1] for k in report.transferred} == set("012345")
    assert all(torch.equal(target.state_dict()[k], v) for k, v in before.items())


@pytest.mark.parametrize("size", ["t"])
def test_a_dual_network_becomes_single_with_equal_outputs(size: str) -> None:
    torch.manual_seed(0)
    dual, single = build_model(f"yolov9-{size}").eval(), build_model(f"gelan-{size}").eval()
    single.load_state_dict(dual_to_single(dual.state_dict(), single))
    image = torch.rand(1, 3, 64, 96)
    with torch.inference_mode():
        expected, got = dual.decode(dual(image)), single.decode(single(image))
    assert torch.equal(expected.boxes, got.boxes) and torch.equal(expected.scores, got.scores)
    with pytest.raises(CheckpointError, match="no auxiliary branch"):
        dual_to_single(single.state_dict(), single)
    with pytest.raises(CheckpointError, match="have no counterpart"):
        dual_to_single(dual.state_dict(), build_model("gelan-s"))


def test_a_dual_checkpoint_is_read_in_its_single_form(tmp_path) -> None:
    torch.manual_seed(0)
    dual = build_model("yolov9-t", num_classes=3, names=("a", "b", "c"), imgsz=(64, 64)).eval()
    path = tmp_path / "dual.pt"
    save_checkpoint(path, {"model": dual.state_dict(), "config": dual.config, "names": list("abc")})
    single = load_single(path, "gelan-t")
    assert single.names == ("a", "b", "c")
    assert sum(p.numel() for p in single.parameters()) < sum(p.numel() for p in dual.parameters())
    with pytest.raises(CheckpointError, match="have no counterpart"):
        load_single(path, "gelan-s")
