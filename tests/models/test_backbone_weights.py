"""Weights of a backbone under any name: by all three flags the same tensors, or a refusal that names what came nearest."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.modules.mobilenetv4 import MobileNetV4ConvSmall
from models.timm.backbone import TimmBackbone
from models.timm.features import create, quiet, statistics_of
from models.weights.fitting import with_channels
from models.weights.load import build_to_train, load_weights
from models.weights.read import read_weights
from models.weights.transfer import load_backbone_weights, transfer
from models.yolo import DetectionModel, build_model
from utils.errors import CheckpointError

timm = pytest.importorskip("timm")
SIZE = (64, 64)


def renamed(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {prefix + key: value for key, value in state.items()}


CONFIG: dict[str, Any] = {
    "nc": 2,
    "backbone": [[-1, 1, "test_resnet", {}]],
    "head": [[["P3", "P4", "P5"], 1, "Detect", ["nc"]]],
}


def on(name: str, **options: Any) -> dict[str, Any]:
    return {**CONFIG, "backbone": [[-1, 1, name, options]]}


@pytest.fixture(scope="module")
def full() -> nn.Module:
    """A classifier of timm with statistics that matter."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet")
    return with_statistics(model)


@pytest.fixture(scope="module")
def untrained() -> DetectionModel:
    """A detector on the same trunk, to be copied."""
    return build_model(CONFIG, imgsz=SIZE)


def with_statistics(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def build_with(**given: Any) -> DetectionModel:
    """The model that a training would start from."""
    return build_to_train(("a", "b"), cfg=CONFIG, imgsz=SIZE, **given)


WRAPPINGS: dict[str, Any] = {
    "plain": lambda s: s,
    "backbone.": lambda s: renamed("backbone.", s) | {"neck.conv.weight": torch.zeros(2, 2)},
    "module.encoder.": lambda s: renamed("module.encoder.", s),
    "model.0.": lambda s: renamed("model.0.", s),
    "state_dict": lambda s: {"state_dict": renamed("module.", s), "epoch": 3},
    "model": lambda s: {"model": s},
    "ema": lambda s: {"model": {k: v + 1 for k, v in s.items()}, "ema": s},
    "teacher": lambda s: {"student": {k: v + 1 for k, v in s.items()}, "teacher": renamed("backbone.", s)},
}  # fmt: skip


def arrived(model: DetectionModel, given: dict[str, Tensor]) -> bool:
    """Whether the backbone has just these tensors, and normalises images as timm does."""
    state = model.model[0].state_dict()
    ours = {key.removeprefix("net."): v for key, v in state.items() if key.startswith("net.")}
    mean = statistics_of("test_resnet")[0]
    return bool(ours) and state["normalize.mean"].tolist() == pytest.approx(mean) and all(
        torch.equal(value, given[key]) for key, value in ours.items()
    )  # fmt: skip


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_backbone_is_found_under_every_customary_wrapping(
    wrapping: str, full: nn.Module, untrained: DetectionModel, tmp_path: Path
):
    torch.save(WRAPPINGS[wrapping](full.state_dict()), tmp_path / "w.pth")
    model = copy.deepcopy(untrained)
    load_backbone_weights(model, tmp_path / "w.pth")
    assert arrived(model, full.state_dict())


def test_all_three_flags_give_the_same_tensors(full: nn.Module, tmp_path: Path):
    path = tmp_path / "w.pth"
    torch.save(WRAPPINGS["backbone."](full.state_dict()), path)
    for given in (
        {"backbone": ["test_resnet", f"weights={path}"]},
        {"backbone_weights": str(path)},
        {"weights": str(path)},
    ):
        assert arrived(build_with(**given), full.state_dict()), given


def test_the_head_keeps_its_own_and_the_report_says_what_was_left_out(
    full: nn.Module, untrained: DetectionModel
):
    model = copy.deepcopy(untrained)
    head = {k: v.clone() for k, v in model.state_dict().items() if k.startswith("model.1.")}
    report = transfer(model, {**full.state_dict(), "neck.weight": torch.zeros(3, 3)})
    assert all(torch.equal(model.state_dict()[key], value) for key, value in head.items())
    assert report.backbone_only and not report.missing and not report.mismatched
    assert report.classifier == ("fc.weight", "fc.bias") and report.unused == ("neck.weight",)
    first, normalised, classifier, unused = report.summary().splitlines()
    assert first == (
        "weights for the backbone only: transferred 90 of 90 tensors (100.0% of the backbone's numbers)"
    )
    assert normalised.startswith("images are normalised inside by timm's mean (0.5, 0.5, 0.5)")
    assert (classifier, unused) == ("classifier left out: fc (2)", "unused 1: neck (1)")


def test_weights_of_a_backbone_are_no_detector(full: nn.Module, tmp_path: Path):
    torch.save(full.state_dict(), tmp_path / "w.pt")
    with pytest.raises(
        CheckpointError, match="w.pt: has weights for the backbone only, expected those of a whole"
    ) as e:
        load_weights(tmp_path / "w.pt", cfg=CONFIG)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("flag", "content", "message"),
    [
        ("weights", {"conv1.weight": torch.zeros(3, 3)}, "got conv1.weight 3x3, expected .*Give"),
        ("backbone_weights", "test_efficientnet", r"does not fit test_resnet - has \d+ of its \d+ tensors"),
        ("backbone", "test_byobnet", "expected at least half; nearest names: got"),
    ],
)  # fmt: skip
def test_less_than_half_is_refused_with_the_nearest_names(
    flag: str, content: Any, message: str, tmp_path: Path
):
    path = tmp_path / "w.pth"
    torch.save(
        timm.create_model(content).state_dict() if isinstance(content, str) else content, path
    )
    given: Any = str(path) if flag != "backbone" else ["test_resnet", f"weights={path}"]
    with pytest.raises(CheckpointError, match=message) as caught:
        build_with(**{flag: given})
    row = "model (--backbone test_resnet) backbone[0] test_resnet: " if flag == "backbone" else ""
    assert str(caught.value).startswith(f"{row}{path}: ") and "\n" not in str(caught.value)


def test_half_of_the_tensors_is_enough_and_less_is_not(full: nn.Module, untrained: DetectionModel):
    keys = [key for key in untrained.model[0].state_dict() if key.startswith("net.")]
    floating = [
        k.removeprefix("net.") for k in keys if full.state_dict()[k[4:]].is_floating_point()
    ]
    half = {key: full.state_dict()[key] for key in floating[: -(-len(floating) // 2)]}
    report = transfer(copy.deepcopy(untrained), half)
    assert len(report.transferred) == len(half)
    assert len(report.missing) == len(floating) - len(half)
    half.popitem()
    half.popitem()
    with pytest.raises(CheckpointError, match=f"has {len(half)} of its {len(floating)} tensors"):
        transfer(copy.deepcopy(untrained), half)


def test_a_saved_yaml_needs_no_weights(full: nn.Module, tmp_path: Path):
    path = tmp_path / "w.pth"
    torch.save(full.state_dict(), path)
    model = build_model(on("test_resnet", weights=str(path)), imgsz=SIZE)
    path.unlink()
    again = build_model(model.config, imgsz=SIZE)
    again.load_state_dict(model.state_dict())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
    assert again.state_dict().keys() == model.state_dict().keys()
    assert str(path) not in str(model.config)


def test_a_detector_gives_its_backbone_to_another_in_another_row(
    untrained: DetectionModel, tmp_path: Path
):
    source = copy.deepcopy(untrained)
    source.model[0].normalize.set((0.1, 0.2, 0.3), (1, 2, 3))
    silence = {**CONFIG, "backbone": [[-1, 1, "Silence", []], *CONFIG["backbone"]]}
    target = build_model(silence, imgsz=SIZE)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    report = load_backbone_weights(target, tmp_path / "w.pt")
    assert not report.missing and not report.classifier
    for key, value in source.model[0].state_dict().items():
        assert torch.equal(target.model[1].state_dict()[key], value), key


def test_a_detector_of_rows_was_trained_on_images_as_they_are(
    full: nn.Module, untrained: DetectionModel
):
    rows = {f"model.0.{key}": value for key, value in full.state_dict().items() if "fc" not in key}
    for others, mean in (
        ({}, statistics_of("test_resnet")[0]),
        ({"model.9.m.weight": torch.zeros(3)}, (0, 0, 0)),
    ):
        model = copy.deepcopy(untrained)
        report = transfer(model, {**rows, **others}, only_backbone=True)
        assert not report.missing
        assert model.model[0].normalize.mean.tolist() == pytest.approx(mean)
        assert ("normalised inside by timm's mean" in report.summary()) is not bool(others)


def test_rows_of_a_backbone_take_weights_of_the_rows_alone(tmp_path: Path):
    config = {
        "nc": 2,
        "backbone": [[-1, 1, "Conv", [8, 3, 4]], [-1, 1, "Conv", [16, 3, 2]]],
        "head": [[[1], 1, "Detect", ["nc"]]],
    }
    source, target = build_model(config, imgsz=SIZE), build_model(config, imgsz=SIZE)
    state = {
        k.replace("model.", "encoder.", 1): v
        for k, v in source.state_dict().items()
        if "model.2." not in k
    }
    torch.save(state, tmp_path / "w.pt")
    report = load_backbone_weights(target, tmp_path / "w.pt")
    assert len(report.transferred) == len(state) and not report.missing
    assert torch.equal(target.state_dict()["model.1.conv.weight"], state["encoder.1.conv.weight"])


@pytest.mark.parametrize("prefix", ["model.0.", pytest.param("", marks=pytest.mark.slow)])
def test_a_backbone_that_knows_other_names_takes_them_by_every_flag(prefix: str, tmp_path: Path):
    torch.manual_seed(0)
    classifier = with_statistics(timm.create_model("mobilenetv4_conv_small"))
    path = tmp_path / "w.pth"
    torch.save(renamed(prefix, classifier.state_dict()), path)
    by_row = MobileNetV4ConvSmall(1, weights=str(path)).eval()
    detector = build_model(on("MobileNetV4ConvSmall", factor=1), imgsz=SIZE)
    report = load_backbone_weights(detector, path)
    assert not report.missing and not report.mismatched
    assert report.classifier == (f"{prefix}classifier.weight", f"{prefix}classifier.bias")
    for key, value in detector.model[0].state_dict().items():
        assert torch.equal(by_row.state_dict()[key], value), key
    own_net = create("mobilenetv4_conv_small", {})
    own_net.load_state_dict(classifier.state_dict(), strict=False)
    mean, std = (
        torch.tensor(numbers).view(3, 1, 1)
        for numbers in statistics_of("mobilenetv4_conv_small") or ()
    )
    image = torch.rand(1, 3, *SIZE)
    with torch.no_grad():
        expected = own_net.eval()((image - mean) / std)
        # timm's last map stands behind one more convolution, its first is finer than ours.
        for found, wanted in zip(detector.model[0].eval()(image)[:3], expected[1:4], strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


class Own(nn.Module):
    """A backbone of a user's file around a part of timm's."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = timm.create_model("test_resnet", features_only=True)
        self.extra = nn.Conv2d(8, 8, 1)


def test_a_module_without_rows_is_a_backbone_where_it_is_asked_for(full: nn.Module):
    model = Own()
    report = transfer(model, full.state_dict(), only_backbone=True)
    assert report.missing == ("extra.weight", "extra.bias")
    given = full.state_dict()
    assert all(torch.equal(v, given[k]) for k, v in model.trunk.state_dict().items())


@pytest.mark.parametrize(
    ("channels", "how"), [(1, "summed from 3 to 1"), (4, "repeated from 3 to 4")]
)
def test_images_of_other_channels(channels: int, how: str, full: nn.Module):
    model = build_model({**CONFIG, "ch": channels}, imgsz=SIZE)
    report = transfer(model, full.state_dict())
    ((key, told),) = report.adapted
    assert (
        told == f"first convolution {how} channels" and f"made to fit: {told}" in report.summary()
    )
    given = full.state_dict()[key.removeprefix("model.0.net.")]
    assert torch.equal(model.state_dict()[key], with_channels(given, channels))
    assert model.model[0].normalize.mean.shape == (channels,)
    model.eval()(torch.rand(1, channels, *SIZE))


def test_a_detector_for_grey_images_takes_a_colour_detectors_weights():
    config = {
        "nc": 2,
        "backbone": [[-1, 1, "Conv", [8, 3, 4]], [-1, 1, "Conv", [16, 3, 2]]],
        "head": [[[1], 1, "Detect", ["nc"]]],
    }
    source, target = build_model(config, imgsz=SIZE), build_model({**config, "ch": 1}, imgsz=SIZE)
    report = transfer(target, source.state_dict())
    assert report.adapted == (
        ("model.0.conv.weight", "first convolution summed from 3 to 1 channels"),
    )
    assert not report.mismatched and len(report.transferred) == len(target.state_dict())


# timm's own models of every kind: the same tensors by every flag, and timm's own outputs.

EVERY_KIND = """
resnet10t resnetv2_18 skresnet18 regnetx_002 regnety_002 densenet121 dla46_c ese_vovnet19b_slim selecsls42 hrnet_w18_small
convnext_atto convnextv2_atto inception_next_atto tf_efficientnet_b0 efficientnet_lite0 mobilenetv2_035 mobilenetv3_small_050
mobilenetv4_conv_small lcnet_035 mnasnet_small tinynet_e ghostnet_050 hgnetv2_b0 repvit_m0_9 fastvit_t8 mobileone_s0 repvgg_a0
rexnet_100 starnet_s1 vit_tiny_patch16_224 deit_tiny_distilled_patch16_224 eva02_tiny_patch14_224 xcit_nano_12_p16_224
pvt_v2_b0 tiny_vit_5m_224 levit_128s pit_ti_224 convit_tiny swin_tiny_patch4_window7_224 maxvit_rmlp_pico_rw_256 gcvit_xxtiny
coatnet_nano_rw_224 mobilevit_xxs mobilevitv2_050 edgenext_xx_small efficientvit_b0 efficientformerv2_s0 poolformer_s12
visformer_tiny nf_regnet_b0 mvitv2_tiny nest_tiny
""".split()
A_FEW = ["test_resnet", "test_convnext", "test_vit", "test_efficientnet"]


@pytest.mark.parametrize(
    "name", [*A_FEW, *(pytest.param(n, marks=pytest.mark.slow) for n in EVERY_KIND)]
)
def test_models_of_timm_arrive_whole_and_give_timms_own_outputs(name: str, tmp_path: Path):
    size = (64, 64) if name in A_FEW else (224, 224)
    torch.manual_seed(0)
    classifier = with_statistics(timm.create_model(name))
    state = classifier.state_dict()
    path = tmp_path / "w.pth"
    torch.save(state, path)
    by_row = TimmBackbone(name, size, weights=str(path))
    first = build_model(on(name), imgsz=size)
    detectors = [first, copy.deepcopy(first)]
    reports = [
        load_backbone_weights(detectors[0], path),
        transfer(detectors[1], read_weights(path).state),
    ]
    for detector, report in zip(detectors, reports, strict=True):
        assert not report.missing and not report.mismatched and report.backbone_only
        own = detector.model[0].state_dict()
        assert all(
            torch.equal(v, by_row.state_dict()[k])
            for k, v in own.items()
            if not k.startswith("levels.")
        )
    backbone: Any = detectors[0].model[0].eval()
    overlay = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": dict(state)}}
    with quiet():
        own_net = create(
            name, {**backbone.plan.options, "out_indices": backbone.plan.indices, **overlay}
        ).eval()
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in statistics_of(name) or ())
    image = torch.rand(1, 3, *size)
    with torch.no_grad():
        for found, expected in zip(
            backbone.net(backbone.normalize(image)), own_net((image - mean) / std), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
