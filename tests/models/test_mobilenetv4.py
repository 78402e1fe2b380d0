"""MobileNetV4: published counts at every factor, timm's outputs at factor 1, and shapes of every kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from models.modules import mobilenetv4
from models.modules.mobilenetv4 import (
    AttentionSpec,
    MobileAttention,
    MobileNetV4,
    round_to_8,
    timm_key,
)
from models.registry import LayerError
from models.yolo import build_model
from utils.errors import CheckpointError, ConfigError

PRINTED = Path(__file__).parent / "printed" / "004_yolo11-MobileNetV4.yaml"
FACTORS = (0.25, 0.5, 0.75, 1, 1.5)
# parameters at FACTORS, without layer scale
COUNTS = {
    "ConvSmall": (87_800, 306_544, 656_232, 1_136_864, 2_490_960),
    "ConvMedium": (490_580, 1_813_352, 3_968_316, 6_955_472, 15_426_360),
    "ConvLarge": (1_978_842, 7_569_300, 16_771_374, 29_585_064, 66_047_292),
    "HybridMedium": (779_668, 2_424_296, 4_933_884, 8_308_432, 17_652_408),
    "HybridLarge": (2_875_994, 9_625_748, 20_249_262, 34_746_536, 75_362_364),
}
HYBRID_TOTALS = {"HybridMedium": 8_314_608, "HybridLarge": 34_758_824}
TIMM_NAMES = {
    "ConvSmall": "mobilenetv4_conv_small",
    "ConvMedium": "mobilenetv4_conv_medium",
    "ConvLarge": "mobilenetv4_conv_large",
    "HybridMedium": "mobilenetv4_hybrid_medium",
    "HybridLarge": "mobilenetv4_hybrid_large",
}


def make(variant: str, *args, **kwargs) -> MobileNetV4:
    return getattr(mobilenetv4, f"MobileNetV4{variant}")(*args, **kwargs)


@pytest.mark.parametrize(("variant", "factor", "expected"), [
    (variant, factor, count) for variant, counts in COUNTS.items() for factor, count in zip(FACTORS, counts)
])  # fmt: skip
def test_the_published_number_of_parameters_at_every_factor(variant, factor, expected):
    with torch.device("meta"):
        model = make(variant, factor)
    without_scale = sum(
        p.numel() for name, p in model.named_parameters() if "layer_scale" not in name
    )
    assert without_scale == expected


@pytest.mark.parametrize(("variant", "expected"), HYBRID_TOTALS.items())
def test_hybrids_with_layer_scale_have_the_total_of_timm(variant, expected):
    with torch.device("meta"):
        assert sum(p.numel() for p in make(variant, 1).parameters()) == expected


def test_the_factor_is_a_half_when_left_out():
    assert make("ConvSmall").channels == make("ConvSmall", 0.5).channels == [16, 32, 48, 64]


@pytest.mark.parametrize(("num_classes", "total"), [(5, 2_173_383), (80, 2_206_648)])
def test_the_printed_detector_has_the_published_total(num_classes, total):
    with torch.device("meta"):
        model = build_model(PRINTED, num_classes=num_classes, imgsz=(128, 128))
    assert sum(p.numel() for p in model.parameters()) == total
    assert [(row.module, row.args) for row in model.rows][0] == ("MobileNetV4ConvSmall", "[0.75]")


def timm_features(variant: str) -> nn.Module:
    """timm's trunk with statistics and layer scales away from where they start, so that they count."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(TIMM_NAMES[variant], features_only=True).eval()
    generator = torch.Generator().manual_seed(7)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        elif name.endswith(("running_mean", "bias")):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.2 - 0.1)
        elif name.endswith("gamma"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.5 + 0.1)
    return model


@pytest.mark.parametrize(
    "variant", ["ConvSmall", "ConvMedium", "ConvLarge", "HybridMedium", "HybridLarge"]
)
def test_factor_1_equals_timm_given_its_weights(variant):
    theirs = timm_features(variant).double()  # float32 rounding alone reaches 2e-4 at values of 10
    state = theirs.state_dict()
    ours = make(variant, 1).double().eval()
    ours.load_timm_state(state, "timm")
    trunk = {key for key in state if not key.startswith("blocks.4.")}
    assert {timm_key(key, ours) for key in ours.state_dict()} == trunk
    image = torch.rand(2, 3, 96, 160, generator=torch.Generator().manual_seed(3)).double()
    with torch.no_grad():
        for mine, other in zip(ours(image), timm_layers(theirs, image), strict=True):
            assert mine.shape == other.shape
            assert other.std() > 1e-2
            assert (mine - other).abs().max() < 1e-9


def timm_layers(model: nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    """Outputs of timm's first four stages; its own features at stride 32 are taken one stage later."""
    maps = []
    with torch.no_grad():
        x = model.act1(model.bn1(model.conv_stem(image)))
        for stage in model.blocks[:4]:
            x = stage(x)
            maps.append(x)
    return maps


def test_weights_of_timm_load_from_a_file(tmp_path):
    timm = pytest.importorskip("timm")
    full = timm.create_model(TIMM_NAMES["ConvSmall"])
    path = tmp_path / "small.pth"
    torch.save(full.state_dict(), path)
    model = make("ConvSmall", 1, weights=str(path))
    assert torch.equal(model.stem.conv.weight, full.conv_stem.weight)
    assert torch.equal(
        model.layers[3][5].project.conv.weight, full.blocks[3][5].pw_proj.conv.weight
    )
    with pytest.raises(LayerError, match="factor 0.5"):
        make("ConvSmall", 0.5, weights=str(path))
    with pytest.raises(CheckpointError, match="does not fit MobileNetV4ConvMedium"):
        make("ConvMedium", 1, weights=str(path))
    with pytest.raises(CheckpointError, match="no such file"):
        make("ConvSmall", 1, weights=str(tmp_path / "none.pth"))


@pytest.mark.parametrize("variant", list(COUNTS))
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 64, 96), (3, 96, 64)])
def test_maps_have_the_stated_strides_and_every_parameter_a_gradient(variant, batch, height, width):
    model = make(variant, 0.25).train()
    maps = model(torch.rand(batch, 3, height, width))
    assert [tuple(m.shape) for m in maps] == [
        (batch, c, height // s, width // s) for c, s in zip(model.channels, model.strides)
    ]
    sum(m.square().mean() for m in maps).backward()
    assert [
        name
        for name, p in model.named_parameters()
        if p.grad is None or not p.grad.isfinite().all()
    ] == []


def test_images_of_a_batch_do_not_mix_and_channels_last_changes_nothing():
    model = make("HybridMedium", 0.25).eval()
    for module in model.modules():
        if isinstance(module, mobilenetv4.LayerScale):
            nn.init.constant_(module.gamma, 0.5)
    images = torch.rand(3, 3, 64, 96)
    with torch.no_grad():
        together = model(images)
        apart = [model(images[i : i + 1]) for i in range(3)]
        other_layout = model.to(memory_format=torch.channels_last)(
            images.to(memory_format=torch.channels_last)
        )
    for level in range(4):
        single = torch.cat([maps[level] for maps in apart])
        assert torch.allclose(together[level], single, atol=1e-5)
        assert torch.allclose(together[level], other_layout[level], atol=1e-5)


def test_attention_is_the_textbook_formula():
    """Two heads of width 3 on a 2x3 map, worked out place by place with scale 1/sqrt(3)."""
    torch.manual_seed(0)
    attention = MobileAttention(4, AttentionSpec(heads=2, dim=3), None).eval()
    x = torch.randn(2, 4, 2, 3)
    with torch.no_grad():
        y = attention.norm(x)
        query, key, value = attention.query(y), attention.key(y), attention.value(y)
        expected = torch.zeros(2, 6, 2, 3)
        for b in range(2):
            for head in range(2):
                for place in range(6):
                    q = query[b, 3 * head : 3 * head + 3].flatten(1)[:, place]
                    weights = (q @ key[b].flatten(1) / 3**0.5).softmax(0)
                    expected[b, 3 * head : 3 * head + 3, place // 3, place % 3] = (
                        value[b].flatten(1) @ weights
                    )
        assert torch.allclose(attention(x), x + attention.project(expected), atol=1e-5)


def test_building_is_reproducible_and_moves_no_statistics():
    torch.manual_seed(5)
    first = make("HybridMedium", 0.25)
    torch.manual_seed(5)
    second = make("HybridMedium", 0.25)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values())
    )
    norms = [m for m in first.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(
        int(m.num_batches_tracked) == 0 and not m.running_mean.any() for m in norms
    )


@pytest.mark.parametrize("factor", [0, -0.5, 0.01, float("nan"), float("inf"), True, "half"])
def test_an_impossible_factor_is_one_line(factor):
    with pytest.raises(LayerError, match="got factor .*expected a number of at least"):
        make("ConvSmall", factor)


def test_a_factor_of_0_in_a_yaml_names_the_row():
    config = {
        "nc": 2,
        "backbone": [[-1, 1, "MobileNetV4ConvSmall", [0]]],
        "head": [["P3", 1, "Conv", [8]], [[-1], 1, "Detect", ["nc"]]],
        "scales": {"n": [1, 1, 64]},
    }
    with pytest.raises(
        ConfigError, match=r"backbone\[0\] MobileNetV4ConvSmall: .*got factor 0, expected"
    ) as caught:
        build_model(config, imgsz=(64, 64))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("value", "expected"), [(1, 8), (8.8, 8), (11, 16), (20, 24), (96, 96), (27, 32), (99, 96)]
)
def test_expansions_round_to_a_multiple_of_8(value, expected):
    assert round_to_8(value) == expected
