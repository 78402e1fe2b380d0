"""Necks: a list of maps in, a list of maps out."""
from typing import List, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class PyramidNeck(nn.Module):
    """Feature pyramid: laterals of one width, top-down sum, a smoothing convolution each."""

    def __init__(self, in_channels: List[int], out_channels: int = 256, num_outs: int = None):
        super().__init__()
        self.in_channels = in_channels
        self.lateral_convs = nn.ModuleList(nn.Conv2d(c, out_channels, 1) for c in in_channels)
        self.fpn_convs = nn.ModuleList(nn.Conv2d(out_channels, out_channels, 3, padding=1) for _ in in_channels)

    def forward(self, inputs: Tuple[Tensor]) -> Tuple[Tensor]:
        assert len(inputs) == len(self.in_channels)
        laterals = [conv(m) for conv, m in zip(self.lateral_convs, inputs)]
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], size=laterals[i - 1].shape[2:], mode="nearest")
        return tuple(conv(m) for conv, m in zip(self.fpn_convs, laterals))


class WeightedNeck(nn.Module):
    """BiFPN's idea in one layer: down and up again with learned, normalised weights."""

    def __init__(self, in_channels_list, out):
        super().__init__()
        self.squeeze = nn.ModuleList(self.block(c, out, 1) for c in in_channels_list)
        n = len(in_channels_list)
        self.down = nn.ModuleList(self.block(out, out, 3) for _ in range(n - 1))
        self.up = nn.ModuleList(self.block(out, out, 3) for _ in range(n - 1))
        self.w1 = nn.Parameter(torch.ones(n - 1, 2))
        self.w2 = nn.Parameter(torch.ones(n - 1, 2))

    @staticmethod
    def block(a, b, k):
        return nn.Sequential(nn.Conv2d(a, b, k, padding=k // 2, bias=False), nn.BatchNorm2d(b), nn.SiLU())

    def mix(self, w, a, b):
        w = F.relu(w)
        return (w[0] * a + w[1] * b) / (w.sum() + 1e-4)

    def forward(self, feats):
        maps = [s(f) for s, f in zip(self.squeeze, feats)]
        for i in reversed(range(len(maps) - 1)):
            maps[i] = self.down[i](self.mix(self.w1[i], maps[i], F.interpolate(maps[i + 1], scale_factor=2.0)))
        for i in range(len(maps) - 1):
            maps[i + 1] = self.up[i](self.mix(self.w2[i], maps[i + 1], F.max_pool2d(maps[i], 2)))
        return maps


class BalancedNeck(nn.Module):
    """No arguments: every map gets some of all maps' mean, in channels that they share."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(8))

    def forward(self, xs):
        size = xs[1].shape[-2:]
        shared = sum(F.interpolate(x.mean(1, keepdim=True), size=size) for x in xs) / len(xs)
        return [x + self.gain[i] * F.interpolate(shared, size=x.shape[-2:]) for i, x in enumerate(xs)]


class KeepWidthNeck(nn.Module):
    """Three maps one by one, each keeps its width; written for widths that are not ours."""

    def __init__(self, channels=(256, 512, 1024), act="relu"):
        super().__init__()
        c3, c4, c5 = channels
        self.down5 = nn.Conv2d(c5, c4, 1)
        self.down4 = nn.Conv2d(c4, c3, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in channels)
        self.act = nn.ReLU(inplace=True) if act == "relu" else nn.SiLU()

    def forward(self, p3, p4, p5):
        p4 = p4 + F.interpolate(self.down5(p5), scale_factor=2, mode="nearest")
        p3 = p3 + F.interpolate(self.down4(p4), scale_factor=2, mode="nearest")
        return [self.act(n(p)) for n, p in zip(self.norms, (p3, p4, p5))]


class FourLevelNeck(nn.Module):
    """Adds a coarser level of its own."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, out_channels, 1) for c in in_channels)
        self.extra = nn.Conv2d(out_channels, out_channels, 3, 2, 1)

    def forward(self, feats):
        maps = [conv(f) for conv, f in zip(self.convs, feats)]
        return maps + [self.extra(maps[-1])]
