"""Box arithmetic against numbers worked out by hand."""

import math

import pytest
import torch

from utils import boxes as b


def test_conversions_of_one_box_are_the_ones_drawn_on_paper() -> None:
    xyxy = torch.tensor([10.0, 20.0, 40.0, 60.0])
    assert b.xyxy_to_cxcywh(xyxy).tolist() == [25, 40, 30, 40]
    assert b.cxcywh_to_xyxy(torch.tensor([25.0, 40, 30, 40])).tolist() == xyxy.tolist()


def test_conversions_keep_leading_dimensions_and_emptiness() -> None:
    assert b.xyxy_to_cxcywh(torch.zeros(2, 3, 4)).shape == (2, 3, 4)
    assert b.cxcywh_to_xyxy(torch.zeros(0, 4)).shape == (0, 4)


def test_clipping_takes_height_then_width() -> None:
    clipped = b.clip_boxes(torch.tensor([[-5.0, -5.0, 500.0, 500.0]]), (100, 200))
    assert clipped.tolist() == [[0, 0, 200, 100]]


def test_area_of_a_box_turned_inside_out_is_zero() -> None:
    assert b.box_area(torch.tensor([[0.0, 0, 3, 4], [3.0, 0, 0, 4]])).tolist() == [12, 0]


def test_pairwise_iou_of_a_hand_worked_matrix() -> None:
    rows = torch.tensor([[0.0, 0, 10, 10], [5.0, 5, 15, 15]])
    columns = torch.tensor([[0.0, 0, 10, 10], [0.0, 0, 10, 5], [20.0, 20, 30, 30]])
    # second row: 25 / (100 + 100 - 25); nothing: touches in no area; nothing
    expected = torch.tensor([[1.0, 0.5, 0.0], [25 / 175, 0.0, 0.0]])
    assert torch.allclose(b.pairwise_iou(rows, columns), expected)


def test_boxes_without_area_overlap_nothing_and_are_not_nan() -> None:
    point = torch.zeros(1, 4)
    assert b.pairwise_iou(point, point).tolist() == [[0]]
    assert torch.isfinite(b.complete_iou(point, point)).all()
    assert torch.isfinite(b.generalized_iou(point, point)).all()


def test_pairwise_iou_of_no_boxes_has_the_right_shape() -> None:
    assert b.pairwise_iou(torch.zeros(0, 4), torch.zeros(3, 4)).shape == (0, 3)
    assert b.pairwise_iou(torch.zeros(2, 5, 4), torch.zeros(2, 3, 4)).shape == (2, 5, 3)


def test_generalized_iou_by_hand() -> None:
    first = torch.tensor([[0.0, 0, 2, 2], [0.0, 0, 1, 1], [0.0, 0, 2, 2]])
    second = torch.tensor([[1.0, 1, 3, 3], [2.0, 0, 3, 1], [0.0, 0, 2, 2]])
    # 1/7 - (9-7)/9; disjoint: 0 - (3-2)/3; equal: 1
    expected = torch.tensor([1 / 7 - 2 / 9, -1 / 3, 1.0])
    assert torch.allclose(b.generalized_iou(first, second), expected, atol=1e-6)


def test_complete_iou_by_hand() -> None:
    first, second = torch.tensor([0.0, 0, 2, 2]), torch.tensor([1.0, 0, 2, 2])
    iou = 2 / 4
    distance = 0.5**2 / (2**2 + 2**2)
    shape = 4 / math.pi**2 * (math.atan(1 / 2) - math.atan(1)) ** 2
    alpha = shape / (1 - iou + shape)
    expected = torch.tensor(iou - distance - alpha * shape)
    assert torch.allclose(b.complete_iou(first, second), expected, atol=1e-6)


def test_alpha_of_complete_iou_takes_no_gradient() -> None:
    # only width matters here, so d(CIoU)/d(x2) is the sum of three hand-made derivatives
    box = torch.tensor([0.0, 0, 2, 4], dtype=torch.float64, requires_grad=True)
    truth = torch.tensor([0.0, 0, 4, 4], dtype=torch.float64)
    b.complete_iou(box, truth).backward()
    angle = math.atan(1 / 2) - math.atan(1)
    shape = 4 / math.pi**2 * angle**2
    alpha = shape / (1 - 0.5 + shape)
    d_iou = 4 / 16
    d_distance = -2 * 1 * 0.5 / 32  # centres 1 apart, the diagonal does not move
    d_shape = 8 / math.pi**2 * angle * (1 / 4) / (1 + 1 / 4)
    expected = d_iou - d_distance - alpha * d_shape
    assert box.grad is not None
    assert box.grad[2].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("function", [b.generalized_iou, b.complete_iou, b.elementwise_iou])
def test_elementwise_overlaps_broadcast_and_widen_half_precision(function) -> None:
    many, one = torch.rand(2, 5, 4).half() * 100, torch.tensor([0.0, 0, 300, 300]).half()
    result = function(many, one)
    assert result.shape == (2, 5)
    assert result.dtype == torch.float32
    assert torch.isfinite(result).all()


def test_overlaps_agree_with_torchvision_on_random_boxes() -> None:
    ops = pytest.importorskip("torchvision.ops")
    corner = torch.rand(2, 40, 2, generator=torch.Generator().manual_seed(0)) * 50
    size = torch.rand(2, 40, 2, generator=torch.Generator().manual_seed(1)) * 30 + 1
    first, second = torch.cat((corner, corner + size), -1)
    assert torch.allclose(b.pairwise_iou(first, second), ops.box_iou(first, second), atol=1e-6)
    expected = 1 - ops.generalized_box_iou_loss(first, second)
    assert torch.allclose(b.generalized_iou(first, second), expected, atol=1e-6)
    expected = 1 - ops.complete_box_iou_loss(first, second)
    assert torch.allclose(b.complete_iou(first, second), expected, atol=1e-5)
