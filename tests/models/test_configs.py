"""Every model YAML: its size, its shapes, its gradients, its folded form, its state-dict keys."""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import Any

import golden_weights
import pytest
import torch
from torch import Tensor, nn

from models.family import build_criterion, total_loss
from models.parser.rows import DETECT_FOLDER
from models.reparam import reparameterize_model
from models.table import count_params
from models.yolo import DetectionModel, build_model
from utils.config import load_yaml
from utils.structures import Targets

HYPS = DETECT_FOLDER.parents[1] / "data" / "hyps"
PRINTED = Path(__file__).parent / "printed"
CLASSES = 3

# Parameters at 80 classes, as published or computed from the published code.
PARAMETERS = {
    "yolov5n": 1_872_157,
    "yolov5s": 7_235_389,
    "yolov5m": 21_190_557,
    "yolov5l": 46_563_709,
    "yolov5x": 86_749_405,
    "gelan-t": 2_442_640,
    "gelan-s": 7_226_208,
    "gelan-m": 20_124_000,
    "gelan-c": 25_498_752,
    "gelan-e": 58_114_432,
    "yolov9-t": 3_717_680,
    "yolov9-s": 9_804_512,
    "yolov9-m": 32_878_432,
    "yolov9-c": 51_182_080,
    "yolov9-e": 69_529_664,
    "yolo11n": 2_624_080,
    "yolo11s": 9_458_752,
    "yolo11m": 20_114_688,
    "yolo11l": 25_372_160,
    "yolo11x": 56_966_176,
    "rtdetr-l": 32_970_476,
    "rtdetr-x": 67_467_852,
    "dfine-n": 3_782_693,
    "dfine-s": 10_321_877,
    "dfine-m": 19_590_064,
    "deimv2-n": 3_600_421,
    "deimv2-atto": 508_985,
    "deimv2-femto": 983_945,
    "deimv2-pico": 1_539_539,
    "yolo11-mobilenetv4": 2_206_648,
}
# The couplings as their write-ups print them: file, classes, parameters. In the first file a
# classifier of 169,000 parameters that nothing uses is left out.
COUPLINGS = [
    ("000_rtdetr-l-EMO", 1, 22_694_235),
    ("001_yolov9-c-mobileone", 1, 45_970_870),
    ("002_yolov5n-EMO", 80, 2_144_365),
    ("003_yolov5n-revcol", 80, 31_223_613),
    ("004_yolo11-MobileNetV4", 5, 2_173_383),
]
# Number of entries of the state dict at 80 classes, and checksum of its keys and shapes: those of the
# published weights where there are any. A change here means that saved weights no longer load.
LAYOUTS = {
    "deimv2-atto": (498, 1096733696),
    "deimv2-femto": (498, 3258724723),
    "deimv2-n": (656, 2611477922),
    "deimv2-pico": (556, 3286917179),
    "dfine-l": (1243, 1351537293),
    "dfine-m": (1045, 4178220449),
    "dfine-n": (667, 1949377609),
    "dfine-s": (787, 204567787),
    "dfine-x": (1561, 79570569),
    "gelan-c": (937, 2077421967),
    "gelan-e": (1811, 3300430920),
    "gelan-m": (907, 1625901645),
    "gelan-s": (1339, 1492220364),
    "gelan-t": (1339, 3660253211),
    "rtdetr-l": (941, 3207778061),
    "rtdetr-l-emo": (704, 3940263300),
    "rtdetr-r18": (515, 1949193567),
    "rtdetr-r50": (779, 1227970487),
    "rtdetr-x": (1241, 2727300659),
    "yolo11-mobilenetv4": (577, 4013414504),
    "yolo11l": (1015, 1457717405),
    "yolo11m": (649, 3594224974),
    "yolo11n": (499, 712860852),
    "yolo11s": (499, 1094133924),
    "yolo11x": (1015, 3192493461),
    "yolov5l": (613, 3497766885),
    "yolov5m": (481, 2984717274),
    "yolov5n": (349, 3333041226),
    "yolov5n-emo": (378, 1176511325),
    "yolov5n-revcol": (627, 789777504),
    "yolov5s": (349, 788338660),
    "yolov5x": (745, 4112462089),
    "yolov9-c": (1460, 78323096),
    "yolov9-c-mobileone": (2359, 619286147),
    "yolov9-e": (2172, 3493022320),
    "yolov9-m": (1412, 119385405),
    "yolov9-s": (1772, 2798962660),
    "yolov9-t": (1772, 2091675558),
}

ROUNDED = {"yolov5n6": 3.2, "yolov5s6": 12.6, "yolov5m6": 35.7, "yolov5l6": 76.8, "yolov5x6": 140.7}

SMALL = [
    "yolov5n",
    "yolov5n-emo",
    "gelan-t",
    "yolov9-t",
    "yolo11n",
    "yolo11-mobilenetv4",
    "rtdetr-r18",
    "dfine-n",
]
EVERY = sorted(
    {p.stem for p in DETECT_FOLDER.glob("*.yaml")} - {"yolo11"} | {f"yolo11{s}" for s in "nsmlx"}
)
CONFIGS = [
    pytest.param(name, marks=() if name in SMALL else pytest.mark.slow, id=name) for name in EVERY
]


def size_for(name: str) -> tuple[int, int]:
    """Not square; RT-DETR and D-FINE rank 300 candidates, so they need as many cells."""
    if name == "dfine-n" or name.startswith("deimv2"):  # without a map at stride 8
        return (256, 320)
    return (128, 160) if name.startswith(("rtdetr", "dfine")) else (64, 96)


@pytest.fixture(scope="module")
def built() -> dict[str, DetectionModel]:
    return {}


@pytest.fixture
def model(request: pytest.FixtureRequest, built: dict[str, DetectionModel]) -> DetectionModel:
    """The model of the test's config with fixed weights, built once."""
    name = request.getfixturevalue("name")
    if name not in built:
        built.clear()
        torch.manual_seed(0)
        new = build_model(name, num_classes=CLASSES, imgsz=size_for(name))
        built[name] = golden_weights.fill(new)
    built[name].zero_grad(set_to_none=True)
    return built[name]


def test_no_config_is_left_out():
    assert set(PARAMETERS) <= set(EVERY)
    assert set(SMALL) <= set(EVERY)
    assert len(EVERY) > 25


def layout(model: nn.Module) -> tuple[int, int]:
    lines = [f"{key} {tuple(value.shape)}" for key, value in model.state_dict().items()]
    return len(lines), zlib.crc32("\n".join(sorted(lines)).encode())


@pytest.mark.parametrize("name", EVERY)
def test_size_keys_and_shapes_are_exactly_those_published(name: str):
    with torch.device("meta"):
        model = build_model(name)
    if name in PARAMETERS:
        assert count_params(model) == PARAMETERS[name]
    if name in ROUNDED:  # published in millions
        assert abs(count_params(model) / 1e6 - ROUNDED[name]) < 0.1
    else:
        assert layout(model) == LAYOUTS[name]
    assert all(re.match(r"model\.\d+\.", key) for key in model.state_dict())


@pytest.mark.parametrize(("name", "classes", "expected"), COUPLINGS)
def test_a_printed_coupling_has_exactly_its_printed_size(name: str, classes: int, expected: int):
    with torch.device("meta"):
        model = build_model(PRINTED / f"{name}.yaml", num_classes=classes)
    assert count_params(model) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [("1M", 2_144_365), ("2M", 3_156_093), ("5M", 5_872_741), ("6M", 6_926_533)],
)
def test_each_size_of_emo_under_yolov5_has_exactly_its_size(size: str, expected: int):
    config = load_yaml(PRINTED / "002_yolov5n-EMO.yaml")
    first = config["backbone"][0]
    config["backbone"][0] = [*first[:2], f"EMO_{size}", *first[3:]]
    with torch.device("meta"):
        assert count_params(build_model(config)) == expected


def anchor_points(model: DetectionModel, size: tuple[int, int]) -> int:
    per_cell = model.head.num_anchors or 1
    return per_cell * sum(size[0] // s * (size[1] // s) for s in model.strides)


def leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for item in value for t in leaves(item)] if isinstance(value, tuple) else []


@pytest.mark.parametrize("name", CONFIGS)
def test_predictions_have_their_shapes_in_training_and_in_use(name: str, model: DetectionModel):
    is_coarse = name == "dfine-n" or name.startswith("deimv2")
    assert model.strides == ((16, 32) if is_coarse else (8, 16, 32))
    for height, width in (size_for(name), size_for(name)[::-1]):
        model.eval()
        with torch.no_grad():
            raw = model(torch.rand(1, 3, height, width))
            boxes, scores = model.decode(raw)
        count = model.head.num_queries or anchor_points(model, (height, width))
        assert boxes.shape == (1, count, 4) and scores.shape == (1, count, CLASSES)
        assert boxes.isfinite().all() and scores.min() >= 0 and scores.max() <= 1
    with torch.no_grad():
        assert type(model.train()(torch.rand(2, 3, *size_for(name)))) is type(raw)


def targets_of(kind: str, size: tuple[int, int]) -> Targets:
    """Three objects in each image, in the first alone, or none."""
    if kind == "none":
        return Targets.empty()
    images = 2 if kind == "both" else 1
    index = torch.arange(images).repeat_interleave(3)
    low = torch.tensor([[4.0, 6.0], [20.0, 12.0], [30.0, 30.0]]).repeat(images, 1)
    side = torch.tensor([[12.0, 10.0], [30.0, 40.0], [50.0, 30.0]]).repeat(images, 1)
    return Targets(index, torch.arange(3).repeat(images), torch.cat((low, low + side), 1))


@pytest.mark.parametrize("kind", ["both", "one", "none"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_familys_loss_is_finite_and_reaches_every_parameter(
    name: str, kind: str, model: DetectionModel
):
    size = size_for(name)
    hyp = load_yaml(HYPS / f"{model.head.family}.yaml")
    criterion = build_criterion(model.head, hyp, size)
    targets = targets_of(kind, size)
    raw = model.train()(golden_weights.image(*size, batch=2), targets)
    losses = criterion(raw, targets)
    total = total_loss(criterion, losses, 2)
    assert all(value.shape == () and value.isfinite() for value in losses.values())
    total.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    without = [n for n, p in trained.items() if p.grad is None]
    assert without == []
    assert [n for n, p in trained.items() if not p.grad.isfinite().all()] == []
    if kind == "both":
        assert sum(bool(p.grad.any()) for p in trained.values()) > 0.95 * len(trained)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_folded_form_predicts_the_same(name: str, model: DetectionModel):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.eval()
    is_amplifying = name.startswith(
        "dfine"
    )  # six layers of these weights make much of one rounding
    deployed = reparameterize_model(model.double() if is_amplifying else model)
    image = golden_weights.image(*size_for(name)).double()
    with torch.no_grad():
        expected = model.double().decode(model(image))
        found = deployed.double().decode(deployed(image))
    model.float()
    for a, b in zip(expected, found, strict=True):
        assert (a - b).abs().max() <= (1e-9 if is_amplifying else 1e-4) * a.abs().max()
    assert count_params(deployed) < count_params(model)
    left = [n for n, m in deployed.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(left) <= len([m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]) // 2
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
