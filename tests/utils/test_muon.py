"""The orthogonal step: published values, invariants, and SGD where it is off."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from utils.muon import MuSGD, orthogonalize

GRADIENT = torch.tensor([[1.0, 2, 3], [4, 5, 6]], dtype=torch.float64)
TURNED = [[-0.5682901, 0.0577419, 0.6837740], [0.5633547, 0.4056128, 0.2478710]]


def test_five_iterations_bring_a_matrix_to_the_published_one():
    found = orthogonalize(GRADIENT)
    torch.testing.assert_close(found, torch.tensor(TURNED, dtype=torch.float64), rtol=0, atol=1e-6)
    values = torch.linalg.svdvals(found).tolist()
    assert values == pytest.approx([0.9203951, 0.7000270], abs=1e-6)
    assert torch.equal(orthogonalize(GRADIENT.T), found.T)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        (0.0, [[0.0912343, 0.0804000, 0.0695657], [0.0600242, 0.0505475, 0.0410707]]),
        (5e-4, [[0.0912338, 0.0803995, 0.0695652], [0.0600237, 0.0505470, 0.0410702]]),
    ],
)
def test_a_first_step_is_the_published_one(decay: float, expected: list[list[float]]):
    weight = nn.Parameter(torch.full((2, 3), 0.1, dtype=torch.float64))
    weight.grad = GRADIENT.clone()
    MuSGD([{"params": [weight], "muon": True}], 0.01, weight_decay=decay).step()
    found = weight.detach()
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6
    )


def test_a_group_without_it_is_sgd_with_nesterov_momentum():
    torch.manual_seed(0)
    first = nn.Parameter(torch.randn(4, 3))
    second = nn.Parameter(first.detach().clone())
    ours = MuSGD([first], 0.1, momentum=0.9)
    theirs = torch.optim.SGD([second], 0.1, momentum=0.9, nesterov=True)
    for _ in range(3):
        first.grad = torch.randn(4, 3)
        second.grad = first.grad.clone()
        ours.step()
        theirs.step()
        torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-7)


def test_a_filter_is_a_matrix_of_its_outputs_and_a_zero_gradient_stays_one():
    weight = nn.Parameter(torch.zeros(8, 4, 3, 3))
    weight.grad = torch.zeros_like(weight)
    optimizer = MuSGD([{"params": [weight], "muon": True}], 0.1, share=1.0)
    optimizer.step()
    assert not weight.any()
    weight.grad = torch.randn(8, 4, 3, 3)
    optimizer.step()
    step = weight.detach().view(8, 36) / (0.1 * 0.2 * 6)
    assert torch.linalg.svdvals(step).min() > 0.6 and torch.linalg.svdvals(step).max() < 1.3
