"""Letterbox numbers, boxes under flips and warps, and that boxes still bound what they bounded."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from data.transforms import (
    FILL,
    Picture,
    flip_horizontally,
    flip_vertically,
    keep_visible,
    letterbox,
    letterbox_boxes,
    random_affine,
    random_colours,
    random_flips,
    random_matrix,
    warp,
    warp_boxes,
)

COLOUR = (255, 0, 255)


def painted(size: tuple[int, int], boxes: list[list[int]]) -> Picture:
    """Magenta rectangles on black."""
    image = np.zeros((*size, 3), dtype=np.uint8)
    for left, top, right, bottom in boxes:
        image[top:bottom, left:right] = COLOUR
    labels = np.arange(len(boxes), dtype=np.int64)
    return Picture(image, labels, np.array(boxes, dtype=np.float32).reshape(-1, 4))


def bounds(image: np.ndarray) -> list[int]:
    """xyxy around the magenta pixels."""
    inside = (image[..., 0].astype(int) - image[..., 1]) > 127
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


# Original size, wanted size, stride -> result size, resized size, top, left.
LETTERBOX_ROWS = [
    ((480, 640), (320, 320), None, (320, 320), (240, 320), 40, 0),
    ((480, 640), (320, 320), 32, (256, 320), (240, 320), 8, 0),
    ((640, 480), (320, 320), 32, (320, 256), (320, 240), 0, 8),
    ((100, 200), (64, 96), None, (64, 96), (48, 96), 8, 0),
    ((200, 100), (96, 64), None, (96, 64), (96, 48), 0, 8),
    ((50, 50), (128, 64), None, (128, 64), (64, 64), 32, 0),
    ((33, 101), (64, 64), None, (64, 64), (21, 64), 21, 0),
    ((64, 64), (64, 64), 32, (64, 64), (64, 64), 0, 0),
    ((3000, 1), (64, 64), None, (64, 64), (64, 1), 0, 31),
]


@pytest.mark.parametrize(
    ("original", "size", "stride", "result", "resized", "top", "left"), LETTERBOX_ROWS
)
def test_letterbox_gives_the_numbers_worked_by_hand(
    original, size, stride, result, resized, top, left
):
    image = np.full((*original, 3), 200, dtype=np.uint8)
    padded, box = letterbox(image, size, stride=stride)
    assert padded.shape == (*result, 3)
    assert (box.height, box.width, box.top, box.left) == (*original, top, left)
    assert box.scale_y == resized[0] / original[0] and box.scale_x == resized[1] / original[1]
    assert (padded[top : top + resized[0], left : left + resized[1]] == 200).all()
    assert (padded == 200).all(axis=2).sum() == resized[0] * resized[1]
    outside = padded[(padded != 200).any(axis=2)]
    assert (outside == FILL).all()


def test_boxes_go_through_the_letterbox_and_back():
    image = np.zeros((480, 640, 3), dtype=np.uint8)
    _, box = letterbox(image, (256, 384))
    # 384 / 640 = 0.6 would need 288 rows, so 256 / 480 holds: 341 columns, 21 to the left.
    boxes = np.array([[0, 0, 640, 480], [60, 30, 120, 90]], dtype=np.float32)
    inside = letterbox_boxes(boxes, box)
    np.testing.assert_allclose(inside[0], [21, 0, 21 + 341, 256], atol=1e-4)
    np.testing.assert_allclose(inside[1, 1], 16, atol=1e-5)
    np.testing.assert_allclose(box.restore(torch.from_numpy(inside)).numpy(), boxes, atol=1e-3)


def test_flips_mirror_boxes_and_pixels():
    picture = painted((20, 30), [[2, 3, 10, 8]])
    mirrored, turned = flip_horizontally(picture), flip_vertically(picture)
    assert mirrored.boxes.tolist() == [[20, 3, 28, 8]] and bounds(mirrored.image) == [20, 3, 28, 8]
    assert turned.boxes.tolist() == [[2, 12, 10, 17]] and bounds(turned.image) == [2, 12, 10, 17]
    assert picture.boxes.tolist() == [[2, 3, 10, 8]], "the input was changed"


def test_flips_follow_their_probabilities():
    picture = painted((20, 30), [[2, 3, 10, 8]])
    rng = np.random.default_rng(0)
    always = random_flips(picture, {"fliplr": 1.0, "flipud": 1.0}, rng)
    never = random_flips(picture, {}, rng)
    assert always.boxes.tolist() == [[20, 12, 28, 17]]
    assert never.boxes.tolist() == picture.boxes.tolist()


def test_warp_boxes_agree_with_a_matrix_worked_by_hand():
    turn_by_90 = np.array([[0.0, -1, 100], [1, 0, 0], [0, 0, 1]])
    boxes = np.array([[10, 20, 30, 50]], dtype=np.float32)
    assert warp_boxes(boxes, turn_by_90).tolist() == [[50, 10, 80, 30]]
    scale_and_shift = np.array([[2.0, 0, 5], [0, 3, -6], [0, 0, 1]])
    assert warp_boxes(boxes, scale_and_shift).tolist() == [[25, 54, 65, 144]]
    tilt = np.array([[1.0, 0, 0], [0, 1, 0], [0.1, 0, 1]])
    # (10, 20) -> (10, 20) / 2, (30, 50) -> (30, 50) / 4, and so on.
    assert warp_boxes(boxes, tilt).tolist() == [[5, 5, 7.5, 25]]


def test_a_centred_matrix_without_strength_only_recentres():
    matrix = random_matrix((40, 60), (20, 30), {}, np.random.default_rng(0))
    np.testing.assert_allclose(matrix, [[1, 0, -15], [0, 1, -10], [0, 0, 1]])


def test_shifts_are_parts_of_the_side_that_they_go_along():
    shifts = [
        random_matrix((40, 60), (20, 30), {"translate": 0.5}, np.random.default_rng(seed))[:2, 2]
        for seed in range(40)
    ]
    x, y = np.abs(np.array(shifts) - (-15, -10)).max(0)
    assert 10 < x <= 15 and 5 < y <= 10


@pytest.mark.parametrize(
    "hyp",
    [
        {"translate": 0.2},
        {"scale": 0.5},
        {"scale": 0.4, "translate": 0.2},
        {"shear": 8},
        {"perspective": 0.0008},
        {"degrees": 90},
    ],
    ids=lambda hyp: "+".join(hyp),
)
def test_boxes_bound_their_pixels_after_a_warp(hyp):
    """Under turns and shears a box may only be larger than the pixels, never smaller."""
    rng = np.random.default_rng(3)
    is_exact = not {"shear", "degrees", "perspective"} & set(hyp)
    compared = 0
    for _ in range(30):
        picture = painted((120, 160), [[60, 40, 100, 80]])
        warped = random_affine(picture, (128, 96), hyp, rng)
        if not len(warped.boxes):
            continue
        got, box = bounds(warped.image), warped.boxes[0]
        assert (box[:2] <= np.array(got[:2]) + 1.01).all()
        assert (box[2:] >= np.array(got[2:]) - 1.01).all()
        if is_exact:
            np.testing.assert_allclose(box, got, atol=0.75)
        compared += 1
    assert compared > 20


def test_half_pixels_are_kept_when_scaling_by_two():
    picture = painted((20, 20), [[5, 5, 15, 15]])
    doubled = warp(picture, np.diag([2.0, 2.0, 1.0]), (40, 40))
    assert bounds(doubled.image) == [10, 10, 30, 30]
    assert doubled.boxes.tolist() == [[10, 10, 30, 30]]


# Box before the cut, box after it, whether it is kept.
VISIBLE_ROWS = [
    ([0, 0, 10, 10], [0, 0, 10, 10], True),
    ([-90, 0, 10, 10], [0, 0, 10, 10], True),
    ([-91, 0, 10, 10], [0, 0, 10, 10], False),
    ([0, 0, 10, 10], [0, 0, 2, 10], False),
    ([0, 0, 10, 10], [0, 0, 2.1, 10], True),
    ([0, 0, 300, 2.5], [0, 0, 300, 2.5], True),
    ([0, 0, 400, 2.5], [0, 0, 300, 2.5], False),
    ([0, 0, 240, 2.5], [0, 0, 240, 2.5], True),
    ([5, 5, 5, 9], [5, 5, 5, 9], False),
]


@pytest.mark.parametrize(("before", "after", "kept"), VISIBLE_ROWS)
def test_slivers_are_dropped(before, after, kept):
    got = keep_visible(np.array([before], np.float32), np.array([after], np.float32))
    assert got.tolist() == [kept]


def test_pictures_without_objects_pass_everything():
    picture = painted((32, 32), [])
    hyp = {"degrees": 20, "scale": 0.5, "fliplr": 1.0, "hsv_h": 0.1, "perspective": 0.001}
    rng = np.random.default_rng(0)
    result = random_flips(random_affine(picture, (32, 64), hyp, rng), hyp, rng)
    assert result.boxes.shape == (0, 4) and result.image.shape == (32, 64, 3)
    assert random_colours(result.image, hyp, rng).shape == (32, 64, 3)


def test_colours_change_only_what_their_strength_allows():
    image = np.random.default_rng(0).integers(30, 200, (16, 16, 3), dtype=np.uint8)
    assert (random_colours(image, {}, np.random.default_rng(1)) == image).all()
    brighter = random_colours(image, {"hsv_v": 0.5}, np.random.default_rng(1))
    before, after = (cv2.cvtColor(x, cv2.COLOR_RGB2HSV).astype(int) for x in (image, brighter))
    factor = after[..., 2].mean() / before[..., 2].mean()
    assert 0.5 <= factor <= 1.5 and factor != pytest.approx(1, abs=0.01)
    # Hue survives up to the rounding of 8 bits; it is a circle of 180.
    turned = np.abs(after[..., 0] - before[..., 0])
    assert np.median(np.minimum(turned, 180 - turned)) <= 2


def test_hue_is_turned_on_its_circle():
    red = np.full((2, 2, 3), (200, 0, 0), dtype=np.uint8)
    seen, is_beyond_yellow = set(), False
    for seed in range(40):
        turned = random_colours(red, {"hsv_h": 0.5}, np.random.default_rng(seed))
        seen.add(int(np.argmax(turned[0, 0])))
        is_beyond_yellow |= turned[0, 0, 0] == 0  # a third of the circle away at least
        assert turned.max() == 200 and turned.min() == 0
    assert seen == {0, 1, 2} and is_beyond_yellow
