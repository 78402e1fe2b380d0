"""RT-DETR's transformer parts: encoder layer AIFI, multi-scale deformable attention, decoder layer.

Sources: RT-DETR (Zhao et al., arXiv 2304.08069), Deformable DETR (Zhu et al., arXiv 2010.04159),
DETR (Carion et al., arXiv 2005.12872).

Letters: B batch, D width, M heads, H and W size of a map, N tokens of all maps, Q queries,
L levels (maps), P sampling points.

Sizes are always read from the tensors at hand, so an exported graph takes any batch and size. What
half precision cannot hold (softmax, normalisation, sampling locations) is computed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.common import short_names
from models.registry import channels_first, register
from utils.boxes import widen

SAMPLINGS = ("grid_sample", "gather")


class MapSize(NamedTuple):
    """Size of one feature map, in cells; symbolic while a graph is exported."""

    height: int
    width: int


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit of x in [0, 1]; both sides are kept `eps` away from 0."""
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


class LayerNorm(nn.LayerNorm):
    """Layer normalisation whose statistics are float32 or wider, whatever the input is."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = widen(self.weight), widen(self.bias)
        return functional.layer_norm(widen(x), self.normalized_shape, weight, bias, self.eps).to(
            x.dtype
        )


class MLP(nn.Module):
    """Linear layers with ReLU, or another activation, between them."""

    def __init__(
        self,
        in_features: int,
        hidden: int,
        out_features: int,
        num_layers: int,
        activation: Callable[[Tensor], Tensor] = functional.relu,
    ) -> None:
        super().__init__()
        self.activation = activation
        widths = [in_features, *[hidden] * (num_layers - 1), out_features]
        self.layers = nn.ModuleList(
            nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.layers
        for layer in hidden:
            x = self.activation(layer(x))
        return last(x)


class SelfAttention(nn.Module):
    """Multi-head attention of tokens among themselves; parameters as in `nn.MultiheadAttention`.

    Args:
        width: D, a multiple of `num_heads`.
        num_heads: M.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(
                f"got {width} channels and {num_heads} heads, expected a multiple of the heads"
            )
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, position: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Attend; `position` is added to queries and keys, not to values.

        Args:
            x: tokens, (B, N, D).
            position: positional embedding, broadcast against `x`.
            allowed: where row n may look at column m, bool (N, N); everywhere if None.

        Returns:
            (B, N, D).
        """
        # Not the tensor's own size: a traced split would follow its shape.
        width = self.out_proj.in_features
        query_key_weight, value_weight = self.in_proj_weight.split((2 * width, width))
        query_key_bias, value_bias = self.in_proj_bias.split((2 * width, width))
        query, key = functional.linear(x + position, query_key_weight, query_key_bias).chunk(2, -1)
        value = functional.linear(x, value_weight, value_bias)
        query, key, value = (
            widen(t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2))
            for t in (query, key, value)
        )
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
        return self.out_proj(attended.transpose(1, 2).flatten(2).to(x.dtype))


def sine_position(size: MapSize, width: int, like: Tensor, temperature: float = 10_000.0) -> Tensor:
    """Sines and cosines of each cell's row and column, (1, H * W, D), the map read row by row.

    The published weights were trained with the row in the first half.

    Args:
        size: of the map.
        width: D, a multiple of 4: a quarter each for sin y, cos y, sin x, cos x.
        like: tensor whose device the result shares.
        temperature: the longest wavelength is about 2 pi times this.
    """
    quarter = width // 4
    omega = temperature ** -(
        torch.arange(quarter, device=like.device, dtype=torch.float32) / quarter
    )
    columns = torch.arange(size.width, device=like.device, dtype=torch.float32)
    rows = torch.arange(size.height, device=like.device, dtype=torch.float32)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    x, y = x.flatten()[:, None] * omega, y.flatten()[:, None] * omega
    return torch.cat((y.sin(), y.cos(), x.sin(), x.cos()), 1)[None]


@register(channels_first)
@short_names
class AIFI(nn.Module):
    """Attention-based intra-scale feature interaction: one post-norm encoder layer on one map of
    any size.

    Args:
        channels: D, a multiple of 4 and of `num_heads`.
        feedforward: width of the feed-forward part.
        num_heads: M.
    """

    def __init__(self, channels: int, feedforward: int = 1024, num_heads: int = 8) -> None:
        super().__init__()
        if channels % 4:
            raise ValueError(
                f"got {channels} channels, expected a multiple of 4 for the positional embedding"
            )
        self.ma = SelfAttention(channels, num_heads)
        self.fc1 = nn.Linear(channels, feedforward)
        self.fc2 = nn.Linear(feedforward, channels)
        self.norm1 = LayerNorm(channels)
        self.norm2 = LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) to the same."""
        size = MapSize(*x.shape[-2:])
        tokens = x.flatten(2).transpose(1, 2)
        position = sine_position(size, x.shape[1], x).to(x.dtype)
        tokens = self.norm1(tokens + self.ma(tokens, position))
        tokens = self.norm2(tokens + self.fc2(functional.gelu(self.fc1(tokens))))
        return tokens.transpose(1, 2).reshape(-1, x.shape[1], size.height, size.width)


def gather_bilinear(maps: Tensor, locations: Tensor) -> Tensor:
    """Bilinear sampling by four gathers, for runtimes without (or with a faulty) GridSample.

    Args:
        maps: (K, C, H, W).
        locations: (K, Q, P, 2), x and y in [0, 1] from edge to edge of the map; outside it the map
            is zero.

    Returns:
        (K, C, Q, P), equal to `grid_sample(maps, 2 * locations - 1, align_corners=False)`.
    """
    height, width = maps.shape[-2:]
    x = (locations[..., 0] * width - 0.5).flatten(1)
    y = (locations[..., 1] * height - 0.5).flatten(1)
    left, top = x.floor(), y.floor()
    flat = maps.flatten(2)
    total = flat.new_zeros(())
    for column, share_x in ((left, left + 1 - x), (left + 1, x - left)):
        for row, share_y in ((top, top + 1 - y), (top + 1, y - top)):
            inside = (column >= 0) & (column <= width - 1) & (row >= 0) & (row <= height - 1)
            index = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
            corner = flat.gather(2, index.long()[:, None].expand(-1, maps.shape[1], -1))
            total = total + corner * (share_x * share_y * inside)[:, None]
    return total.reshape(*maps.shape[:2], *locations.shape[1:3])


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (arXiv 2010.04159, eq. 3): each query looks at a few points
    of each map.

    Args:
        width: D, a multiple of `num_heads`.
        num_heads: M.
        num_levels: L.
        num_points: P, per head and level; or one number a level (arXiv 2407.17140, section 3.1).
        is_projected: whether values and output go through linear layers of their own; D-FINE has none.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        num_levels: int,
        num_points: int | Sequence[int],
        is_projected: bool = True,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(
                f"got width {width} and {num_heads} heads, expected a multiple of the heads"
            )
        points = [num_points] * num_levels if isinstance(num_points, int) else list(num_points)
        if len(points) != num_levels or min(points) < 1:
            raise ValueError(
                f"got num_points {num_points} for {num_levels} maps, expected a number from 1 for each"
            )
        self.num_heads, self.num_points = num_heads, points
        self.sampling = SAMPLINGS[0]
        total = num_heads * sum(points)
        self.sampling_offsets = nn.Linear(width, total * 2)
        self.attention_weights = nn.Linear(width, total)
        own: type[nn.Module] = nn.Linear if is_projected else nn.Identity
        self.value_proj, self.output_proj = own(width, width), own(width, width)
        self._initialize()

    def _initialize(self) -> None:
        """Each head starts with a direction of its own, point p at p steps from the centre."""
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for own in (self.value_proj, self.output_proj):
            if isinstance(own, nn.Linear):
                nn.init.zeros_(own.bias)
                nn.init.xavier_uniform_(own.weight)
        angle = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        direction = torch.stack((angle.cos(), angle.sin()), -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        steps = torch.cat([torch.arange(1, points + 1) for points in self.num_points])
        offsets = direction[:, None] * steps[:, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.flatten())

    def forward(
        self, queries: Tensor, boxes_cxcywh: Tensor, memory: Tensor, sizes: Sequence[MapSize]
    ) -> Tensor:
        """Attend to `memory` around each query's box.

        Args:
            queries: (B, Q, D).
            boxes_cxcywh: one box per query, (B, Q, 4), normalised to [0, 1], float32.
            memory: tokens of all maps, finest first, (B, N, D).
            sizes: of the L maps.

        Returns:
            (B, Q, D).
        """
        weights = widen(self.attention_weights(queries)).unflatten(-1, (self.num_heads, -1))
        weights = weights.softmax(-1).transpose(1, 2).flatten(0, 1)[:, None]
        offsets = widen(self.sampling_offsets(queries)).unflatten(-1, (self.num_heads, -1, 2))
        centre, extent = boxes_cxcywh[:, :, None, None].chunk(2, -1)
        maps = self.value_proj(memory).split([size.height * size.width for size in sizes], 1)
        output = offsets.new_zeros(())
        first = 0
        for points, tokens, size in zip(self.num_points, maps, sizes, strict=True):
            of_level = slice(first, first + points)
            locations = centre + offsets[..., of_level, :] / points * extent * 0.5
            sampled = self._sample(tokens, locations, size)
            output = output + (sampled * weights[..., of_level]).sum(-1)
            first += points
        output = output.unflatten(0, (-1, self.num_heads)).flatten(1, 2).transpose(1, 2)
        return self.output_proj(output.to(queries.dtype))

    def _sample(self, tokens: Tensor, locations: Tensor, size: MapSize) -> Tensor:
        """Values of one map, (B, H * W, D), at `locations` (B, Q, M, P, 2): (B * M, D / M, Q,
        P).
        """
        per_head = tokens.shape[-1] // self.num_heads
        maps = (
            tokens.transpose(1, 2)
            .reshape(-1, per_head, size.height, size.width)
            .to(locations.dtype)
        )
        locations = locations.transpose(1, 2).flatten(0, 1)
        if self.sampling == "gather":
            return gather_bilinear(maps, locations)
        grid = 2 * locations - 1
        return functional.grid_sample(
            maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False
        )


def set_sampling(module: nn.Module, sampling: str) -> None:
    """Choose how every deformable attention in `module` reads its maps: "grid_sample" or "gather".

    Raises:
        ValueError: `sampling` is neither.
    """
    if sampling not in SAMPLINGS:
        raise ValueError(f"set_sampling: got {sampling!r}, expected one of {', '.join(SAMPLINGS)}")
    for part in module.modules():
        if isinstance(part, DeformableAttention):
            part.sampling = sampling


class DecoderLayer(nn.Module):
    """Self-attention among queries, deformable attention to the maps, feed-forward; post-norm.

    Args:
        width: D.
        num_heads: M.
        feedforward: width of the feed-forward part.
        num_levels: L.
        num_points: P, or one number a level.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        feedforward: int,
        num_levels: int,
        num_points: int | Sequence[int],
    ) -> None:
        super().__init__()
        self.self_attn = SelfAttention(width, num_heads)
        self.norm1 = LayerNorm(width)
        self.cross_attn = DeformableAttention(width, num_heads, num_levels, num_points)
        self.norm2 = LayerNorm(width)
        self.linear1 = nn.Linear(width, feedforward)
        self.linear2 = nn.Linear(feedforward, width)
        self.norm3 = LayerNorm(width)

    def forward(
        self,
        queries: Tensor,
        position: Tensor,
        boxes_cxcywh: Tensor,
        memory: Tensor,
        sizes: Sequence[MapSize],
        allowed: Tensor | None = None,
    ) -> Tensor:
        """Refine `queries` (B, Q, D); `position` is their positional embedding, the rest as in the
        two attentions.
        """
        queries = self.norm1(queries + self.self_attn(queries, position, allowed))
        seen = self.cross_attn(queries + position, boxes_cxcywh, memory, sizes)
        queries = self.norm2(queries + seen)
        return self.norm3(queries + self.linear2(functional.relu(self.linear1(queries))))


class Decoder(nn.Module):
    """The decoder's layers; what they predict is up to the head."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
