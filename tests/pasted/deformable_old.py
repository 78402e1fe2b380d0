"""The same through the file that one used to compile by hand."""
import torch.nn as nn
from dcn_v2 import DCN


class DCNConv(nn.Module):
    def __init__(self, inp, oup, kernel_size=3, stride=1):
        super().__init__()
        self.conv = DCN(inp, oup, kernel_size=kernel_size, stride=stride, padding=kernel_size // 2, deformable_groups=1)
        self.norm = nn.BatchNorm2d(oup)

    def forward(self, x):
        return nn.functional.relu(self.norm(self.conv(x)))
