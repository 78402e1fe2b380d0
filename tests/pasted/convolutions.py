"""Convolutions of all sorts, as papers' own repositories spell their arguments."""
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models.layers import DropPath
from torch import Tensor


class Partial_conv3(nn.Module):
    """Only a part of the channels is convolved (arXiv 2303.03667); forward is picked by name."""

    def __init__(self, dim, n_div=4, forward="split_cat"):
        super().__init__()
        self.touched = dim // n_div
        self.conv = nn.Conv2d(self.touched, self.touched, 3, 1, 1, bias=False)
        ways = {"slicing": self.in_place, "split_cat": self.in_parts}
        self.forward = ways[forward]

    def in_place(self, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, : self.touched] = self.conv(x[:, : self.touched])
        return y

    def in_parts(self, x: Tensor) -> Tensor:
        head, tail = torch.split(x, [self.touched, x.shape[1] - self.touched], dim=1)
        return torch.cat((self.conv(head), tail), 1)


class FasterBlock(nn.Module):
    def __init__(self, dim, n_div=4, mlp_ratio=2.0, drop_path=0.1, layer_scale_init_value=0.0):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.spatial_mixing = Partial_conv3(dim, n_div)
        self.mlp = nn.Sequential(
            nn.Conv2d(dim, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.GELU(), nn.Conv2d(hidden, dim, 1, bias=False)
        )
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.scaled = layer_scale_init_value > 0
        if self.scaled:
            self.layer_scale = nn.Parameter(layer_scale_init_value * torch.ones(dim), requires_grad=True)

    def forward(self, x):
        y = self.mlp(self.spatial_mixing(x))
        if self.scaled:
            y = self.layer_scale[:, None, None] * y
        return x + self.drop_path(y)


class GhostModule(nn.Module):
    def __init__(self, inp, oup, kernel_size=1, ratio=2, dw_size=3, stride=1, relu=True):
        super(GhostModule, self).__init__()
        self.oup = oup
        init_channels = -(-oup // ratio)
        new_channels = init_channels * (ratio - 1)
        self.primary_conv = nn.Sequential(
            nn.Conv2d(inp, init_channels, kernel_size, stride, kernel_size // 2, bias=False),
            nn.BatchNorm2d(init_channels),
            nn.ReLU(inplace=True) if relu else nn.Sequential(),
        )
        self.cheap_operation = nn.Sequential(
            nn.Conv2d(init_channels, new_channels, dw_size, 1, dw_size // 2, groups=init_channels, bias=False),
            nn.BatchNorm2d(new_channels),
            nn.ReLU(inplace=True) if relu else nn.Sequential(),
        )

    def forward(self, x):
        x1 = self.primary_conv(x)
        return torch.cat([x1, self.cheap_operation(x1)], dim=1)[:, : self.oup, :, :]


class Dynamic_conv2d(nn.Module):
    """K kernels weighed by each image; the batch stands in the groups of one convolution."""

    def __init__(self, in_planes, out_planes, kernel_size, ratio=0.25, stride=1, padding=1, groups=1, K=4, temperature=34):
        super().__init__()
        self.kernel_size, self.stride, self.padding, self.groups = kernel_size, stride, padding, groups
        self.in_planes, self.out_planes, self.K, self.temperature = in_planes, out_planes, K, temperature
        hidden = int(in_planes * ratio) + 1
        self.attention = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(in_planes, hidden, 1, bias=False), nn.ReLU(), nn.Conv2d(hidden, K, 1), nn.Flatten()
        )
        self.weight = nn.Parameter(torch.empty(K, out_planes, in_planes // groups, kernel_size, kernel_size))
        for kernel in self.weight:
            nn.init.kaiming_uniform_(kernel)

    def forward(self, x):
        mixture = torch.softmax(self.attention(x) / self.temperature, 1)
        b, c, h, w = x.size()
        weight = torch.mm(mixture, self.weight.view(self.K, -1)).view(-1, self.in_planes // self.groups, self.kernel_size, self.kernel_size)
        out = F.conv2d(x.reshape(1, -1, h, w), weight, None, self.stride, self.padding, 1, self.groups * b)
        return out.view(b, self.out_planes, out.size(-2), out.size(-1))


class Involution(nn.Module):
    """The kernel is made from the pixel itself, shared in groups of channels."""

    def __init__(self, channels, kernel_size=3, stride=1, group_channels=16, reduction_ratio=4):
        super().__init__()
        self.kernel_size, self.stride, self.group_channels = kernel_size, stride, group_channels
        self.groups = channels // group_channels
        self.reduce = nn.Sequential(nn.Conv2d(channels, channels // reduction_ratio, 1), nn.BatchNorm2d(channels // reduction_ratio), nn.ReLU())
        self.span = nn.Conv2d(channels // reduction_ratio, kernel_size**2 * self.groups, 1)
        self.pool = nn.AvgPool2d(stride, stride) if stride > 1 else nn.Identity()
        self.unfold = nn.Unfold(kernel_size, 1, (kernel_size - 1) // 2, stride)

    def forward(self, x):
        weight = self.span(self.reduce(self.pool(x)))
        b, c, h, w = weight.shape
        weight = weight.view(b, self.groups, self.kernel_size**2, h, w).unsqueeze(2)
        patches = self.unfold(x).view(b, self.groups, self.group_channels, self.kernel_size**2, h, w)
        return (weight * patches).sum(dim=3).view(b, -1, h, w)


class WTConv2d(nn.Module):
    """Depthwise convolution of the four Haar bands: a wide field for few weights."""

    def __init__(self, in_channels, out_channels, kernel_size=5, stride=1, bias=True, wt_levels=1):
        super().__init__()
        assert in_channels == out_channels
        self.in_channels, self.wt_levels = in_channels, wt_levels
        low, high = torch.tensor([0.5, 0.5]), torch.tensor([0.5, -0.5])
        bank = torch.stack([torch.outer(a, b) for a in (low, high) for b in (low, high)])
        self.bands = nn.Parameter(bank.unsqueeze(1).repeat(in_channels, 1, 1, 1), requires_grad=False)
        self.base = nn.Conv2d(in_channels, in_channels, kernel_size, padding="same", groups=in_channels, bias=bias)
        self.wave = nn.ModuleList(
            nn.Conv2d(4 * in_channels, 4 * in_channels, kernel_size, padding="same", groups=4 * in_channels, bias=False)
            for _ in range(wt_levels)
        )
        self.scale = nn.Parameter(torch.full((1, in_channels, 1, 1), 0.1))

    def forward(self, x):
        y, shapes, details = x, [], []
        for conv in self.wave:
            shapes.append(y.shape[-2:])
            y = F.pad(y, (0, y.shape[3] % 2, 0, y.shape[2] % 2))
            y = conv(F.conv2d(y, self.bands, stride=2, groups=self.in_channels))
            b, _, h, w = y.shape
            y = y.reshape(b, self.in_channels, 4, h, w)
            details.append(y[:, :, 1:])
            y = y[:, :, 0]
        for shape, detail in zip(reversed(shapes), reversed(details)):
            y = torch.cat([y.unsqueeze(2), detail], 2).flatten(1, 2)
            y = F.conv_transpose2d(y, self.bands, stride=2, groups=self.in_channels)[..., : shape[0], : shape[1]]
        return self.base(x) + self.scale * y


class ScConv(nn.Module):
    """Spatial, then channel reconstruction (CVPR 2023)."""

    def __init__(self, op_channel: int, group_num: int = 4, gate_threshold: float = 0.5, alpha: float = 1 / 2, squeeze_ratio: int = 2):
        super().__init__()
        self.gn = nn.GroupNorm(num_channels=op_channel, num_groups=group_num)
        self.gate_threshold = gate_threshold
        self.parts = (int(alpha * op_channel), op_channel - int(alpha * op_channel))
        up, low = (part // squeeze_ratio for part in self.parts)
        self.squeeze_up = nn.Conv2d(self.parts[0], up, 1, bias=False)
        self.squeeze_low = nn.Conv2d(self.parts[1], low, 1, bias=False)
        self.GWC = nn.Conv2d(up, op_channel, 3, padding=1, groups=2)
        self.PWC1 = nn.Conv2d(up, op_channel, 1, bias=False)
        self.PWC2 = nn.Conv2d(low, op_channel - low, 1, bias=False)

    def forward(self, x):
        normed = self.gn(x)
        gate = (normed * (self.gn.weight / self.gn.weight.sum())[:, None, None]).sigmoid()
        informative = torch.where(gate > self.gate_threshold, x, gate * x)
        a, b = informative.chunk(2, 1)
        c, d = (x - informative).chunk(2, 1)
        up, low = torch.cat((a + d, b + c), 1).split(self.parts, 1)
        up, low = self.squeeze_up(up), self.squeeze_low(low)
        rich, cheap = self.GWC(up) + self.PWC1(up), torch.cat((self.PWC2(low), low), 1)
        share = torch.stack((rich.mean((2, 3)), cheap.mean((2, 3)))).softmax(0)[..., None, None]
        return share[0] * rich + share[1] * cheap


class RepBlock(nn.Module):
    """3x3, 1x1 and identity while it learns (arXiv 2101.03697); one 3x3 afterwards."""

    def __init__(self, in_channels, out_channels, kernel_size=3, stride=1, padding=1, groups=1, deploy=False):
        super(RepBlock, self).__init__()
        self.args = dict(in_channels=in_channels, out_channels=out_channels, stride=stride, groups=groups)
        self.kernel_size, self.padding = kernel_size, padding
        self.nonlinearity = nn.ReLU()
        if deploy:
            self.single = nn.Conv2d(kernel_size=kernel_size, padding=padding, **self.args)
        else:
            self.dense = self.branch(kernel_size, padding)
            self.point = self.branch(1, 0)
            self.same = nn.BatchNorm2d(in_channels) if in_channels == out_channels and stride == 1 else None

    def branch(self, k, p):
        conv = nn.Conv2d(kernel_size=k, padding=p, bias=False, **self.args)
        return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels))

    def forward(self, inputs):
        if hasattr(self, "single"):
            return self.nonlinearity(self.single(inputs))
        out = self.dense(inputs) + self.point(inputs)
        return self.nonlinearity(out if self.same is None else out + self.same(inputs))

    def folded(self, kernel, bn):
        t = bn.weight / torch.sqrt(bn.running_var + bn.eps)
        return kernel * t[:, None, None, None], bn.bias - bn.running_mean * t

    def switch_to_deploy(self):
        if hasattr(self, "single"):
            return
        kernels = [self.folded(self.dense[0].weight, self.dense[1])]
        kernels.append(self.folded(F.pad(self.point[0].weight, [self.padding] * 4), self.point[1]))
        if self.same is not None:
            unit = torch.zeros_like(self.dense[0].weight)
            for i in range(len(unit)):
                unit[i, i % unit.shape[1], self.padding, self.padding] = 1
            kernels.append(self.folded(unit, self.same))
        self.single = nn.Conv2d(kernel_size=self.kernel_size, padding=self.padding, **self.args)
        self.single.weight.data = sum(k for k, _ in kernels).detach()
        self.single.bias.data = sum(b for _, b in kernels).detach()
        del self.dense, self.point, self.same


class ConvNeXtBlock(nn.Module):
    """Norm and two linear layers in channels-last order between two permutations (arXiv 2201.03545)."""

    def __init__(self, dim, drop_path=0.0, layer_scale_init_value=1e-6):
        super().__init__()
        self.mix = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.rest = nn.Sequential(nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.gamma = nn.Parameter(torch.full((dim,), layer_scale_init_value)) if layer_scale_init_value > 0 else None
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x):
        y = self.rest(self.mix(x).permute(0, 2, 3, 1))
        y = y if self.gamma is None else self.gamma * y
        return x + self.drop_path(y.permute(0, 3, 1, 2))


class CoordConv(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size=1, stride=1, with_r=False):
        super().__init__()
        self.with_r = with_r
        self.conv = nn.Conv2d(in_channels + 2 + int(with_r), out_channels, kernel_size, stride, kernel_size // 2)

    def forward(self, x):
        b, _, h, w = x.shape
        ys = torch.linspace(-1, 1, h, device=x.device, dtype=x.dtype)
        xs = torch.linspace(-1, 1, w, device=x.device, dtype=x.dtype)
        yy, xx = torch.meshgrid(ys, xs, indexing="ij")
        extra = [xx, yy, (xx**2 + yy**2).sqrt()] if self.with_r else [xx, yy]
        return self.conv(torch.cat([x, torch.stack(extra).expand(b, -1, -1, -1)], 1))
