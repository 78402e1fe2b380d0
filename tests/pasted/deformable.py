"""Deformable convolution through a compiled package, version 2: offsets and a mask."""
import torch
import torch.nn as nn
from mmcv.cnn import ConvModule
from mmcv.ops import ModulatedDeformConv2d, modulated_deform_conv2d


class DeformBlock(nn.Module):
    def __init__(self, c1, c2, k=3, s=1, p=None, g=1, act=True):
        super().__init__()
        p = k // 2 if p is None else p
        self.offset_mask = nn.Conv2d(c1, 3 * k * k, k, s, p)
        nn.init.zeros_(self.offset_mask.weight)
        nn.init.zeros_(self.offset_mask.bias)
        self.dcn = ModulatedDeformConv2d(c1, c2, k, stride=s, padding=p, groups=g, bias=False)
        self.bn = nn.BatchNorm2d(c2)
        self.act = nn.SiLU() if act else nn.Identity()

    def forward(self, x):
        dy, dx, mask = torch.chunk(self.offset_mask(x), 3, dim=1)
        return self.act(self.bn(self.dcn(x, torch.cat((dy, dx), dim=1), mask.sigmoid())))


class DyHeadLike(nn.Module):
    """Task part left out: offsets are shared, the operator is called as a function."""

    def __init__(self, in_channels, out_channels, deform_groups=1):
        super().__init__()
        self.groups = deform_groups
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 3, 3))
        nn.init.kaiming_uniform_(self.weight)
        self.offset = nn.Conv2d(in_channels, 3 * 9 * deform_groups, 3, padding=1)
        self.out = ConvModule(out_channels, out_channels, 1, norm_cfg=dict(type="BN"), act_cfg=dict(type="ReLU"))

    def forward(self, x):
        o1, o2, mask = torch.chunk(self.offset(x), 3, dim=1)
        y = modulated_deform_conv2d(x, torch.cat((o1, o2), 1), mask.sigmoid(), self.weight, None, 1, 1, 1, 1, self.groups)
        return self.out(y)
