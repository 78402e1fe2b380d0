"""The RT-DETR family as a whole: published counts, keys, outputs; the head alone; denoising;
export.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import published
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torch_versions import needs_both, needs_programs, onnx_by_tracing

from models.heads import denoising
from models.heads.denoising import noisy_queries
from models.heads.rtdetr import RTDETRDecoder, RTDETRRaw
from models.losses.hungarian import HungarianLoss
from models.meta import run_on_meta
from models.transformer import set_sampling
from models.yolo import build_model
from utils.structures import Targets

RECIPE = Path(__file__).parents[2] / "data" / "hyps" / "rtdetr.yaml"
HYP = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
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
        [-1, 2, "RepC3", [32]],
        [
            [2, 8, 5], 1, "RTDETRDecoder",
            ["nc", {"hidden": 32, "num_queries": 20, "num_heads": 4, "num_layers": 2, "num_denoising": 10}],
        ],
    ],
}  # fmt: skip


def small_model() -> nn.Module:
    torch.manual_seed(0)
    model = build_model(SMALL, imgsz=(64, 64))
    for name, value in model.state_dict().items():  # no zero weight hides a mistake
        if value.is_floating_point() and "running" not in name:
            value.add_(0.02 * torch.randn(value.shape))
    return model


def targets_of(*counts: int) -> Targets:
    index = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    low = torch.rand(len(index), 2) * 40
    return Targets(
        index,
        torch.randint(4, (len(index),)),
        torch.cat((low, low + 8 + torch.rand(len(index), 2) * 16), 1),
    )


@pytest.mark.parametrize(
    ("config", "parameters", "gigaflops"),
    [
        ("rtdetr-l", 32_970_476, 109.5),
        ("rtdetr-x", 67_467_852, 233.8),
        ("rtdetr-r18", 20_160_752, 55.2),
        ("rtdetr-r50", 42_925_132, 131.7),
    ],
)
def test_configs_have_their_parameters_and_gigaflops(
    config: str, parameters: int, gigaflops: float
) -> None:
    with torch.device("meta"):
        model = build_model(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    with FlopCounterMode(display=False) as counter:
        run_on_meta(model, torch.empty(1, 3, 640, 640, device="meta"))
    assert counter.get_total_flops() / 1e9 == pytest.approx(gigaflops, abs=0.05)
    assert model.strides == (8, 16, 32)


@published.needs_golden
def test_rtdetr_l_has_the_published_keys_and_outputs() -> None:
    model = build_model("rtdetr-l")
    assert published.layout(model) == published.read_json("rtdetr-l.keys.json")
    published.fill(model).eval()
    golden, path = published.golden(), str(published.FOLDER / "rtdetr-l.npz")
    with torch.inference_mode():
        raw = model(golden.image(256, 224))
    assert golden.difference(raw.boxes[-1], path, "boxes") < 1e-4
    assert golden.difference(raw.logits[-1].sigmoid(), path, "scores") < 1e-4


@pytest.mark.slow
@published.needs_golden
def test_rtdetr_l_has_the_published_losses_and_gradients_within_their_own_spread() -> None:
    """These weights are badly conditioned in training form.

    Batch statistics raise a relative change of 1e-7 of the image to 1e-4 in the features and to
    more in the last layers, so float32 does not fix these numbers to 1e-4, nor does it fix them
    from one thread count to another. Hence the spread under such a change is measured; totals are
    compared with its mean to 1e-3, every number to four of its standard deviations.
    """
    golden, expected = published.golden(), published.read_json("losses.json")
    model = published.fill(build_model("rtdetr-l")).train()
    model.head.num_denoising = 0
    criterion, parameters = HungarianLoss(model.head, HYP), dict(model.named_parameters())
    found: dict[str, list[float]] = {}
    for seed in range(8):
        image = golden.image(320, 320, 2)
        noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
        model.zero_grad()
        raw = model(image * (1 + 1e-7 * noise))
        for name, rows in golden.TARGET_SETS.items():
            terms = criterion(raw, published.targets_in_pixels(rows, 320, 320))
            for key, value in {**terms, "total": sum(terms.values())}.items():
                found.setdefault(f"{name}.{key}", []).append(value.item())
            if name == "both":
                sum(terms.values()).backward(retain_graph=True)
        for key in expected["rtdetr-l.grad"]:
            found.setdefault(f"grad.{key}", []).append(parameters[key].grad.norm().item())
    for group in ("both", "first", "none", "grad"):
        for key, value in expected[f"rtdetr-l.{group}"].items():
            spread = torch.tensor(found[f"{group}.{key}"], dtype=torch.float64)
            assert abs(value - spread.mean()) <= 4 * spread.std(), (group, key, value, spread)
            if key == "total":
                assert value == pytest.approx(spread.mean().item(), rel=1e-3)


def test_recipe_has_the_published_weights_and_costs() -> None:
    published_values = {
        "cls": 1, "l1": 5, "giou": 2, "vfl_alpha": 0.75, "vfl_gamma": 2, "cost_class": 2, "cost_l1": 5, "cost_giou": 2,
        "cost_alpha": 0.25, "cost_gamma": 2, "num_denoising": 100, "label_noise": 0.5, "box_noise": 1,
    }  # fmt: skip
    assert {key: HYP[key] for key in published_values} == published_values


def test_raw_holds_every_stage_in_training_and_the_last_one_in_evaluation() -> None:
    model, images = small_model(), torch.rand(2, 3, 64, 96)
    raw = model.train()(images, targets_of(1, 2))
    assert raw.logits.shape == (2, 2, 20, 4) and raw.boxes.shape == (2, 2, 20, 4)
    assert raw.encoder_logits.shape == (2, 20, 4) and raw.image_size == (64, 96)
    assert raw.denoising is not None and raw.denoising.groups == 5
    assert raw.denoising.logits.shape == (2, 2, 20, 4)  # 5 groups of 2 right and 2 wrong ones
    raw = model.eval()(images)
    assert raw.logits.shape == (1, 2, 20, 4) and raw.denoising is None


def test_decode_gives_pixels_and_the_export_layout_normalised_boxes() -> None:
    head = RTDETRDecoder(2, [8], 8, num_heads=2, num_layers=1)
    boxes = torch.tensor([0.5, 0.5, 0.5, 1.0]).expand(1, 1, 1, 4)
    raw = RTDETRRaw(
        torch.zeros(1, 1, 1, 2), boxes, torch.zeros(1, 1, 2), boxes[0], None, (100, 200)
    )
    decoded = head.decode(raw)
    assert decoded.boxes.tolist() == [[[50, 0, 150, 100]]] and decoded.scores.tolist() == [
        [[0.5, 0.5]]
    ]
    assert head.export_layout(raw).tolist() == [[[0.5, 0.5, 0.5, 1.0, 0.5, 0.5]]]


@pytest.mark.parametrize("counts", [(2, 3), (0, 1), (0, 0)])
def test_every_parameter_has_a_gradient_whatever_the_batch_holds(counts: tuple[int, int]) -> None:
    model = small_model().train()
    targets = targets_of(*counts)
    terms = HungarianLoss(model.head, HYP)(model(torch.rand(2, 3, 64, 64), targets), targets)
    sum(terms.values()).backward()
    missing = [
        name
        for name, p in model.named_parameters()
        if p.grad is None or not p.grad.isfinite().all()
    ]
    assert missing == []


def test_images_of_a_batch_do_not_touch_each_other() -> None:
    model, images = small_model().eval(), torch.rand(2, 3, 64, 64)
    both = model(images)
    for image in range(2):
        one = model(images[image : image + 1])
        torch.testing.assert_close(one.boxes[:, 0], both.boxes[:, image])
        torch.testing.assert_close(one.logits[:, 0], both.logits[:, image])


def test_maps_with_fewer_cells_than_queries_give_as_many_queries_as_cells() -> None:
    model = small_model()
    model.head.num_queries = 300
    assert model.eval()(torch.rand(1, 3, 64, 64)).boxes.shape == (1, 1, 64 + 16 + 4, 4)


def test_denoising_does_not_change_what_the_ordinary_queries_predict() -> None:
    model, images = small_model().train(), torch.rand(2, 3, 64, 64)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with_copies = model(images, targets_of(3, 1))
    model.load_state_dict(state)
    without = model(images)
    torch.testing.assert_close(with_copies.logits, without.logits)
    torch.testing.assert_close(with_copies.boxes, without.boxes)


def test_denoising_groups_do_not_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, targets = small_model().train(), torch.rand(2, 3, 64, 64), targets_of(1, 1)
    state = {key: value.clone() for key, value in model.state_dict().items()}

    def first_group(box_noise_elsewhere: float) -> Tensor:
        model.load_state_dict(state)
        queries = noisy_queries(
            targets, 2, (64, 64), 4, count=10, label_noise=0.5, box_noise=1.0,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        assert queries is not None
        boxes = queries.boxes.clone()
        boxes[:, 2:] += box_noise_elsewhere
        moved = queries._replace(boxes=boxes)
        monkeypatch.setattr(denoising, "noisy_queries", lambda *_, **__: moved)
        return model(images, targets).denoising.boxes[:, :, :2]

    torch.testing.assert_close(first_group(0.0), first_group(-0.05))


def test_noisy_copies_are_laid_out_in_groups_of_right_and_wrong_ones() -> None:
    targets = targets_of(2, 0, 1)
    queries = noisy_queries(targets, 3, (64, 64), 4, count=7, label_noise=0.0, box_noise=0.0)
    assert queries is not None and queries.groups == 3 and queries.labels.shape == (3, 12)
    assert queries.object_index[0].tolist() == [0, 1, -1, -1] * 3
    assert queries.object_index[1].tolist() == [-1] * 12
    assert queries.object_index[2].tolist() == [2, -1, -1, -1] * 3
    assert queries.is_real.sum(1).tolist() == [12, 0, 6]
    assert queries.labels[0].tolist() == targets.labels[:2].tolist() * 6
    low, high = targets.boxes[2].view(2, 2) / 64
    expected = torch.cat(((low + high) / 2, high - low))
    torch.testing.assert_close(queries.boxes[2, [0, 2]], expected.expand(2, 4))


def test_right_copies_stay_near_their_object_and_wrong_ones_do_not() -> None:
    box = torch.tensor([[24.0, 24, 40, 40]])
    targets = Targets(torch.tensor([0]), torch.tensor([0]), box)
    queries = noisy_queries(targets, 1, (64, 64), 4, count=100, label_noise=0.5, box_noise=1.0)
    assert queries is not None
    centre, extent = queries.boxes[0].chunk(2, -1)
    low, high = (centre - extent / 2) * 64, (centre + extent / 2) * 64
    shift = torch.cat(((low - box[:, :2]).abs(), (high - box[:, 2:]).abs()), 1)
    is_wrong = torch.arange(200) % 2 == 1
    assert (shift[~is_wrong] <= 8 + 1e-3).all()
    kept = extent[is_wrong].amin(1) > 1e-4  # corners that have crossed give no box
    assert kept.any() and (shift[is_wrong][kept] >= 8 - 1e-3).all() and shift[is_wrong].max() > 12
    changed = (queries.labels != 0).float().mean()
    assert 0.08 < changed < 0.32  # a quarter get a random class, three in four of them another one


def test_noise_follows_the_seed_and_the_generator() -> None:
    targets = targets_of(2, 3)

    def draw(generator: torch.Generator | None = None) -> Tensor:
        queries = noisy_queries(
            targets, 2, (64, 64), 4, count=10, label_noise=0.5, box_noise=1.0, generator=generator
        )
        assert queries is not None
        return queries.boxes

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(draw(), first) and not torch.equal(first, second)
    seeded = [draw(torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*seeded)


def test_copies_of_a_crowded_image_are_limited() -> None:
    targets = targets_of(500, 2)
    queries = noisy_queries(targets, 2, (64, 64), 4, count=100, label_noise=0.5, box_noise=1.0)
    assert queries is not None and queries.labels.shape == (2, 200) and queries.groups == 1
    assert len(queries.object_index[0].unique()) == 101  # a hundred different objects, and -1


def test_a_batch_without_objects_has_no_noisy_queries() -> None:
    assert (
        noisy_queries(targets_of(0, 0), 2, (64, 64), 4, count=100, label_noise=0.5, box_noise=1.0)
        is None
    )


def test_half_precision_agrees_with_float32_to_half_a_pixel() -> None:
    model, images = small_model().eval(), torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        full = model.decode(model(images))
        half = model.half().decode(model(images.half()))
    assert half.boxes.dtype == torch.float32
    order = torch.cdist(half.boxes[0], full.boxes[0]).amin(1)  # near ties may change places
    assert (
        order.median() < 0.5 and (half.scores.amax(-1) - full.scores.amax(-1)).abs().median() < 1e-2
    )


def test_model_overfits_one_batch() -> None:
    model = small_model().train()
    images, targets = torch.rand(2, 3, 64, 64), targets_of(1, 2)
    criterion, optimiser = (
        HungarianLoss(model.head, HYP),
        torch.optim.AdamW(model.parameters(), 2e-3),
    )
    totals = []
    for _ in range(40):
        terms = criterion(model(images, targets), targets)
        totals.append(sum(v for k, v in terms.items() if not k.endswith("_dn")).item())
        optimiser.zero_grad()
        sum(terms.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    assert sum(totals[-5:]) < 0.5 * sum(totals[:5])


class _Deployed(nn.Module):
    """Images to what runners expect, and to pixels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        raw = self.model(images)
        return self.model.head.export_layout(raw), self.model.decode(raw).boxes


@needs_programs
@pytest.mark.parametrize(
    "sampling", ["grid_sample", pytest.param("gather", marks=pytest.mark.slow)]
)
def test_exported_program_takes_any_batch_and_size(sampling: str) -> None:
    model = _Deployed(small_model()).eval()
    set_sampling(model, sampling)
    batch, height, width = (torch.export.Dim(name, max=1024) for name in "bhw")
    sizes = {0: batch, 2: 32 * height, 3: 32 * width}
    with torch.no_grad():
        program = torch.export.export(
            model, (torch.rand(2, 3, 96, 128),), dynamic_shapes={"images": sizes}, strict=False
        ).module()
        for shape in ((1, 3, 128, 96), (3, 3, 96, 160)):
            images = torch.rand(shape)
            for got, expected in zip(program(images), model(images)):
                torch.testing.assert_close(got, expected)


def test_traced_model_takes_any_batch_and_size() -> None:
    model = _Deployed(small_model()).eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, (torch.rand(2, 3, 96, 128),), check_trace=False)
        images = torch.rand(3, 3, 128, 64)
        for got, expected in zip(traced(images), model(images)):
            torch.testing.assert_close(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [pytest.param(True, marks=needs_both), False])
@pytest.mark.parametrize("sampling", ["grid_sample", "gather"])
def test_onnx_file_takes_any_batch_and_size(tmp_path, sampling: str, dynamo: bool) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, path = _Deployed(small_model()).eval(), str(tmp_path / "model.onnx")
    set_sampling(model, sampling)
    batch, height, width = (torch.export.Dim(name, max=1024) for name in "bhw")
    sizes = {0: batch, 2: 32 * height, 3: 32 * width}
    how = {"input_names": ["images"], "output_names": ["predictions", "boxes"], "opset_version": 18}
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
        for got, wanted in zip(session.run(None, {"images": images.numpy()}), expected):
            torch.testing.assert_close(torch.from_numpy(got), wanted, atol=1e-3, rtol=1e-4)
