import torch.nn as nn

__all__ = ["Mlp", "Norm"]


class Norm(nn.GroupNorm):
    def __init__(self, width):
        super().__init__(1, width)


class Mlp(nn.Module):
    def __init__(self, width, ratio):
        super().__init__()
        self.a, self.b = nn.Conv2d(width, width * ratio, 1), nn.Conv2d(width * ratio, width, 1)

    def forward(self, x):
        return self.b(nn.functional.gelu(self.a(x)))
