"""MobileOne: published counts, exact folding, and timm's whole S0 built from our blocks."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn

from models.modules.mobileone import MobileOne, MobileOneBlock, SqueezeExcite
from models.registry import LayerError, Scaling, find
from models.timm.mobileone import with_fast_branches

# in, [out, blocks, branches, use_se, num_se], parameters while training, parameters after folding
STAGES = [
    (64, [64, 2, 4, False, 0], 40_192, 9_600),
    (64, [128, 8, 4, False, 0], 548_416, 133_504),
    (128, [256, 10, 4, True, 1], 2_651_296, 666_400),
    (256, [512, 1, 4, True, 1], 582_192, 175_920),
]


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and statistic a value that a mistake in folding cannot hide behind."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(noise + 0.5 if name.endswith("running_var") else (noise - 0.5))
    return module


@pytest.mark.parametrize(("in_channels", "args", "trained", "folded"), STAGES)
def test_a_stage_has_the_published_parameters_before_and_after_folding(
    in_channels, args, trained, folded
):
    stage = MobileOne(in_channels, *args)
    assert count(stage) == trained
    for module in stage.modules():
        if isinstance(module, MobileOneBlock):
            module.reparameterize()
    assert count(stage) == folded


def test_the_row_becomes_in_and_scaled_out_and_keeps_its_other_arguments():
    rule = find("MobileOne").rule
    plan = rule([64], [128, 8, 4, False, 0], Scaling(width=0.5))
    assert plan.args == [64, 64, 8, 4, False, 0]
    assert plan.channels == 64
    with pytest.raises(LayerError, match="repeats 3"):
        rule([64], [128, 8, 4, False, 0], Scaling(repeats=3))


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 4, 16])
@pytest.mark.parametrize("use_se", [False, True])
@pytest.mark.parametrize("out_channels", [16, 32])
def test_folding_is_exact_in_float64(kernel_size, stride, dilation, groups, use_se, out_channels):
    block = MobileOneBlock(16, out_channels, kernel_size, stride, dilation, groups, 2, use_se)
    randomise(block.double()).eval()
    x = torch.randn(2, 16, 13, 18, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    before = block(x)
    block.reparameterize()
    after = block(x)
    assert before.abs().max() > 0.1
    assert (before - after).abs().max() < 1e-12


def test_folding_twice_changes_nothing_and_leaves_one_convolution():
    block = randomise(MobileOneBlock(16, 16, use_se=True)).eval()
    block.reparameterize()
    state = copy.deepcopy(block.state_dict())
    block.reparameterize()
    assert sorted(state) == [
        "conv.bias", "conv.weight", "se.expand.bias", "se.expand.weight", "se.reduce.bias", "se.reduce.weight",
    ]  # fmt: skip
    assert all(torch.equal(state[key], value) for key, value in block.state_dict().items())
    leftovers = [key for key, value in vars(block).items() if isinstance(value, Tensor)]
    assert not leftovers


def test_gradients_still_flow_after_folding():
    stage = randomise(MobileOne(16, 32, 2, 4, True, 1))
    for block in stage:
        block.reparameterize()
    assert all(p.requires_grad and p.is_leaf for p in stage.parameters())
    x = torch.randn(2, 16, 16, 16, requires_grad=True)
    stage(x).square().sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in stage.parameters())


def test_a_frozen_block_stays_frozen_when_folded():
    block = MobileOneBlock(8, 8).requires_grad_(False)
    block.reparameterize()
    assert not any(p.requires_grad for p in block.parameters())


def test_every_parameter_gets_a_gradient_while_training():
    stage = MobileOne(16, 24, 2, 2, True, 2).train()
    stage(torch.randn(2, 16, 16, 24)).square().sum().backward()
    assert [name for name, p in stage.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("channels", [1, 8, 15, 16, 64])
def test_squeeze_and_excitation_works_for_any_width_and_size(channels):
    module = SqueezeExcite(channels)
    for size in ((1, 1), (7, 12), (40, 24)):
        x = torch.randn(2, channels, *size)
        gate = torch.sigmoid(module.expand(torch.relu(module.reduce(x.mean((2, 3), keepdim=True)))))
        assert torch.allclose(module(x), x * gate)
    assert module.reduce.out_channels == max(channels // 16, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MobileOneBlock(8, 8, kernel_size=4), "kernel size 4"),
        (lambda: MobileOneBlock(8, 8, num_branches=0), "0 branches"),
        (lambda: MobileOne(8, 8, 0), "0 blocks"),
        (lambda: MobileOne(8, 8, 2, 4, True, 3), "3 with SE"),
    ],
)
def test_impossible_arguments_are_named(make, message):
    with pytest.raises(LayerError, match=message):
        make()


class MobileOneS0(nn.Module):
    """The whole S0 of the paper from our stages: stem 48 with one branch, widths 48, 128, 256, 1024 with four."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = MobileOneBlock(3, 48, 3, 2, num_branches=1)
        widths, depths = (48, 48, 128, 256, 1024), (2, 8, 10, 1)
        self.stages = nn.ModuleList(
            MobileOne(i, o, n) for i, o, n in zip(widths, widths[1:], depths)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [self.stem(x)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps


def timm_key(ours: str) -> str:
    """The name of our parameter in timm's MobileOne."""
    for pattern, text in (
        (r"\.branches\.", ".conv_kxk."),
        (r"\.scale\.", ".conv_scale."),
        (r"\.skip\.", ".identity."),
    ):
        ours = re.sub(pattern, text, ours)
    return ours


def test_s0_from_our_blocks_equals_timm_given_its_weights():
    timm = pytest.importorskip("timm")
    theirs = randomise(timm.create_model("mobileone_s0", features_only=True)).eval()
    for tensor in theirs.parameters():
        if tensor.ndim == 4:  # keep the signal of a deep random network within float32
            tensor.data.normal_(
                0,
                (0.4 / tensor[0].numel()) ** 0.5,
                generator=torch.Generator().manual_seed(tensor.numel()),
            )
    source = {
        key.replace("stages_", "stages."): value for key, value in theirs.state_dict().items()
    }
    ours = MobileOneS0().eval()
    ours.load_state_dict({key: source[timm_key(key)] for key in ours.state_dict()})
    assert len(ours.state_dict()) == len(source)
    image = torch.rand(1, 3, 96, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for mine, other in zip(ours(image), theirs(image), strict=True):
            assert mine.shape == other.shape
            assert other.std() > 1e-2
            assert (mine - other).abs().max() < 1e-4


# --- training -------------------------------------------------------------------------------------


def stats_and_gradients(block: nn.Module, forward, x: Tensor) -> dict[str, Tensor]:
    """What a training step of `forward` leaves: output, buffers, and gradients, those of parameters in one tensor."""
    x = x.clone().requires_grad_()
    y = forward(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    grads = torch.cat([p.grad.flatten() for p in block.parameters() if p.grad is not None])
    buffers = copy.deepcopy(dict(block.named_buffers()))
    return {"y": y.detach(), "grad x": x.grad, "grads": grads, **buffers}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], limit: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        largest = value.abs().max().clamp(min=1e-30)
        assert (found[name] - value).abs().max() <= limit * largest, name


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    "shape", [(6, 6, 1, 1, 1), (6, 9, 1, 1, 1), (6, 6, 3, 1, 6), (6, 6, 3, 2, 6), (3, 8, 3, 2, 1)]
)
def test_a_training_step_is_that_of_one_branch_after_the_other(shape, dtype, limit):
    in_channels, out_channels, kernel_size, stride, groups = shape
    block = MobileOneBlock(in_channels, out_channels, kernel_size, stride, 1, groups, 3)
    block = randomise(block).to(dtype).train()
    plain = copy.deepcopy(block)

    def one_by_one(x: Tensor) -> Tensor:
        paths = [*plain.branches, *filter(None, [plain.scale, plain.skip])]
        for path in plain.modules():
            if isinstance(path, nn.Conv2d):
                path.__class__ = nn.Conv2d
        return sum(path(x) for path in paths).relu()

    x = (
        torch.rand(3, in_channels, 10, 8, dtype=dtype, generator=torch.Generator().manual_seed(1))
        + 1
    )
    assert_same(
        stats_and_gradients(block, block, x), stats_and_gradients(plain, one_by_one, x), limit
    )


def test_shapes_are_found_without_numbers_while_training():
    with torch.device("meta"):
        y = MobileOneBlock(4, 8, 1).train()(torch.empty(2, 4, 6, 6))
    assert y.shape == (2, 8, 6, 6)


def test_branches_that_do_not_take_statistics_are_summed_as_they_are():
    block = randomise(MobileOneBlock(4, 4, 1)).train()
    block.branches[1].bn.eval()
    kept = block.branches[1].bn.running_mean.clone()
    x = torch.rand(4, 4, 6, 6)
    expected = sum(path(x) for path in (*copy.deepcopy(block).branches, copy.deepcopy(block).skip))
    assert torch.equal(block(x), expected.relu())
    assert torch.equal(block.branches[1].bn.running_mean, kept)


def test_timms_mobileone_trains_as_timm_has_it():
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("mobileone_s0", features_only=True, out_indices=(0, 1))
    theirs = theirs.double().train()
    ours = with_fast_branches(copy.deepcopy(theirs))
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    found, expected = (
        stats_and_gradients(net, lambda x, net=net: net(x)[-1], x) for net in (ours, theirs)
    )
    assert_same(found, expected, 1e-9)
    reparameterize_model = pytest.importorskip("timm.utils").reparameterize_model
    ours.eval(), theirs.eval()
    reparameterize_model(ours, inplace=True)
    assert (ours(x)[-1] - theirs(x)[-1]).abs().max() < 1e-9
    assert [name for name, _ in ours.named_parameters() if "kxk" in name or "scale" in name] == []
