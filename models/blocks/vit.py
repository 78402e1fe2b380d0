"""Encoder layers of the vision transformer over one map of any size (ViT, arXiv 2010.11929, equations 2 and 3).

Letters: B batch, D width, N = H * W tokens. Positions are sines and cosines, since a learned table is bound to one size.
"""

from __future__ import annotations

from torch import Tensor, nn

from models.common import C3, Conv, short_names
from models.registry import convolution, offer, register, stacked
from models.transformer import LayerNorm, MapSize, SelfAttention, sine_position

MLP_RATIO = 4  # of every size in ViT's table 1


@short_names
class TransformerLayer(nn.Module):
    """Attention and a two-layer perceptron, each behind a norm and beside a residual.

    Args:
        channels: D, a multiple of `num_heads`.
        num_heads: of the attention.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(channels), LayerNorm(channels)
        self.ma = SelfAttention(channels, num_heads)
        self.fc1 = nn.Linear(channels, MLP_RATIO * channels)
        self.fc2 = nn.Linear(MLP_RATIO * channels, channels)

    def forward(self, tokens: Tensor, position: Tensor | float = 0.0) -> Tensor:
        """Tokens (B, N, D) to the same; `position` is added to queries and keys."""
        tokens = tokens + self.ma(self.norm1(tokens), position)
        return tokens + self.fc2(nn.functional.gelu(self.fc1(self.norm2(tokens))))


@offer(convolution)
@short_names
class TransformerBlock(nn.Module):
    """A chain of encoder layers on a map: (B, C, H, W) to (B, D, H, W).

    Args:
        in_channels: C.
        out_channels: D, a multiple of 4 and of `num_heads`; a pointwise convolution leads there where C is another.
        num_heads: of every attention.
        num_layers: length of the chain.
    """

    def __init__(
        self, in_channels: int, out_channels: int, num_heads: int = 4, num_layers: int = 1
    ) -> None:
        super().__init__()
        if out_channels % 4 or out_channels % num_heads:
            raise ValueError(
                f"got {out_channels} channels and {num_heads} heads, expected a multiple of 4 and of the heads"
            )
        same = in_channels == out_channels
        self.conv: nn.Module = nn.Identity() if same else Conv(in_channels, out_channels)
        self.tr = nn.ModuleList(
            TransformerLayer(out_channels, num_heads) for _ in range(num_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        size = MapSize(*x.shape[-2:])
        tokens = x.flatten(2).transpose(1, 2)
        position = sine_position(size, x.shape[1], x).to(x.dtype)
        for layer in self.tr:
            tokens = layer(tokens, position)
        return tokens.transpose(1, 2).reshape(-1, x.shape[1], size.height, size.width)


@register(stacked)
class C3TR(C3):
    """`C3` over a chain of encoder layers with four heads."""

    def path(self, hidden: int, repeats: int, shortcut: bool, groups: int) -> nn.Module:
        return TransformerBlock(hidden, hidden, 4, repeats)
