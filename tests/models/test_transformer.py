"""AIFI and deformable attention: equal to what they are defined by, at any size."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from models.transformer import (
    AIFI,
    DeformableAttention,
    LayerNorm,
    MapSize,
    SelfAttention,
    gather_bilinear,
    inverse_sigmoid,
    set_sampling,
    sine_position,
)


def test_self_attention_equals_torch_multihead_attention_with_the_same_weights() -> None:
    torch.manual_seed(0)
    ours, theirs = SelfAttention(16, 4), nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    x, position = torch.randn(2, 5, 16), torch.randn(1, 5, 16)
    allowed = torch.ones(5, 5).tril().bool()
    expected, _ = theirs(x + position, x + position, x, attn_mask=~allowed)
    torch.testing.assert_close(ours(x, position, allowed), expected)


def test_a_width_that_the_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a multiple of the heads"):
        SelfAttention(10, 4)


def test_position_holds_the_row_in_its_first_half_and_the_column_in_its_second() -> None:
    position = sine_position(MapSize(2, 3), 8, torch.zeros(1))
    assert position.shape == (1, 6, 8)
    cell = position[0, 1 * 3 + 2]  # row 1, column 2; wavelengths 1 and 100 (10000 to the 1/2)
    expected = torch.tensor([1, 0.01, 1, 0.01, 2, 0.02, 2, 0.02])
    expected = torch.cat(
        (expected[:2].sin(), expected[2:4].cos(), expected[4:6].sin(), expected[6:].cos())
    )
    torch.testing.assert_close(cell, expected)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 2)])
def test_aifi_keeps_the_shape_of_any_map(size: tuple[int, int]) -> None:
    layer = AIFI(16, 32, 4).eval()
    x = torch.randn(2, 16, *size)
    assert layer(x).shape == x.shape
    torch.testing.assert_close(layer(x)[:1], layer(x[:1]))


def test_aifi_takes_feedforward_and_heads_as_a_yaml_row_gives_them() -> None:
    assert sum(p.numel() for p in AIFI(256, 1024, 8).parameters()) == 789_760


@pytest.mark.parametrize("size", [(1, 1), (4, 7)])
def test_gather_sampling_equals_grid_sample_inside_and_outside_the_map(
    size: tuple[int, int],
) -> None:
    torch.manual_seed(0)
    maps = torch.randn(3, 2, *size, dtype=torch.float64)
    locations = torch.rand(3, 50, 4, 2, dtype=torch.float64) * 2 - 0.5
    expected = functional.grid_sample(maps, 2 * locations - 1, align_corners=False)
    torch.testing.assert_close(gather_bilinear(maps, locations), expected)


def _attend_by_loops(layer, queries, boxes, memory, sizes):
    """Equation 3 of arXiv 2010.04159, one query, head, level and point at a time."""
    width = queries.shape[-1] // layer.num_heads
    value = layer.value_proj(memory).split([h * w for h, w in sizes], 1)
    out = torch.zeros_like(queries)
    for b, q in torch.cartesian_prod(
        torch.arange(queries.shape[0]), torch.arange(queries.shape[1])
    ):
        levels = [level for level, count in enumerate(layer.num_points) for _ in range(count)]
        offsets = layer.sampling_offsets(queries[b, q]).view(layer.num_heads, -1, 2)
        weights = layer.attention_weights(queries[b, q]).view(layer.num_heads, -1).softmax(-1)
        for head, point in torch.cartesian_prod(*(torch.arange(n) for n in weights.shape)):
            level = levels[point]
            channels = slice(head * width, (head + 1) * width)
            grid = value[level][b, :, channels].T.reshape(1, width, *sizes[level])
            shift = offsets[head, point] / layer.num_points[level]
            at = boxes[b, q, :2] + shift * boxes[b, q, 2:] / 2
            seen = functional.grid_sample(
                grid, (2 * at - 1).view(1, 1, 1, 2), align_corners=False
            ).flatten()
            out[b, q, channels] += weights[head, point] * seen
    return layer.output_proj(out)


@pytest.mark.parametrize("sampling", ["grid_sample", "gather"])
@pytest.mark.parametrize(("points", "is_projected"), [(2, True), ([1, 3], False)])
def test_deformable_attention_equals_its_definition(
    sampling: str, points: int | list[int], is_projected: bool
) -> None:
    torch.manual_seed(0)
    layer = DeformableAttention(8, 2, 2, points, is_projected).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    set_sampling(layer, sampling)
    sizes = [MapSize(3, 4), MapSize(2, 2)]
    queries, memory = torch.randn(2, 3, 8).double(), torch.randn(2, 16, 8).double()
    boxes = torch.rand(2, 3, 4).double()
    with torch.no_grad():
        expected = _attend_by_loops(layer, queries, boxes, memory, sizes)
        torch.testing.assert_close(layer(queries, boxes, memory, sizes), expected)


@pytest.mark.parametrize("points", [[2], [3, 6, 3], [2, 0]])
def test_points_that_do_not_fit_the_maps_are_refused(points: list[int]) -> None:
    with pytest.raises(ValueError, match="for 2 maps, expected a number from 1 for each"):
        DeformableAttention(8, 2, 2, points)


def test_unknown_sampling_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of grid_sample, gather"):
        set_sampling(nn.Identity(), "nearest")


def test_layer_norm_of_half_precision_is_computed_in_float32() -> None:
    norm = LayerNorm(4).half()
    x = torch.tensor(
        [[60_000, 60_000, 0, 0]]
    ).half()  # their sum of squares overflows half precision
    torch.testing.assert_close(norm(x).float(), torch.tensor([[1.0, 1, -1, -1]]))


def test_inverse_sigmoid_undoes_the_sigmoid_and_is_finite_at_the_ends() -> None:
    x = torch.tensor([0.0, 0.2, 0.5, 1.0])
    assert inverse_sigmoid(x).isfinite().all()
    torch.testing.assert_close(inverse_sigmoid(x).sigmoid(), x, atol=2e-5, rtol=0)
