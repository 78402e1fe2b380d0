"""What stands in for other projects: small functions, deformable convolutions, mmcv."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from pasted_files import run as run
from torch import nn

from models.losses.own import own_overlap
from models.pasted import deformable, families
from utils.boxes import BoxPair

# --- the small functions --------------------------------------------------------------------------


def helper(name: str):
    return families.YOLO.names()[name]


def test_small_functions_say_what_their_names_do():
    assert helper("make_divisible")(33, 8) == 40
    assert helper("make_divisible")(32.1, torch.tensor([8, 16])) == 48
    assert helper("colorstr")("blue", "bold", "text") == "text"
    assert helper("check_version")("2.10.1+cpu", "2.9") and not helper("check_version")(
        "1.9", "1.10"
    )
    points, strides = helper("make_anchors")(
        [torch.zeros(1, 8, 1, 2), torch.zeros(1, 8, 1, 1)], [8, 16]
    )
    assert points.tolist() == [[0.5, 0.5], [1.5, 0.5], [0.5, 0.5]]
    assert strides.tolist() == [[8], [8], [16]]
    distance = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    point = torch.tensor([[5.0, 5.0]])
    corners = helper("dist2bbox")(distance, point, xywh=False)
    assert corners.tolist() == [[4, 3, 8, 9]]
    assert helper("dist2bbox")(distance, point).tolist() == [[6, 6, 4, 6]]
    assert torch.allclose(helper("bbox2dist")(point, corners, 16), distance)
    logits = torch.full((1, 8, 1), -100.0)
    logits[0, [0, 3, 4, 7], 0] = 100.0  # sides at bins 0, 1, 0, 1 of two
    assert helper("DFL")(2)(logits).flatten().tolist() == [0, 1, 0, 1]
    assert helper("bias_init_with_prob")(0.5) == 0


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ({}, 1 / 3),  # 2x2 boxes, one moved by 1: 2 of 6
        ({"GIoU": True}, 1 / 3),  # the hull is 3x2, nothing of it is empty
        ({"DIoU": True}, 1 / 3 - 1 / 13),  # centres 1 apart, diagonal of 3x2 squared
        ({"CIoU": True}, 1 / 3 - 1 / 13),  # of one shape
    ],
)
def test_overlaps_of_two_boxes(kind: dict[str, bool], expected: float):
    first, second = torch.tensor([[1.0, 1, 2, 2]]), torch.tensor([[2.0, 1, 2, 2]])
    found = helper("bbox_iou")(first, second, **kind)
    assert found.shape == (1, 1)
    assert found.item() == pytest.approx(expected, abs=1e-6)
    corners = [torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[1.0, 0, 3, 2]])]
    assert helper("bbox_iou")(*corners, xywh=False, **kind).item() == pytest.approx(
        expected, abs=1e-6
    )


def test_a_pasted_box_loss_takes_its_overlap_from_us(tmp_path: Path):
    path = tmp_path / "losses.py"
    path.write_text(
        "from ultralytics.utils.metrics import bbox_iou\n\n\ndef giou(p, t):\n"
        "    return 1 - bbox_iou(p, t, xywh=False, GIoU=True).squeeze(-1)\n"
    )
    pair = BoxPair(torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[1.0, 0, 3, 4]]))
    expected = pair.iou - pair.empty_share
    assert torch.allclose(own_overlap(f"{path}:giou", True)(pair, {}, (32, 32)), expected)


@pytest.mark.parametrize(
    "conv", [nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.ConvTranspose2d(3, 4, 2, 2)]
)
def test_a_convolution_folded_with_its_norm_gives_the_same(conv: nn.Module):
    norm = nn.BatchNorm2d(4).eval()
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    x = torch.rand(1, 3, 8, 8)
    folded = helper("fuse_conv_and_bn")(conv, norm)
    assert torch.allclose(folded(x), norm(conv(x)), atol=1e-6)


def test_a_tool_that_measures_is_refused_when_it_is_called(run):
    if importlib.util.find_spec("thop"):
        pytest.skip("a package of that name is installed")
    module = run("from thop import profile\nimport thop")
    with pytest.raises(Exception, match="python models/yolo.py --cfg X.yaml"):
        module.profile(None)


# --- deformable convolution -----------------------------------------------------------------------


def by_hand(x, weight, shift):
    """A 1x1 convolution of x moved by `shift` whole rows: rows beyond the edge are 0."""
    moved = torch.zeros_like(x)
    moved[:, :, : x.shape[2] - shift] = x[:, :, shift:]
    return torch.nn.functional.conv2d(moved, weight)


def test_offsets_are_rows_first_and_masks_are_factors():
    layer = deformable.ModulatedDeformConv2d(2, 3, 1, bias=False)
    x = torch.rand(1, 2, 4, 4)
    offset = torch.zeros(1, 2, 4, 4)
    offset[:, 0] = 1.0  # one row down
    assert torch.allclose(
        layer(x, offset, torch.full((1, 1, 4, 4), 0.5)),
        0.5 * by_hand(x, layer.weight, 1),
        atol=1e-6,
    )
    plain = deformable.DeformConv2d(2, 3, 1)
    assert plain.bias is None
    assert torch.allclose(plain(x, offset), by_hand(x, plain.weight, 1), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "share"),
    [("DeformConv2dPack", 1.0), ("ModulatedDeformConv2dPack", 0.5), ("DCN", 0.5)],
)
def test_a_pack_starts_as_a_plain_convolution_and_trains(name: str, share: float):
    """Offsets start at 0 and masks at sigmoid(0) = 0.5."""
    layer = deformable.NAMES[name](4, 6, 3, stride=2, padding=1)
    x = torch.rand(2, 4, 8, 8)
    plain = torch.nn.functional.conv2d(x, share * layer.weight, layer.bias, 2, 1)
    assert torch.allclose(layer(x), plain, atol=1e-6)
    layer(x).square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


# --- mmcv ----------------------------------------------------------------------------------------

MM_FILE = """
import torch
from torch import nn
from mmcv.cnn import (ConvModule, DepthwiseSeparableConvModule, Scale, build_activation_layer, build_conv_layer,
                      build_norm_layer, constant_init, kaiming_init)
from mmcv.cnn.bricks.transformer import build_dropout
from mmcv.runner import BaseModule as OldBaseModule, auto_fp16
from mmdet.models.builder import BACKBONES
from mmdet.registry import MODELS
from mmengine.model import BaseModule, Sequential
from mmseg.utils import get_root_logger


@BACKBONES.register_module()
@MODELS.register_module(name="net")
class Net(BaseModule):
    def __init__(self, c1, c2, norm_cfg=dict(type="SyncBN", requires_grad=True), init_cfg=None):
        super().__init__(init_cfg)
        self.stem = ConvModule(c1, c2, 3, padding=1, norm_cfg=norm_cfg, act_cfg=dict(type="GELU"))
        self.deform = ConvModule(c2, c2, 3, padding=1, conv_cfg=dict(type="DCNv2", deform_groups=1))
        self.cheap = DepthwiseSeparableConvModule(c2, c2, 3, padding=1, norm_cfg=dict(type="GN", num_groups=2))
        name, layer = build_norm_layer(dict(type="LN2d"), c2, postfix=1)
        self.name = name
        self.add_module(name, layer)
        self.scale = Scale(2.0)
        self.tail = Sequential(build_conv_layer(None, c2, c2, 1), build_dropout(dict(type="DropPath", drop_prob=0.1)))
        constant_init(self.tail[0], 1, bias=3)
        kaiming_init(self.stem.conv)

    @auto_fp16()
    def forward(self, x):
        return self.tail(self.scale(getattr(self, self.name)(self.cheap(self.deform(self.stem(x))))))
"""


def test_a_file_of_openmmlab_builds_and_trains(run):
    module = run(MM_FILE)
    net = module.Net(3, 8)
    assert net.stem.norm is net.stem.bn and net.stem.conv.bias is None
    assert net.deform.conv.bias is not None and isinstance(net.deform.activate, nn.ReLU)
    assert net.name == "ln1" and net.scale.scale.item() == 2.0
    assert net.tail[0].weight.eq(1).all() and net.tail[0].bias.eq(3).all()
    assert issubclass(module.OldBaseModule, nn.Module)
    assert module.MODELS.build({"type": "net", "c1": 3, "c2": 8}).stem.conv.out_channels == 8
    net(torch.rand(2, 3, 8, 8)).square().sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []
    net.init_weights()


def test_convolution_norm_and_activation_come_in_the_order_that_is_asked(run):
    module = run("from mmcv.cnn import ConvModule")
    block = module.ConvModule(
        2, 4, 1, norm_cfg={"type": "BN"}, act_cfg={"type": "ReLU"}, order=("norm", "act", "conv"), bias=False
    ).eval()  # fmt: skip
    x = torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1)
    assert block.bn.num_features == 2
    expected = block.conv.weight[:, 1, 0, 0] / math.sqrt(1 + 1e-5)  # the negative channel is cut
    assert torch.allclose(block(x).flatten(), expected, atol=1e-6)


def test_an_unknown_kind_of_layer_is_told(run):
    module = run("from mmcv.cnn import build_norm_layer")
    with pytest.raises(Exception, match="mmcv norm_cfg: got 'XN', expected one of BN, BN1d"):
        module.build_norm_layer({"type": "XN"}, 8)
