"""Blocks that YAMLs of the wild name: sizes worked out by hand, folding, gradients, and all of them in one model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from models.blocks.cbam import CBAM, ChannelAttention, SpatialAttention
from models.blocks.csp import C1, C2, C3SPP, BottleneckCSP, C3x, CrossConv
from models.blocks.ghost import C3Ghost, GhostBottleneck
from models.blocks.rep import RepConv, fold_branches
from models.blocks.resnet import ResNetBlock, ResNetLayer
from models.blocks.sampling import (
    Contract,
    ConvTranspose,
    DWConvTranspose2d,
    Expand,
    Index,
    MixConv2d,
)
from models.blocks.vit import C3TR, TransformerBlock
from models.blocks.yolov10 import CIB, PSA, C2fCIB, C2fPSA, RepVGGDW, SCDown
from models.common import Conv, batch_norm
from models.registry import LayerError


def conv(a: int, b: int, k: int = 1, g: int = 1) -> int:
    """Weights of a convolution without bias and the two of its norm for each output."""
    return a // g * b * k * k + 2 * b


def ghost(a: int, b: int) -> int:
    """Half of the outputs by a pointwise convolution, half by a depthwise 5x5 one."""
    return conv(a, b // 2) + conv(b // 2, b // 2, 5, b // 2)


C3_AROUND = conv(16, 8) + conv(16, 8) + conv(16, 16)  # cv1, cv2, cv3 of a C3 from 16 to 16
GHOST_SAME = ghost(8, 4) + ghost(4, 8)
ENCODER = (
    2 * 16 + (3 * 8 * 8 + 3 * 8) + (8 * 8 + 8) + (8 * 32 + 32) + (32 * 8 + 8)
)  # norms, attention, perceptron
ATTENTION = (
    conv(64, 128) + conv(64, 64) + conv(64, 64, 3, 64)
)  # queries and keys of 32, values of 64
PERCEPTRON = conv(64, 128) + conv(128, 64)
CIB_16 = 3 * conv(16, 16, 3, 16) + 2 * conv(16, 16)
CIB_8_WIDE = 2 * conv(8, 8, 3, 8) + conv(16, 16, 3, 16) + conv(8, 16) + conv(16, 8)
RES_BLOCK = conv(16, 8) + conv(8, 8, 3) + conv(8, 32)

BLOCKS = [
    (GhostBottleneck(16, 16), 16, 1, ghost(16, 8) + ghost(8, 16)),
    (GhostBottleneck(16, 24, 3, 2), 24, 2,
     ghost(16, 12) + conv(12, 12, 3, 12) + ghost(12, 24) + conv(16, 16, 3, 16) + conv(16, 24)),
    (C3Ghost(16, 16, 2), 16, 1, C3_AROUND + 2 * GHOST_SAME),
    (CrossConv(16, 16), 16, 1, 2 * (16 * 16 * 3 + 32)),
    (CrossConv(16, 24, 5, 2, 4, 0.5, True), 24, 2, 16 * 12 * 5 + 24 + 12 // 4 * 24 * 5 + 48),
    (C3x(16, 16, 1), 16, 1, C3_AROUND + 2 * (8 * 8 * 3 + 16)),
    (C3SPP(16, 16, (5, 9, 13)), 16, 1, C3_AROUND + conv(8, 4) + conv(16, 8)),
    (C3TR(16, 16, 1), 16, 1, C3_AROUND + ENCODER),
    (TransformerBlock(16, 8, 2, 2), 8, 1, conv(16, 8) + 2 * ENCODER),
    (BottleneckCSP(16, 16, 1), 16, 1, conv(16, 8) + 2 * 16 + 16 * 8 + 8 * 8 + conv(16, 16) + conv(8, 8) + conv(8, 8, 3)),
    (C1(16, 16, 2), 16, 1, conv(16, 16) + 2 * conv(16, 16, 3)),
    (C2(16, 16, 1), 16, 1, 2 * conv(16, 16) + 2 * conv(8, 8, 3)),
    (SCDown(16, 32), 32, 2, conv(16, 32) + conv(32, 32, 3, 32)),
    (RepVGGDW(16), 16, 1, conv(16, 16, 7, 16) + conv(16, 16, 3, 16)),
    (CIB(16, 16), 16, 1, CIB_16),
    (CIB(16, 16, lk=True), 16, 1, CIB_16 + conv(16, 16, 7, 16)),
    (C2fCIB(16, 16, 1, True), 16, 1, conv(16, 16) + conv(24, 16) + CIB_8_WIDE),
    (PSA(128, 128), 128, 1, 2 * conv(128, 128) + ATTENTION + PERCEPTRON),
    (C2fPSA(128, 128, 1), 128, 1, conv(128, 128) + conv(192, 128) + ATTENTION + PERCEPTRON),
    (DWConvTranspose2d(16, 16, 4, 2, 1), 16, 0.5, 16 * 16 + 16),
    (ConvTranspose(16, 8), 8, 0.5, 16 * 8 * 4 + 16),
    (ConvTranspose(16, 8, bn=False), 8, 0.5, 16 * 8 * 4 + 8),
    (MixConv2d(16, 16), 16, 1, 16 // 8 * 8 + 16 // 8 * 8 * 9 + 32),
    (MixConv2d(16, 16, (1, 3), 2, False), 16, 2, 16 * 15 + 16 * 9 + 32),  # 9 in 10 of the channels for the small kernel
    (ChannelAttention(16, 8), 16, 1, 16 * 2 + 2 * 16),
    (SpatialAttention(), 16, 1, 2 * 49),
    (CBAM(16), 16, 1, 16 + 16 + 2 * 49),
    (ResNetBlock(16, 8), 32, 1, RES_BLOCK + conv(16, 32)),
    (ResNetLayer(16, 8, 2, False, 2), 32, 2, RES_BLOCK + conv(16, 32) + conv(32, 8) + conv(8, 8, 3) + conv(8, 32)),
    (ResNetLayer(16, 24, 1, True), 24, 4, conv(16, 24, 7)),
    (RepConv(16, 16, bn=True), 16, 1, conv(16, 16, 3) + conv(16, 16) + 32),
    (RepConv(16, 24, 3, 2, 1, 8), 24, 2, conv(16, 24, 3, 8) + conv(16, 24, 1, 8)),
    (Contract(2), 64, 2, 0),
    (Expand(2), 4, 0.5, 0),
]  # fmt: skip
IDS = [f"{type(block).__name__}-{number}" for number, (block, *_) in enumerate(BLOCKS)]


@pytest.mark.parametrize(("block", "channels", "stride", "parameters"), BLOCKS, ids=IDS)
def test_a_block_has_the_parameters_and_shape_of_its_definition(
    block: nn.Module, channels: int, stride: float, parameters: int
):
    assert sum(p.numel() for p in block.parameters()) == parameters
    side = 16 if not isinstance(block, (PSA, C2fPSA)) else 4
    width = 128 if isinstance(block, (PSA, C2fPSA)) else 16
    size = (int(side / stride), int(2 * side / stride))
    assert block(torch.rand(2, width, side, 2 * side)).shape == (2, channels, *size)


@pytest.mark.parametrize(
    "block", [block for block, *_ in BLOCKS if any(True for _ in block.parameters())],
    ids=[name for name, (block, *_) in zip(IDS, BLOCKS) if any(True for _ in block.parameters())],
)  # fmt: skip
def test_every_parameter_of_a_block_takes_a_gradient(block: nn.Module):
    torch.manual_seed(0)
    width = 128 if isinstance(block, (PSA, C2fPSA)) else 16
    block = copy.deepcopy(block)
    (block(torch.rand(2, width, 8, 12)) ** 2).sum().backward()
    assert [n for n, p in block.named_parameters() if p.grad is None] == []


def randomised(block: nn.Module) -> nn.Module:
    """Norms that do something: statistics and weights far from their start."""
    generator = torch.Generator().manual_seed(0)
    for norm in (m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
        for value in (norm.running_mean, norm.bias.data):
            value.copy_(torch.randn(value.shape, generator=generator))
        for value in (norm.running_var, norm.weight.data):
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
    return block.eval()


@pytest.mark.parametrize(
    ("block", "deployed"),
    [
        (RepVGGDW(16), 16 * 49 + 16),
        (
            CIB(16, 16, lk=True),
            CIB_16 + 16 * 49 - 9 * 16 - 16,
        ),  # the middle one: 7x7 and a bias, no norm
        (RepConv(16, 16), 16 * 16 * 9 + 16),
        (RepConv(16, 16, bn=True, groups=4), 16 * 4 * 9 + 16),
        (RepConv(16, 24, 5, 2, groups=8, activation=False), 2 * 24 * 25 + 24),
        (RepConv(16, 16, 3, 1, 2, dilation=2, bn=True), 16 * 16 * 9 + 16),
    ],
)
def test_the_deployed_form_is_the_training_form(block: nn.Module, deployed: int):
    block = randomised(block)
    x = torch.randn(2, 16, 9, 11)
    before = block(x)
    for module in block.modules():
        if hasattr(module, "reparameterize"):
            module.reparameterize()
    after = block(x)
    assert (after - before).abs().max() <= 1e-6 * before.abs().max()
    assert sum(p.numel() for p in block.parameters()) == deployed
    for module in block.modules():
        if hasattr(module, "reparameterize"):
            module.reparameterize()
    assert torch.equal(block(x), after)
    after.sum().backward()
    assert all(p.grad is not None for p in block.parameters())


def test_branches_are_summed_kernel_by_kernel():
    """Ones in a 3x3 and a 1x1 kernel and an identity: 1 around a centre of 3, up to the norms' eps."""
    large, small, path = Conv(1, 1, 3), Conv(1, 1, 1), batch_norm(1)
    for branch in (large, small):
        nn.init.ones_(branch.conv.weight)
        branch.bn.eps = 0.0
    path.eps = 0.0
    path.bias.data.fill_(0.5)
    folded = fold_branches((large, small), path)
    assert folded.weight.flatten().tolist() == [1, 1, 1, 1, 3, 1, 1, 1, 1]
    assert folded.bias.tolist() == [0.5]
    assert folded.padding == (1, 1)


# --- by hand --------------------------------------------------------------------------------------


def test_attention_weighs_channels_by_average_and_maximum():
    """A perceptron that passes positive numbers on: the weight is sigmoid(mean + maximum)."""
    block = ChannelAttention(1, 1)
    for layer in (block.fc[0], block.fc[2]):
        nn.init.ones_(layer.weight)
    x = torch.tensor([1.0, 3.0]).view(1, 1, 1, 2)
    assert torch.allclose(block(x), x * torch.tensor(5.0).sigmoid())


def test_attention_weighs_places_by_average_and_maximum_of_the_channels():
    block = SpatialAttention(1)
    block.cv1.weight.data = torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)
    x = torch.tensor([[1.0, 0.0], [3.0, 0.0]]).view(
        1, 2, 1, 2
    )  # mean 2 and maximum 3, then 0 and 0
    expected = x * torch.tensor([-1.0, 0.0]).sigmoid()
    assert torch.allclose(block(x), expected)


def test_places_become_channels_and_back():
    x = torch.arange(4.0).view(1, 1, 2, 2)
    assert Contract(2)(x).flatten().tolist() == [0, 1, 2, 3]
    assert torch.equal(Expand(2)(Contract(2)(x)), x)


def test_a_cross_convolution_of_ones_sums_a_square():
    block = CrossConv(1, 1, 3).eval()
    for layer in (block.cv1, block.cv2):
        nn.init.ones_(layer.conv.weight)
        layer.bn, layer.act = nn.Identity(), nn.Identity()
    x = torch.zeros(1, 1, 5, 5)
    x[..., 2, 2] = 1
    assert block(x).sum() == 9 and block(x)[0, 0, 1:4, 1:4].eq(1).all()


def test_an_encoder_layer_does_not_forget_where_a_token_stood():
    block = TransformerBlock(8, 8, 2).eval()
    x = torch.rand(1, 8, 1, 1).expand(1, 8, 4, 4)  # all places look alike
    assert (
        block(x).std((2, 3)).max() < 1e-5
    )  # nor does attention invent a difference among equal values
    mixed = torch.rand(1, 8, 4, 4)
    turned = block(mixed.flip(3)).flip(3)
    assert (turned - block(mixed)).abs().max() > 1e-4


def test_widths_that_attention_cannot_divide_are_refused():
    with pytest.raises(
        ValueError, match="got 6 channels and 4 heads, expected a multiple of 4 and of the heads"
    ):
        TransformerBlock(6, 6, 4)
    with pytest.raises(LayerError, match="got 1 output channels for 2 kernels"):
        MixConv2d(16, 1)


def test_stages_of_the_residual_network_have_the_published_size():
    """ResNet-50's trunk: 23,508,032 parameters, torchvision's resnet50 without its classifier."""
    stages = ((64, 64, 1, 3), (256, 128, 2, 4), (512, 256, 2, 6), (1024, 512, 2, 3))
    with torch.device("meta"):
        layers = [
            ResNetLayer(3, 64, 1, True),
            *(ResNetLayer(a, b, s, False, n) for a, b, s, n in stages),
        ]
    assert (
        sum(p.numel() for layer in layers for p in layer.parameters())
        == 25_557_032 - 2048 * 1000 - 1000
    )


def test_an_index_picks_a_map():
    maps: list[Tensor] = [torch.zeros(1), torch.ones(1)]
    assert Index(1)(maps).item() == 1
