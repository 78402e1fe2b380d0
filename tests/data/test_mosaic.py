"""Objects stay inside their boxes when pictures are put together."""

from __future__ import annotations

import numpy as np
import pytest

from data.mosaic import mixup, mosaic4, mosaic9
from data.transforms import FILL, Picture

SIZE = (48, 64)


def coloured(number: int, size: tuple[int, int] = SIZE) -> Picture:
    """A rectangle of a colour of its own on dark ground; label and red value tell which."""
    image = np.full((*size, 3), 20, dtype=np.uint8)
    box = [size[1] // 4, size[0] // 4, size[1] // 4 * 3, size[0] // 4 * 3]
    image[box[1] : box[3], box[0] : box[2]] = (130 + 10 * number, 0, 0)
    return Picture(image, np.array([number]), np.array([box], dtype=np.float32))


def bounds_of(image: np.ndarray, number: int) -> list[int]:
    inside = (image[..., 0] == 130 + 10 * number) & (image[..., 1] == 0)
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] if len(rows) else []


@pytest.mark.parametrize(("join", "count"), [(mosaic4, 4), (mosaic9, 9)])
def test_every_box_bounds_exactly_its_pixels(join, count):
    rng = np.random.default_rng(0)
    seen = 0
    for _ in range(25):
        shapes = [SIZE if rng.random() < 0.5 else (48, 40) for _ in range(count)]
        pictures = [coloured(k, shape) for k, shape in enumerate(shapes)]
        result = join(pictures, SIZE, rng)
        assert result.image.shape == (96, 128, 3)
        for label, box in zip(result.labels, result.boxes, strict=True):
            assert box.tolist() == bounds_of(result.image, int(label))
            seen += 1
        lost = set(range(count)) - set(result.labels.tolist())
        for label in lost:
            box = bounds_of(result.image, label)
            area = (box[2] - box[0]) * (box[3] - box[1]) if box else 0
            whole = (shapes[label][0] // 2) * (shapes[label][1] // 2)
            thin = bool(box) and min(box[2] - box[0], box[3] - box[1]) <= 2
            assert thin or area < 0.11 * whole, "an object that is visible lost its box"
    assert seen > 25 * count * 0.4


def test_four_pictures_meet_in_one_point_of_the_middle_half():
    rng = np.random.default_rng(1)
    for _ in range(20):
        result = mosaic4([coloured(k) for k in range(4)], SIZE, rng)
        is_ground = (result.image == FILL).all(axis=2)
        rows = np.flatnonzero(~is_ground.all(axis=1))
        columns = np.flatnonzero(~is_ground.all(axis=0))
        # The pictures together are 2 x the size, less what the canvas cuts off.
        assert is_ground[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].sum() == 0
        assert len(rows) >= 72 and len(columns) >= 96


def test_nine_pictures_cover_the_whole_window():
    result = mosaic9([coloured(k) for k in range(9)], SIZE, np.random.default_rng(2))
    assert not (result.image == FILL).all(axis=2).any()


def test_a_mosaic_of_empty_pictures_has_no_boxes():
    empty = Picture(
        np.zeros((*SIZE, 3), np.uint8), np.zeros(0, np.int64), np.zeros((0, 4), np.float32)
    )
    result = mosaic4([empty] * 4, SIZE, np.random.default_rng(0))
    assert result.boxes.shape == (0, 4) and result.labels.shape == (0,)


def test_mixup_keeps_the_objects_of_both():
    first, second = coloured(0), coloured(1)
    first = first._replace(image=np.full_like(first.image, 200))
    second = second._replace(image=np.zeros_like(second.image))
    result = mixup(first, second, np.random.default_rng(0))
    assert result.labels.tolist() == [0, 1] and result.boxes.shape == (2, 4)
    assert 40 < result.image.mean() < 160 and result.image.std() == 0
