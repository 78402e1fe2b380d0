import torch.nn as nn

from .parts import Mlp, Norm
from . import parts as p


class Pooling(nn.Module):
    """What PoolFormer mixes with: neighbours' mean less itself."""

    def __init__(self, size):
        super().__init__()
        self.pool = nn.AvgPool2d(size, 1, size // 2, count_include_pad=False)

    def forward(self, x):
        return self.pool(x) - x


class MixerBlock(nn.Module):
    def __init__(self, dim, pool_size=3, mlp_ratio=2):
        super().__init__()
        self.norm1, self.norm2 = Norm(dim), p.Norm(dim)
        self.mixer, self.mlp = Pooling(pool_size), Mlp(dim, mlp_ratio)

    def forward(self, x):
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))
