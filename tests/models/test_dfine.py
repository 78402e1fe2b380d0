"""The D-FINE family as a whole: published counts, the head alone, any backbone, deployment."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torch_versions import needs_both, onnx_by_tracing

from models.blocks.fusion import MeanConv
from models.family import build_criterion, recipe_file
from models.heads.dfine import DFINEDecoder
from models.heads.distributions import boxes_from_distances, mean_distances
from models.heads.gated_layers import Residual, RMSNorm, SwiGLU
from models.meta import run_on_meta
from models.reparam import fuse
from models.transformer import set_sampling
from models.yolo import DetectionModel, build_model
from utils.config import load_hyp
from utils.errors import ConfigError
from utils.structures import Targets

HYP = load_hyp(None, recipe_file("dfine"))
HEAD = {
    "hidden": 32, "num_queries": 20, "num_points": [3, 6, 3], "num_heads": 4, "num_layers": 3, "feedforward": 32,
    "reg_max": 8, "num_denoising": 10,
}  # fmt: skip
SMALL: dict[str, Any] = {
    "nc": 4,
    "backbone": [
        [-1, 1, "HGStem", [8, 8]],
        [-1, 1, "DWConv", [16, 3, 2, 1, False]],
        [-1, 2, "HGBlock", [8, 32, 3, True, False]],
        [-1, 1, "Conv", [32, 3, 2]],
        [-1, 1, "Conv", [32, 3, 2]],
    ],
    "head": [
        [-1, 1, "AIFI", [64, 4]],
        [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
        [[-1, 3], 1, "Concat", [1]],
        [-1, 2, "RepELAN", [48]],
        [[2, 8, 5], 1, "DFINEDecoder", ["nc", HEAD]],
    ],
}  # fmt: skip


def small_model(deimv2: bool = False, small: bool = False) -> DetectionModel:
    torch.manual_seed(0)
    form = {"deimv2": deimv2, "small": small}
    head = [[2, 8, 5], 1, "DFINEDecoder", ["nc", {**HEAD, **form}]]
    model = build_model({**SMALL, "head": [*SMALL["head"][:-1], head]}, imgsz=(64, 64))
    for name, value in model.state_dict().items():  # no zero weight hides a mistake
        if value.is_floating_point() and "running" not in name and value.numel() > 1:
            value.add_(0.02 * torch.randn(value.shape))
    return model


def targets_of(*counts: int) -> Targets:
    index = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    low = torch.rand(len(index), 2) * 40
    boxes = torch.cat((low, low + 8 + torch.rand(len(index), 2) * 16), 1)
    return Targets(index, torch.randint(4, (len(index),)), boxes)


def losses_of(model: DetectionModel, images: Tensor, targets: Targets) -> dict[str, Tensor]:
    return build_criterion(model.head, HYP, (64, 64))(model(images, targets), targets)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# --- published sizes ------------------------------------------------------------------------------

# Size: parameters, of them the backbone's, the encoder's, the decoder's; deployed ones; GFLOPs deployed.
PUBLISHED = {
    "n": (3_782_693, 1_850_396, 703_824, 1_228_473, 3_753_799, 7.31),
    "s": (10_321_877, 1_850_396, 4_021_504, 4_449_977, 10_237_491, 25.50),
    "m": (19_590_064, 6_026_626, 7_799_040, 5_764_398, 19_248_189, 57.03),
    "l": (31_244_152, 13_507_680, 9_343_232, 8_393_240, 30_724_195, 91.60),
    "x": (62_621_560, 33_231_840, 20_700_032, 8_689_688, 61_601_635, 203.08),
}


def norm_params(module: nn.Module) -> int:
    return sum(2 * m.num_features for m in module.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("size", PUBLISHED)
def test_sizes_have_the_published_parameters(size: str):
    """Of L and X the published backbones have frozen norms, whose numbers are no parameters."""
    with torch.device("meta"):
        model = build_model(f"dfine-{size}")
    total, backbone, encoder, decoder, *_ = PUBLISHED[size]
    extra = norm_params(model.model[0]) if size in "lx" else 0
    found = [count(model.model[0]) - extra, count(model.model[1:-1]), count(model.head)]
    assert found == [backbone, encoder, decoder] and sum(found) == total
    assert model.strides == ((16, 32) if size == "n" else (8, 16, 32))


@pytest.mark.parametrize(
    "size", ["n", "s", *(pytest.param(s, marks=pytest.mark.slow) for s in "mlx")]
)
def test_deployed_sizes_have_the_published_parameters_and_gigaflops(size: str):
    """Published deployed models keep the norms of the backbone and of the projections, and the denoising embedding."""
    model = build_model(f"dfine-{size}", imgsz=(160, 192))
    embedding = count(model.head.denoising_class_embed)
    projections = [row for row in model.model[1:-1] if row is model.model[1]]
    levels, hidden = len(model.strides), projections[0].conv.out_channels
    backbone = count(model.model[0])
    fuse(model, check=False)
    kept = PUBLISHED[size][1] - count(model.model[0]) + levels * hidden + embedding
    if size == "x":
        kept += levels * model.head.input_proj[0][0].out_channels
    assert count(model) + kept == PUBLISHED[size][4]
    assert count(model.model[0]) < backbone
    with FlopCounterMode(display=False) as counter:
        run_on_meta(model.to("meta"), torch.empty(1, 3, 640, 640, device="meta"))
    assert counter.get_total_flops() / 1e9 == pytest.approx(PUBLISHED[size][5], abs=0.02)


@pytest.mark.parametrize(
    ("size", "encoder", "decoder", "width", "layers"),
    [("n", 506_704, 1_176_825, 128, 3), ("s", 3_561_216, 4_347_001, 256, 3)],
)
@pytest.mark.parametrize("classes", [1, 20])
def test_parameters_over_any_backbone_follow_the_published_formula(
    size: str, encoder: int, decoder: int, width: int, layers: int, classes: int
):
    with torch.device("meta"):
        model = build_model(f"dfine-{size}", num_classes=classes, backbone=["resnet18"])
    used = {"n": (256, 512), "s": (128, 256, 512)}[size]
    assert count(model.model[1:-1]) == encoder + sum(c * width + 2 * width for c in used)
    assert (
        count(model.head) == decoder + (layers + 1) * (width + 1) * classes + (classes + 1) * width
    )


# --- the head -------------------------------------------------------------------------------------


def test_raw_holds_every_stage_in_training_and_the_last_one_in_evaluation():
    model, images = small_model(), torch.rand(2, 3, 64, 96)
    raw = model.train()(images, targets_of(1, 2))
    assert raw.refined.logits.shape == (4, 2, 20, 4) and raw.refined.boxes.shape == (4, 2, 20, 4)
    assert raw.refined.edges.shape == (3, 2, 20, 4, 9) and raw.refined.reference.shape == (2, 20, 4)
    assert raw.encoder_logits.shape == (2, 20, 4) and raw.image_size == (64, 96)
    assert raw.denoising is not None and raw.denoising.groups == 5
    assert raw.denoising.refined.edges.shape == (3, 2, 20, 4, 9)
    raw = model.eval()(images)
    assert raw.refined.logits.shape == (1, 2, 20, 4) and raw.refined.edges.shape == (1, 2, 20, 4, 9)
    assert raw.denoising is None


def test_every_layers_box_is_that_of_its_distributions_around_the_first_box():
    model = small_model().train()
    refined = model(torch.rand(2, 3, 64, 64)).refined
    assert torch.equal(refined.reference, refined.boxes[0]) and not refined.reference.requires_grad
    for edges, boxes in zip(refined.edges, refined.boxes[1:]):
        distances = mean_distances(edges, model.head.bin_distances)
        expected = boxes_from_distances(refined.reference, distances, model.head.reg_scale)
        torch.testing.assert_close(boxes, expected)


def test_a_fresh_head_gives_every_layer_the_first_box_and_halves_what_it_sees():
    torch.manual_seed(0)
    head = DFINEDecoder(2, [8], 8, num_queries=4, num_heads=2, num_layers=2).train()
    refined = head([torch.rand(1, 8, 4, 4)]).refined
    assert not refined.edges.any()
    torch.testing.assert_close(refined.boxes, refined.boxes[:1].expand(3, -1, -1, -1))
    gate = head.decoder.layers[0].gateway
    known, seen = torch.randn(1, 4, 8), torch.randn(1, 4, 8)
    torch.testing.assert_close(gate(known, seen), gate.norm((known + seen) / 2))


def test_refinement_of_the_last_layer_trains_those_before_but_what_they_attend_around_does_not():
    model = small_model().train()
    model(torch.rand(1, 3, 64, 64)).refined.edges[-1].sum().backward()
    head = model.head
    assert all(mlp.layers[0].weight.grad.any() for mlp in head.dec_bbox_head)
    assert head.pre_bbox_head.layers[0].weight.grad is None


@pytest.mark.parametrize("counts", [(2, 3), (0, 1), (0, 0)])
@pytest.mark.parametrize("form", [(), (True,), (True, True)], ids=["dfine", "deimv2", "small"])
def test_every_parameter_has_a_gradient_whatever_the_batch_holds(
    counts: tuple[int, int], form: tuple[bool, ...]
):
    model, targets = small_model(*form).train(), targets_of(*counts)
    sum(losses_of(model, torch.rand(2, 3, 64, 64), targets).values()).backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert [n for n, p in trained.items() if p.grad is None or not p.grad.isfinite().all()] == []
    assert {n.rpartition(".")[2] for n in dict(model.named_parameters()) if n not in trained} == {
        "up",
        "reg_scale",
    }


def test_images_of_a_batch_do_not_touch_each_other():
    model, images = small_model().eval(), torch.rand(2, 3, 64, 64)
    both = model.decode(model(images))
    for image in range(2):
        one = model.decode(model(images[image : image + 1]))
        torch.testing.assert_close(one.boxes[0], both.boxes[image])
        torch.testing.assert_close(one.scores[0], both.scores[image])


def test_denoising_does_not_change_what_the_ordinary_queries_predict():
    model, images = small_model().train(), torch.rand(2, 3, 64, 64)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with_copies = model(images, targets_of(3, 1))
    model.load_state_dict(state)
    without = model(images)
    for a, b in zip(with_copies.refined, without.refined):
        torch.testing.assert_close(a, b)


def test_maps_with_fewer_cells_than_queries_give_as_many_queries_as_cells():
    model = small_model()
    model.head.num_queries = 300
    raw = model.eval()(torch.rand(1, 3, 64, 64))
    assert raw.refined.boxes.shape == (1, 1, 64 + 16 + 4, 4)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_points": [4, 4]}, "got num_points [4, 4], expected one for each of 3 maps"),
        ({"reg_max": 7}, "got reg_max 7, expected an even number from 4"),
    ],
)
def test_options_that_do_not_fit_are_one_line(options: dict[str, Any], told: str):
    head = [*SMALL["head"][:-1], [[2, 8, 5], 1, "DFINEDecoder", ["nc", {**HEAD, **options}]]]
    with pytest.raises(ConfigError, match="head\\[4\\]") as caught:
        build_model({**SMALL, "head": head}, imgsz=(64, 64))
    assert told in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("deimv2", [False, True])
def test_half_precision_agrees_with_float32_to_half_a_pixel(deimv2: bool):
    model, images = small_model(deimv2).eval(), torch.rand(1, 3, 64, 64)
    model.head.num_queries = 64 + 16 + 4  # every cell: no near tie chooses among them
    with torch.inference_mode():
        full = model.decode(model(images))
        half = model.half().decode(model(images.half()))
    assert half.boxes.dtype == torch.float32
    nearest = torch.cdist(half.boxes[0], full.boxes[0]).amin(1)  # near ties may change places
    assert nearest.median() < 0.5
    assert (half.scores.amax(-1) - full.scores.amax(-1)).abs().median() < 1e-2


def test_recipe_has_the_published_weights_and_costs():
    published = {
        "cls": 1, "l1": 5, "giou": 2, "fgl": 0.15, "ddf": 1.5, "ddf_temperature": 5, "vfl_alpha": 0.75, "vfl_gamma": 2,
        "mal_gamma": 1.5, "cost_class": 2, "cost_l1": 5, "cost_giou": 2, "cost_alpha": 0.25, "cost_gamma": 2,
        "num_denoising": 100, "label_noise": 0.5, "box_noise": 1, "lr0": 2e-4, "weight_decay": 1e-4, "clip_norm": 0.1,
        "ema_decay": 0.9999, "ema_tau": 1000, "nbs": 32,
    }  # fmt: skip
    assert {key: HYP[key] for key in published} == published


def test_model_overfits_one_batch():
    model = small_model().train()
    images, targets = torch.rand(2, 3, 64, 64), targets_of(1, 2)
    optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 2e-3)
    totals = []
    for _ in range(60):
        terms = losses_of(model, images, targets)
        totals.append(sum(terms[name] for name in ("giou", "cls", "l1", "fgl")).item())
        optimiser.zero_grad()
        sum(terms.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    assert sum(totals[-5:]) < 0.5 * sum(totals[:5])


def test_deimv2s_layers_worked_out_by_hand():
    """SwiGLU: gate 1 and value 3 of input 1 are silu(1) * 3. RMS of (3, 4) is sqrt(12.5)."""
    layer = SwiGLU(1, 2)
    with torch.no_grad():
        layer.linear1.weight.copy_(torch.tensor([[1.0], [3.0]]))
        for parameter in (layer.linear1.bias, layer.linear2.bias):
            parameter.zero_()
        layer.linear2.weight.fill_(1.0)
    assert layer(torch.ones(1, 1)).item() == pytest.approx(3 / (1 + math.exp(-1)))
    found = RMSNorm(2)(torch.tensor([[3.0, 4.0]]))[0]
    assert found.tolist() == pytest.approx([3 / math.sqrt(12.5), 4 / math.sqrt(12.5)], rel=1e-5)


def test_deimv2_embeds_the_first_boxes_alone():
    model = small_model(deimv2=True).eval()
    calls: list[int] = []
    model.head.query_pos_head.register_forward_hook(lambda *_: calls.append(1))
    model(torch.rand(1, 3, 64, 64))
    assert len(calls) == 1 and isinstance(model.head.enc_output, nn.Identity)


def test_the_smallest_forms_layers_share_a_box_head_and_add_what_they_see():
    model = small_model(deimv2=True, small=True).eval()
    (box_head,) = model.head.dec_bbox_head
    calls: list[int] = []
    box_head.register_forward_hook(lambda *_: calls.append(1))
    model(torch.rand(1, 3, 64, 64))
    assert len(calls) == 3
    added = Residual(RMSNorm(2))(torch.tensor([[1.0, 4.0]]), torch.tensor([[2.0, 0.0]]))[0]
    assert added.tolist() == pytest.approx([3 / math.sqrt(12.5), 4 / math.sqrt(12.5)], rel=1e-5)


def test_the_mean_of_a_map_reaches_every_place():
    """One channel (1, 3), weight 2, folded away statistics: silu(2 (1 + 2)), silu(2 (3 + 2))."""
    layer = MeanConv(1, 1).eval()
    nn.init.constant_(layer.cv1.conv.weight, 2.0)
    found = layer(torch.tensor([[[[1.0, 3.0]]]])).flatten()
    expected = torch.tensor([6.0, 10.0])
    torch.testing.assert_close(found, expected * expected.sigmoid(), rtol=1e-3, atol=0)


# --- deployment -----------------------------------------------------------------------------------


def test_the_deployed_form_predicts_the_same_and_keeps_the_last_layers_scores_alone():
    model, images = small_model().eval(), torch.rand(1, 3, 64, 96)
    expected = model.decode(model(images))
    report = fuse(model)
    assert report.difference < 1e-12 and not report.left
    found = model.decode(model(images))
    torch.testing.assert_close(found.boxes, expected.boxes, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(found.scores, expected.scores)
    head = model.head
    for predictors in (head.dec_score_head, head.quality):
        assert [count(m) > 0 for m in predictors] == [False, False, True]
    assert all(count(m) for m in head.dec_bbox_head) and not count(head.denoising_class_embed)


class _Deployed(nn.Module):
    """Images to what runners expect."""

    def __init__(self, model: DetectionModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.head.export_layout(self.model(images))


@pytest.mark.parametrize("form", [(), (True,), (True, True)], ids=["dfine", "deimv2", "small"])
def test_traced_model_takes_any_batch_and_size(form: tuple[bool, ...]):
    model = _Deployed(small_model(*form)).eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, (torch.rand(2, 3, 96, 128),), check_trace=False)
        images = torch.rand(3, 3, 128, 64)
        torch.testing.assert_close(traced(images), model(images))


@pytest.mark.parametrize(
    "dynamo", [pytest.param(True, marks=[pytest.mark.slow, needs_both]), False]
)
@pytest.mark.parametrize(
    "sampling", ["grid_sample", pytest.param("gather", marks=pytest.mark.slow)]
)
def test_onnx_file_takes_any_batch_and_size(tmp_path, sampling: str, dynamo: bool):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, path = _Deployed(small_model()).eval(), str(tmp_path / "model.onnx")
    set_sampling(model, sampling)
    batch, height, width = (torch.export.Dim(name, max=1024) for name in "bhw")
    sizes = {0: batch, 2: 32 * height, 3: 32 * width}
    how = {"input_names": ["images"], "output_names": ["predictions"], "opset_version": 18}
    images = torch.rand(2, 3, 96, 128)
    if dynamo:
        how |= {"dynamic_shapes": {"images": sizes}, "dynamo": True, "verbose": False}
        torch.onnx.export(model, (images,), path, **how)
    else:
        onnx_by_tracing(
            model, images, path, dynamic_axes={"images": dict(zip(sizes, "bhw"))}, **how
        )
    session = runtime.InferenceSession(path)
    for shape in ((1, 3, 128, 96), (3, 3, 96, 160)):
        images = torch.rand(shape)
        with torch.no_grad():
            expected = model(images)
        (found,) = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-4)
