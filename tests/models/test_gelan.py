"""YOLOv9's blocks: folding, composite links, published sizes, layouts and outputs."""

from __future__ import annotations

import pytest
import torch
from published import FOLDER, fill, golden, layout, needs_golden, read_json
from torch import Tensor, nn

from models.blocks.gelan import (
    ELAN1,
    SPPELAN,
    AConv,
    ADown,
    CBFuse,
    CBLinear,
    RepNCSPELAN4,
    Silence,
)
from models.blocks.rep import RepConvN
from models.registry import LayerError, Scaling, find
from models.yolo import build_model


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def randomised(module: nn.Module) -> nn.Module:
    """Norms that do something: statistics and weights far from their start."""
    generator = torch.Generator().manual_seed(0)
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        for value in (norm.running_mean, norm.bias.data):
            value.copy_(torch.randn(value.shape, generator=generator))
        for value in (norm.running_var, norm.weight.data):
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
    return module


@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2}, {"groups": 4}, {"kernel_size": 5}, {"activation": False}],
    ids=str,
)
def test_folding_a_pair_of_branches_is_exact(options):
    block = randomised(RepConvN(8, 12, **options)).double().eval()
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    before = block(x)
    block.reparameterize()
    assert (block(x) - before).abs().max() < 1e-12
    assert set(block.state_dict()) == {"conv.weight", "conv.bias"}


def test_folding_twice_changes_nothing_and_leaves_gradients():
    block = randomised(RepConvN(4, 4)).eval()
    block.reparameterize()
    state = {key: value.clone() for key, value in block.state_dict().items()}
    block.reparameterize()
    assert all(torch.equal(state[key], value) for key, value in block.state_dict().items())
    block(torch.randn(1, 4, 5, 5)).sum().backward()
    assert [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in block.parameters()] == [
        True,
        True,
    ]


def test_folding_a_whole_block_leaves_no_branches():
    block = randomised(RepNCSPELAN4(8, 16, 16, 8, 2)).double().eval()
    x = torch.randn(1, 8, 8, 8, dtype=torch.float64)
    before = block(x)
    for module in block.modules():
        if isinstance(module, RepConvN):
            module.reparameterize()
    assert (block(x) - before).abs().max() < 1e-12
    assert not [key for key in block.state_dict() if "conv1" in key or "conv2" in key]


def test_an_even_kernel_is_refused():
    with pytest.raises(LayerError, match="kernel size 2, expected an odd one"):
        RepConvN(4, 4, 2)


@pytest.mark.parametrize(
    ("block", "count"),
    [
        (RepNCSPELAN4(768, 512, 512, 256, 1), 2_988_544),
        (RepNCSPELAN4(128, 256, 128, 64, 1), 212_864),
        (SPPELAN(512, 512, 256), 656_896),
        (ADown(256, 256), 164_352),
        (CBLinear(256, [256, 512]), 197_376),
        (CBFuse([0, 0, 0]), 0),
        (Silence(), 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_blocks_have_their_published_sizes(block, count):
    assert parameters(block) == count


@pytest.mark.parametrize(
    ("block", "shape"),
    [
        (RepNCSPELAN4(8, 12, 16, 8, 2), (12, 8, 6)),
        (ELAN1(8, 12, 8, 4), (12, 8, 6)),
        (SPPELAN(8, 12, 4), (12, 8, 6)),
        (AConv(8, 12), (12, 4, 3)),
        (ADown(8, 12), (12, 4, 3)),
        (Silence(), (8, 8, 6)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_blocks_give_the_size_they_promise_and_train(block, shape):
    x = torch.randn(2, 8, 8, 6, requires_grad=True)
    y = block(x)
    assert y.shape[1:] == shape
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


def test_composite_outputs_are_the_slices_of_one_convolution():
    block = CBLinear(4, [2, 3, 5])
    x = torch.randn(1, 4, 2, 2)
    maps = block(x)
    assert [m.shape[1] for m in maps] == [2, 3, 5]
    assert torch.equal(torch.cat(maps, 1), block.conv(x))


def test_composite_maps_are_picked_resized_and_added_to_the_last_input():
    first = [torch.tensor([[[[10.0]]]]), torch.tensor([[[[99.0]]]])]
    second = [torch.tensor([[[[99.0]]]]), torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])]
    target = torch.zeros(1, 1, 4, 4)
    target[..., 0, 0] = 100
    # 10 everywhere, plus each cell of the 2 x 2 map as a 2 x 2 patch, plus 100 in the corner.
    expected = [[111, 11, 12, 12], [11, 11, 12, 12], [13, 13, 14, 14], [13, 13, 14, 14]]
    assert CBFuse([0, 1])([first, second, target])[0, 0].tolist() == expected
    assert target[0, 0, 1, 1] == 0


@pytest.mark.parametrize(
    ("name", "inputs", "args", "message"),
    [
        ("CBFuse", [[4, 8], 4], [[2]], "pick 2 of an input with 2 maps"),
        ("CBFuse", [[4, 8], 4], [[1]], "8 channels to add to one of 4"),
        ("CBFuse", [[4, 8], [4], 4], [[0]], "expected one for each of 2 inputs"),
        ("CBLinear", [4], [8], "expected a list of output channels"),
        ("CBLinear", [[4, 8]], [[8]], "expected one map"),
        ("RepNCSPELAN4", [[4, 8]], [8, 8, 4], "expected one map"),
    ],
)
def test_rows_that_cannot_work_are_answered(name, inputs, args, message):
    with pytest.raises(LayerError, match=message):
        find(name).rule(inputs, args, Scaling())


def test_composite_links_follow_the_width_factor():
    scaling = Scaling(width=0.5)
    linear = find("CBLinear").rule([64], [[64, 128]], scaling)
    assert linear.args == [64, [32, 64]] and linear.channels == [32, 64]
    assert find("CBFuse").rule([[32, 64], 64], [[1]], scaling).channels == 64


COUNTS = {
    "gelan-t": 2_442_640,
    "gelan-s": 7_226_208,
    "gelan-m": 20_124_000,
    "gelan-c": 25_498_752,
    "gelan-e": 58_114_432,
    "yolov9-t": 3_717_680,
    "yolov9-s": 9_804_512,
    "yolov9-m": 32_878_432,
    "yolov9-c": 51_182_080,
    "yolov9-e": 69_529_664,
}


@pytest.mark.parametrize("name", COUNTS)
def test_configs_have_their_published_counts(name):
    with torch.device("meta"):
        model = build_model(name, imgsz=(64, 64))
    assert parameters(model) == COUNTS[name]
    assert model.strides == (8, 16, 32)


@needs_golden
@pytest.mark.parametrize("name", ["gelan-t", "gelan-c", "yolov9-t", "yolov9-c"])
def test_layout_and_outputs_are_the_published_ones(name):
    model = build_model(name, imgsz=(64, 64))
    assert layout(model) == read_json(f"{name}.keys.json")
    numbers = golden()
    with torch.inference_mode():
        raw = fill(model).eval()(numbers.image(256, 320))
        check(name, "", model.head.export_layout(raw))
        if name.startswith("yolov9"):
            check(name, "aux.", model.head.export_layout(raw._replace(main=raw.aux)))


def check(name: str, branch: str, output: Tensor) -> None:
    numbers, path = golden(), str(FOLDER / f"{name}.npz")
    assert numbers.difference(output[:, :4], path, f"{branch}boxes") < 1e-4
    assert numbers.difference(output[:, 4:], path, f"{branch}scores") < 1e-4
