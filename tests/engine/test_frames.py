"""Frames in batches: which go together, and that a batch finds what single frames give."""

from __future__ import annotations

import numpy as np
import torch
from tiny_models import tiny_model

from data.videos import Frame
from deploy.backends import model_backend
from engine.frames import detect, fit, in_batches
from engine.options import Thresholds


def frames(*sizes: tuple[int, int]) -> list[Frame]:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    return [Frame(f"{k}.png", picture, 0, None) for k, picture in enumerate(pictures)]


def test_frames_of_one_shape_go_together_in_order():
    """By hand, into 64 x 64 in steps of 32: 60 x 120 becomes 32 x 64, 64 x 64 stays, 30 x 60 becomes 32 x 64."""
    given = frames((60, 120), (60, 120), (60, 120), (64, 64), (30, 60))
    batches = list(in_batches((fit(frame, (64, 64), 32) for frame in given), 2))
    assert [[f.frame.path[0] for f in batch] for batch in batches] == [
        ["0", "1"],
        ["2"],
        ["3"],
        ["4"],
    ]
    assert [batch[0].image.shape[:2] for batch in batches] == [
        (32, 64),
        (32, 64),
        (64, 64),
        (32, 64),
    ]


def test_a_batch_finds_what_its_frames_give_alone_in_their_own_pixels():
    model, limits = model_backend(tiny_model("channels")), Thresholds(0.01, 0.45, 20)
    fitted = [fit(frame, (64, 96)) for frame in frames((128, 192), (64, 96))]
    together = detect(model, fitted, limits)
    alone = [detect(model, [one], limits)[0] for one in fitted]
    assert all(len(found.scores) > 3 for found in together)
    for found, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(found.boxes, expected.boxes, rtol=0, atol=1e-3)
        assert found.labels.tolist() == expected.labels.tolist()
    assert together[0].boxes.max() > 96  # twice the network's pixels
