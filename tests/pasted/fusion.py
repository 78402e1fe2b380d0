"""Several maps in, one out."""
import torch
import torch.nn as nn
import torch.nn.functional as F


class BiFPN_Add(nn.Module):
    """Fast normalised fusion (EfficientDet) of maps of one shape, then a 1x1 convolution; takes them as a list."""

    def __init__(self, c1, c2, n_maps=2, eps=1e-4):
        super(BiFPN_Add, self).__init__()
        self.importance = nn.Parameter(torch.ones(n_maps), requires_grad=True)
        self.eps = eps
        self.project = nn.Sequential(nn.SiLU(), nn.Conv2d(c1, c2, 1))

    def forward(self, x):
        share = F.relu(self.importance)
        share = share / (share.sum() + self.eps)
        total = share[0] * x[0]
        for i in range(1, len(x)):
            total = total + share[i] * x[i]
        return self.project(total)


class WeightedConcat(nn.Module):
    """Concatenation with a learned factor for each map."""

    def __init__(self, dimension=1, n=2):
        super().__init__()
        self.d = dimension
        self.w = nn.Parameter(torch.ones(n))

    def forward(self, x):
        share = self.w.abs() / (self.w.abs().sum() + 1e-4)
        return torch.cat([share[i] * m for i, m in enumerate(x)], self.d)


class AFF(nn.Module):
    """Attentional fusion of two maps, given one by one."""

    def __init__(self, channels=64, r=4):
        super().__init__()
        inter = int(channels // r)
        self.local_att = self.branch(channels, inter)
        self.global_att = nn.Sequential(nn.AdaptiveAvgPool2d(1), *self.branch(channels, inter))
        self.sigmoid = nn.Sigmoid()

    @staticmethod
    def branch(channels, inter):
        return nn.Sequential(
            nn.Conv2d(channels, inter, 1), nn.BatchNorm2d(inter), nn.ReLU(inplace=True), nn.Conv2d(inter, channels, 1), nn.BatchNorm2d(channels)
        )

    def forward(self, x, residual):
        xa = x + residual
        wei = self.sigmoid(self.local_att(xa) + self.global_att(xa))
        return 2 * x * wei + 2 * residual * (1 - wei)


class Fusion(nn.Module):
    """Widths of all inputs as a list, brought to the first."""

    def __init__(self, inc_list, fusion="weight"):
        super().__init__()
        assert fusion in ("weight", "sum")
        self.fusion = fusion
        self.align = nn.ModuleList(nn.Conv2d(c, inc_list[0], 1) for c in inc_list)
        if fusion == "weight":
            self.weight = nn.Parameter(torch.ones(len(inc_list)))

    def forward(self, x):
        maps = [conv(m) for conv, m in zip(self.align, x)]
        if self.fusion == "sum":
            return sum(maps)
        share = F.softmax(self.weight, 0)
        return sum(share[i] * m for i, m in enumerate(maps))


class SKFF(nn.Module):
    """Selective kernels over maps of one shape."""

    def __init__(self, in_channels, height=2, reduction=8, bias=False):
        super().__init__()
        self.height = height
        d = max(int(in_channels / reduction), 4)
        self.conv_du = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(in_channels, d, 1, bias=bias), nn.PReLU())
        self.fcs = nn.ModuleList(nn.Conv2d(d, in_channels, kernel_size=1, bias=bias) for _ in range(height))

    def forward(self, inp_feats):
        stack = torch.stack(list(inp_feats), 1)
        z = self.conv_du(stack.sum(1))
        att = torch.stack([fc(z) for fc in self.fcs], 1).softmax(1)
        return (stack * att).sum(1)


class TopDown(nn.Module):
    """A fine and a coarse map of different width."""

    def __init__(self, c_fine, c_coarse, c_out):
        super().__init__()
        self.lateral = nn.Conv2d(c_fine, c_out, 1)
        self.inner = nn.Conv2d(c_coarse, c_out, 1)
        self.smooth = nn.Sequential(nn.Conv2d(c_out, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU())

    def forward(self, fine, coarse):
        up = F.interpolate(self.inner(coarse), size=fine.shape[-2:], mode="nearest")
        return self.smooth(self.lateral(fine) + up)


class MiddleCat(nn.Module):
    """Three neighbouring scales brought to the middle one; no arguments."""

    def __init__(self):
        super().__init__()

    def forward(self, x):
        fine, middle, coarse = x
        fine = 0.5 * (F.max_pool2d(fine, 2) + F.avg_pool2d(fine, 2))
        coarse = F.interpolate(coarse, middle.shape[2:], mode="nearest")
        return torch.cat([fine, middle, coarse], dim=1)


class ScaleMix(nn.Module):
    def __init__(self, channels_list, out_channels):
        super().__init__()
        self.convs = nn.ModuleList([nn.Sequential(nn.Conv2d(c, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)) for c in channels_list])
        self.score = nn.Conv2d(out_channels * len(channels_list), len(channels_list), 1)

    def forward(self, feats):
        size = feats[0].shape[-2:]
        maps = [F.interpolate(conv(f), size=size, mode="bilinear", align_corners=False) for conv, f in zip(self.convs, feats)]
        share = self.score(torch.cat(maps, 1)).softmax(1)
        return sum(m * share[:, i : i + 1] for i, m in enumerate(maps))
