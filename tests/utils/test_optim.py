"""Parameter groups, state by name, schedules and warm-up against hand-made numbers."""

import pytest
import torch
from torch import nn

from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import CheckpointError, ConfigError
from utils.optim import (
    OPTIMIZERS,
    Warmup,
    build_optimizer,
    build_schedule,
    clip_gradients,
    load_optimizer_state_by_name,
    optimizer_state_by_name,
    parameter_groups,
    set_learning_rates,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.gamma = nn.Parameter(torch.ones(4))
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.conv(x)) * self.gamma[:, None, None])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.rand(2, 3, 6, 6, generator=generator)).square().mean().backward()
        optimizer.step()


def test_groups_are_weights_norms_and_biases_by_name() -> None:
    groups = {g["role"]: g["names"] for g in parameter_groups(Net())}
    assert groups == {
        "weight": ["conv.weight", "last.weight"],
        "norm": ["gamma", "norm.weight"],
        "bias": ["norm.bias", "last.bias"],
    }


def test_scales_and_tables_of_positions_do_not_decay_whatever_their_shape() -> None:
    net = nn.Module()
    net.alpha0 = nn.Parameter(torch.ones(1, 4, 1, 1))
    net.pos_embed = nn.Parameter(torch.ones(1, 9, 4))
    net.relative_position_bias_table = nn.Parameter(torch.ones(9, 4))
    net.point = nn.Conv2d(4, 1, 1, bias=False)  # a filter, though one dimension counts
    groups = {g["role"]: g["names"] for g in parameter_groups(net)}
    assert groups["norm"] == ["alpha0", "pos_embed", "relative_position_bias_table"]
    assert groups["weight"] == ["point.weight"]


def test_dense_filters_alone_may_step_orthogonally() -> None:
    net = Net()
    net.depthwise = nn.Conv2d(4, 4, 3, groups=4)
    optimizer = build_optimizer(net, "MuSGD", 0.01, 0.9, 5e-4)
    groups = {g["role"]: (g["names"], g["muon"], g["weight_decay"]) for g in optimizer.param_groups}
    assert groups["weight dense"] == (["conv.weight", "last.weight"], True, 5e-4)
    assert groups["weight"] == (["depthwise.weight"], False, 5e-4)
    assert groups["norm"][1:] == (False, 0.0) and len(optimizer.param_groups) == 4


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_weights_decay_and_the_order_of_groups_is_fixed(name: str) -> None:
    optimizer = build_optimizer(Net(), name, lr=0.01, momentum=0.9, weight_decay=5e-4)
    dense = ["weight dense"] if name == "MuSGD" else []
    assert [g["role"] for g in optimizer.param_groups] == ["weight", *dense, "norm", "bias"]
    assert [g["weight_decay"] for g in optimizer.param_groups if g["role"] != "weight dense"] == [
        5e-4,
        0,
        0,
    ]
    assert all(g["initial_lr"] == 0.01 for g in optimizer.param_groups)
    momentum = optimizer.param_groups[0]
    assert (momentum["momentum"] if "SGD" in name else momentum["betas"][0]) == 0.9


def test_frozen_parameters_are_left_out_and_empty_groups_stay() -> None:
    model = Net()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith("last")
    optimizer = build_optimizer(model, "SGD", 0.01, 0.9, 0.0)
    assert [g["names"] for g in optimizer.param_groups] == [["last.weight"], [], ["last.bias"]]
    train(model, optimizer, 1, 0)


def test_a_wrong_name_and_a_frozen_model_are_user_errors() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'AdamW'"):
        build_optimizer(Net(), "AdmW", 0.01, 0.9, 0.0)
    with pytest.raises(ConfigError, match="every parameter is frozen"):
        build_optimizer(Net().requires_grad_(False), "SGD", 0.01, 0.9, 0.0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_training_equals_straight_training_bit_for_bit(name: str, tmp_path) -> None:
    straight = Net()
    start = {k: v.clone() for k, v in straight.state_dict().items()}
    optimizer = build_optimizer(straight, name, 0.01, 0.9, 5e-4)
    train(straight, optimizer, 3, seed=1)
    state = {"model": straight.state_dict(), "optimizer": optimizer_state_by_name(optimizer)}
    save_checkpoint(tmp_path / "a.pt", state)
    train(straight, optimizer, 3, seed=2)

    resumed = Net()
    resumed.load_state_dict(start)
    content = load_checkpoint(tmp_path / "a.pt")
    resumed.load_state_dict(content["model"])
    optimizer = build_optimizer(resumed, name, 0.01, 0.9, 5e-4)
    assert load_optimizer_state_by_name(optimizer, content["optimizer"]) == []
    train(resumed, optimizer, 3, seed=2)
    for key, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_state_finds_its_parameter_when_the_groups_change() -> None:
    model = Net()
    optimizer = build_optimizer(model, "SGD", 0.01, 0.9, 0.0)
    train(model, optimizer, 2, 0)
    saved = optimizer_state_by_name(optimizer)
    model.conv.requires_grad_(False)  # every index after it shifts
    fresh = build_optimizer(model, "SGD", 0.01, 0.9, 0.0)
    assert load_optimizer_state_by_name(fresh, saved) == []
    buffer = fresh.state[model.last.weight]["momentum_buffer"]
    assert torch.equal(buffer, saved["state"]["last.weight"]["momentum_buffer"])
    model.conv.requires_grad_(True)
    del saved["state"]["conv.weight"]
    fresh = build_optimizer(model, "SGD", 0.01, 0.9, 0.0)
    assert load_optimizer_state_by_name(fresh, saved) == ["conv.weight"]


def test_state_of_another_model_or_optimiser_is_refused() -> None:
    model = Net()
    optimizer = build_optimizer(model, "SGD", 0.01, 0.9, 0.0)
    train(model, optimizer, 1, 0)
    saved = optimizer_state_by_name(optimizer)
    with pytest.raises(CheckpointError, match="holds SGD, the run uses AdamW"):
        load_optimizer_state_by_name(build_optimizer(model, "AdamW", 0.01, 0.9, 0.0), saved)
    saved["state"]["last.weight"]["momentum_buffer"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"last\.weight.*got shape \(3,\)"):
        load_optimizer_state_by_name(optimizer, saved)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("linear", [1.0, 0.775, 0.55, 0.1]),
        ("cosine", [1.0, 0.1 + 0.9 * (1 + 2**-0.5) / 2, 0.55, 0.1]),
        ("flat_cosine", [1.0, 1.0, 1.0, 0.1]),
        ("fixed", [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_schedules_at_the_start_quarter_half_and_end(kind: str, expected: list[float]) -> None:
    schedule = build_schedule(kind, epochs=100, lrf=0.1)
    assert [schedule(e) for e in (0, 25, 50, 100)] == pytest.approx(expected)


def test_flat_cosine_is_half_way_down_at_three_quarters() -> None:
    assert build_schedule("flat_cosine", 100, 0.1)(75) == pytest.approx(0.55)


def test_flat_cosine_may_begin_later_and_end_before_the_training() -> None:
    """DEIM's plan: half of the training, and the last tenth, constant."""
    schedule = build_schedule("flat_cosine", 100, 0.5, flat=0.5, end=0.9)
    epochs, expected = (
        (0, 50, 60, 70, 80, 89, 90, 99),
        (1, 1, 0.926777, 0.75, 0.573223, 0.500771, 0.5, 0.5),
    )
    assert [schedule(epoch) for epoch in epochs] == pytest.approx(expected, abs=1e-6)
    cut = build_schedule("flat_cosine", 100, 0.5, flat=0.9, end=0.9)
    assert [cut(epoch) for epoch in (90, 91)] == [1, 0.5]


def test_a_warm_up_may_rise_as_the_square_of_the_time() -> None:
    warmup = Warmup(iterations=10, bias_lr=0.0, momentum=0.9, power=2.0)
    assert [warmup.lr(i, "weight", 1.0) for i in (0, 5, 10, 11)] == pytest.approx([0, 0.25, 1, 1])


def test_unknown_schedule_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'cosine'"):
        build_schedule("cosin", 10, 0.1)


def test_warm_up_half_way_by_hand() -> None:
    optimizer = build_optimizer(Net(), "SGD", lr=0.01, momentum=0.937, weight_decay=0.0)
    warmup = Warmup(iterations=100, bias_lr=0.1, momentum=0.8)
    set_learning_rates(optimizer, factor=0.5, iteration=50, warmup=warmup, momentum=0.937)
    rates = {g["role"]: g["lr"] for g in optimizer.param_groups}
    # weights 0 -> 0.005, biases 0.1 -> 0.005
    assert rates == pytest.approx({"weight": 0.0025, "norm": 0.0025, "bias": 0.0525})
    assert optimizer.param_groups[0]["momentum"] == pytest.approx(0.8685)
    set_learning_rates(optimizer, factor=0.5, iteration=101, warmup=warmup, momentum=0.937)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.005] * 3)
    assert optimizer.param_groups[0]["momentum"] == 0.937


def test_accumulation_grows_from_one_to_its_target() -> None:
    warmup = Warmup(iterations=100, bias_lr=0.1, momentum=0.8)
    assert [warmup.accumulate(i, 4.0) for i in (0, 50, 100, 500)] == [1, 2, 4, 4]
    assert warmup.accumulate(500, 0.5) == 1


def test_no_warm_up_starts_at_the_target() -> None:
    warmup = Warmup(iterations=0, bias_lr=0.1, momentum=0.8)
    assert warmup.lr(0, "bias", 0.01) == 0.01
    assert not warmup.is_active(0)


def test_clipping_scales_gradients_to_the_norm() -> None:
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    assert clip_gradients(layer, 1.0).item() == pytest.approx(5.0)
    assert torch.allclose(layer.weight.grad, torch.tensor([[0.6, 0.8]]), atol=1e-4)
