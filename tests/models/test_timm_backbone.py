"""timm models as backbones: slots by stride, layouts, sizes, pyramids, weights, and what cannot be."""

from __future__ import annotations

import copy
import socket

import pytest
import torch
from torch import Tensor, nn

from models.parser.lookup import find_layer
from models.registry import LayerError
from models.timm.backbone import (
    PyramidLevel,
    TimmBackbone,
    find_timm_layer,
)
from models.timm.features import is_timm_model, power_of_two, timm_names
from models.yolo import build_model
from utils.errors import CheckpointError, ConfigError

timm = pytest.importorskip("timm")
SIZE = (64, 96)

SWIN = (
    "swin_tiny_patch4_window7_224",
    {"depths": (1, 1, 1, 1), "embed_dim": 16, "num_heads": (1, 1, 2, 2)},
)

# name, options, strides of its maps, which of them are derived
MODELS = [
    ("test_resnet", {}, (2, 4, 8, 16, 32), ()),
    ("test_convnext", {}, (4, 8, 16, 32), ()),
    ("test_efficientnet", {}, (2, 4, 8, 16, 32), ()),
    ("test_byobnet", {}, (2, 4, 8, 16, 32), ()),
    ("test_vit", {}, (4, 8, 16, 32), (4, 8, 16, 32)),
    (*SWIN, (4, 8, 16, 32), ()),
    ("levit_128s", {}, (8, 16, 32, 64), (8,)),
]


def stride_shapes(
    model: TimmBackbone, batch: int, height: int, width: int
) -> list[tuple[int, ...]]:
    return [
        (batch, c, -(-height // s), -(-width // s)) for c, s in zip(model.channels, model.strides)
    ]


@pytest.fixture(scope="module", params=MODELS, ids=lambda row: row[0])
def case(request):
    name, options, strides, derived = request.param
    torch.manual_seed(0)
    return TimmBackbone(name, SIZE, pyramid_width=32, **options), strides, derived


def test_maps_have_the_stated_channels_and_strides(case):
    model, strides, derived = case
    assert tuple(model.strides) == strides
    assert sorted(model.levels) == sorted(f"stride{s}" for s in derived)
    with torch.no_grad():
        maps = model.eval()(torch.rand(1, 3, *SIZE))
    assert [tuple(m.shape) for m in maps] == stride_shapes(model, 1, *SIZE)


def test_every_parameter_that_trains_gets_a_gradient_for_the_maps_that_are_read(case):
    model = copy.deepcopy(case[0]).train()
    model.select_strides([8, 16])
    assert model.strides == [8, 16]
    maps = model(torch.rand(2, 3, *SIZE))
    assert [tuple(m.shape) for m in maps] == stride_shapes(model, 2, *SIZE)
    sum(m.square().mean() for m in maps).backward()
    assert [
        name for name, p in model.named_parameters() if p.requires_grad and p.grad is None
    ] == []
    frozen = [name for name, p in model.net.named_parameters() if not p.requires_grad]
    assert sorted(frozen) == model.unused


def test_selecting_maps_does_not_change_them(case):
    model = copy.deepcopy(case[0]).eval()
    x = torch.rand(1, 3, *SIZE)
    with torch.no_grad():
        before = dict(zip(model.strides, model(x)))
        state = torch.get_rng_state()
        model.select_strides([8, 16])
        assert torch.equal(torch.get_rng_state(), state)
        after = dict(zip(model.eval().strides, model(x)))
    assert sorted(after) == [8, 16]
    assert all(torch.equal(before[stride], after[stride]) for stride in after)


def test_stages_that_serve_no_selected_map_are_gone():
    model = TimmBackbone("levit_128s", SIZE, pyramid_width=16)
    before = sum(p.numel() for p in model.parameters())
    model.select_strides([8, 16, 32])
    assert model.unused == []
    assert model.plan.indices == (0, 1)
    assert sum(p.numel() for p in model.parameters()) < before / 2


def test_folding_changes_no_output(case):
    model = case[0].eval()
    x = torch.rand(1, 3, *SIZE)
    with torch.no_grad():
        before = model(x)
        model.reparameterize()
        model.reparameterize()
        after = model(x)
    for a, b in zip(before, after, strict=True):
        assert (a - b).abs().max() < 1e-4 * max(1.0, a.abs().max().item())


@pytest.mark.parametrize(("name", "options"), [("test_vit", {}), SWIN, ("test_convnext", {})])
def test_another_size_than_the_built_one_works_where_timm_allows_it(name, options):
    model = TimmBackbone(name, (64, 64), pyramid_width=16, **options).eval()
    with torch.no_grad():
        maps = model(torch.rand(2, 3, 96, 160))
    assert [tuple(m.shape) for m in maps] == stride_shapes(model, 2, 96, 160)


def test_weights_of_a_size_free_model_do_not_depend_on_the_built_size():
    for name, options in (("test_vit", {}), SWIN):
        with torch.device("meta"):
            small, large = (
                TimmBackbone(name, (64, 64), **options),
                TimmBackbone(name, (320, 416), **options),
            )
        assert {k: v.shape for k, v in small.state_dict().items()} == {
            k: v.shape for k, v in large.state_dict().items()
        }


def test_a_model_of_fixed_size_is_built_for_the_size_in_use_and_says_so():
    model = TimmBackbone("levit_128s", (64, 96), pyramid_width=16).eval()
    with pytest.raises(
        ConfigError, match="levit_128s has a fixed input size - got 96x96, expected the 64x96"
    ):
        model(torch.rand(1, 3, 96, 96))


def test_maps_in_channels_last_layout_become_channels_first():
    model = TimmBackbone(SWIN[0], SIZE, **SWIN[1]).eval()
    image = torch.rand(1, 3, *SIZE)
    with torch.no_grad():
        raw, maps = model.net(image), model(image)
    assert raw[0].shape == (1, 16, 24, 16)
    assert torch.equal(maps[0], raw[0].permute(0, 3, 1, 2))


def test_a_patch_of_14_becomes_16():
    with torch.device("meta"):
        model = TimmBackbone("vit_small_patch14_dinov2", (64, 96))
    assert model.plan.options["patch_size"] == 16
    assert model.strides == [4, 8, 16, 32]


def test_strides_that_are_no_power_of_two_are_resized_to_one():
    model = TimmBackbone(
        "pit_b_224", (128, 128), pyramid_width=16, depth=[1, 1, 1]
    ).eval()  # reductions 7, 14, 28
    with torch.no_grad():
        maps = model(torch.rand(1, 3, 128, 128))
    assert model.strides == [8, 16, 32]
    assert [m.shape[2] for m in maps] == [16, 8, 4]


@pytest.mark.parametrize(
    ("value", "expected"), [(2, 2), (7, 8), (14, 16), (16, 16), (12, 16), (28, 32), (64, 64)]
)
def test_power_of_two(value, expected):
    assert power_of_two(value) == expected


@pytest.mark.parametrize(
    ("source", "target", "ups", "downs"),
    [(16, 4, 2, 0), (16, 8, 1, 0), (16, 16, 0, 0), (16, 32, 0, 1), (32, 4, 3, 0), (8, 32, 0, 2)],
)
def test_a_pyramid_level_has_the_steps_of_the_paper(source, target, ups, downs):
    level = PyramidLevel(64, 24, source, target)
    kinds = [type(m) for m in level]
    assert kinds.count(nn.ConvTranspose2d) == ups
    assert kinds.count(nn.MaxPool2d) == downs
    assert kinds.count(nn.GELU) == max(ups - 1, 0)
    size = 64 // source
    assert level(torch.rand(2, 64, size, 2 * size)).shape == (2, 24, 64 // target, 128 // target)


def test_parameters_that_no_map_depends_on_are_found_and_frozen():
    model = TimmBackbone("pit_ti_224", (64, 64), pyramid_width=16)
    model.select_strides(model.strides)
    assert model.unused == ["body.norm.bias", "body.norm.weight"]
    assert not any(p.requires_grad for p in model.net.body.norm.parameters())


def test_building_draws_random_numbers_for_initialisation_only():
    torch.manual_seed(3)
    first = TimmBackbone("test_vit", (64, 64))
    after_first = torch.rand(1)
    torch.manual_seed(3)
    reference = timm.create_model(
        "test_vit", features_only=True, out_indices=first.plan.indices, dynamic_img_size=True
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.net.state_dict().values(), reference.state_dict().values())
    )
    torch.manual_seed(3)
    TimmBackbone("test_vit", (64, 64))
    assert torch.equal(torch.rand(1), after_first)


def test_no_statistic_moves_while_building():
    model = TimmBackbone("test_resnet", (64, 64))
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(
        int(m.num_batches_tracked) == 0 and not m.running_mean.any() for m in norms
    )


def test_weights_of_timm_load_from_a_file(tmp_path):
    full = timm.create_model("test_vit")
    path = tmp_path / "vit.pth"
    torch.save(full.state_dict(), path)
    model = TimmBackbone("test_vit", (64, 64), weights=str(path))
    assert torch.equal(model.net.model.blocks[0].attn.qkv.weight, full.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize(("content", "message"), [
    (lambda: timm.create_model("test_resnet").state_dict(), "does not fit test_vit|cannot be loaded"),
    (lambda: {"a": torch.zeros(3, 3)}, "does not fit test_vit - has 0 of its"),
    (lambda: {"note": 3}, "has no tensors"),
])  # fmt: skip
def test_weights_of_something_else_are_refused(tmp_path, content, message):
    path = tmp_path / "other.pth"
    torch.save(content(), path)
    with pytest.raises(CheckpointError, match=message):
        TimmBackbone("test_vit", (64, 64), weights=str(path))


def test_weights_that_are_not_there_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="none.pth: no such file"):
        TimmBackbone("test_resnet", (64, 64), weights=str(tmp_path / "none.pth"))


def test_pretrained_offline_says_what_to_do_at_once(monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise socket.gaierror("no network")

    monkeypatch.setattr("models.timm.backbone.getproxies", dict)
    monkeypatch.setattr("models.timm.backbone.cached_weights", lambda name: None)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(
        CheckpointError, match="not in the cache, and the hub cannot be reached.*weights: path"
    ):
        TimmBackbone("test_resnet", (64, 64), pretrained=True)


def test_pretrained_comes_from_the_cache_without_asking_the_network(monkeypatch, tmp_path):
    full = timm.create_model("test_resnet")
    path = tmp_path / "cached.pth"
    torch.save(full.state_dict(), path)
    monkeypatch.setattr("models.timm.backbone.cached_weights", lambda name: str(path))
    monkeypatch.setattr(
        "models.timm.backbone.hub_is_reachable", lambda: pytest.fail("asked the network")
    )
    model = TimmBackbone("test_resnet", (64, 64), pretrained=True)
    ours: dict[str, Tensor] = model.net.state_dict()
    assert torch.equal(
        ours["conv1.weight"] if "conv1.weight" in ours else ours["conv1.0.weight"],
        next(iter(full.parameters())),
    )


def test_names_with_prefix_and_tag_are_known():
    assert (
        is_timm_model("resnet18")
        and is_timm_model("timm/resnet18")
        and is_timm_model("resnet18.a1_in1k")
    )
    assert not is_timm_model("resnet18x") and not is_timm_model("Cnov")
    assert "convnext_tiny" in timm_names()
    assert find_timm_layer("nothing_of_the_kind") is None
    assert find_layer("timm/test_resnet").build.func is TimmBackbone


def test_a_timm_model_stands_in_a_yaml_and_options_reach_it():
    config = {
        "nc": 3,
        "scales": {"n": [1, 1, 64]},
        "backbone": [[-1, 1, "timm/test_resnet", {"drop_path_rate": 0.2}]],
        "head": [[["P3", "P4", "P5"], 1, "Detect", ["nc"]]],
    }
    model = build_model(config, imgsz=(64, 64))
    assert model.strides == (8, 16, 32)
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.2)


@pytest.mark.parametrize(("row", "message"), [
    (["test_resnet", {"colour": 3}], "unexpected keyword argument 'colour'"),
    (["test_resnet", ["yes"]], "got pretrained 'yes', expected true or false"),
    (["test_resnot", []], "unknown layer 'test_resnot'.*Did you mean 'test_resnet"),
])  # fmt: skip
def test_mistakes_in_a_yaml_name_row_and_reason(row, message):
    config = {
        "nc": 3,
        "scales": {"n": [1, 1, 64]},
        "backbone": [[-1, 1, *row]],
        "head": [[["P3", "P4", "P5"], 1, "Detect", ["nc"]]],
    }
    with pytest.raises(ConfigError, match=message) as caught:
        build_model(config, imgsz=(64, 64))
    assert str(caught.value).startswith("model backbone[0] ")
    assert len(str(caught.value).splitlines()) == 1


def test_a_size_that_timm_refuses_is_one_line():
    with pytest.raises(
        LayerError, match="timm cannot give features of 'nest_tiny' at 64x96 - .*square"
    ):
        TimmBackbone("nest_tiny", SIZE)


@pytest.mark.skipif(
    not is_timm_model("efficientvim_m1"), reason="this version of timm does not have the model"
)
def test_a_model_whose_weights_depend_on_its_maps_keeps_them_when_fewer_are_read():
    net = TimmBackbone("efficientvim_m1", (64, 64)).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before = dict(zip(net.strides, net(images)))
        net.select_strides([16, 32])
        for stride, after in zip(net.strides, net(images), strict=True):
            torch.testing.assert_close(after, before[stride])


def test_maps_that_a_model_rounds_up_get_their_size_at_every_image_size():
    net = TimmBackbone("mobilevitv2_050", (64, 64)).eval()
    with torch.no_grad():
        shapes = [tuple(m.shape[2:]) for m in net(torch.rand(1, 3, 64, 96))]
    assert shapes == [(64 // s, 96 // s) for s in net.strides]


def test_weights_that_are_missing_are_told_with_the_row_that_names_them():
    with pytest.raises(
        CheckpointError, match=r"yolo11.yaml .*backbone\[0\] test_resnet: none.pth: no such file"
    ):
        build_model("yolo11n", backbone=["test_resnet", "weights=none.pth"], imgsz=SIZE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out_indices": [1, 2]}, "got out_indices, which is not for a backbone to be told"),
        ({"features_only": False}, "got features_only"),
        ({"pyramid_width": 0}, "got pyramid_width 0, expected a number of channels"),
    ],
)
def test_options_that_would_be_dropped_are_refused(options: dict, message: str):
    with pytest.raises(LayerError, match=message):
        TimmBackbone("resnet18", **options)
