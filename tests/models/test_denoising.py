"""Denoising switched off, in the YAML or by the recipe."""

from __future__ import annotations

import pytest
import torch

from models.heads.rtdetr import RTDETRDecoder
from utils.structures import Targets


@pytest.mark.parametrize("built_with", [0, 4])
def test_denoising_switched_off_by_the_recipe_leaves_every_parameter_a_gradient(built_with: int):
    torch.manual_seed(0)
    head = RTDETRDecoder(
        2, [8], hidden=32, num_queries=5, num_layers=1, feedforward=16, num_denoising=built_with
    )
    head.num_denoising = 4 - built_with
    targets = Targets(torch.tensor([0]), torch.tensor([1]), torch.tensor([[1.0, 1, 20, 20]]))
    raw = head.train()([torch.rand(1, 8, 4, 4)], targets)
    assert raw.denoising is None
    (
        raw.logits.sum() + raw.boxes.sum() + raw.encoder_logits.sum() + raw.encoder_boxes.sum()
    ).backward()
    assert [name for name, p in head.named_parameters() if p.grad is None] == []
