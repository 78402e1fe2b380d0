"""Blocks as their authors wrote them (tests/pasted/), and the rows that name them."""

from __future__ import annotations

from typing import Any, NamedTuple

Args = list[Any]


class Pasted(NamedTuple):
    """A block and how it is used.

    Attributes:
        file: file or package in `FOLDER`.
        reads: how its constructor is called, `{c}` being the channels of the map it stands on, `{h}` half of
            them, `{cs}` those of all its inputs, `{n}` repeats.
        rows: arguments of a row, one list for each kind of fork. C is the full width of the map, H half of it.
        place: where it stands.
        repeats: of the row.
        rule: of `models/registry.py`, the one that says the same.
        frozen: its parameters that do not train.
        source: what the head reads of a neck.
    """

    file: str
    reads: str
    rows: tuple[Args, ...]
    place: str = "map"
    repeats: int = 1
    rule: str = ""
    frozen: str = ""
    source: str = ""


C, H = "<width>", "<half>"
BOTH: tuple[Args, ...] = ([C], [])
CONV, STACKED, FIRST, SAME = "convolution", "stacked", "channels_first", "unchanged"

PASTED = {
    # attention: channel
    "SE": Pasted("attention", "channel={c}, reduction=16", BOTH, rule=FIRST),
    "eca_layer": Pasted("attention", "channel={c}, k_size=3", BOTH, rule=FIRST),
    "ECA": Pasted("attention", "k_size=3", ([], [3]), rule=SAME),
    "ECAAdaptive": Pasted("attention", "c1={c}, b=1, gamma=2", BOTH, rule=FIRST),
    "KeywordSE": Pasted("attention", "channels={c}, ratio=4", ([{"ratio": 4}], [C, {"ratio": 4}])),
    "FrequencyAttention": Pasted(
        "attention", "channel={c}, dct_h=7, dct_w=7, reduction=16", BOTH, rule=FIRST
    ),
    "ChannelAttention": Pasted("attention", "in_planes={c}, ratio=8", ([C, 8], [8]), rule=FIRST),
    "NAM": Pasted("attention", "channels={c}", BOTH, rule=FIRST),
    # spatial, both
    "SpatialAttention": Pasted(
        "attention", "kernel_size=3", ([3], [{"kernel_size": 3}]), rule=SAME
    ),
    "CBAM": Pasted("attention", "c1={c}, reduction=16", (*BOTH, [{"reduction": 16}]), rule=FIRST),
    "BAM": Pasted("attention", "gate_channel={c}, reduction_ratio=16", BOTH, rule=FIRST),
    "GAM_Attention": Pasted(
        "attention", "in_channels={c}, out_channels={c}, rate=4", BOTH, rule=CONV
    ),
    "ShuffleAttention": Pasted("attention", "channel={c}, reduction=16, G=8", BOTH, rule=FIRST),
    "EMA": Pasted("attention", "channels={c}, factor=8", BOTH, rule=FIRST),
    # no channels, no arguments
    "SimAM": Pasted("attention", "e_lambda=0.0001", ([], [C], [None, 0.0001]), rule=SAME),
    "TripletAttention": Pasted("attention", "no_spatial=False, kernel_size=7", ([],), rule=SAME),
    "ZoomGate": Pasted("attention", "", ([],), rule=SAME),
    # coordinate, large kernels, all cells
    "CoordAtt": Pasted("long_range", "inp={c}, oup={c}, reduction=32", BOTH, rule=CONV),
    "LKA": Pasted("long_range", "dim={c}", BOTH, rule=FIRST),
    "SeparableLKA": Pasted("long_range", "dim={c}, k_size=7", ([C, 7], [7]), rule=FIRST),
    "GlobalContext": Pasted("long_range", "inplanes={c}, ratio=0.25", BOTH, rule=FIRST),
    "DoubleAttention": Pasted(
        "long_range", "in_channels={c}, c_m=32, c_n=32", ([C, 32, 32], [{"c_m": 32, "c_n": 32}])
    ),
    "SelfAttention2d": Pasted("long_range", "dim={c}, num_heads=4", ([C, 4], [4]), rule=FIRST),
    "LinearAttention": Pasted(
        "long_range", "embed_dim={c}, heads=4, dim_head=16", BOTH, rule=FIRST
    ),
    "WindowMixer": Pasted("long_range", "dim={c}, input_resolution={hw}", BOTH, "last"),
    "MHSA": Pasted("long_range", "n_dims={c}, width={w}, height={h_}, heads=4", BOTH, "last"),
    "PositionTable": Pasted("long_range", "dim={c}, h={h_}, w={w}", BOTH, "last"),
    # convolutions
    "Partial_conv3": Pasted("convolutions", "dim={c}, n_div=4", ([C, 4], [4]), rule=FIRST),
    "FasterBlock": Pasted(
        "convolutions",
        "dim={c}, n_div=4, mlp_ratio=2.0, drop_path=0.1",
        BOTH,
        repeats=4,
        rule=FIRST,
    ),
    "GhostModule": Pasted("convolutions", "inp={c}, oup={h}, kernel_size=3", ([H, 3],), rule=CONV),
    "Dynamic_conv2d": Pasted(
        "convolutions", "in_planes={c}, out_planes={c}, kernel_size=3", ([C, 3],), rule=CONV
    ),
    "Involution": Pasted(
        "convolutions", "channels={c}, kernel_size=3, stride=1", ([C, 3], [3]), rule=FIRST
    ),
    "WTConv2d": Pasted(
        "convolutions",
        "in_channels={c}, out_channels={c}, kernel_size=5",
        ([C, 5], []),
        rule=CONV,
        frozen="bands",
    ),
    "ScConv": Pasted("convolutions", "op_channel={c}, group_num=4", BOTH, rule=FIRST),
    "RepBlock": Pasted(
        "convolutions",
        "in_channels={c}, out_channels={c}, kernel_size=3",
        (*BOTH, [C, 3]),
        rule=CONV,
    ),
    "ConvNeXtBlock": Pasted("convolutions", "dim={c}, drop_path=0.0", BOTH, repeats=3, rule=FIRST),
    "CoordConv": Pasted(
        "convolutions",
        "in_channels={c}, out_channels={h}, kernel_size=1, stride=1, with_r=True",
        ([H, 1, 1, True],),
        rule=CONV,
    ),
    "DeformBlock": Pasted("deformable", "c1={c}, c2={h}, k=3, s=1", ([H, 3, 1], [H]), rule=CONV),
    "DyHeadLike": Pasted("deformable", "in_channels={c}, out_channels={c}", BOTH, rule=CONV),
    "DCNConv": Pasted("deformable_old", "inp={c}, oup={c}, kernel_size=3", ([C, 3], []), rule=CONV),
    "StripBlock": Pasted("own_helpers", "dim_in={c}, dim_out={h}, k=5", ([H, 5],), rule=CONV),
    # constructors that say little
    "MixBlock": Pasted("oddities", "a={c}, b={h}", ([H],), rule=CONV),
    "LazyBlock": Pasted("oddities", "out_channels={h}, kernel_size=3", ([H], [H, 3])),
    "AnyConv": Pasted("oddities", "{c}, {h}, 1", ([H, 1],), rule=CONV),
    "WeightStandardConv": Pasted(
        "oddities",
        "in_channels={c}, out_channels={h}, kernel_size=3, stride=1, padding=1",
        ([H, 3, 1, 1],),
        rule=CONV,
    ),
    "ConfiguredBlock": Pasted("oddities", "width={c}", BOTH, rule=FIRST),
    "Residual": Pasted("oddities", "in_chs={c}, out_chs={h}", ([H],), repeats=4, rule=CONV),
    "residual_gelu": Pasted("oddities", "in_chs={c}, out_chs={c}", BOTH),
    "conv_bn_relu": Pasted("oddities", "channels={c}, k=3", (*BOTH, [C, 3])),
    "TemperatureGate": Pasted("oddities", "c1={c}, reduction=8", BOTH, rule=FIRST),
    "SmoothGate": Pasted("oddities", "channels={c}, sigma=1.0", BOTH, rule=FIRST),
    "HostTable": Pasted("oddities", "channels={c}", BOTH, rule=FIRST),
    "FixedPrior": Pasted("oddities", "c1={c}, size=20", BOTH, rule=FIRST),
    "ViewShuffle": Pasted("oddities", "nin={c}, nout={h}, groups=4", ([H, 4],), rule=CONV),
    "RowFlip": Pasted("oddities", "inplanes={c}", BOTH, rule=FIRST),
    "MixerBlock": Pasted(
        "mixer_pack", "dim={c}, pool_size=3, mlp_ratio=2", BOTH, repeats=2, rule=FIRST
    ),
    # variants of C2f and C3
    "C2f_Partial": Pasted(
        "csp_c2f",
        "c1={c}, c2={h}, n={n}, shortcut=True",
        ([H, True],),
        repeats=6,
        rule=STACKED,
    ),
    "C2f_DW": Pasted("csp_c2f", "c1={c}, c2={c}, n={n}", (*BOTH,), repeats=3, rule=STACKED),
    "C3_Strip": Pasted(
        "csp_c2f",
        "c1={c}, c2={c}, n={n}, shortcut=False",
        ([C, False],),
        repeats=3,
        rule=STACKED,
    ),
    "C3k2_SE": Pasted(
        "csp_c2f",
        "c1={c}, c2={c}, n={n}, c3k=True, e=0.25",
        ([C, True, 0.25],),
        repeats=2,
        rule=STACKED,
    ),
    "GatedC2f": Pasted(
        "csp_c2f",
        "c1={c}, c2={h}, n={n}, shortcut=True",
        ([H, True],),
        repeats=2,
        rule=STACKED,
    ),
    "GSConv": Pasted("csp_c3", "c1={c}, c2={h}, k=3, s=1", ([H, 3, 1],), rule=CONV),
    "VoVGSCSP": Pasted(
        "csp_c3",
        "c1={c}, c2={c}, n={n}, shortcut=False",
        ([C, False],),
        repeats=3,
        rule=STACKED,
    ),
    "C3SimAM": Pasted("csp_c3", "c1={c}, c2={c}, n={n}", BOTH, repeats=3, rule=STACKED),
    "Res2Block": Pasted(
        "csp_c3",
        "c1={c}, c2={c}, shortcut=True, scale=4",
        ([C], [C, True, 4]),
        repeats=4,
        rule=CONV,
    ),
    "SPPFGate": Pasted("csp_c3", "c1={c}, c2={c}, k=3", ([C, 3],), rule=CONV),
    # down and up
    "SPDConv": Pasted("sampling", "inc={c}, ouc={next}", ([C],), "down", rule=CONV),
    "SpaceToDepth": Pasted("sampling", "", ([],), "down"),
    "HaarDown": Pasted("sampling", "in_ch={c}, out_ch={next}", ([C],), "down", rule=CONV),
    "BlurPool": Pasted(
        "sampling", "channels={c}, filt_size=4, stride=2", ([],), "down", rule=FIRST
    ),
    "PatchMerging": Pasted("sampling", "dim={c}, out_dim={next}", ([C],), "down", rule=CONV),
    "TwoWayDown": Pasted("sampling", "c1={c}, c2={next}, k=3", ([C], [C, 3]), "down", rule=CONV),
    "CARAFE": Pasted(
        "sampling", "c={c}, k_enc=3, k_up=5, c_mid=32, scale=2", ([], [3, 5, 32]), "up", rule=FIRST
    ),
    "DySample": Pasted(
        "sampling",
        "in_channels={c}, scale=2, style='lp', groups=4",
        ([], [2, "lp"]),
        "up",
        rule=FIRST,
    ),
    "PixelUp": Pasted("sampling", "in_ch={c}, out_ch={next}, r=2", ([C], [C, 2]), "up", rule=CONV),
    "DeconvUp": Pasted(
        "sampling", "input_channels={c}, output_channels={next}", ([C],), "up", rule=CONV
    ),
    "PlainUp": Pasted("sampling", "scale_factor=2, mode='bilinear'", ([], [2]), "up", rule=SAME),
    # fusions
    "BiFPN_Add": Pasted("fusion", "c1={c}, c2={c}", ([C, C], [C], []), "pair"),
    "WeightedConcat": Pasted("fusion", "dimension=1, n=2", ([1], []), "uneven"),
    "AFF": Pasted("fusion", "channels={c}, r=4", BOTH, "pair"),
    "Fusion": Pasted("fusion", "inc_list={cs}, fusion='weight'", ([], ["weight"]), "uneven"),
    "SKFF": Pasted("fusion", "in_channels={c}, height=2, reduction=8", BOTH, "pair"),
    "TopDown": Pasted("fusion", "c_fine={c}, c_coarse={next}, c_out={c}", ([C],), "steps"),
    "MiddleCat": Pasted("fusion", "", ([],), "middle"),
    "ScaleMix": Pasted("fusion", "channels_list={cs}, out_channels={c}", ([C],), "finest"),
    # necks
    "PyramidNeck": Pasted(
        "necks", "in_channels={cs}, out_channels={c}", ([C],), "neck", source="neck"
    ),
    "WeightedNeck": Pasted(
        "necks", "in_channels_list={cs}, out={c}", ([C],), "neck", source="neck.P3 neck.P4 neck.P5"
    ),
    "BalancedNeck": Pasted("necks", "", ([],), "neck", source="neck.0 neck.1 neck.2"),
    "KeepWidthNeck": Pasted("necks", "channels={cs}, act='relu'", ([],), "neck", source="-3 -2 -1"),
    "FourLevelNeck": Pasted(
        "necks",
        "in_channels={cs}, out_channels={c}",
        ([C],),
        "neck",
        frozen="extra.weight extra.bias",
        source="neck.P3 neck.P4 neck.P5",
    ),
}
"""By the name of the class or function."""
