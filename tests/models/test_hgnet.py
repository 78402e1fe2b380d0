"""HGNetv2 and the re-parameterizable neck block of RT-DETR."""

from __future__ import annotations

import pytest
import torch

from models import registry
from models.blocks.hg import AffineReLU, HGBlock, HGStem
from models.blocks.rep import RepC3, RepConv
from models.modules.hgnet import (
    HGNetv2_Atto,
    HGNetv2_Femto,
    HGNetv2_L,
    HGNetv2_Pico,
    HGNetv2_X,
)


def _unsettle(module: torch.nn.Module) -> None:
    """Weights and running statistics that hide no mistake."""
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            torch.nn.init.uniform_(
                value, 0.5, 1.5
            ) if "running_var" in name else torch.nn.init.normal_(value)


@pytest.mark.parametrize("build", [HGNetv2_L, HGNetv2_X])
@pytest.mark.parametrize("size", [(32, 32), (64, 96)])
def test_backbone_says_the_channels_and_strides_that_it_has(build, size: tuple[int, int]) -> None:
    with torch.device("meta"):
        net = build().eval()
        maps = net(torch.empty(1, 3, *size))
    assert [m.shape[1] for m in maps] == net.channels == [128, 512, 1024, 2048]
    assert [size[0] // m.shape[2] for m in maps] == [size[1] // m.shape[3] for m in maps]
    assert [size[0] // m.shape[2] for m in maps] == net.strides == [4, 8, 16, 32]


def test_backbone_has_the_parameters_of_the_rows_that_rtdetr_lists() -> None:
    """Rows 0-9 of rtdetr-l and 0-13 of rtdetr-x; the totals are what is left of the published
    counts.
    """
    with torch.device("meta"):
        counts = [sum(p.numel() for p in build().parameters()) for build in (HGNetv2_L, HGNetv2_X)]
    assert counts == [13_553_376, 33_325_760]


@pytest.mark.parametrize(
    ("build", "channels", "parameters"),
    [(HGNetv2_Atto, 256, 230_344), (HGNetv2_Femto, 512, 389_832), (HGNetv2_Pico, 512, 749_202)],
)
def test_small_backbones_end_at_stride_16_and_have_their_published_parameters(
    build, channels: int, parameters: int
) -> None:
    with torch.device("meta"):
        net = build().eval()
        maps = net(torch.empty(1, 3, 64, 96))
    assert [tuple(m.shape[1:]) for m in maps] == [(64, 16, 24), (256, 8, 12), (channels, 4, 6)]
    assert net.channels == [64, 256, channels] and net.strides == [4, 8, 16]
    assert sum(p.numel() for p in net.parameters()) == parameters


def test_an_affine_activation_by_hand() -> None:
    layer = AffineReLU()
    with torch.no_grad():
        layer.scale.fill_(2)
        layer.bias.fill_(-1)
    assert layer(torch.tensor([-3.0, 0.0, 2.0])).tolist() == [-1, -1, 3]


def test_backbone_is_registered_under_the_published_names() -> None:
    for name in ("HGNetv2_L", "HGNetv2_X"):
        layer = registry.find(name)
        assert layer is not None and layer.rule is registry.backbone


def test_stem_quarters_the_size_and_its_2x2_windows_look_right_and_down() -> None:
    stem = HGStem(3, 8, 16).eval()
    _unsettle(stem)
    image = torch.zeros(1, 3, 32, 48)
    assert stem(image).shape == (1, 16, 8, 12)

    def cells_moved_by(row: int, column: int) -> list[list[int]]:
        changed = image.clone()
        changed[..., row, column] = 1
        return (stem(changed) != stem(image)).any(1)[0].nonzero().tolist()

    # the last pixel reaches cell 15 at stride 2, two windows back cell 13, and so cell 6 at stride 4
    assert cells_moved_by(31, 47) == [[6, 10], [6, 11], [7, 10], [7, 11]]
    assert cells_moved_by(0, 0) == [[0, 0]]


@pytest.mark.parametrize(
    ("in_channels", "shortcut", "has"), [(16, True, True), (16, False, False), (8, True, False)]
)
def test_block_adds_its_input_only_where_asked_and_where_widths_agree(
    in_channels, shortcut, has
) -> None:
    block = HGBlock(in_channels, 4, 16, 3, repeats=2, light=True, shortcut=shortcut).eval()
    torch.nn.init.zeros_(block.ec.bn.weight)  # what is left is the residual
    x = torch.rand(1, in_channels, 4, 6)
    y = block(x)
    torch.testing.assert_close(y, x if has else torch.zeros_like(y))


def test_block_rule_leaves_widths_alone_and_puts_the_repeats_inside() -> None:
    layer = registry.find("HGBlock")
    assert layer is not None
    plan = layer.rule(
        [48], [48, 2048, 3, True], registry.Scaling(width=0.5, max_channels=1024, repeats=6)
    )
    assert (plan.args, plan.channels, plan.repeats_inside) == (
        [48, 48, 2048, 3, 6, True],
        2048,
        True,
    )


def test_rows_that_say_too_little_are_refused() -> None:
    for name, args in (("HGBlock", [48, 128]), ("HGStem", [32])):
        layer = registry.find(name)
        assert layer is not None
        with pytest.raises(registry.LayerError, match="expected"):
            layer.rule([3], args, registry.Scaling())


def test_rep_conv_folds_exactly_and_only_once() -> None:
    torch.manual_seed(0)
    conv = RepConv(5, 7).double().eval()
    _unsettle(conv)
    x = torch.randn(2, 5, 6, 9).double()
    expected = conv(x)
    conv.reparameterize()
    folded = conv.conv
    assert (conv(x) - expected).abs().max() < 1e-12
    conv.reparameterize()
    assert conv.conv is folded
    assert set(conv.state_dict()) == {"conv.weight", "conv.bias"}
    conv(x).sum().backward()
    assert all(p.grad is not None for p in conv.parameters())


@pytest.mark.parametrize("expansion", [1.0, 0.5])
def test_rep_c3_folds_all_its_convolutions(expansion: float) -> None:
    torch.manual_seed(0)
    block = RepC3(6, 8, 2, expansion).double().eval()
    x = torch.randn(1, 6, 4, 4).double()
    expected = block(x)
    for part in block.m:
        part.reparameterize()
    assert (block(x) - expected).abs().max() < 1e-12
