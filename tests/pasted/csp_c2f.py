"""Variants of C2f, C3 and C3k2 that exchange the inner block; the base comes from the tree they were written for."""
import torch
import torch.nn as nn

from ultralytics.nn.modules import C2f, C3
from ultralytics.nn.modules.block import Bottleneck, C3k, C3k2
from ultralytics.nn.modules.conv import Conv, DWConv, autopad

__all__ = ("C2f_Partial", "C3_Strip", "C3k2_SE", "C2f_DW", "GatedC2f")


class PartialConv(nn.Module):
    def __init__(self, dim, n_div=4):
        super().__init__()
        self.part, self.rest = dim // n_div, dim - dim // n_div
        self.conv = nn.Conv2d(self.part, self.part, 3, padding=1, bias=False)

    def forward(self, x):
        a, b = x.split((self.part, self.rest), 1)
        return torch.cat((self.conv(a), b), 1)


class PartialBottleneck(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.body = nn.Sequential(PartialConv(dim), Conv(dim, 2 * dim, 1), nn.Conv2d(2 * dim, dim, 1, bias=False))

    def forward(self, x):
        return x + self.body(x)


class C2f_Partial(C2f):
    def __init__(self, c1, c2, n=1, shortcut=False, g=1, e=0.5):
        super().__init__(c1, c2, n, shortcut, g, e)
        self.m = nn.ModuleList(PartialBottleneck(self.c) for _ in range(n))


class C2f_DW(C2f):
    """Depthwise bottlenecks."""

    def __init__(self, c1, c2, n=1, shortcut=False, g=1, e=0.5):
        super().__init__(c1, c2, n, shortcut, g, e)
        self.m = nn.ModuleList(
            nn.Sequential(Conv(self.c, self.c, 1), DWConv(self.c, self.c, 5, act=False)) for _ in range(n)
        )


class StripBottleneck(Bottleneck):
    def __init__(self, c1, c2, shortcut=True, g=1, k=(3, 3), e=0.5):
        super().__init__(c1, c2, shortcut, g, k, e)
        c_ = int(c2 * e)
        self.cv1 = Conv(c1, c_, (1, 3), p=(0, 1))
        self.cv2 = nn.Sequential(Conv(c_, c_, (3, 1), p=(1, 0)), Conv(c_, c2, k[1], 1, p=autopad(k[1]), g=g))


class C3_Strip(C3):
    def __init__(self, c1, c2, n=1, shortcut=True, g=1, e=0.5):
        super().__init__(c1, c2, n, shortcut, g, e)
        c_ = int(c2 * e)  # hidden channels
        self.m = nn.Sequential(*(StripBottleneck(c_, c_, shortcut, g, e=1.0) for _ in range(n)))


class SqueezedBottleneck(Bottleneck):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        width = self.cv2.conv.out_channels
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, width, 1), nn.Sigmoid())

    def forward(self, x):
        y = super().forward(x)
        return y * self.gate(y)


class C3k_SE(C3k):
    def __init__(self, c1, c2, n=1, shortcut=True, g=1, e=0.5, k=3):
        super().__init__(c1, c2, n, shortcut, g, e, k)
        c_ = int(c2 * e)
        self.m = nn.Sequential(*(SqueezedBottleneck(c_, c_, shortcut, g, k=(k, k), e=1.0) for _ in range(n)))


class C3k2_SE(C3k2):
    def __init__(self, c1, c2, n=1, c3k=False, e=0.5, g=1, shortcut=True):
        super().__init__(c1, c2, n, c3k, e, g, shortcut)
        blocks = []
        for _ in range(n):
            blocks.append(C3k_SE(self.c, self.c, n=2, shortcut=shortcut) if c3k else SqueezedBottleneck(self.c, self.c, shortcut, g))
        self.m = nn.ModuleList(blocks)


class GatedC2f(C2f):
    """A learned factor for every part; a last convolution with the class's own activation."""

    def __init__(self, c1, c2, n=1, shortcut=False, g=1, e=0.5):
        super().__init__(c1, c2, n, shortcut, g, e)
        self.m = nn.ModuleList([Bottleneck(self.c, self.c, shortcut, g, k=((3, 3), (3, 3)), e=1.0) for _ in self.m])
        self.factors = nn.Parameter(torch.ones(2 + n))
        self.cv2.act = Conv.default_act

    def forward(self, x):
        parts = list(torch.split(self.cv1(x), (self.c, self.c), 1))
        for block in self.m:
            parts.append(block(parts[-1]))
        return self.cv2(torch.cat([part * self.factors[i] for i, part in enumerate(parts)], 1))
