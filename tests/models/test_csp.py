"""YOLO11's blocks: attention by its formula, size letters, published sizes, layouts and outputs."""

from __future__ import annotations

import pytest
import torch
from published import FOLDER, fill, golden, layout, needs_golden, read_json

from models.blocks.csp import C2PSA, Attention, C2f, C3k, C3k2
from models.registry import LayerError, Scaling, find
from models.yolo import build_model


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_attention_is_softmax_of_scaled_products_plus_a_convolution_of_the_values():
    torch.manual_seed(0)
    block = Attention(12, num_heads=2).eval()  # 6 value channels a head, 3 for keys and queries
    x = torch.randn(2, 12, 3, 5)
    qkv = block.qkv(x).view(2, 2, 12, 15)
    query, key, value = qkv[:, :, :3], qkv[:, :, 3:6], qkv[:, :, 6:]
    weights = torch.einsum("bkcq,bkcp->bkqp", query, key).div(3**0.5).softmax(-1)
    mixed = torch.einsum("bkqp,bkcp->bkcq", weights, value).reshape(2, 12, 3, 5)
    expected = block.proj(mixed + block.pe(value.reshape(2, 12, 3, 5)))
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-6)


def test_attention_keeps_the_images_of_a_batch_apart():
    block = C2PSA(128, 128).eval()
    x = torch.randn(3, 128, 4, 6)
    alone = torch.cat([block(image) for image in x.split(1)])
    torch.testing.assert_close(block(x), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("block", "count"),
    [
        (C2PSA(256, 256, 1), 249_728),
        (C3k2(328, 128, 1, False), 104_128),
        (C3k2(176, 64, 1, False), 26_976),
        (C3k2(384, 256, 1, True), 378_880),
    ],
    ids=["C2PSA", "C3k2 wide", "C3k2 narrow", "C3k2 of C3k"],
)
def test_blocks_have_their_published_sizes(block, count):
    assert parameters(block) == count


@pytest.mark.parametrize(
    "block",
    [C2f(8, 16, 2), C3k(8, 16, 2), C3k2(8, 16, 2), C3k2(8, 16, 2, True), C2PSA(16, 16, 2)],
    ids=["C2f", "C3k", "C3k2", "C3k2 of C3k", "C2PSA"],
)
def test_blocks_keep_the_size_and_train_every_parameter(block):
    x = torch.randn(2, block.cv1.conv.in_channels, 6, 4)
    y = block(x)
    assert y.shape == (2, 16, 6, 4)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.parametrize(
    ("size", "args", "expected"),
    [
        ("n", [64, False, 0.25], [32, 64, 2, False, 0.25]),
        ("s", [64, True], [32, 64, 2, True]),
        ("", [64, False], [32, 64, 2, False]),
        ("m", [64, False, 0.25], [32, 64, 2, True, 0.25]),
        ("l", [64], [32, 64, 2, True]),
        ("x", [64, True], [32, 64, 2, True]),
    ],
)
def test_large_sizes_use_the_deeper_stage_whatever_the_row_says(size, args, expected):
    assert find("C3k2").rule([32], args, Scaling(size=size, repeats=2)).args == expected


def test_attention_over_another_width_than_it_gets_is_refused():
    with pytest.raises(LayerError, match="got 96 input channels for 128 output channels"):
        find("C2PSA").rule([96], [128], Scaling())


COUNTS = {"n": 2_624_080, "s": 9_458_752, "m": 20_114_688, "l": 25_372_160, "x": 56_966_176}


@pytest.mark.parametrize("size", COUNTS)
def test_every_size_has_its_published_count(size):
    with torch.device("meta"):
        model = build_model(f"yolo11{size}.yaml", imgsz=(64, 64))
    assert parameters(model) == COUNTS[size]
    assert model.strides == (8, 16, 32)


@needs_golden
@pytest.mark.parametrize("name", ["yolo11n", "yolo11m"])
def test_layout_and_outputs_are_the_published_ones(name):
    model = build_model(name, imgsz=(64, 64))
    assert layout(model) == read_json(f"{name}.keys.json")
    numbers, path = golden(), str(FOLDER / f"{name}.npz")
    with torch.inference_mode():
        output = model.head.export_layout(fill(model).eval()(numbers.image(256, 320)))
    assert numbers.difference(output[:, :4], path, "boxes") < 1e-4
    assert numbers.difference(output[:, 4:], path, "scores") < 1e-4
