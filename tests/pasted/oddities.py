"""Constructors that say little, and forwards that ask for much."""
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


class MixBlock(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.f = nn.Conv2d(a, b, 1)
        self.g = nn.Conv2d(b, b, 3, 1, 1, groups=b)

    def forward(self, t):
        return F.silu(self.g(self.f(t)))


class LazyBlock(nn.Module):
    """Only the output is said; the input is found when the first map comes."""

    def __init__(self, out_channels, kernel_size=3):
        super().__init__()
        self.conv = nn.LazyConv2d(out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.LazyBatchNorm2d()

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)))


class AnyConv(nn.Module):
    def __init__(self, *args, **kwargs):
        super().__init__()
        self.conv = nn.Conv2d(*args, **kwargs)
        self.act = nn.Hardswish()

    def forward(self, x):
        return self.act(self.conv(x))


class WeightStandardConv(nn.Conv2d):
    """Its constructor is that of nn.Conv2d."""

    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


@dataclass
class BlockConfig:
    expand: int = 2
    kernel: int = 3
    act: str = "SiLU"


class ConfiguredBlock(nn.Module):
    def __init__(self, width: int, cfg: BlockConfig = BlockConfig()):
        super().__init__()
        inner = width * cfg.expand
        self.body = nn.Sequential(
            nn.Conv2d(width, inner, 1), getattr(nn, cfg.act)(),
            nn.Conv2d(inner, inner, cfg.kernel, 1, cfg.kernel // 2, groups=inner), getattr(nn, cfg.act)(), nn.Conv2d(inner, width, 1),
        )

    def forward(self, x):
        return x + self.body(x)


class Residual(nn.Module):
    def __init__(self, in_chs, out_chs, norm_layer=nn.BatchNorm2d, act_layer=partial(nn.ReLU, inplace=True)):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(in_chs, out_chs, 3, 1, 1, bias=False), norm_layer(out_chs)
        self.conv2, self.bn2 = nn.Conv2d(out_chs, out_chs, 3, 1, 1, bias=False), norm_layer(out_chs)
        self.act = act_layer()
        self.proj = nn.Conv2d(in_chs, out_chs, 1) if in_chs != out_chs else nn.Identity()

    def forward(self, x):
        y = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        y += self.proj(x)
        return self.act(y)


def residual_gelu(in_chs, out_chs, **kwargs):
    """A factory, as timm has them."""
    return Residual(in_chs, out_chs, act_layer=nn.GELU, **kwargs)


def conv_bn_relu(channels: int, k: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, channels, k, padding=k // 2, bias=False), nn.BatchNorm2d(channels), nn.ReLU(True))


class TemperatureGate(nn.Module):
    """Reads a number out of a tensor in forward."""

    def __init__(self, c1, reduction=8):
        super().__init__()
        self.register_buffer("temperature", torch.tensor(2.0))
        self.net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c1, c1 // reduction, 1), nn.ReLU(), nn.Conv2d(c1 // reduction, c1, 1))

    def forward(self, x):
        return x * torch.sigmoid(self.net(x) / self.temperature.item())


class SmoothGate(nn.Module):
    """Makes its kernel with numpy, anew in every forward."""

    def __init__(self, channels, sigma=1.0):
        super().__init__()
        self.channels, self.sigma = channels, sigma
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        r = np.arange(-1, 2)
        line = np.exp(-(r**2) / (2 * self.sigma**2))
        kernel = torch.from_numpy(np.outer(line, line) / line.sum() ** 2).float().to(x.device)
        kernel = kernel.expand(self.channels, 1, 3, 3)
        return x * self.mix(F.conv2d(x, kernel, padding=1, groups=self.channels)).sigmoid()


class HostTable(nn.Module):
    """Makes a tensor in forward and forgets the device."""

    def __init__(self, channels):
        super().__init__()
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        gain = torch.linspace(0.5, 1.5, x.shape[1]).view(1, -1, 1, 1)
        return self.proj(x * gain)


class FixedPrior(nn.Module):
    """A buffer of one size, cut to what comes; larger maps do not fit."""

    def __init__(self, c1, size=20):
        super().__init__()
        ys = torch.linspace(-1, 1, size)
        self.register_buffer("prior", torch.exp(-(ys[:, None] ** 2 + ys[None] ** 2))[None, None])
        self.gain = nn.Parameter(torch.zeros(1, c1, 1, 1))

    def forward(self, x):
        h, w = x.shape[-2:]
        return x + self.gain * self.prior[..., :h, :w]


class ViewShuffle(nn.Module):
    """Shuffles by `.view`, which any layout allows here."""

    def __init__(self, nin, nout, groups=4):
        super().__init__()
        self.groups = groups
        self.point = nn.Conv2d(nin, nout, 1, groups=groups, bias=False)
        self.deep = nn.Conv2d(nout, nout, 3, padding=1, groups=nout, bias=False)
        self.bn = nn.BatchNorm2d(nout)

    def forward(self, x):
        x = self.point(x)
        n, c, h, w = x.size()
        x = x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return self.bn(self.deep(x))


class RowFlip(nn.Module):
    """`.view` over channels and rows, which no layout but the plain one allows."""

    def __init__(self, inplanes):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(inplanes))

    def forward(self, x):
        b, c, h, w = x.shape
        t = x.view(b, c * h, w).flip(-1)
        return x + self.scale.view(1, -1, 1, 1) * t.view(b, c, h, w)
