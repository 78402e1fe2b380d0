"""D-FINE's loss and what it is made of: hand-worked values, and numbers that the reference criterion gave."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from models.assigners.hungarian import Match
from models.assigners.union import union_of_stages
from models.family import recipe_file
from models.heads.dfine import DFINEDecoder, DFINERaw, Refined, RefinedNoise
from models.heads.distributions import (
    Bins,
    bin_distances,
    bins_of,
    boxes_from_distances,
    distances_to_boxes,
    mean_distances,
)
from models.losses.classification import CLASS_LOSSES, ClassTargets
from models.losses.dfine import (
    DFINELoss,
    Shares,
    distillation_loss,
    fine_grained_loss,
    mean_by_shares,
    shares_of,
)
from models.losses.hungarian import in_shares
from utils.boxes import cxcywh_to_xyxy
from utils.config import load_hyp
from utils.structures import Targets

SIZE = (640, 640)
HYP = dict(load_hyp(None, recipe_file("dfine")))
HALF, FOUR = torch.tensor([0.5]), torch.tensor([4.0])


# --- numbers of the reference ---------------------------------------------------------------------


def wave(*shape: int, step: float, start: float) -> Tensor:
    """sin(step i + start), i counted along the rows."""
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return (step * index + start).sin().reshape(shape).float()


def wave_boxes(start: float) -> Tensor:
    centre, side = wave(2, 6, 4, step=0.9, start=start).double().chunk(2, -1)
    return torch.cat((0.5 + 0.3 * centre, 0.25 + 0.12 * side), -1).float()


def reference_raw() -> DFINERaw:
    """Two images, six queries, three classes, three layers; the first stage is what comes before the refinement."""
    starts = [7, 0, 1, 2]
    boxes = [wave_boxes(start) for start in (0.9, 0.0, 0.2, 0.4)]
    edges = [wave(2, 6, 4 * 33, step=0.37, start=0.5 * n).unflatten(-1, (4, 33)) for n in range(3)]
    refined = Refined(
        torch.stack([2 * wave(2, 6, 3, step=0.7, start=start) for start in starts]),
        torch.stack(boxes),
        torch.stack(edges),
        wave_boxes(-0.1),
    )
    encoder = 2 * wave(2, 6, 3, step=0.7, start=9), wave_boxes(1.3)
    return DFINERaw(refined, *encoder, None, SIZE)


def reference_targets() -> Targets:
    boxes = torch.tensor([[0.4, 0.45, 0.2, 0.3], [0.7, 0.6, 0.3, 0.25], [0.3, 0.5, 0.25, 0.2]])
    return Targets(torch.tensor([0, 0, 1]), torch.tensor([0, 2, 1]), cxcywh_to_xyxy(boxes) * 640)


def criterion_of(**changes: Any) -> DFINELoss:
    head = DFINEDecoder(3, [8], 8, num_heads=2, num_layers=3)
    return DFINELoss(head, {**HYP, **changes})


# In the order of the stages: encoder, before the refinement, layers 0, 1 and 2.
REFERENCE = {
    "giou": [2.00907087, 2.03772402, 2.47496796, 2.42981577, 2.32120156],
    "l1": [2.08733845, 2.00881219, 2.39881301, 2.29691100, 2.19133329],
    "fgl": [0.09241492, 0.11674411, 0.16278385],
    "ddf": [0.08340041, 0.02269481],
}
VARIFOCAL = [4.00959158, 3.79851437, 3.90625215, 3.74911571, 3.82249904]
MATCHABILITY = [7.30248880, 7.31610632, 7.34628296, 7.37741995, 7.38556147]


def test_the_inputs_are_those_that_the_reference_had():
    raw = reference_raw()
    assert raw.refined.boxes[1, 0, 0].tolist() == pytest.approx(
        [0.5, 0.7349981, 0.3668617, 0.3012856], abs=1e-6
    )
    assert raw.refined.edges[0, 0, 0, 0, :3].tolist() == pytest.approx(
        [0, 0.3616154, 0.6742879], abs=1e-6
    )
    assert raw.refined.logits[1, 0, 0].tolist() == pytest.approx(
        [0, 1.2884353, 1.9708995], abs=1e-6
    )


@pytest.mark.parametrize(("cls_loss", "cls"), [("varifocal", VARIFOCAL), ("mal", MATCHABILITY)])
def test_losses_of_every_stage_are_those_of_the_reference(cls_loss: str, cls: list[float]):
    targets, frame = in_shares(reference_targets(), SIZE)
    criterion = criterion_of(cls_loss=cls_loss)
    found = criterion.stage_losses(reference_raw(), targets, frame)[0]._asdict()
    for name, expected in {**REFERENCE, "cls": cls}.items():
        assert found[name].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6), name
    terms = criterion(reference_raw(), reference_targets())
    assert terms["giou"].item() == pytest.approx(REFERENCE["giou"][-1], rel=1e-5)
    assert terms["fgl_aux"].item() == pytest.approx(sum(REFERENCE["fgl"][:2]), rel=1e-5)
    assert terms["ddf"].item() == pytest.approx(sum(REFERENCE["ddf"]), rel=1e-5)
    assert terms["cls_aux"].item() == pytest.approx(sum(cls[:-1]), rel=1e-5)


def test_the_union_is_that_of_the_reference():
    targets, _ = in_shares(reference_targets(), SIZE)
    raw, criterion = reference_raw(), criterion_of()
    logits = torch.cat((raw.encoder_logits[None], raw.refined.logits))
    boxes = torch.cat((raw.encoder_boxes[None], raw.refined.boxes))
    match = criterion.assigner(logits, boxes, targets.image_index, targets.labels, targets.boxes)
    of_stages = [
        [(q, o) for s, _, q, o in zip(*(part.tolist() for part in match)) if s == stage]
        for stage in range(5)
    ]
    assert [sorted(pairs) for pairs in of_stages] == [
        [(2, 2), (3, 0), (5, 1)],
        [(0, 1), (0, 2), (3, 0)],
        [(0, 1), (1, 0), (4, 2)],
        [(0, 1), (0, 2), (3, 0)],
        [(2, 1), (2, 2), (3, 0)],
    ]
    union = union_of_stages(match)
    assert list(zip(union.image.tolist(), union.query.tolist(), union.object.tolist())) == [
        (0, 0, 1), (0, 1, 0), (0, 2, 1), (0, 3, 0), (0, 5, 1), (1, 0, 2), (1, 2, 2), (1, 4, 2),
    ]  # fmt: skip


def test_without_the_union_every_stage_learns_by_its_own_matching():
    """The last layer's pairs, written down, divided by the three objects; the edges go on by the union."""
    targets, frame = in_shares(reference_targets(), SIZE)
    raw = reference_raw()
    found = criterion_of(union=False).stage_losses(raw, targets, frame)[0]
    pairs = [(0, 2, 1), (0, 3, 0), (1, 2, 2)]  # image, query, object
    off = sum((raw.refined.boxes[-1][b, q] - targets.boxes[o]).abs().sum() for b, q, o in pairs)
    assert found.l1[-1].item() == pytest.approx(5 * off.item() / 3, rel=1e-5)
    assert found.giou[-1].item() != pytest.approx(REFERENCE["giou"][-1], rel=1e-2)
    assert found.fgl.tolist() == pytest.approx(REFERENCE["fgl"], rel=1e-5)


OUTWARDS = {
    4: [0.07599, 0.157754, 0.245731, 0.340393, 0.442249, 0.551845, 0.66977, 0.796655, 0.933182, 1.080083, 1.238148,
        1.408224, 1.591224, 1.78813, 2, 4],
    8: [0.113264, 0.239356, 0.37973, 0.536003, 0.709976, 0.903654, 1.119269, 1.359305, 1.626529, 1.924019, 2.255203,
        2.623899, 3.034356, 3.491301, 4, 8],
}  # fmt: skip


@pytest.mark.parametrize("scale", OUTWARDS)
def test_distances_of_the_bins_are_those_of_the_reference(scale: int):
    found = bin_distances(32, HALF, torch.tensor([float(scale)])).tolist()
    expected = [-d for d in reversed(OUTWARDS[scale])] + [0] + OUTWARDS[scale]
    assert len(found) == 33 and found == pytest.approx(expected, abs=5e-6)


def test_distances_of_the_bins_worked_out_by_hand():
    """N = 6, a = 0.5, c = 6: ac = 3, s = 4^(2/4) = 2."""
    assert bin_distances(6, HALF, torch.tensor([6.0])).tolist() == pytest.approx(
        [-6, -3, -1, 0, 1, 3, 6]
    )


def test_bins_of_a_target_are_those_of_the_reference():
    reference, target = (
        torch.tensor([[0.5, 0.5, 0.2, 0.4]]),
        torch.tensor([[0.38, 0.32, 0.63, 0.69]]),
    )
    distances = distances_to_boxes(reference, target, FOUR)
    bins = bins_of(distances, bin_distances(32, HALF, FOUR))
    assert bins.left.tolist() == [[20, 13, 22, 14]]
    assert bins.right_share[0].tolist() == pytest.approx(
        [0.5852053, 0.5198040, 0.4083515, 0.7063448], abs=1e-5
    )


def test_a_box_of_the_reference_is_decoded_and_encoded_again():
    reference, distances = (
        torch.tensor([[0.5, 0.5, 0.2, 0.4]]),
        torch.tensor([[0.4, -0.2, 0.6, -0.1]]),
    )
    box = boxes_from_distances(reference, distances, FOUR)
    assert box[0].tolist() == pytest.approx([0.505, 0.505, 0.25, 0.37])
    torch.testing.assert_close(distances_to_boxes(reference, cxcywh_to_xyxy(box), FOUR), distances)


@pytest.mark.parametrize(
    ("logit", "quality", "mal", "varifocal"),
    [
        (0.0, 0.5, 0.693147, 0.346574),
        (2.0, 0.5, 1.419821, 0.563464),
        (2.0, None, 1.758193, 1.237559),
        (-2.0, 0.9, 1.834558, 1.734235),
    ],
)
def test_class_losses_of_one_logit_are_those_of_the_reference(
    logit: float, quality: float | None, mal: float, varifocal: float
):
    is_positive = torch.tensor([float(quality is not None)])
    aims = ClassTargets(is_positive, torch.tensor([quality or 0.0]), is_positive)
    for name, expected in (("mal", mal), ("varifocal", varifocal)):
        found = CLASS_LOSSES[name](torch.tensor([logit]), aims, HYP)
        assert found.item() == pytest.approx(expected, abs=1e-5), name


# --- parts, worked out by hand --------------------------------------------------------------------


def match_of(*rows: tuple[int, int, int, int]) -> Match:
    return Match(*torch.tensor(rows, dtype=torch.int64).reshape(-1, 4).unbind(1))


@pytest.mark.parametrize(
    ("rows", "expected", "reason"),
    [
        ([(0, 0, 3, 5), (1, 0, 3, 4), (2, 0, 3, 5), (2, 0, 7, 4)], [(0, 3, 5), (0, 7, 4)], "object 5 twice, 4 once"),
        ([(0, 0, 1, 2), (1, 0, 1, 0)], [(0, 1, 0)], "once each: the first object"),
        ([(0, 1, 2, 9), (0, 0, 2, 3), (1, 1, 2, 9)], [(0, 2, 3), (1, 2, 9)], "one query of two images"),
        ([(0, 0, 0, 1), (0, 0, 1, 0), (1, 0, 1, 1), (1, 0, 0, 1), (2, 0, 1, 1)], [(0, 0, 1), (0, 1, 1)],
         "an object may have two queries"),
        ([], [], "nothing"),
    ],
)  # fmt: skip
def test_union_takes_for_every_query_the_object_it_had_most_often(rows, expected, reason):
    union = union_of_stages(match_of(*rows))
    found = zip(union.image.tolist(), union.query.tolist(), union.object.tolist())
    assert list(found) == expected, reason
    assert all(part.dtype == torch.int64 for part in union)


def test_bins_at_and_beyond_the_ends():
    """W = -2, 0, 4."""
    bins = bins_of(torch.tensor([-5.0, -2, -1.5, 0, 1, 4, 9]), torch.tensor([-2.0, 0, 4]))
    assert bins.left.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert bins.right_share.tolist() == [0, 0, 0.25, 0, 0.25, 1, 1]


def test_mean_distance_is_that_of_the_distribution():
    logits = torch.tensor([0.25, 0.25, 0.5]).log().expand(4, 3)
    assert mean_distances(logits, torch.tensor([-2.0, 0, 4])).tolist() == pytest.approx([1.5] * 4)


def test_fine_grained_loss_of_one_edge():
    """Shares 1/4, 1/2, 1/4; the target lies at three quarters from bin 1 to bin 2."""
    edges = torch.tensor([0.25, 0.5, 0.25]).log().reshape(1, 1, 1, 3)
    bins = Bins(torch.tensor([[1]]), torch.tensor([[0.75]]))
    found = fine_grained_loss(edges, bins)
    assert found.shape == (1, 1, 1)
    assert found.item() == pytest.approx(0.25 * math.log(2) + 0.75 * math.log(4))


def test_distillation_of_one_edge():
    """At temperature 2 the student's logits 0, 2 log 3 are shares 1/4, 3/4; the teacher's are halves."""
    student, teacher = torch.tensor([[0.0, 2 * math.log(3)]]), torch.tensor([[1.0, 1.0]])
    expected = 4 * (0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75))
    assert distillation_loss(student, teacher, 2.0).item() == pytest.approx(expected, rel=1e-5)
    assert distillation_loss(student, student, 2.0).item() == 0


def test_matched_and_unmatched_edges_are_joined_by_the_roots_of_their_numbers():
    """One matched of five queries: shares 1 and 2; means 3 and 6."""
    shares = shares_of(match_of((0, 0, 2, 0)), (1, 5))
    assert shares == (1, 2)
    loss = torch.full((2, 1, 5, 4), 6.0)
    is_matched = torch.tensor([[False, False, True, False, False]])
    loss[0, 0, 2] = 3.0
    assert mean_by_shares(loss, is_matched, shares).tolist() == pytest.approx([5, 6])
    nothing = torch.zeros_like(is_matched)
    assert mean_by_shares(loss[1:], nothing, Shares(0.0, 2.0)).tolist() == pytest.approx([6])


def test_parts_have_right_gradients_in_double_precision():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 7, dtype=torch.float64, requires_grad=True)
    distances = bin_distances(6, HALF.double(), FOUR.double())
    bins = bins_of(torch.randn(3, 4, dtype=torch.float64), distances)
    assert torch.autograd.gradcheck(lambda z: fine_grained_loss(z, bins), logits)
    teacher = torch.randn(3, 4, 7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: distillation_loss(z, teacher, 5.0), logits)
    reference = torch.rand(2, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda z: boxes_from_distances(reference, mean_distances(z, distances), FOUR.double()),
        logits,
    )


# --- the criterion --------------------------------------------------------------------------------


def of_image(raw: DFINERaw, image: int) -> DFINERaw:
    part = slice(image, image + 1)
    refined = Refined(*(t[:, part] for t in raw.refined[:3]), raw.refined.reference[part])
    return DFINERaw(refined, raw.encoder_logits[part], raw.encoder_boxes[part], None, SIZE)


def test_a_batch_of_two_is_two_batches_but_for_the_distillation():
    raw, targets, criterion = reference_raw(), reference_targets(), criterion_of()
    together = criterion(raw, targets)
    objects, pairs = (2, 1), (5, 3)
    parts = []
    for image in range(2):
        labels, boxes = targets.of_image(image)
        parts.append(
            criterion(of_image(raw, image), Targets(torch.zeros_like(labels), labels, boxes))
        )
    for name in ("giou", "l1", "fgl", "giou_aux", "cls", "cls_aux"):
        counts = objects if name.startswith("cls") else pairs
        expected = sum(n * part[name] for n, part in zip(counts, parts)) / sum(counts)
        torch.testing.assert_close(together[name], expected)


@pytest.mark.parametrize("with_objects", [True, False])
def test_gradients_are_finite_and_everywhere(with_objects: bool):
    raw = reference_raw()
    leaves = [t.requires_grad_() for t in (*raw.refined[:3], raw.encoder_logits, raw.encoder_boxes)]
    terms = criterion_of()(raw, reference_targets() if with_objects else Targets.empty())
    sum(terms.values()).backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)
    assert all(term.dtype == torch.float32 and term.shape == () for term in terms.values())
    if not with_objects:
        assert terms["giou"] == terms["l1"] == terms["fgl"] == 0 < terms["cls"]


def test_the_last_layer_is_taught_by_nobody_and_teaches_without_gradient():
    raw = reference_raw()
    edges = raw.refined.edges.clone().requires_grad_()
    raw = raw._replace(refined=raw.refined._replace(edges=edges))
    criterion_of()(raw, reference_targets())["ddf"].backward()
    assert edges.grad[:2].abs().amax((1, 2, 3, 4)).min() > 0 and not edges.grad[2].any()


def test_weight_of_negatives_takes_gradient_only_if_the_recipe_says_so():
    logit = torch.tensor([1.0], requires_grad=True)
    aims = ClassTargets(*(torch.zeros(1) for _ in range(3)))
    p = logit.detach().sigmoid().item()
    for gradient, expected in (
        (False, 0.75 * p**3),
        (True, 0.75 * p**2 * (p + 2 * (1 - p) * -math.log(1 - p))),
    ):
        loss = CLASS_LOSSES["varifocal"](logit, aims, {**HYP, "vfl_gradient": gradient})
        assert torch.autograd.grad(loss, logit)[0].item() == pytest.approx(expected, rel=1e-5)


def test_denoising_queries_answer_for_the_object_they_were_made_from():
    raw, targets, criterion = reference_raw(), reference_targets(), criterion_of()
    wanted, _ = in_shares(targets, SIZE)
    table = torch.tensor([[0, 1, -1], [2, -1, -1]])
    exact = wanted.boxes[table.clamp(min=0)]
    logits = torch.full((4, 2, 3, 3), -20.0)
    for image, query in ((0, 0), (0, 1), (1, 0)):
        logits[:, image, query, targets.labels[table[image, query]]] = 20.0
    edges = torch.zeros(3, 2, 3, 4, 33)
    edges[..., 16] = 30.0  # no distance
    noise = RefinedNoise(Refined(logits, exact.expand(4, -1, -1, -1), edges, exact), table, 1)
    perfect = criterion(raw._replace(denoising=noise), targets)
    for name in ("giou", "cls", "l1", "fgl", "ddf"):
        assert perfect[f"{name}_dn"].item() == pytest.approx(0, abs=1e-4), name
    moved = noise._replace(refined=noise.refined._replace(boxes=noise.refined.boxes + 0.01))
    for groups in (1, 5):
        found = criterion(raw._replace(denoising=moved._replace(groups=groups)), targets)
        assert found["l1_dn"].item() == pytest.approx(5 * 4 * 0.04 / groups, rel=1e-3)
