"""Heads of YOLO11 and YOLOv9: decoding by hand, biases, the auxiliary twin, traced graphs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.heads.ddetect import DDetect, DualDDetect
from models.heads.detect import build_detect
from models.heads.dfl import DFL, DFLDetect, DFLRaw, anchor_points
from models.registry import LayerError, Scaling, find


def maps(channels: list[int], sizes: list[tuple[int, int]], batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, c, *size, generator=generator)
        for c, size in zip(channels, sizes, strict=True)
    ]


def test_anchor_points_are_cell_centres_in_pixels_row_by_row():
    points, strides = anchor_points(
        [torch.empty(1, 7, 2, 3), torch.empty(1, 9, 1, 2)], strides=(8, 16)
    )
    assert points.tolist() == [
        [4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12], [8, 8], [24, 8],
    ]  # fmt: skip
    assert strides.flatten().tolist() == [8] * 6 + [16] * 2


def test_a_distance_is_the_mean_of_its_distribution():
    # Probabilities over bins 0..3; means: 0*1 = 0; (1 + 2) / 2 = 1.5; 3; (0 + 1 + 2 + 3) / 4 = 1.5.
    probabilities = torch.tensor(
        [[1, 0, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 0, 1], [0.25, 0.25, 0.25, 0.25]]
    )
    distances = DFL(4)(probabilities.log().flatten())
    torch.testing.assert_close(distances, torch.tensor([0, 1.5, 3, 1.5]))


def test_decoding_one_point_by_hand():
    head = DDetect(2, [4])
    # A point at (20, 12) on stride 8; bins 1, 0, 2, 1 are certain: 8 left, 0 up, 16 right, 8 down.
    distances = torch.full((1, 1, 4, 16), -1e4)
    for side, bin_ in enumerate((1, 0, 2, 1)):
        distances[0, 0, side, bin_] = 0
    logits = torch.tensor([[[0.0, math.log(3)]]])  # sigmoid: 1/2 and 3/4
    raw = DFLRaw(distances.flatten(2), logits, torch.tensor([[20.0, 12]]), torch.tensor([[8.0]]))
    decoded = head.decode(raw)
    assert decoded.boxes.tolist() == [[[12, 12, 36, 20]]]
    torch.testing.assert_close(decoded.scores, torch.tensor([[[0.5, 0.75]]]))
    # Centre (24, 16), size 24 x 8, then the scores, one column a point.
    expected = torch.tensor([24, 16, 24, 8, 0.5, 0.75]).view(1, 6, 1)
    torch.testing.assert_close(head.export_layout(raw), expected)


def test_decoding_in_half_precision_keeps_pixels():
    head = DFLDetect(3, channels=[16]).eval()
    head.initialize([8])
    features = maps([16], [(4, 150)], batch=1)
    exact = head.decode(head(features))
    raw = head.half()([features[0].half()])
    found = head.decode(raw)
    assert raw.distances.dtype == torch.float16 and found.boxes.dtype == torch.float32
    widened = raw._replace(distances=raw.distances.float(), logits=raw.logits.float())
    assert all(map(torch.equal, found, head.float().decode(widened)))
    assert (found.boxes - exact.boxes).abs().max() < 0.25  # float16 alone steps by 1 at 1200


@pytest.mark.parametrize("build", [DFLDetect, DDetect], ids=["YOLO11", "YOLOv9"])
def test_biases_start_at_the_score_of_a_rare_object(build):
    head = build(10, channels=[16, 32])
    head.initialize([8, 32])
    # 5 objects over 10 classes and (640 / 8)^2 = 6400 cells, (640 / 32)^2 = 400 cells.
    for level, cells in enumerate((6400, 400)):
        expected = torch.full((10,), math.log(5 / 10 / cells))
        torch.testing.assert_close(head.cv3[level][-1].bias.detach(), expected)
        assert head.cv2[level][-1].bias.eq(1).all()


def test_the_distance_weight_is_fixed():
    head = DDetect(2, [8])
    assert head.state_dict()["dfl.conv.weight"].flatten().tolist() == list(range(16))
    assert not head.dfl.conv.weight.requires_grad


def test_the_published_size_of_a_dual_head():
    head = DualDDetect(1, [512, 512, 512, 256, 512, 512])
    assert sum(p.numel() for p in head.parameters()) == 21_542_822


def test_the_main_branch_stands_alone_on_the_second_half_of_the_inputs():
    dual = DualDDetect(3, [8, 16, 12, 20]).eval()
    dual.initialize([8, 16, 8, 16])
    features = maps([8, 16, 12, 20], [(4, 6), (2, 3)] * 2)
    raw = dual(features)
    main = dual.main_head()
    assert not main.training and main.strides == (8, 16)
    assert all(map(torch.equal, raw.main, main(features[dual.main_inputs])))
    assert not torch.equal(raw.main.logits, raw.aux.logits)
    assert all(map(torch.equal, dual.decode(raw), main.decode(raw.main)))
    shared = {id(p) for p in dual.parameters()}
    assert all(id(p) in shared for p in main.parameters())
    assert not any(p.is_meta for p in main.parameters())


def test_the_auxiliary_branch_does_not_touch_the_main_output():
    dual = DualDDetect(3, [8, 8]).eval()
    dual.initialize([8, 8])
    first, second = maps([8, 8], [(4, 4)] * 2)
    changed = dual([first + 1, second])
    assert torch.equal(dual([first, second]).main.logits, changed.main.logits)
    assert not torch.equal(dual([first, second]).aux.logits, changed.aux.logits)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DualDDetect(3, [8, 8, 8]), "3 feature maps, expected an even number"),
        (lambda: DDetect(3, []), "no feature maps"),
        (lambda: DFLDetect(3, 0, [8]), "reg_max 0, expected 1 or more"),
        (lambda: DDetect(3, [8], 0), "reg_max 0, expected 1 or more"),
    ],
)
def test_heads_that_cannot_work_are_refused(build, message):
    with pytest.raises(LayerError, match=message):
        build()


def test_heads_print_their_arguments_as_users_know_them():
    plan = find("Detect").rule([64, 128, 256], [80], Scaling())
    assert str(plan.args) == "[80, 16, None, [64, 128, 256]]"
    assert isinstance(build_detect(*plan.args), DFLDetect)
    assert str(find("DualDDetect").rule([512, 256], [1], Scaling()).args) == "[1, [512, 256]]"


class Deployed(torch.nn.Module):
    """Two feature maps in, what runners expect out."""

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        features = [fine, coarse] * (2 if isinstance(self.head, DualDDetect) else 1)
        return self.head.export_layout(self.head(features))


@pytest.fixture(params=["YOLO11", "YOLOv9", "YOLOv9 dual"])
def deployed(request: pytest.FixtureRequest) -> Deployed:
    torch.manual_seed(0)
    head = {
        "YOLO11": lambda: DFLDetect(3, channels=[8, 12]),
        "YOLOv9": lambda: DDetect(3, [8, 12]),
        "YOLOv9 dual": lambda: DualDDetect(3, [8, 12, 8, 12]),
    }[request.param]()
    head.initialize([8, 16] * (2 if isinstance(head, DualDDetect) else 1))
    return Deployed(head).eval()


SEEN = maps([8, 12], [(8, 12), (4, 6)], batch=2)
OTHER = maps([8, 12], [(16, 8), (8, 4)], batch=3)


def test_a_traced_graph_holds_at_another_batch_and_size(deployed):
    with torch.no_grad():
        traced = torch.jit.trace(deployed, tuple(SEEN), check_trace=False)
        torch.testing.assert_close(traced(*OTHER), deployed(*OTHER))


def test_an_exported_graph_holds_at_another_batch_and_size(deployed):
    batch, *rest = (torch.export.Dim(name, min=2, max=40) for name in "bhwyx")
    shapes = {
        "fine": {0: batch, 2: rest[0], 3: rest[1]},
        "coarse": {0: batch, 2: rest[2], 3: rest[3]},
    }
    program = torch.export.export(deployed, tuple(SEEN), dynamic_shapes=shapes, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(*OTHER), deployed(*OTHER))
