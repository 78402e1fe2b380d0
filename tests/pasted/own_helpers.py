"""Helpers of this file's own that happen to be called like everybody's."""
import torch
from torch import nn


def autopad(k):
    """One argument only."""
    return k // 2


class Conv(nn.Module):
    """Convolution, norm, PReLU; takes the kernel first."""

    def __init__(self, k, in_dim, out_dim, groups=1):
        super().__init__()
        pad = tuple(map(autopad, k)) if isinstance(k, tuple) else autopad(k)
        self.body = nn.Sequential(
            nn.Conv2d(in_dim, out_dim, k, padding=pad, groups=groups, bias=False), nn.BatchNorm2d(out_dim), nn.PReLU(out_dim)
        )

    def forward(self, x):
        return self.body(x)


class Bottleneck(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.b = Conv(1, width, width // 2), Conv(3, width // 2, width)

    def forward(self, x):
        return x + self.b(self.a(x))


class StripBlock(nn.Module):
    """A square window from two strips."""

    def __init__(self, dim_in, dim_out, k=7):
        super().__init__()
        self.first = Conv(1, dim_in, dim_out)
        self.strips = nn.Sequential(Conv((1, k), dim_out, dim_out, dim_out), Conv((k, 1), dim_out, dim_out, dim_out))
        self.body = Bottleneck(dim_out)

    def forward(self, x):
        x = self.first(x)
        return self.body(x + self.strips(x))
