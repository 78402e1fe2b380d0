"""Ways down and ways up."""
import torch
import torch.nn as nn
import torch.nn.functional as F


# ------------------------------------------------------------------ down
class SPDConv(nn.Module):
    """Space to depth, then a convolution without stride."""

    def __init__(self, inc, ouc, dimension=1):
        super(SPDConv, self).__init__()
        self.d = dimension
        self.conv = nn.Sequential(nn.Conv2d(inc * 4, ouc, 3, padding=1, bias=False), nn.BatchNorm2d(ouc), nn.SiLU())

    def forward(self, x):
        corners = [x[..., i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.conv(torch.cat(corners, self.d))


class SpaceToDepth(nn.Module):
    def __init__(self):
        super().__init__()

    def forward(self, x):
        return F.pixel_unshuffle(x, 2)


class HaarDown(nn.Module):
    def __init__(self, in_ch, out_ch):
        super().__init__()
        self.mix = nn.Sequential(nn.Conv2d(in_ch * 4, out_ch, 1), nn.BatchNorm2d(out_ch), nn.ReLU(inplace=True))

    def forward(self, x):
        a, b, c, d = x[:, :, 0::2, 0::2], x[:, :, 1::2, 0::2], x[:, :, 0::2, 1::2], x[:, :, 1::2, 1::2]
        bands = torch.cat([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d], dim=1) / 2
        return self.mix(bands)


class BlurPool(nn.Module):
    """A binomial filter before the stride; nothing to learn."""

    def __init__(self, channels, filt_size=4, stride=2):
        super().__init__()
        self.stride, self.channels = stride, channels
        row = torch.ones(1)
        for _ in range(filt_size - 1):
            row = F.pad(row, (0, 1)) + F.pad(row, (1, 0))
        filt = torch.outer(row, row)
        self.register_buffer("filt", (filt / filt.sum()).expand(channels, 1, filt_size, filt_size).clone())
        self.pad = nn.ReflectionPad2d(((filt_size - 1) // 2, filt_size // 2) * 2)

    def forward(self, x):
        return F.conv2d(self.pad(x), self.filt, stride=self.stride, groups=self.channels)


class PatchMerging(nn.Module):
    def __init__(self, dim, out_dim=None, norm_layer=nn.LayerNorm):
        super().__init__()
        self.norm = norm_layer(4 * dim)
        self.reduction = nn.Linear(4 * dim, out_dim or 2 * dim, bias=False)

    def forward(self, x):
        B, C, H, W = x.shape
        x = x.view(B, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(B, H // 2, W // 2, 4 * C)
        return self.reduction(self.norm(x)).permute(0, 3, 1, 2).contiguous()


class TwoWayDown(nn.Module):
    """Half by a strided convolution, half by a max pool."""

    def __init__(self, c1, c2, k=3):
        super().__init__()
        self.half = c1 // 2
        self.a = nn.Conv2d(self.half, c2 // 2, k, 2, k // 2)
        self.b = nn.Conv2d(c1 - self.half, c2 - c2 // 2, 1)

    def forward(self, x):
        x1, x2 = x[:, : self.half], x[:, self.half :]
        return torch.cat((self.a(x1), self.b(F.max_pool2d(x2, 3, 2, 1))), 1)


# ------------------------------------------------------------------ up
class CARAFE(nn.Module):
    """Each new cell mixes its old neighbourhood with a kernel made from the content (arXiv 1905.02188)."""

    def __init__(self, c, k_enc=3, k_up=5, c_mid=32, scale=2):
        super().__init__()
        self.scale, self.k_up = scale, k_up
        self.squeeze = nn.Sequential(nn.Conv2d(c, c_mid, 1), nn.BatchNorm2d(c_mid), nn.SiLU())
        self.kernels = nn.Conv2d(c_mid, (scale * k_up) ** 2, k_enc, padding=k_enc // 2)
        self.patches = nn.Unfold(k_up, padding=k_up // 2)

    def forward(self, x):
        n, c, h, w = x.shape
        kernels = F.pixel_shuffle(self.kernels(self.squeeze(x)), self.scale).softmax(1)
        patches = self.patches(x).view(n, c * self.k_up**2, h, w)
        patches = patches.repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3)
        return torch.einsum("nkyx,nckyx->ncyx", kernels, patches.view(n, c, self.k_up**2, h * self.scale, w * self.scale))


class DySample(nn.Module):
    def __init__(self, in_channels, scale=2, style="lp", groups=4):
        super().__init__()
        assert style in ("lp", "pl") and in_channels % groups == 0
        self.scale, self.groups = scale, groups
        self.offset = nn.Conv2d(in_channels, 2 * groups * scale**2, 1)
        nn.init.normal_(self.offset.weight, std=0.001)
        steps = (torch.arange(scale) + 0.5) / scale - 0.5
        ys, xs = torch.meshgrid(steps, steps, indexing="ij")
        self.register_buffer("start", torch.stack((xs, ys)).view(1, 2, 1, scale, scale))

    def forward(self, x):
        b, c, h, w = x.shape
        s, g = self.scale, self.groups
        shift = self.offset(x).view(b, g, 2, s * s, h, w) * 0.25
        shift = F.pixel_shuffle(shift.reshape(b, g * 2 * s * s, h, w), s).view(b, g, 2, h * s, w * s)
        ys = (torch.arange(h, device=x.device, dtype=x.dtype) + 0.5).view(1, 1, h, 1, 1)
        xs = (torch.arange(w, device=x.device, dtype=x.dtype) + 0.5).view(1, 1, 1, w, 1)
        start = self.start.view(1, 2, s, s)
        gy = (ys.view(h, 1, 1, 1) + start[0, 1].view(1, 1, s, s)).expand(h, w, s, s).permute(0, 2, 1, 3).reshape(h * s, w * s)
        gx = (xs.view(1, w, 1, 1) + start[0, 0].view(1, 1, s, s)).expand(h, w, s, s).permute(0, 2, 1, 3).reshape(h * s, w * s)
        grid = torch.stack((2 * (gx + shift[:, :, 0]) / w - 1, 2 * (gy + shift[:, :, 1]) / h - 1), -1)
        out = F.grid_sample(x.reshape(b * g, c // g, h, w), grid.flatten(0, 1), mode="bilinear", padding_mode="border", align_corners=False)
        return out.view(b, c, h * s, w * s)


class PixelUp(nn.Module):
    def __init__(self, in_ch, out_ch, r=2):
        super().__init__()
        self.conv = nn.Conv2d(in_ch, out_ch * r * r, 1)
        self.up = nn.PixelShuffle(r)

    def forward(self, x):
        return self.up(self.conv(x))


class DeconvUp(nn.Module):
    def __init__(self, input_channels, output_channels=None):
        super().__init__()
        output_channels = output_channels or input_channels
        self.deconv = nn.ConvTranspose2d(input_channels, output_channels, 2, 2, bias=False)
        self.norm = nn.BatchNorm2d(output_channels)

    def forward(self, x):
        return F.leaky_relu(self.norm(self.deconv(x)), 0.1)


class PlainUp(nn.Module):
    def __init__(self, scale_factor=2, mode="bilinear"):
        super().__init__()
        self.up = nn.Upsample(scale_factor=scale_factor, mode=mode, align_corners=False)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.up(x) * self.gain
