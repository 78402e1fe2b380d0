"""Our layers as pasted code calls them: short keywords, attributes that subclasses read, kernels as pairs."""

from __future__ import annotations

import pytest
import torch
from pasted_files import run as run
from small_configs import build, error_of
from torch import nn

from models import common
from models.blocks import csp

SUBCLASSES = """
import torch
from torch import nn
from ultralytics.nn.modules.block import Bottleneck, C2f, C3, C3k2, C2PSA
from ultralytics.nn.modules.conv import Conv, autopad


class Gate(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.mix = Conv(dim, dim, k=3, s=1, p=None, g=dim, d=1, act=False)

    def forward(self, x):
        return x * self.mix(x).sigmoid()


class GatedBottleneck(Bottleneck):
    def __init__(self, c1, c2, shortcut=True, g=1, k=((3, 3), (3, 3)), e=0.5):
        super().__init__(c1, c2, shortcut, g, k=k, e=e)
        c_ = int(c2 * e)
        self.cv1 = Conv(c1, c_, k[0], 1)
        self.gate = Gate(c2)

    def forward(self, x):
        y = self.gate(self.cv2(self.cv1(x)))
        return x + y if self.add else y


class C2fGated(C2f):
    def __init__(self, c1, c2, n=1, shortcut=False, g=1, e=0.5):
        super().__init__(c1, c2, n, shortcut, g, e)
        self.m = nn.ModuleList(GatedBottleneck(self.c, self.c, shortcut, g, k=((3, 3), (3, 3)), e=1.0) for _ in range(n))


class C2fKeywords(C2f):
    def __init__(self, c1, c2, n=1, shortcut=False, g=1, e=0.5):
        super().__init__(c1=c1, c2=c2, n=n, shortcut=shortcut, g=g, e=e)
        self.m = nn.ModuleList(Gate(self.c) for _ in range(n))

    def forward(self, x):
        y = list(self.cv1(x).split((self.c, self.c), 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class C3Gated(C3):
    def __init__(self, c1, c2, n=1, shortcut=True, g=1, e=0.5):
        super().__init__(c1, c2, n, shortcut, g, e)
        c_ = int(c2 * e)
        self.m = nn.Sequential(*(GatedBottleneck(c_, c_, shortcut, g, e=1.0) for _ in range(n)))


class C3k2Gated(C3k2):
    def __init__(self, c1, c2, n=1, c3k=False, e=0.5, g=1, shortcut=True):
        super().__init__(c1, c2, n, c3k, e, g, shortcut)
        self.m = nn.ModuleList(Gate(self.c) for _ in range(n))


class C2PSAGated(C2PSA):
    def __init__(self, c1, c2, n=1, e=0.5):
        super().__init__(c1, c2, n=n, e=e)
        self.m = nn.Sequential(*(Gate(self.c) for _ in range(n)))

    def forward(self, x):
        a, b = self.cv1(x).split((self.c, self.c), dim=1)
        return self.cv2(torch.cat((a, self.m(b)), 1))


class Strip(nn.Module):
    default_act = Conv.default_act

    def __init__(self, c1, c2, k=7, act=True):
        super().__init__()
        self.across = Conv(c1, c2, k=(1, k), act=act)
        self.down = nn.Conv2d(c2, c2, (k, 1), padding=autopad((k, 1)), bias=False)
        self.bn = nn.BatchNorm2d(c2)
        self.act = self.default_act if act is True else nn.Identity()

    def forward(self, x):
        return self.act(self.bn(self.down(self.across.forward_fuse(x))))
"""


@pytest.mark.parametrize(
    "name", ["C2fGated", "C2fKeywords", "C3Gated", "C3k2Gated", "C2PSAGated", "Strip"]
)
def test_a_pasted_subclass_of_our_blocks_trains(run, name: str):
    block = getattr(run(SUBCLASSES), name)(16, 16)
    x = torch.rand(2, 16, 8, 8, requires_grad=True)
    y = block(x)
    assert y.shape == x.shape
    y.square().sum().backward()
    idle = [n for n, p in block.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert idle == (["across.bn.weight", "across.bn.bias"] if name == "Strip" else [])


def test_short_keywords_mean_our_words():
    short = common.Conv(8, 16, k=3, s=2, p=1, g=4, d=1, act=False)
    whole = common.Conv(
        8, 16, kernel_size=3, stride=2, padding=1, groups=4, dilation=1, activation=False
    )
    assert repr(short) == repr(whole)
    assert common.Concat(d=2).dimension == 2
    assert common.SPP(8, 8, k=(3, 5)).m[1].kernel_size == 5
    assert common.SPPF(8, 8, k=3).m.kernel_size == 3
    assert csp.C3k(8, 8, n=1, g=1, e=0.5, k=5).m[0].cv1.conv.kernel_size == (5, 5)
    assert csp.PSABlock(c=16, attn_ratio=0.5, num_heads=2).attn.num_heads == 2
    assert csp.Attention(dim=16, num_heads=4, attn_ratio=1.0).key_channels == 4
    with pytest.raises(TypeError, match="got k and kernel_size, expected one of them"):
        common.Conv(8, 16, k=3, kernel_size=3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'q'"):
        common.Conv(8, 16, q=3)


@pytest.mark.parametrize(
    ("arguments", "padding"),
    [
        ((3,), 1),
        ((5, None, 2), 4),
        ((3, 0), 0),
        (((1, 7),), (0, 3)),
        (([3, 5], None, 2), (2, 4)),
        (((3, 3), (1, 1)), (1, 1)),
    ],
)
def test_padding_keeps_the_size_for_square_and_other_kernels(arguments: tuple, padding: object):
    assert common.autopad(*arguments) == padding


def test_a_subclass_may_have_another_default_activation():
    class Rectified(common.Conv):
        default_act = nn.ReLU()

    assert isinstance(Rectified(3, 8).act, nn.ReLU)
    assert isinstance(common.Conv(3, 8).act, nn.SiLU)
    assert common.Conv(3, 8).act is not common.Conv.default_act  # each has its own
    assert Rectified(3, 8).has_default_activation


def test_a_row_may_use_the_short_keywords_too():
    rows = [[-1, 1, "Conv", [16, {"k": 3, "s": 2, "act": False}]]]
    built = build(rows).model[0]
    assert (built.conv.kernel_size, built.conv.stride) == ((3, 3), (2, 2))
    assert isinstance(built.act, nn.Identity)
    assert "got an unexpected keyword argument 'q'" in error_of([[-1, 1, "Conv", [16, {"q": 3}]]])
