"""Decoder layers of D-FINE and DEIMv2: a gate in place of a residual, points by level, values as they are.

Sources: D-FINE (arXiv 2410.13842), DEIMv2 (arXiv 2509.20787).

Letters: B batch, Q queries, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.transformer import DeformableAttention, LayerNorm, MapSize, SelfAttention
from utils.boxes import widen

LARGEST_HALF = 65504.0  # largest number of float16


class Gate(nn.Module):
    """Weighs what a query knew against what it has seen, channel by channel, in place of a residual."""

    def __init__(self, width: int, norm: nn.Module) -> None:
        super().__init__()
        self.gate = nn.Linear(2 * width, 2 * width)
        self.norm = norm
        nn.init.zeros_(self.gate.weight)  # a half of each
        nn.init.zeros_(self.gate.bias)

    def forward(self, known: Tensor, seen: Tensor) -> Tensor:
        """(B, Q, D) twice to the same."""
        of_known, of_seen = self.gate(torch.cat((known, seen), -1)).sigmoid().chunk(2, -1)
        return self.norm(of_known * known + of_seen * seen)


class Residual(nn.Module):
    """What a query knew and what it has seen, added; stands for `Gate` in the smallest models."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, known: Tensor, seen: Tensor) -> Tensor:
        """(B, Q, D) twice to the same."""
        return self.norm(known + seen)


class RMSNorm(nn.RMSNorm):
    """Division by the root mean square (arXiv 1910.07467), in float32 or wider, whatever the input is."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        normal = functional.rms_norm(widen(x), self.normalized_shape, widen(self.weight), self.eps)
        return normal.to(x.dtype)


class FeedForward(nn.Module):
    """Two linear layers with ReLU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(functional.relu(self.linear1(x)))


class SwiGLU(nn.Module):
    """Two linear layers, half of the first one's channels gates for the others (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden // 2, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.linear1(x).chunk(2, -1)
        return self.linear2(functional.silu(gate) * value)


class GatedDecoderLayer(nn.Module):
    """Self-attention among queries, deformable attention to the maps behind a gate, feed-forward; post-norm.

    Args:
        width: D.
        num_heads: of both attentions.
        feedforward: width of the feed-forward part.
        num_points: sampling points per head, one number a level.
        deimv2: `RMSNorm` for LayerNorm, `SwiGLU` for `FeedForward`.
        is_gated: `Gate` rather than `Residual`.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        feedforward: int,
        num_points: Sequence[int],
        deimv2: bool = False,
        is_gated: bool = True,
    ) -> None:
        super().__init__()
        norm: Callable[[int], nn.Module] = RMSNorm if deimv2 else LayerNorm
        self.self_attn = SelfAttention(width, num_heads)
        self.norm1 = norm(width)
        self.cross_attn = DeformableAttention(
            width, num_heads, len(num_points), num_points, is_projected=False
        )
        self.gateway = Gate(width, norm(width)) if is_gated else Residual(norm(width))
        self.ffn = (SwiGLU if deimv2 else FeedForward)(width, feedforward)
        self.norm3 = norm(width)

    def forward(
        self,
        queries: Tensor,
        position: Tensor,
        boxes_cxcywh: Tensor,
        memory: Tensor,
        sizes: Sequence[MapSize],
        allowed: Tensor | None = None,
    ) -> Tensor:
        """Refine `queries` (B, Q, D); `position` is their positional embedding, the rest as in the two attentions."""
        queries = self.norm1(queries + self.self_attn(queries, position, allowed))
        seen = self.cross_attn(queries + position, boxes_cxcywh, memory, sizes)
        queries = self.gateway(queries, seen)
        queries = queries + self.ffn(queries)
        return self.norm3(queries.clamp(-LARGEST_HALF, LARGEST_HALF))
