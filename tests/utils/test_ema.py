"""The moving average of weights."""

import copy
import math

import pytest
import torch
from torch import nn

from utils.ema import ModelEMA


def test_two_updates_by_hand() -> None:
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    ema = ModelEMA(model, decay=0.5, tau=1.0)
    expected = 0.0
    for update, value in enumerate((1.0, 3.0), start=1):
        model.weight.data.fill_(value)
        ema.update(model)
        decay = 0.5 * (1 - math.exp(-update))
        expected = decay * expected + (1 - decay) * value
        assert ema.current_decay == pytest.approx(decay)
    assert ema.model.weight.item() == pytest.approx(expected)


def test_statistics_are_averaged_and_counters_copied() -> None:
    model = nn.BatchNorm2d(2)
    ema = ModelEMA(model, decay=0.5, tau=1e-9)
    model.running_mean.fill_(4.0)
    model.num_batches_tracked.fill_(9)
    ema.update(model)
    assert ema.model.running_mean.tolist() == [2, 2]
    assert ema.model.num_batches_tracked.item() == 9


def test_a_shared_weight_is_averaged_once() -> None:
    model = nn.ModuleList([nn.Linear(1, 1, bias=False)])
    model.append(model[0])
    model[0].weight.data.fill_(0.0)
    ema = ModelEMA(model, decay=0.5, tau=1e-9)
    model[0].weight.data.fill_(4.0)
    ema.update(model)
    assert ema.model[1].weight.item() == 2


def test_the_average_is_a_copy_in_eval_mode_without_gradients() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    ema = ModelEMA(model)
    assert model.training
    assert not ema.model.training
    assert not any(p.requires_grad for p in ema.model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    before = copy.deepcopy(ema.model.state_dict())
    model[0].weight.data.add_(1)
    assert torch.equal(ema.model.state_dict()["0.weight"], before["0.weight"])


def test_saved_and_loaded_average_goes_on_the_same() -> None:
    model = nn.Linear(3, 3)
    ema = ModelEMA(model)
    ema.update(model)
    other = ModelEMA(nn.Linear(3, 3))
    other.load_state_dict(ema.state_dict())
    model.weight.data.mul_(2)
    ema.update(model)
    other.update(model)
    assert other.updates == ema.updates == 2
    assert torch.equal(other.model.weight, ema.model.weight)
