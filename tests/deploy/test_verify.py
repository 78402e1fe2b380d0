"""Holding artifacts against the network: what is allowed, and what is told."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor

import deploy.exporters.verify as verify_file
from deploy.backends import model_info
from deploy.exporters.network import ExportOptions, blobs
from deploy.exporters.verify import (
    HALF_TOLERANCE,
    OWN_ROUNDINGS,
    TOLERANCE,
    allowed,
    compare,
    leads,
    roundings,
    take_reference,
    widen_reference,
)
from deploy.runtimes.artifact import Backend
from models.head import Head
from models.yolo import DetectionModel
from utils.boxes import xyxy_to_cxcywh
from utils.structures import Decoded

IMGSZ = (64, 96)
OPTIONS = ExportOptions(imgsz=IMGSZ)


def artifact(model: DetectionModel, decoded: Decoded) -> Backend:
    """One that gives `decoded` whatever it is shown."""
    size = torch.tensor([IMGSZ[1], IMGSZ[0]] * 2)
    output = torch.cat((xyxy_to_cxcywh(decoded.boxes), decoded.scores), -1)
    if model.head.postprocess == "topk":
        output[..., :4] /= size
        info = replace(model_info(model), layout="queries")
    else:
        output, info = output.transpose(1, 2), replace(model_info(model), layout="channels")
    return Backend(info, lambda images: (output,), torch.device("cpu"))


# --- queries ---------------------------------------------------------------------------------------


def test_the_lead_is_a_share_of_the_largest_logit():
    logits = torch.tensor([[[4.0, -1], [0, 3], [2, 2]], [[-8, -9], [-9, -9], [-9, -9]]])
    assert leads(logits, 3) == pytest.approx([(3 - 2) / 4, 0])
    assert leads(logits, 4) == [float("inf")] * 2


def test_what_is_rounded_off_is_the_largest_difference_at_any_rank():
    logits = torch.tensor([[[4.0, -1], [0, 3], [2, 2]], [[-8, -9], [-9, -9], [-9, -9]]])
    exact = torch.tensor([[[-1, 4.0], [3.2, 0], [2.1, 2]], [[-8, -10], [-9, -9], [-9, -9]]])
    assert roundings(logits, exact.double()) == pytest.approx([0.2 / 4, 0])


def leads_of(model: DetectionModel, images: Tensor) -> list[float]:
    """Of the query ranked 40th over the one ranked 41st."""
    wider = copy.deepcopy(model)
    wider.head.num_queries = 41
    with torch.no_grad():
        return list(leads(wider(images).encoder_logits, 41))


def test_images_that_leave_doubt_which_queries_are_chosen_are_passed_over(
    monkeypatch: pytest.MonkeyPatch,
):
    model = tiny_model("queries")
    usual = leads_of(model, blobs(3, IMGSZ, seed=4))
    monkeypatch.setattr(verify_file, "CLEAR_LEAD", sorted(usual)[1])
    images = take_reference(model, 3, IMGSZ, seed=4).images
    assert min(leads_of(model, images)) > sorted(usual)[1] > min(usual) >= 0


def test_a_network_that_rounds_more_off_needs_a_wider_lead(monkeypatch: pytest.MonkeyPatch):
    """Where a lead of 1e-5 were enough, its queries would be chosen otherwise by another runtime."""
    model = tiny_model("queries")
    usual = leads_of(model, blobs(3, IMGSZ, seed=4))
    assert min(usual) > verify_file.CLEAR_LEAD
    own = sorted(usual)[1] / verify_file.ROUNDINGS_AHEAD
    monkeypatch.setattr(verify_file, "roundings", lambda logits, exact: [own] * len(logits))
    images = take_reference(model, 3, IMGSZ, seed=4).images
    assert min(leads_of(model, images)) > sorted(usual)[1] > min(usual)


def test_where_no_image_is_clear_the_clearest_are_taken(monkeypatch: pytest.MonkeyPatch):
    model = tiny_model("queries")
    monkeypatch.setattr(verify_file, "CLEAR_LEAD", 1.0)
    monkeypatch.setattr(verify_file, "ROUNDS", 3)
    drawn = [lead for i in range(3) for lead in leads_of(model, blobs(2, IMGSZ, 4 + 1000 * i))]
    images = take_reference(model, 2, IMGSZ, seed=4).images
    assert leads_of(model, images) == pytest.approx(sorted(drawn)[:-3:-1], rel=1e-3)


def test_the_order_of_queries_is_free():
    model = tiny_model("queries")
    reference = take_reference(model, 2, IMGSZ, seed=1)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    shuffled = Decoded(*(t[:, order] for t in reference.decoded))
    case = compare(artifact(model, shuffled), model, reference, OPTIONS)
    assert case.worst is None and case.largest("box").relative < 1e-6 and case.rows == 80


@pytest.mark.parametrize(("strangers", "half", "passes"), [(1, False, False), (1, True, True), (2, True, False)])  # fmt: skip
def test_another_query_is_a_fault_but_for_one_in_float16(strangers: int, half: bool, passes: bool):
    model = tiny_model("queries")
    reference = take_reference(model, 2, IMGSZ, seed=1)
    other = Decoded(*(t.clone() for t in reference.decoded))
    other.boxes[0, :strangers] += 20
    options = replace(OPTIONS, half=half)
    case = compare(artifact(model, other), model, reference, options)
    assert (case.worst is None) is passes
    assert ("ranked otherwise" in str(case)) is passes


def test_a_query_that_is_no_number_is_a_fault():
    model = tiny_model("queries")
    reference = take_reference(model, 1, IMGSZ, seed=1)
    other = Decoded(*(t.clone() for t in reference.decoded))
    other.scores[0, 3, 0] = float("nan")
    case = compare(artifact(model, other), model, reference, OPTIONS)
    assert case.worst is not None and case.worst.relative == float("inf")


# --- rounding --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "limit"),
    [(0, TOLERANCE), (1e-5, TOLERANCE), (1e-3, OWN_ROUNDINGS * 1e-3), (0.5, HALF_TOLERANCE)],
)
def test_what_is_allowed_follows_what_float32_itself_can_give(own: float, limit: float):
    assert allowed(own) == pytest.approx(limit)


@pytest.mark.parametrize(("shift", "passes"), [(5e-5, True), (3e-4, False)])
def test_a_network_that_rounds_well_is_held_to_the_tolerance(shift: float, passes: bool):
    model = tiny_model("channels")
    reference = take_reference(model, 1, IMGSZ, seed=1)
    boxes = reference.decoded.boxes
    found = Decoded(boxes + shift * boxes.abs().max(), reference.decoded.scores)
    case = compare(artifact(model, found), model, reference, OPTIONS)
    assert (case.worst is None) is passes
    assert case.limit == TOLERANCE and case.largest("box").relative == pytest.approx(shift, rel=0.1)


def noisy(head: Head, inputs: tuple[list[Tensor], ...]) -> tuple[list[Tensor], ...]:
    """Float32 gives few digits of it: a large number is added to the maps and taken away again."""
    return ([(feature + 2e5) - 2e5 for feature in inputs[0]], *inputs[1:])


def of_fixed_type(head: Head, inputs: tuple[list[Tensor], ...]) -> tuple[list[Tensor], ...]:
    """Multiplies by a tensor of its own, float32 whatever comes."""
    first, *others = inputs[0]
    ones = torch.ones(first.shape[1], 1, 1, 1)
    first = torch.nn.functional.conv2d(first, ones, groups=len(ones))
    return ([first, *others], *inputs[1:])


def test_a_network_that_amplifies_rounding_is_judged_by_the_exact_values():
    model = tiny_model("channels")
    model.head.register_forward_pre_hook(noisy)
    reference = take_reference(model, 1, IMGSZ, seed=1)
    exact = widen_reference(model, reference).decoded
    lost = (reference.decoded.scores - exact.scores).abs().max() / exact.scores.max()
    assert lost > TOLERANCE
    case = compare(artifact(model, Decoded(*(t.float() for t in exact))), model, reference, OPTIONS)
    assert case.worst is None and case.largest("score").relative < 1e-6 and case.limit > TOLERANCE
    far = Decoded(exact.boxes.float(), (exact.scores * 0.9).float())
    assert compare(artifact(model, far), model, reference, OPTIONS).worst is not None


@pytest.mark.parametrize("layout", ["channels", "queries"])
def test_a_network_that_insists_on_float32_is_compared_with_what_it_gives(layout: str):
    model = tiny_model(layout)
    model.head.register_forward_pre_hook(of_fixed_type)
    reference = take_reference(model, 1, IMGSZ, seed=1)
    assert widen_reference(model, reference) is None
    boxes, scores = reference.decoded
    for factor, passes in ((1.0, True), (0.9, False)):
        found = artifact(model, Decoded(boxes, scores * factor))
        assert (compare(found, model, reference, OPTIONS).worst is None) is passes
