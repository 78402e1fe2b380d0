"""Folding: exact where the data flow allows it, hands off where it does not, and checked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.fusing import pairs
from models.reparam import FuseError, FuseReport, _rounded, fuse, reparameterize_model

SAMPLE = torch.rand(2, 3, 12, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def same_weights() -> None:
    """With some random weights a ReLU gives nothing and hides a planted error."""
    torch.manual_seed(0)


def shake(module: nn.Module) -> nn.Module:
    """Give every norm statistics and weights that matter."""
    generator = torch.Generator().manual_seed(2)
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None:
            for tensor, low in ((norm.running_mean, -0.5), (norm.running_var, 0.5)):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)
            for tensor, low in ((norm.weight, 0.5), (norm.bias, -0.5)):
                if tensor is not None:
                    tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + low)
    return module


class Net(nn.Module):
    """Parts by name, and how they are called."""

    def __init__(self, run: Callable[[Net, Tensor], object], **parts: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            self.add_module(name, part)
        shake(self)

    def forward(self, x: Tensor) -> object:
        return self.run(self, x)


def fold(net: nn.Module, sample: Tensor = SAMPLE) -> FuseReport:
    """Fuse, and compare the outputs in float32 here, apart from the self-check."""
    net.eval()
    with torch.no_grad():
        before = net(sample)
        report = fuse(net, sample=sample)
        after = net(sample)
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (before, after))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert report.difference is not None and report.difference < 1e-9
    return report


def chain(*modules: nn.Module) -> nn.Module:
    return shake(nn.Sequential(*modules))


FOLDED = {
    "conv and norm": chain(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.SiLU()),
    "conv with bias": chain(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=1e-3)),
    "grouped conv": chain(nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)),
    "norm without weights": chain(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False)),
    "two norms in a row": chain(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)),
    "transposed": chain(nn.ConvTranspose2d(3, 6, 2, 2, groups=3), nn.BatchNorm2d(6)),
    "norm before an unpadded conv": chain(nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3, groups=3)),
    "linear": chain(nn.Flatten(), nn.Linear(3 * 12 * 16, 5), nn.BatchNorm1d(5)),
    "norm before linear": chain(
        nn.Flatten(), nn.BatchNorm1d(3 * 12 * 16), nn.Linear(3 * 12 * 16, 5)
    ),
}


@pytest.mark.parametrize("name", FOLDED)
def test_every_kind_of_pair_is_folded(name: str):
    net = FOLDED[name]
    report = fold(net)
    assert report.left == {} and report.folded
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())


def test_fused_twice_is_fused_once():
    net = chain(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    first, state = fold(net), {k: v.clone() for k, v in net.state_dict().items()}
    second = fold(net)
    assert len(first.folded) == 1 and second.folded == []
    assert second.before == second.after == first.after
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_gradients_flow_through_what_was_folded_and_types_stay():
    net = chain(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    fold(net)
    net(SAMPLE).sum().backward()
    assert len(list(net.parameters())) == 2
    assert all(p.dtype == torch.float32 and p.grad is not None for p in net.parameters())


def test_inference_mode_around_it_hides_nothing_and_taints_no_parameter():
    net = chain(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU())
    with torch.inference_mode():
        report = fuse(net, sample=SAMPLE)
    assert len(report.folded) == 1 and not report.left
    net(SAMPLE).sum().backward()
    assert net[0].weight.grad is not None


def test_the_copy_is_fused_and_the_model_is_not():
    net = chain(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).train()
    fused = reparameterize_model(net, sample=SAMPLE)
    assert isinstance(net[1], nn.BatchNorm2d) and net.training
    assert not isinstance(fused[1], nn.BatchNorm2d)
    net.eval()
    torch.testing.assert_close(fused(SAMPLE), net(SAMPLE))


def conv() -> nn.Conv2d:
    return nn.Conv2d(3, 3, 3, padding=1)


def with_statistics_of_the_batch() -> nn.Module:
    return chain(conv(), nn.BatchNorm2d(3, track_running_stats=False))


class Stubborn(nn.BatchNorm2d):
    """A norm that trains for ever."""

    def train(self, mode: bool = True) -> Stubborn:
        return super().train(True)


LEFT = {
    "conv with two readers": Net(lambda n, x: n.bn(y := n.conv(x)) + y, conv=conv(), bn=nn.BatchNorm2d(3)),
    "conv read by a function": Net(
        lambda n, x: n.bn(y := n.conv(x)) + F.relu(y), conv=conv(), bn=nn.BatchNorm2d(3)
    ),
    "conv sliced": Net(
        lambda n, x: n.bn(y := n.conv(x)) + y[:, :1], conv=conv(), bn=nn.BatchNorm2d(3)
    ),
    "conv read as a number": Net(
        lambda n, x: n.bn(y := n.conv(x)) * sum(y.flatten().tolist()[:9]), conv=conv(), bn=nn.BatchNorm2d(3)
    ),
    "conv overwritten in a slice": Net(
        lambda n, x: (y := n.conv(x), y.__setitem__(0, 1.0), n.bn(y))[2], conv=conv(), bn=nn.BatchNorm2d(3)
    ),
    "conv output returned": Net(lambda n, x: (n.bn(y := n.conv(x)), y), conv=conv(), bn=nn.BatchNorm2d(3)),
    "shared conv": Net(
        lambda n, x: n.a(n.conv(x)) + n.b(n.conv(x * 2)),
        conv=conv(), a=nn.BatchNorm2d(3), b=nn.BatchNorm2d(3),
    ),
    "shared norm": Net(
        lambda n, x: n.bn(n.a(x)) + n.bn(n.b(x)), a=conv(), b=conv(), bn=nn.BatchNorm2d(3)
    ),
    "weight used elsewhere": Net(
        lambda n, x: n.bn(n.conv(x)) * n.conv.weight.sum(), conv=conv(), bn=nn.BatchNorm2d(3)
    ),
    "conv changed in place afterwards": Net(
        lambda n, x: n.bn(y := n.conv(x)) + y.add_(1), conv=conv(), bn=nn.BatchNorm2d(3)
    ),
    "activation between": Net(
        lambda n, x: n.bn(F.relu(n.conv(x))), conv=conv(), bn=nn.BatchNorm2d(3)
    ),
    "norm before a padded conv": chain(nn.BatchNorm2d(3), conv()),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_folded_is_left_alone_with_a_reason(name: str):
    report = fold(LEFT[name])
    assert report.folded == []
    assert report.left and all(report.left.values())


def test_two_layers_with_one_weight_are_left_alone():
    net = Net(lambda n, x: n.bn(n.a(x)) + n.b(x), a=conv(), b=conv(), bn=nn.BatchNorm2d(3))
    net.b.weight = net.a.weight
    assert fold(net).folded == []


def test_a_norm_on_statistics_of_the_batch_is_not_folded():
    for net in (with_statistics_of_the_batch(), chain(conv(), Stubborn(3))):
        net.eval()
        assert fuse(net, check=False, sample=SAMPLE).folded == []
        assert isinstance(net[1], nn.BatchNorm2d)


def test_a_watched_module_is_left_alone():
    net, seen = chain(conv(), nn.BatchNorm2d(3)), []
    net[0].register_forward_hook(lambda module, args, output: seen.append(output))
    assert fold(net).folded == []
    assert seen


def test_a_norm_before_a_padded_conv_folds_when_it_does_not_shift():
    net = chain(nn.BatchNorm2d(3), conv())
    net[0].bias.data.zero_()
    net[0].running_mean.zero_()
    assert fold(net).folded == ["0 + 1"]


class LayerScale(nn.Module):
    """The usual one, in place."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(shape) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.gamma)


@pytest.mark.parametrize("dropout", [False, True])
def test_layer_scale_folds_into_the_projection_before_it(dropout: bool):
    between = nn.Dropout(0.5) if dropout else nn.Identity()
    tokens = Net(
        lambda n, x: x + n.scale(n.drop(n.project(x))),
        project=nn.Linear(16, 16), drop=between, scale=LayerScale(16),
    )  # fmt: skip
    assert fold(tokens).folded == ["project + scale"]
    maps = chain(nn.Conv2d(3, 5, 1), between, LayerScale(5, 1, 1))
    assert fold(maps).folded == ["0 + 2"]


class Foreign(nn.Module):
    """Another project's convention: `fuse()` gives a new module back."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        one = nn.Conv2d(3, 4, 1)
        one.weight.copy_(self.a.weight + self.b.weight)
        one.bias.copy_(self.a.bias + self.b.bias)
        return one


class Deployable(nn.Module):
    """Another convention: in place. `error` is planted."""

    def __init__(self, error: float = 0.0) -> None:
        super().__init__()
        self.a, self.b, self.error = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), error

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if self.b is None else self.a(x) + self.b(x)

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        if self.b is not None:
            self.a.weight += self.b.weight + self.error
            self.a.bias += self.b.bias
            self.b = None


def test_foreign_protocols_are_honoured_and_what_they_leave_is_folded():
    net = chain(Foreign(), nn.BatchNorm2d(4), nn.Sequential(Deployable()))
    report = fold(net)
    assert report.reparameterized == ["0", "2.0"] and report.folded == ["0 + 1"]
    assert report.after == 2 * 4 + 8 + 20
    assert fold(net).reparameterized == []


class FixedType(nn.Module):
    """Makes its maps float32 and blurs them with a constant: float64 weights do not fit."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        blurred = nn.functional.conv2d(x.float(), torch.ones(4, 1, 3, 3) / 9, groups=4, padding=1)
        return self.linear(blurred.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("check", [True, False])
def test_code_that_insists_on_its_type_is_run_in_it(check: bool):
    net = chain(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), FixedType()).eval()
    with torch.no_grad():
        before = net(SAMPLE)
        report = fuse(net, sample=SAMPLE, check=check)
        torch.testing.assert_close(net(SAMPLE), before, rtol=1e-4, atol=1e-5)
    assert report.folded == ["0 + 1"] and (report.difference is not None) == check
    assert all(p.dtype == torch.float32 for p in net.parameters())


class Merges(nn.Module):
    """Has a method that is called like folding and does something else."""

    def fuse(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def forward(self, x: Tensor) -> Tensor:
        return self.fuse(x, x.relu())


def test_a_method_called_fuse_that_takes_maps_is_left_alone():
    assert fold(chain(conv(), Merges())).reparameterized == []


def test_a_planted_error_in_a_module_is_found_and_named():
    net = chain(Foreign(), nn.ReLU(), nn.Sequential(Deployable(error=0.01)), nn.ReLU())
    with pytest.raises(FuseError, match=r"'2\.0' \(Deployable\)"):
        fuse(net, sample=SAMPLE)


def test_a_planted_error_in_the_folding_is_found_and_named(monkeypatch: pytest.MonkeyPatch):
    true_fold, planted = pairs.fold_behind, []

    def wrong(layer: nn.Module, affine: pairs.Affine) -> None:
        true_fold(layer, affine)
        planted.append(layer)
        if len(planted) == 2:
            layer.weight.data *= 1.001

    monkeypatch.setattr(pairs, "fold_behind", wrong)
    parts = [m for i in range(3) for m in (conv(), nn.BatchNorm2d(3), nn.ReLU())]
    with pytest.raises(FuseError, match=r"'4' \(BatchNorm2d\)"):
        fuse(chain(*parts), sample=SAMPLE)


def test_what_inference_never_touches_is_removed():
    net = Net(
        lambda n, x: n.conv(x) + (n.embed(torch.zeros(1).long()).sum() if n.training else 0),
        conv=conv(), embed=nn.Embedding(4, 7),
    )  # fmt: skip
    report = fold(net)
    assert report.dropped == ["embed"]
    assert report.before - report.after == 28


def test_an_unused_module_that_is_asked_for_its_type_stays():
    net = Net(
        lambda n, x: n.conv(x).to(n.embed.weight.dtype), conv=conv(), embed=nn.Embedding(4, 7)
    )
    assert fold(net).dropped == []


@pytest.mark.parametrize("name", ["test_efficientnet", "test_byobnet", "test_mambaout", "test_vit"])
def test_timm_models_lose_their_norms(name: str):
    timm = pytest.importorskip("timm")
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    net = shake(timm.create_model(name, num_classes=5))
    report = fold(net, torch.rand(1, 3, *net.default_cfg["input_size"][1:]))
    assert not [n for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)], report.left


@pytest.mark.parametrize("width", [5, 7])
def test_a_layer_scale_is_told_along_the_right_axis_on_a_square_of_its_width(width: int):
    maps = chain(nn.Conv2d(3, 5, 1), LayerScale(5, 1, 1))
    assert fold(maps, torch.rand(1, 3, 5, width)).folded == ["0 + 1"]


def test_a_norm_and_a_layer_scale_behind_it_fold_into_one_layer():
    net = chain(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), LayerScale(5, 1, 1), nn.ReLU())
    assert fold(net).folded == ["0 + 1", "0 + 2"]


@pytest.mark.parametrize("gain", [1.0, 2000.0])
def test_rounding_is_allowed_as_far_as_a_network_amplifies_it_where_float64_cannot_be_asked(
    gain: float,
):
    def run(net: Net, x: Tensor) -> Tensor:
        x = F.conv2d(x, torch.ones(3, 1, 1, 1), groups=3)  # float32, whatever x is
        return torch.sin(gain * net.bn(net.conv(x)))

    net = Net(run, conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4)).eval()
    with torch.no_grad():
        moved = (net(SAMPLE) - net(_rounded(SAMPLE))).abs().max() / net(SAMPLE).abs().max()
    report = fuse(net, sample=SAMPLE)
    assert report.folded and report.difference is not None
    assert report.difference <= report.tolerance == pytest.approx(max(1e-4, 4 * float(moved)))
    assert (report.tolerance > 1e-4) is (gain > 1)


def test_one_rounding_moves_every_other_column_by_one_step_of_float32():
    moved = _rounded(torch.ones(1, 1, 1, 4)) - 1
    assert moved.flatten().tolist() == [-(2.0**-24), 0, -(2.0**-24), 0]
