"""Small layers that backbones share: normalisation over channels, drop path, initialisation.

Letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.registry import LayerError


class LayerNorm2d(nn.Module):
    """Layer normalisation over the channels of a (B, C, H, W) map.

    The parameters stand under `norm`, as an `nn.LayerNorm` of its own.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ChannelNorm(nn.LayerNorm):
    """`LayerNorm2d` with its parameters directly under its own name, eps 1e-6."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016): drops the branch of single samples while training.

    Args:
        rate: probability that a sample's branch is dropped, in [0, 1); the kept ones are scaled
            by 1 / (1 - rate).
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"DropPath: rate - got {rate}, expected a number in [0, 1)")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        return x * keep_scale(torch.rand(x.shape[0], device=x.device), self.rate, x.dtype)

    def extra_repr(self) -> str:
        return f"{self.rate:.4g}"


def keep_scale(noise: Tensor, rate: float, dtype: torch.dtype) -> Tensor:
    """Factors of drop path for one branch.

    Args:
        noise: one uniform number in [0, 1) per sample, (B,).
        rate: probability that a sample's branch is dropped.

    Returns:
        0 for dropped samples and 1 / (1 - rate) for the others, (B, 1, 1, 1).
    """
    return ((noise >= rate).to(dtype) / (1.0 - rate)).view(-1, 1, 1, 1)


def linear_rates(last: float, count: int) -> list[float]:
    """`count` drop path rates from 0 to `last` in equal steps.

    Raises:
        LayerError: `last` is no probability below 1.
    """
    if isinstance(last, bool) or not isinstance(last, (int, float)) or not 0 <= last < 1:
        raise LayerError(f"drop_path - got {last!r}, expected a number in [0, 1)")
    return [last * index / max(count - 1, 1) for index in range(count)]


def init_trunc_normal(model: nn.Module) -> None:
    """Convolutions and linear layers: weights from a cut normal of deviation 0.02, biases 0."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
