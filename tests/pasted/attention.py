"""Attention as people paste it: one file, many classes, every habit of naming."""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn import init


# ------------------------------------------------------------------ channel attention
class SE(nn.Module):
    def __init__(self, channel, reduction=16):
        super(SE, self).__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.mlp = nn.Sequential(
            nn.Linear(channel, channel // reduction, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(channel // reduction, channel, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x):
        b, c, _, _ = x.size()
        gate = self.mlp(self.pool(x).view(b, c)).view(b, c, 1, 1)
        return x * gate.expand_as(x)


class eca_layer(nn.Module):
    """k_size is chosen by hand, `channel` is only there for the look of it."""

    def __init__(self, channel, k_size=3):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.conv = nn.Conv1d(1, 1, kernel_size=k_size, padding=(k_size - 1) // 2, bias=False)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        w = self.avg_pool(x).squeeze(-1).transpose(-1, -2)
        w = self.conv(w).transpose(-1, -2).unsqueeze(-1)
        return x * self.sigmoid(w)


class ECA(nn.Module):
    def __init__(self, k_size=3):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, k_size, padding=k_size // 2, bias=False)

    def forward(self, x):
        w = x.mean((2, 3)).unsqueeze(1)
        return x * torch.sigmoid(self.conv(w)).squeeze(1)[..., None, None]


class ECAAdaptive(nn.Module):
    """The kernel follows from the channels: |log2(C)/gamma + b/gamma| made odd."""

    def __init__(self, c1, b=1, gamma=2):
        super().__init__()
        t = int(abs((math.log(c1, 2) + b) / gamma))
        k = t if t % 2 else t + 1
        self.conv = nn.Conv1d(1, 1, k, padding=k // 2, bias=False)

    def forward(self, x):
        y = F.adaptive_avg_pool2d(x, 1)
        y = self.conv(y.view(y.shape[0], 1, -1)).view(y.shape[0], -1, 1, 1)
        return x * y.sigmoid()


class KeywordSE(nn.Module):
    def __init__(self, *, channels, ratio=8, act=nn.ReLU):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, max(channels // ratio, 4), 1)
        self.act = act()
        self.excite = nn.Conv2d(max(channels // ratio, 4), channels, 1)

    def forward(self, x):
        return x * self.excite(self.act(self.squeeze(x.mean((2, 3), keepdim=True)))).sigmoid()


class FrequencyAttention(nn.Module):
    """Squeeze by DCT bases instead of the mean; the bases are a table of channel x h x w."""

    def __init__(self, channel, dct_h=7, dct_w=7, reduction=16):
        super().__init__()
        self.size = (dct_h, dct_w)
        self.register_buffer("weight", self.make_table(channel, dct_h, dct_w))
        self.fc = nn.Sequential(
            nn.Linear(channel, channel // reduction, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(channel // reduction, channel, bias=False),
            nn.Sigmoid(),
        )

    @staticmethod
    def make_table(channel, h, w):
        table = torch.zeros(channel, h, w)
        for i in range(channel):
            u, v = (i % 4) // 2, i % 2
            for y in range(h):
                for x in range(w):
                    table[i, y, x] = math.cos(math.pi * u * (y + 0.5) / h) * math.cos(math.pi * v * (x + 0.5) / w)
        return table

    def forward(self, x):
        n, c, h, w = x.shape
        pooled = F.interpolate(x, self.size, mode="nearest")
        y = torch.sum(pooled * self.weight, dim=[2, 3])
        return x * self.fc(y).view(n, c, 1, 1)


# ------------------------------------------------------------------ spatial attention, both
class SpatialAttention(nn.Module):
    def __init__(self, kernel_size=7):
        super(SpatialAttention, self).__init__()
        assert kernel_size in (3, 7), "kernel size must be 3 or 7"
        self.conv1 = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        avg_out = torch.mean(x, dim=1, keepdim=True)
        max_out, _ = torch.max(x, dim=1, keepdim=True)
        return x * self.sigmoid(self.conv1(torch.cat([avg_out, max_out], dim=1)))


class ChannelAttention(nn.Module):
    def __init__(self, in_planes, ratio=16):
        super(ChannelAttention, self).__init__()
        self.shared = nn.Sequential(
            nn.Conv2d(in_planes, in_planes // ratio, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(in_planes // ratio, in_planes, 1, bias=False),
        )

    def forward(self, x):
        avg = self.shared(F.adaptive_avg_pool2d(x, 1))
        peak = self.shared(F.adaptive_max_pool2d(x, 1))
        return x * torch.sigmoid(avg + peak)


class CBAM(nn.Module):
    def __init__(self, c1, reduction=16):
        super().__init__()
        self.channel = ChannelAttention(c1, reduction)
        self.spatial = SpatialAttention(7)

    def forward(self, x):
        return self.spatial(self.channel(x))


class BAM(nn.Module):
    def __init__(self, gate_channel, reduction_ratio=16, dilation_val=2):
        super().__init__()
        mid = gate_channel // reduction_ratio
        self.channel = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(gate_channel, mid), nn.ReLU(), nn.Linear(mid, gate_channel)
        )
        self.spatial = nn.Sequential(
            nn.Conv2d(gate_channel, mid, 1),
            nn.Conv2d(mid, mid, 3, padding=dilation_val, dilation=dilation_val),
            nn.BatchNorm2d(mid),
            nn.ReLU(),
            nn.Conv2d(mid, 1, 1),
        )

    def forward(self, x):
        att = 1 + torch.sigmoid(self.channel(x)[:, :, None, None] * self.spatial(x))
        return att * x


class GAM_Attention(nn.Module):
    def __init__(self, in_channels, out_channels, rate=4):
        super(GAM_Attention, self).__init__()
        hidden = int(in_channels / rate)
        self.channel_attention = nn.Sequential(
            nn.Linear(in_channels, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, in_channels)
        )
        self.spatial_attention = nn.Sequential(
            nn.Conv2d(in_channels, hidden, kernel_size=7, padding=3),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, out_channels, kernel_size=7, padding=3),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x):
        b, c, h, w = x.shape
        rows = x.permute(0, 2, 3, 1).view(b, -1, c)
        gate = self.channel_attention(rows).view(b, h, w, c).permute(0, 3, 1, 2)
        x = x * gate
        return x * self.spatial_attention(x).sigmoid()


class ShuffleAttention(nn.Module):
    """`channel=512` is the author's own width, not ours."""

    def __init__(self, channel=512, reduction=16, G=8):
        super().__init__()
        self.G = G
        half = channel // (2 * G)
        self.gn = nn.GroupNorm(half, half)
        self.cweight = nn.Parameter(torch.zeros(1, half, 1, 1))
        self.cbias = nn.Parameter(torch.ones(1, half, 1, 1))
        self.sweight = nn.Parameter(torch.zeros(1, half, 1, 1))
        self.sbias = nn.Parameter(torch.ones(1, half, 1, 1))

    def forward(self, x):
        b, c, h, w = x.size()
        x = x.view(b * self.G, -1, h, w)
        a, s = x.chunk(2, dim=1)
        a = a * torch.sigmoid(self.cweight * a.mean((2, 3), keepdim=True) + self.cbias)
        s = s * torch.sigmoid(self.sweight * self.gn(s) + self.sbias)
        out = torch.cat([a, s], dim=1).contiguous().view(b, -1, h, w)
        return out.reshape(b, 2, -1, h, w).transpose(1, 2).reshape(b, -1, h, w)


class NAM(nn.Module):
    """Scales of a BatchNorm are the importance of a channel. Of the arguments only the first is used."""

    def __init__(self, channels, shape=None, out_channels=None, no_spatial=True):
        super().__init__()
        self.channels = channels
        self.bn2 = nn.BatchNorm2d(self.channels, affine=True)

    def forward(self, x):
        residual = x
        x = self.bn2(x)
        weight = self.bn2.weight.data.abs() / torch.sum(self.bn2.weight.data.abs())
        x = torch.mul(weight.view(1, -1, 1, 1), x)
        return torch.sigmoid(x) * residual


class EMA(nn.Module):
    def __init__(self, channels, c2=None, factor=8):
        super(EMA, self).__init__()
        self.groups = factor
        assert channels // self.groups > 0
        d = channels // self.groups
        self.gn = nn.GroupNorm(d, d)
        self.conv1x1 = nn.Conv2d(d, d, kernel_size=1)
        self.conv3x3 = nn.Conv2d(d, d, kernel_size=3, padding=1)

    def forward(self, x):
        b, c, h, w = x.size()
        g = x.reshape(b * self.groups, -1, h, w)
        rows, columns = g.mean(3, keepdim=True), g.mean(2, keepdim=True).permute(0, 1, 3, 2)
        rows, columns = torch.split(self.conv1x1(torch.cat([rows, columns], dim=2)), [h, w], dim=2)
        one = self.gn(g * rows.sigmoid() * columns.permute(0, 1, 3, 2).sigmoid())
        two = self.conv3x3(g)
        q1 = one.mean((2, 3)).softmax(-1).unsqueeze(1)
        q2 = two.mean((2, 3)).softmax(-1).unsqueeze(1)
        maps = q1 @ two.flatten(2) + q2 @ one.flatten(2)
        return (g * maps.view(b * self.groups, 1, h, w).sigmoid()).reshape(b, c, h, w)


# ------------------------------------------------------------------ no channels at all
class SimAM(torch.nn.Module):
    def __init__(self, channels=None, e_lambda=1e-4):
        super(SimAM, self).__init__()
        self.gate = nn.Sigmoid()
        self.e_lambda = e_lambda

    def __repr__(self):
        return self.__class__.__name__ + "(lambda=%f)" % self.e_lambda

    def forward(self, x):
        b, c, h, w = x.size()
        n = w * h - 1
        d = (x - x.mean(dim=[2, 3], keepdim=True)).pow(2)
        y = d / (4 * (d.sum(dim=[2, 3], keepdim=True) / n + self.e_lambda)) + 0.5
        return x * self.gate(y)


class TripletAttention(nn.Module):
    """Three branches that look along C-H, C-W and H-W; none needs to know how wide the map is."""

    class Gate(nn.Module):
        def __init__(self, k):
            super().__init__()
            self.conv = nn.Conv2d(2, 1, k, padding=k // 2, bias=False)
            self.bn = nn.BatchNorm2d(1)

        def forward(self, x):
            z = torch.cat((x.amax(1, keepdim=True), x.mean(1, keepdim=True)), 1)
            return x * torch.sigmoid(self.bn(self.conv(z)))

    def __init__(self, no_spatial=False, kernel_size=7):
        super().__init__()
        self.cw, self.hc = self.Gate(kernel_size), self.Gate(kernel_size)
        self.no_spatial = no_spatial
        if not no_spatial:
            self.hw = self.Gate(kernel_size)

    def forward(self, x):
        a = self.cw(x.permute(0, 2, 1, 3).contiguous()).permute(0, 2, 1, 3).contiguous()
        b = self.hc(x.permute(0, 3, 2, 1).contiguous()).permute(0, 3, 2, 1).contiguous()
        return (a + b) / 2 if self.no_spatial else (a + b + self.hw(x)) / 3


class ZoomGate(nn.Module):
    """No arguments whatsoever."""

    def __init__(self):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x + self.alpha * F.avg_pool2d(x, 3, 1, 1)


