"""Variants for the older tree, which keeps its layers in models/common.py."""
from models.common import *
from utils.torch_utils import fuse_conv_and_bn


class GSConv(nn.Module):
    # arXiv 2206.02424, figure 3: half the channels dense, half depthwise from these, then shuffled
    def __init__(self, c1, c2, k=1, s=1, g=1, act=True):
        super().__init__()
        half = c2 // 2
        self.dense = Conv(c1, half, k, s, None, g, act=act)
        self.depthwise = Conv(half, half, 5, 1, None, half, act=act)

    def forward(self, x):
        a = self.dense(x)
        y = torch.stack((a, self.depthwise(a)), 2)
        return y.flatten(1, 2)


class GSResidual(nn.Module):
    def __init__(self, c, k=3):
        super().__init__()
        self.long = nn.Sequential(GSConv(c, c // 2), GSConv(c // 2, c, k, act=False))
        self.short = Conv(c, c, k=1, s=1, act=False)

    def forward(self, x):
        return self.long(x) + self.short(x)


class VoVGSCSP(nn.Module):
    # figure 4: one aggregation past a chain of residuals
    def __init__(self, c1, c2, n=1, shortcut=True, g=1, e=0.5):
        super().__init__()
        width = int(c2 * e)
        self.enter, self.past = Conv(c1, width), Conv(c1, width)
        self.chain = nn.Sequential(*[GSResidual(width) for _ in range(n)])
        self.leave = Conv(width * 2, c2)

    def forward(self, x):
        return self.leave(torch.cat([self.chain(self.enter(x)), self.past(x)], 1))


class C3SimAM(C3):
    # C3 whose output is weighed without parameters
    def __init__(self, c1, c2, n=1, shortcut=True, g=1, e=0.5):
        super().__init__(c1, c2, n, shortcut, g, e)
        self.lam = 1e-4

    def forward(self, x):
        y = super().forward(x)
        d = (y - y.mean((2, 3), True)).pow(2)
        return y * (d / (4 * (d.mean((2, 3), True) + self.lam)) + 0.5).sigmoid()


class Res2Block(nn.Module):
    # scales inside one block, no n
    def __init__(self, c1, c2, shortcut=True, scale=4):
        super().__init__()
        self.width = c2 // scale
        self.cv1 = Conv(c1, self.width * scale, 1)
        self.convs = nn.ModuleList(Conv(self.width, self.width, 3) for _ in range(scale - 1))
        self.cv2 = Conv(self.width * scale, c2, 1, act=nn.Identity())
        self.add = shortcut and c1 == c2

    def forward(self, x):
        parts = list(torch.split(self.cv1(x), self.width, 1))
        for i, conv in enumerate(self.convs):
            parts[i + 1] = conv(parts[i + 1] + parts[i])
        y = self.cv2(torch.cat(parts, 1))
        return x + y if self.add else y


class SPPFGate(SPPF):
    def __init__(self, c1, c2, k=5):
        super().__init__(c1, c2, k)
        self.lin = nn.Linear(c2, c2)

    def forward(self, x):
        y = super().forward(x)
        return y * self.lin(y.mean((-2, -1))).sigmoid()[:, :, None, None]
