"""Which names of two networks belong together, and which tensors of other shapes are made to fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.weights.backbones import classifier_keys
from models.weights.fitting import kind_of_change, made_to_fit, with_channels
from models.weights.matching import match_suffixes, nearest_key

pytest.importorskip("timm")

# Names: matched by common ends, one pair of prefixes for all.

LAYERS = {f"layer{n}.conv.weight": (8, 8, 3, 3) for n in (1, 2, 3)} | {"stem.weight": (8, 3, 3, 3)}


def renamed(prefix: str, shapes: dict[str, Any]) -> dict[str, Any]:
    return {prefix + key: value for key, value in shapes.items()}


@pytest.mark.parametrize("own", ["", "net.", "body.model."])
@pytest.mark.parametrize("prefix", ["", "backbone.", "module.encoder.", "model.0.", "net."])
def test_names_are_matched_under_any_pair_of_prefixes(prefix: str, own: str):
    match = match_suffixes(renamed(prefix, LAYERS), renamed(own, LAYERS))
    assert match.pairs == {own + key: prefix + key for key in LAYERS}
    assert match.fitting == set(renamed(own, LAYERS))


def test_a_layer_never_takes_the_tensors_of_another():
    # The file lacks layer1, whose shapes layer2 has too; and it has a neck of the same shapes.
    given = {key: shape for key, shape in LAYERS.items() if "layer1" not in key}
    source = renamed("backbone.", given) | {"neck.layer1.conv.weight": (8, 8, 3, 3)}
    match = match_suffixes(source, renamed("net.", LAYERS))
    assert match.pairs == {f"net.{key}": f"backbone.{key}" for key in given}


def test_dots_and_underscores_part_names_alike_and_exact_ones_go_first():
    source = {"enc.stages.0.conv.weight": (4, 4), "enc.stages.1.conv.weight": (4, 4)}
    target = {"stages_0.conv.weight": (4, 4), "stages_1.conv.weight": (4, 4)}
    match = match_suffixes(source, target)
    assert match.pairs == dict(zip(target, source))
    both = {"a.b.weight": (4, 4), "a_b.weight": (4, 4)}
    assert match_suffixes(both, both).pairs == {key: key for key in both}


def test_of_two_copies_the_averaged_one_is_taken():
    source = renamed("student.backbone.", LAYERS) | renamed("teacher.backbone.", LAYERS)
    assert match_suffixes(source, LAYERS).prefix == ("teacher", "backbone")


def test_names_that_differ_in_shape_belong_together_and_do_not_fit():
    source = renamed("backbone.", LAYERS) | {"backbone.layer2.conv.weight": (16, 8, 3, 3)}
    match = match_suffixes(source, LAYERS)
    assert match.pairs["layer2.conv.weight"] == "backbone.layer2.conv.weight"
    assert match.fitting == set(LAYERS) - {"layer2.conv.weight"}


def test_nothing_in_common_is_nothing():
    assert not match_suffixes({"a.b": (3,)}, {"c.d": (3,)}).pairs
    assert (
        nearest_key("net.conv1.weight", ["fc.weight", "conv1.weight", "bn1.weight"])
        == "conv1.weight"
    )


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("fc.weight", True),
        ("head.fc.bias", True),
        ("backbone.head_dist.weight", True),
        ("classifier.1.weight", True),
        ("model.0.fc.weight", True),
        ("model.24.cv3.0.2.weight", False),  # a detector's head
        ("stages.0.fc1.weight", False),
        ("bbox_head.conv.weight", False),
    ],
)
def test_a_classifier_is_told_by_its_name(key: str, expected: bool):
    assert bool(classifier_keys([key])) is expected


# Shapes: what is made to fit, and how.


def test_a_first_convolution_is_summed_for_grey_images():
    weight = torch.tensor([1.0, 2, 4]).view(1, 3, 1, 1)
    assert with_channels(weight, 1).flatten().tolist() == [7]
    colour, grey = torch.rand(2, 1, 5, 6).expand(2, 3, 5, 6), torch.rand(8, 3, 3, 3)
    expected = F.conv2d(colour, grey)
    torch.testing.assert_close(F.conv2d(colour[:, :1], with_channels(grey, 1)), expected)


def test_a_first_convolution_is_repeated_and_scaled_for_more_channels():
    weight = torch.tensor([1.0, 2, 4]).view(1, 3, 1, 1)
    torch.testing.assert_close(
        with_channels(weight, 4).flatten(), torch.tensor([1.0, 2, 4, 1]) * 0.75
    )
    torch.testing.assert_close(with_channels(weight, 2).flatten(), torch.tensor([1.0, 2]) * 1.5)
    torch.testing.assert_close(
        with_channels(torch.ones(1, 1, 1, 1), 3).flatten(), torch.full((3,), 1 / 3)
    )


@pytest.mark.parametrize(
    ("key", "given", "wanted", "kind"),
    [
        ("conv1.weight", (8, 3, 3, 3), (8, 1, 3, 3), "first convolution"),
        ("conv1.weight", (8, 1, 3, 3), (8, 3, 3, 3), "first convolution"),
        ("conv1.weight", (8, 3, 3, 3), (8, 12, 3, 3), "first convolution"),
        ("conv1.weight", (8, 12, 3, 3), (8, 3, 3, 3), ""),  # not an image's channels
        ("conv2.weight", (8, 16, 3, 3), (8, 1, 3, 3), ""),
        ("conv1.weight", (8, 3, 3, 3), (16, 1, 3, 3), ""),
        ("pos_embed", (1, 50, 8), (1, 17, 8), "position table"),
        ("pos_embed", (1, 50, 8), (1, 17, 16), ""),
        ("attn.relative_position_bias_table", (169, 4), (49, 4), "window table"),
        ("attn.relative_position_bias_table", (169, 4), (49, 8), ""),
        ("self_attn.pos_embed.height_rel", (31, 16), (27, 16), "window table"),
        ("patch_embed.proj.weight", (8, 3, 14, 14), (8, 3, 16, 16), "patch kernel"),
        ("head.weight", (8, 4), (8, 4, 1, 1), "linear layer"),
        ("bn.weight", (8,), (4,), ""),
    ],
)
def test_what_can_be_made_to_fit(key: str, given: tuple, wanted: tuple, kind: str):
    assert kind_of_change(key, given, wanted) == kind


def ramp(height: int, width: int) -> Tensor:
    """Rows of (y, x) in [-1, 1] at the cells of a grid, (N, 2); interpolation leaves such a plane as it is."""
    y = (torch.arange(height) + 0.5) / height * 2 - 1
    x = (torch.arange(width) + 0.5) / width * 2 - 1
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flatten(0, 1)


class Owner(nn.Module):
    """A holder that tells the grid behind its table."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


@pytest.mark.parametrize(("given_tokens", "tokens"), [(1, 1), (0, 0), (1, 0), (0, 1), (2, 1)])
def test_positions_are_interpolated_and_class_tokens_kept(given_tokens: int, tokens: int):
    given = torch.cat((torch.full((given_tokens, 2), 7.0), ramp(8, 8)))[None]
    wanted = torch.full((1, tokens + 24, 2), 9.0)
    grid = nn.Module()
    grid.grid_size = (4, 6)
    made = made_to_fit("position table", given, wanted, Owner(patch_embed=grid))
    assert made is not None and made.shape == wanted.shape
    assert (made[0, :tokens] == (7 if given_tokens >= tokens else 9)).all()
    inner = made[0, tokens:].view(4, 6, 2)[1:-1, 1:-1]  # the border has no cells beyond it
    torch.testing.assert_close(inner, ramp(4, 6).view(4, 6, 2)[1:-1, 1:-1], atol=0.02, rtol=0)


def test_a_grid_has_the_shape_of_the_image():
    wanted = torch.zeros(1, 4 * 6, 2)
    made = made_to_fit("position table", ramp(8, 8)[None], wanted, Owner(), imgsz=(64, 96))
    assert made is not None
    inner = made.view(4, 6, 2)[1:-1, 1:-1]
    torch.testing.assert_close(inner, ramp(4, 6).view(4, 6, 2)[1:-1, 1:-1], atol=0.02, rtol=0)


def blocks(table: Tensor, count: int, side: int) -> Tensor:
    """A map (H, W, C) as (1, T, N, C): `count` times `count` blocks of `side` times `side` cells, written out cell by cell."""
    rows = [
        torch.stack([table[i * side + y, j * side + x] for y in range(side) for x in range(side)])
        for i in range(count)
        for j in range(count)
    ]
    return torch.stack(rows)[None]


@pytest.mark.parametrize("layout", ["last", "first", "blocks"])
def test_tables_with_a_grid_of_their_own(layout: str):
    wide = torch.randn(8, 8, 40)  # more channels than a side has cells
    image = F.interpolate(
        wide.permute(2, 0, 1)[None], (12, 12), mode="bicubic", align_corners=False
    )
    fine = image[0].permute(1, 2, 0)
    given, expected = {
        "last": (wide[None], fine[None]),
        "first": (wide.permute(2, 0, 1)[None], image),
        "blocks": (blocks(wide, 2, 4), blocks(fine, 2, 6)),
    }[layout]
    made = made_to_fit("position table", given, torch.zeros_like(expected), Owner())
    assert made is not None
    torch.testing.assert_close(made, expected)


def test_positions_without_a_known_grid_are_left_alone():
    assert (
        made_to_fit("position table", torch.zeros(1, 23, 4), torch.zeros(1, 16, 4), Owner()) is None
    )


def test_window_tables_are_those_that_timm_makes():
    from timm.layers import resize_rel_pos_bias_table

    table = torch.randn(13 * 13, 4)
    made = made_to_fit("window table", table, torch.zeros(7 * 15, 4), Owner(window_size=(4, 8)))
    torch.testing.assert_close(made, resize_rel_pos_bias_table(table, (4, 8), (7 * 15, 4)))
    biases = torch.stack((ramp(7, 7)[:, 0], ramp(7, 7)[:, 1]))
    made = made_to_fit("window table", biases, torch.zeros(2, 4 * 6), Owner(resolution=(4, 6)))
    assert made is not None
    torch.testing.assert_close(
        made.view(2, 4, 6)[:, 1:-1, 1:-1],
        ramp(4, 6).T.reshape(2, 4, 6)[:, 1:-1, 1:-1],
        atol=0.05,
        rtol=0,
    )
    line = made_to_fit("window table", torch.arange(9.0)[:, None], torch.zeros(5, 1), Owner())
    assert (
        line is not None and line.flatten()[2] == 4
    )  # the middle, distance 0, stays in the middle
