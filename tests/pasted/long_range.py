"""Attention along rows and columns, over large windows and over all cells."""
import torch
from einops import rearrange
from torch import einsum, nn
from torch.nn import functional as F
from torch.nn import init

try:  # where an old timm is installed
    from timm.models.layers import DropPath, to_2tuple, trunc_normal_
except ImportError:
    from timm.layers import DropPath, to_2tuple, trunc_normal_


class h_sigmoid(nn.Module):
    def __init__(self, inplace=True):
        super().__init__()
        self.relu = nn.ReLU6(inplace=inplace)

    def forward(self, x):
        return self.relu(x + 3) / 6


class CoordAtt(nn.Module):
    def __init__(self, inp, oup, reduction=32):
        super(CoordAtt, self).__init__()
        mip = max(8, inp // reduction)
        self.conv1 = nn.Conv2d(inp, mip, kernel_size=1, stride=1, padding=0)
        self.bn1 = nn.BatchNorm2d(mip)
        self.gate = h_sigmoid()
        self.conv_h = nn.Conv2d(mip, oup, kernel_size=1)
        self.conv_w = nn.Conv2d(mip, oup, kernel_size=1)

    def forward(self, x):
        n, c, h, w = x.size()
        along_h = x.mean(3, keepdim=True)
        along_w = x.mean(2, keepdim=True).permute(0, 1, 3, 2)
        y = self.bn1(self.conv1(torch.cat([along_h, along_w], dim=2)))
        y = y * self.gate(y)
        a, b = torch.split(y, [h, w], dim=2)
        return x * self.conv_w(b.permute(0, 1, 3, 2)).sigmoid() * self.conv_h(a).sigmoid()


class LKA(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv0 = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.conv_spatial = nn.Conv2d(dim, dim, 7, stride=1, padding=9, groups=dim, dilation=3)
        self.conv1 = nn.Conv2d(dim, dim, 1)

    def forward(self, x):
        u = x.clone()
        return u * self.conv1(self.conv_spatial(self.conv0(x)))


class SeparableLKA(nn.Module):
    """The kernel has no default: a row must say it."""

    def __init__(self, dim, k_size):
        super().__init__()
        table = {7: (3, 1), 11: (3, 2), 23: (5, 3), 35: (7, 3)}
        inner, dilation = table[k_size]
        outer = k_size // dilation
        pad = dilation * (outer // 2)
        self.h = nn.Conv2d(dim, dim, (1, inner), padding=(0, inner // 2), groups=dim)
        self.v = nn.Conv2d(dim, dim, (inner, 1), padding=(inner // 2, 0), groups=dim)
        self.far_h = nn.Conv2d(dim, dim, (1, outer), padding=(0, pad), groups=dim, dilation=dilation)
        self.far_v = nn.Conv2d(dim, dim, (outer, 1), padding=(pad, 0), groups=dim, dilation=dilation)
        self.mix = nn.Conv2d(dim, dim, 1)

    def forward(self, x):
        att = self.mix(self.far_v(self.far_h(self.v(self.h(x)))))
        return x * F.interpolate(att, size=x.shape[2:]) if att.shape != x.shape else x * att


class GlobalContext(nn.Module):
    def __init__(self, inplanes, ratio=0.25, fusion_types=("channel_add",)):
        super().__init__()
        planes = int(inplanes * ratio)
        self.conv_mask = nn.Conv2d(inplanes, 1, kernel_size=1)
        self.add = nn.Sequential(
            nn.Conv2d(inplanes, planes, 1), nn.LayerNorm([planes, 1, 1]), nn.ReLU(inplace=True), nn.Conv2d(planes, inplanes, 1)
        )
        init.kaiming_normal_(self.conv_mask.weight, mode="fan_in")

    def forward(self, x):
        b, c, h, w = x.size()
        mask = self.conv_mask(x).view(b, 1, h * w).softmax(2).unsqueeze(-1)
        context = torch.matmul(x.view(b, c, h * w).unsqueeze(1), mask).view(b, c, 1, 1)
        return x + self.add(context)


class DoubleAttention(nn.Module):
    def __init__(self, in_channels, c_m=128, c_n=128, reconstruct=True):
        super().__init__()
        self.c_m, self.c_n, self.reconstruct = c_m, c_n, reconstruct
        self.gather = nn.Conv2d(in_channels, c_m, 1)
        self.spread = nn.Conv2d(in_channels, c_n, 1)
        self.hand_out = nn.Conv2d(in_channels, c_n, 1)
        if self.reconstruct:
            self.back = nn.Conv2d(c_m, in_channels, kernel_size=1)

    def forward(self, x):
        b, c, h, w = x.shape
        assert c == self.gather.in_channels
        a = self.gather(x).view(b, self.c_m, -1)
        attention = F.softmax(self.spread(x).view(b, self.c_n, -1), dim=-1)
        vectors = F.softmax(self.hand_out(x).view(b, self.c_n, -1), dim=1)
        z = torch.bmm(a, attention.permute(0, 2, 1)).matmul(vectors).reshape(b, self.c_m, h, w)
        return self.back(z) if self.reconstruct else z


class SelfAttention2d(nn.Module):
    def __init__(self, dim, num_heads=4, qkv_bias=False, attn_drop=0.0, proj_drop=0.0):
        super().__init__()
        assert dim % num_heads == 0, f"dim {dim} should be divisible by num_heads {num_heads}"
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x):
        B, C, H, W = x.shape
        t = self.norm(x.flatten(2).transpose(1, 2))
        q, k, v = self.qkv(t).reshape(B, H * W, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        attn = self.attn_drop((q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1))
        t = self.proj_drop(self.proj((attn @ v).transpose(1, 2).reshape(B, H * W, C)))
        return x + t.transpose(1, 2).reshape(B, C, H, W)


class LinearAttention(nn.Module):
    """Keys are normalised over cells, queries over channels: cost grows with the cells, not their square."""

    def __init__(self, embed_dim, heads=4, dim_head=16):
        super().__init__()
        inner = heads * dim_head
        self.heads = heads
        self.to_qkv = nn.Conv2d(embed_dim, inner * 3, 1, bias=False)
        self.to_out = nn.Conv2d(inner, embed_dim, 1)

    def forward(self, x):
        b, c, h, w = x.shape
        q, k, v = rearrange(self.to_qkv(x), "b (three heads d) h w -> three b heads d (h w)", three=3, heads=self.heads)
        context = einsum("b h d n, b h e n -> b h d e", k.softmax(dim=-1), v)
        out = einsum("b h d e, b h d n -> b h e n", context, q.softmax(dim=-2))
        return x + self.to_out(rearrange(out, "b heads d (h w) -> b (heads d) h w", h=h, w=w))


class WindowMixer(nn.Module):
    """Made for one size: the tokens are numbered."""

    def __init__(self, dim, input_resolution, drop_path=0.0):
        super().__init__()
        self.dim = dim
        self.input_resolution = to_2tuple(input_resolution)
        tokens = self.input_resolution[0] * self.input_resolution[1]
        self.norm = nn.LayerNorm(dim)
        self.mix = nn.Linear(tokens, tokens)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        trunc_normal_(self.mix.weight, std=0.02)

    def forward(self, x):
        B, C, H, W = x.shape
        assert (H, W) == self.input_resolution, f"input is {H}x{W}, expected {self.input_resolution}"
        t = self.norm(x.flatten(2).transpose(1, 2)).transpose(1, 2)
        return x + self.drop_path(self.mix(t)).view(B, C, H, W)


class MHSA(nn.Module):
    """Bottleneck Transformer (arXiv 2101.11605): all cells look at all, with position tables along h and along w."""

    def __init__(self, n_dims, width=14, height=14, heads=4):
        super(MHSA, self).__init__()
        self.heads = heads
        self.qkv = nn.Conv2d(n_dims, 3 * n_dims, kernel_size=1)
        self.table_h = nn.Parameter(torch.randn(heads, n_dims // heads, height, 1) * 0.1)
        self.table_w = nn.Parameter(torch.randn(heads, n_dims // heads, 1, width) * 0.1)

    def forward(self, x):
        n, c, h, w = x.size()
        q, k, v = self.qkv(x).view(n, 3, self.heads, c // self.heads, h * w).unbind(1)
        place = (self.table_h + self.table_w).flatten(2)
        scores = torch.einsum("nhdi,nhdj->nhij", q, k) + torch.einsum("nhdi,hdj->nhij", q, place)
        return torch.einsum("nhij,nhdj->nhdi", scores.softmax(-1), v).reshape(n, c, h, w)


class PositionTable(nn.Module):
    def __init__(self, dim, h, w):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1, dim, h, w))
        nn.init.normal_(self.table, std=0.02)

    def forward(self, x):
        return x + self.table
