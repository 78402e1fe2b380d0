"""How a row is read for a class that nobody registered: every convention of names, with and without a width in front."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import yaml
from pasted_classes import block, settled
from torch import Tensor, nn

from models.parser.signature import Role, read_constructor
from models.registry import LayerError


def read(build: Callable, args: list, *channels: int, repeats: int = 1, **kwargs) -> str:
    """The call that a row with `args` means."""
    return settled(build, args, *channels, repeats=repeats, **kwargs).text


KEPT = block("c1, reduction=16")
"""Keeps its channels, as attention does."""


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], "Block(c1=256, reduction=16)"),
        ([1024], "Block(c1=256, reduction=16)"),  # the full width of an input of 256
        ([1024, 8], "Block(c1=256, reduction=8)"),
        ([8], "Block(c1=256, reduction=8)"),
        ([4], "Block(c1=256, reduction=4)"),
    ],
)
def test_a_block_that_keeps_its_channels_takes_rows_with_and_without_a_width(args, expected):
    assert read(KEPT, args) == expected


CHANGED = block("c1, c2, k=3, act=True", "c1", "c2")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([512], "Block(c1=256, c2=128, k=3, act=True)"),  # 512 x 0.25
        ([512, 5], "Block(c1=256, c2=128, k=5, act=True)"),
        ([512, 5, False], "Block(c1=256, c2=128, k=5, act=False)"),
        ([], "Block(c1=256, c2=256, k=3, act=True)"),
        ([5], "Block(c1=256, c2=256, k=5, act=True)"),
        ([1024, 512], "Block(c1=256, c2=128, k=3, act=True)"),  # with the input written out
        ([1024, 512, 7], "Block(c1=256, c2=128, k=7, act=True)"),
    ],
)
def test_a_block_with_an_output_width_takes_rows_with_and_without_it(args, expected):
    assert read(CHANGED, args) == expected


@pytest.mark.parametrize(
    "words",
    ["c1, c2", "in_channels, out_channels", "in_ch, out_ch", "inp, oup", "inc, ouc", "in_planes, planes", "inplanes, planes",
     "ch_in, ch_out", "cin, cout", "dim_in, dim_out", "dim, dim_out", "in_dim, out_dim", "in_features, out_features",
     "in_c, out_c", "c_in, c_out", "in_chans, embed_dim", "input_dim, output_dim", "inChannels, outChannels",
     "nin, nout", "channels, out_channels", "in_filters, filters", "a, b", "first, second"],
)  # fmt: skip
def test_input_and_output_are_found_under_every_customary_word(words: str):
    first, second = words.split(", ")
    assert read(block(words, first, second), [512]) == f"Block({first}=256, {second}=128)"


@pytest.mark.parametrize(
    "word",
    ["c1", "c", "ch", "dim", "channel", "channels", "in_channels", "in_channel", "inp", "in_planes", "planes", "embed_dim",
     "d_model", "num_channels", "gate_channels", "n_feats", "dim_in", "input_dim", "c_in", "anything"],
)  # fmt: skip
def test_a_single_width_is_the_inputs_under_every_customary_word(word: str):
    build = block(word, word, word)
    for args in ([], [1024]):
        assert read(build, args) == f"Block({word}=256)"


def test_a_width_with_a_default_is_still_the_inputs():
    assert (
        read(block("channel=512, reduction=16", "channel", "channel"), [1024])
        == "Block(channel=256, reduction=16)"
    )
    assert (
        read(block("channels=None, e_lambda=0.0001", keeps=False), [1024])
        == "Block(channels=256, e_lambda=0.0001)"
    )


def test_a_constructor_without_channels_gets_none():
    build = block("k_size=3", keeps=False)
    assert read(build, []) == "Block(k_size=3)"
    assert read(build, [5]) == "Block(k_size=5)"
    assert read(block("e_lambda=0.0001", keeps=False), [1024]) == "Block(e_lambda=0.0001)"


def test_repeats_go_where_the_constructor_takes_them():
    build = block("c1, c2, n=1, shortcut=False", "c1", "c2")
    found = settled(build, [512, True], repeats=3)
    assert (
        found.text == "Block(c1=256, c2=128, n=3, shortcut=True)" and found.reading.repeats_inside
    )
    assert not settled(CHANGED, [512], repeats=3).reading.repeats_inside
    assert (
        read(block("c1, depth=2", "c1", "c1"), []) == "Block(c1=256, depth=2)"
    )  # a row that repeats nothing leaves it
    assert read(block("c1, depth=2", "c1", "c1"), [], repeats=3) == "Block(c1=256, depth=3)"
    assert read(build, [512, 2]) == "Block(c1=256, c2=128, n=2, shortcut=False)"  # 2 is no shortcut


def test_two_meanings_are_told_with_what_to_write_for_each():
    found = settled(KEPT, [64], 64)
    assert found.text == "Block(c1=64, reduction=16)"
    assert "but Block(c1=64, reduction=64) fits the row too" in found.note
    assert "Write {reduction: 16} for the first, {reduction: 64} for the second." in found.note
    assert settled(KEPT, [64], 64, reduction=16).note == ""
    assert read(KEPT, [], 64, reduction=64) == "Block(c1=64, reduction=64)"


@pytest.mark.parametrize(
    ("build", "args", "channels"),
    [
        (KEPT, [64], 64),
        (block("in_c, out_c, mid_c=None", "in_c", "out_c"), [256], 256),
        (block("c1, c2, hidden_channels=32", "c1", "c2"), [64], 64),
        (block("c1, c2, n=1, k=3", "c1", "c2"), [512, 5], 256),
    ],
)
def test_what_a_warning_says_to_write_gives_that_reading_and_no_warning(build, args, channels):
    found = settled(build, args, channels)
    written = re.findall(r"\{(.*?)\} for the (?:first|second)", found.note)
    texts = re.findall(r"Block\(.*?\)", found.note)
    for text, words in zip(texts, written):
        again = settled(build, [], channels, **yaml.safe_load(f"{{{words}}}"))
        assert (again.text, again.note) == (text.replace("None", "None"), "")
    assert len(texts) == len(written) and len(texts) in (0, 2)


def test_a_width_that_nobody_would_take_for_a_reduction_is_not_questioned():
    assert settled(KEPT, [1024]).note == "" == settled(KEPT, [256]).note


@pytest.mark.parametrize("parameters", ["c1, k_size", "c1, heads=7"])
def test_the_width_of_the_input_is_not_poured_into_another_argument(parameters: str):
    with pytest.raises(LayerError):
        settled(block(parameters, "c1 if locals().get('heads') != 7 else 0 / 0", "c1"), [64], 64)


def test_a_width_that_fits_nothing_is_dropped_and_told():
    found = settled(block("dim", "dim", "dim"), [512])
    assert found.text == "Block(dim=256)"
    assert (
        "the row's 512 is neither its input nor its output of 256 channels and is not used"
        in found.note
    )


def test_widths_given_by_name_are_scaled_and_the_input_is_known():
    assert read(CHANGED, [], c2=512) == "Block(c1=256, c2=128, k=3, act=True)"
    assert read(CHANGED, [], c1=1024, c2=512, k=1) == "Block(c1=256, c2=128, k=1, act=True)"


def test_a_width_in_between_is_scaled_too():
    build = block("c1, c2, mid_channels=64", "c1", "c2")
    assert read(build, [512, 128]) == "Block(c1=256, c2=128, mid_channels=32)"


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ("dim, input_resolution", "dim=256, input_resolution=(8, 8)"),
        ("dim, resolution=20", "dim=256, resolution=8"),
        ("dim, h, w", "dim=256, h=8, w=8"),
        ("dim, num_patches", "dim=256, num_patches=64"),
        ("dim, feat_size=None", "dim=256, feat_size=None"),
    ],
)
def test_a_size_is_the_maps(parameters: str, expected: str):
    assert read(block(parameters, "dim", "dim"), []) == f"Block({expected})"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([], "Block(n_dims=256, width=8, height=8, heads=4)"),
        ([1024, 14, 14, 2], "Block(n_dims=256, width=8, height=8, heads=2)"),
        ([14, 14, 2], "Block(n_dims=256, width=8, height=8, heads=2)"),
    ],
)
def test_a_row_that_writes_the_size_of_the_map_gets_the_measured_one(row: list, expected: str):
    assert read(block("n_dims, width=14, height=14, heads=4", "n_dims", "n_dims"), row) == expected


def test_a_row_in_the_constructors_own_order_is_read_too():
    build = block("kernel_size, in_channels, out_channels", "in_channels", "out_channels")
    for row in ([3, 512], [512, 3]):
        assert read(build, row) == "Block(kernel_size=3, in_channels=256, out_channels=128)"


def test_the_channel_word_that_a_row_leaves_out_is_the_inputs():
    build = block("dim, depth, channel", "channel", "channel")
    assert read(build, [], dim=96, depth=2) == "Block(dim=24, depth=2, channel=256)"


def test_inner_widths_behind_an_output_are_not_taken_for_it():
    build = block("c1, c2, c3, c4, c5=1", "c1", "c2")
    assert read(build, [256, 128, 64, 1]) == "Block(c1=256, c2=64, c3=128, c4=64, c5=1)"
    assert settled(build, [256, 128, 64, 1]).note == ""
    elan = block("c1, c2, c3, c4, n=1", "c1", "c2")
    assert read(elan, [1024, 256, 128, 1]) == "Block(c1=256, c2=256, c3=256, c4=128, n=1)"


def test_a_kernel_that_would_fill_the_memory_is_never_built():
    with pytest.raises(LayerError, match=r"got \[256\], which Block\(c1, c2, k\) does not take"):
        settled(block("c1, c2, k", "c1", "c2, k) if k else (c1, c2"), [256])


class Joined(nn.Module):
    def __init__(self, in_channels: list, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(sum(in_channels), out_channels, 1)

    def forward(self, xs: list[Tensor]) -> Tensor:
        return self.conv(torch.cat(xs, 1))


class Summed(nn.Module):
    def __init__(self, c1, c2):
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, 1)

    def forward(self, xs):
        return self.conv(torch.cat(xs, 1))


class Gate(nn.Module):
    def __init__(self, F_g, F_l, F_int):
        super().__init__()
        self.g, self.x, self.out = (
            nn.Conv2d(F_g, F_int, 1),
            nn.Conv2d(F_l, F_int, 1),
            nn.Conv2d(F_int, 1, 1),
        )

    def forward(self, g, x):
        return x * self.out(self.g(g) + self.x(x)).sigmoid()


class Added(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 1)

    def forward(self, a, b):
        return self.conv(a + b)


@pytest.mark.parametrize(
    ("build", "args", "channels", "text", "style"),
    [
        (Joined, [512], (64, 128), "Block(in_channels=[64, 128], out_channels=128)", "list"),
        (Summed, [512], (64, 128), "Block(c1=192, c2=128)", "list"),
        (Summed, [512], (64, 64), "Block(c1=128, c2=128)", "list"),
        (Added, [512], (128, 128), "Block(dim=128)", "spread"),
        (Gate, [128], (64, 32), "Block(F_g=64, F_l=32, F_int=32)", "spread"),
        (Gate, [256, 128, 128], (64, 32), "Block(F_g=64, F_l=32, F_int=32)", "spread"),
    ],
)
def test_a_fusion_of_several_maps(build, args, channels, text, style):
    found = settled(build, args, *channels)
    assert (found.text, found.style) == (text, style)


def test_several_maps_out_are_a_neck():
    class Neck(nn.Module):
        def __init__(self, in_channels_list, out):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(c, out, 1) for c in in_channels_list)

        def forward(self, maps):
            return [conv(m) for conv, m in zip(self.convs, maps)]

    found = settled(Neck, [256], 32, 64, 128)
    assert found.text == "Block(in_channels_list=[32, 64, 128], out=64)"
    assert [tuple(m.shape) for m in found.output] == [(1, 64, 8, 8)] * 3


def test_an_output_alone_is_the_rows_width():
    class Lazy(nn.Module):
        def __init__(self, out_channels):
            super().__init__()
            self.conv = nn.LazyConv2d(out_channels, 1)

        def forward(self, x):
            return self.conv(x)

    assert read(Lazy, [512]) == "Block(out_channels=128)"


def test_factory_functions_and_anything_behind_a_star_are_read_too():
    def make(c1, c2, **options):
        return nn.Conv2d(c1, c2, **options)

    def any_of(*args):
        return nn.Conv2d(*args)

    def by_name(*, dim, kernel_size=1):
        return nn.Conv2d(dim, dim, kernel_size)

    assert read(make, [512], kernel_size=1) == "Block(c1=256, c2=128, kernel_size=1)"
    assert read(any_of, [512, 1]) == "Block(256, 128, 1)"
    assert read(by_name, [1024]) == "Block(dim=256, kernel_size=1)"


@pytest.mark.parametrize(
    ("build", "args", "kwargs", "message"),
    [
        (KEPT, [1024, 8, 4], {}, "got [1024, 8, 4], which Block(c1, reduction=16) does not take. Channels and repeats come from "
         "the parser; a row says [width, reduction], [reduction] or names such as {reduction: ...}."),
        (KEPT, [], {"ratio": 4}, "got an unexpected keyword argument 'ratio', expected those of Block(c1, reduction=16)."),
        (block("c1, mode", "c1", "c1"), [], {}, "got no arguments, which Block(c1, mode) does not take. Channels and repeats come "
         "from the parser; a row says [width, mode], [mode] or names such as {mode: ...}."),
        (block("c1, c2", "7", "c2"), [512], {}, "expected input[1, 256, 8, 8] to have 7 channels, but got 256 channels instead"),
    ],
)  # fmt: skip
def test_what_fits_none_is_one_line_with_the_constructor_and_what_to_write(
    build, args, kwargs, message
):
    with pytest.raises(LayerError) as caught:
        settled(build, args, **kwargs)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "roles"),
    [
        ("nc, n, k", (Role.OTHER, Role.REPEATS, Role.OTHER)),
        ("num_heads, head_dim, qk_dim", (Role.OTHER, Role.OTHER, Role.OTHER)),
        ("h", (Role.OTHER,)),
        ("dim, hidden_dim", (Role.WIDTH, Role.INNER)),
        ("hidden_dim", (Role.WIDTH,)),
        ("in_channels, channels, dim", (Role.INPUT, Role.OUTPUT, Role.WIDTH)),
    ],
)
def test_words_that_only_look_like_channels_are_none(words: str, roles: tuple):
    found = read_constructor(block(words, keeps=False)).arguments
    assert tuple(a.role for a in found) == roles


def test_trying_draws_no_random_number_of_the_callers():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    read(CHANGED, [512])
    assert torch.equal(torch.rand(4), expected)
