"""From flags to parts: recipes, freezing, anchors, batch size."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engine import batch_size
from engine.anchors import check_anchors, fit_to_objects
from engine.batch_size import automatic_batch_size
from engine.freeze import freeze
from engine.options import TrainOptions
from engine.pace import Length
from engine.recipe import recipe, settle, settle_optimizer
from engine.run import refuse_sizes
from models.family import RECIPES
from models.yolo import DetectionModel, build_model
from utils.errors import ConfigError

SMALL: dict[str, Any] = {
    "nc": 2,
    "anchors": [[10, 10, 20, 20], [40, 40, 80, 80]],
    "backbone": [
        [-1, 1, "Conv", [8, 3, 2]],
        [-1, 1, "Conv", [8, 3, 2]],
        [-1, 1, "C3", [8]],
    ],
    "head": [
        [-1, 1, "Conv", [16, 3, 2]],
        [[2, 3], 1, "Detect", ["nc", "anchors"]],
    ],
}


def small() -> DetectionModel:
    torch.manual_seed(0)
    return build_model(SMALL, imgsz=(64, 64))


def test_a_recipe_is_the_familys_with_the_users_and_the_flags_over_it(tmp_path: Path):
    own = tmp_path / "mine.yaml"
    own.write_text("lr0: 0.5\nbox: 1\n")
    hyp = recipe("yolov5", str(own), {"optimizer": "Adam", "schedule": None})
    assert (hyp["lr0"], hyp["box"], hyp["optimizer"]) == (0.5, 1.0, "Adam")
    assert (hyp["momentum"], hyp["schedule"]) == (0.937, "linear")  # the family's own


def test_the_recipe_of_yolov5_has_the_published_numbers():
    published = {
        "lr0": 0.01, "lrf": 0.01, "momentum": 0.937, "weight_decay": 0.0005, "nbs": 64,
        "warmup_epochs": 3, "warmup_momentum": 0.8, "warmup_bias_lr": 0.1, "anchor_t": 4,
        "box": 0.05, "cls": 0.5, "cls_pw": 1, "obj": 1, "obj_pw": 1, "fl_gamma": 0,
        "hsv_h": 0.015, "hsv_s": 0.7, "hsv_v": 0.4, "degrees": 0, "translate": 0.1, "scale": 0.5,
        "shear": 0, "perspective": 0, "flipud": 0, "fliplr": 0.5, "mosaic": 1, "mixup": 0,
    }  # fmt: skip
    hyp = recipe("yolov5", None, {})
    assert {name: hyp[name] for name in published} == published
    assert hyp["schedule"] == "linear"
    settled = settle_optimizer(hyp, Length(7330, 300, 16), None)  # COCO
    named = ("optimizer", "lr0", "momentum", "warmup_bias_lr")
    assert [settled[key] for key in named] == ["SGD", 0.01, 0.937, 0.1]
    short = settle_optimizer(hyp, Length(25, 30, 16), None)
    assert [short[key] for key in named] == ["AdamW", 0.002, 0.9, 0.0]
    assert settle_optimizer(hyp, Length(25, 30, 16), 6)["lr0"] == 0.001, "from weights: half of it"


def test_which_recipe_is_used_is_said(capsys: pytest.CaptureFixture[str]):
    recipe("rtdetr", None, {})
    assert "data/hyps/rtdetr.yaml, the rtdetr family's own" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["yolov5", "yolov9", "yolo11", "rtdetr", "dfine"])
def test_every_family_has_a_recipe_with_what_the_loop_needs(family: str):
    hyp = recipe(family, None, {})
    needed = "optimizer lr0 lrf schedule momentum weight_decay warmup_epochs warmup_bias_lr nbs"
    assert set(f"{needed} warmup_momentum clip_norm ema_decay ema_tau".split()) <= set(hyp)


def test_an_unknown_key_of_a_recipe_is_told_with_its_line(tmp_path: Path):
    own = tmp_path / "mine.yaml"
    own.write_text("lr0: 0.1\nmomentun: 0.9\n")
    with pytest.raises(ConfigError, match=r"mine.yaml:2: unknown key 'momentun'.*'momentum'"):
        recipe("yolov5", str(own), {})


@pytest.mark.parametrize(
    ("family", "row", "message"),
    [
        ("yolov5", "nbs: 0", "nbs - got 0, expected 1 or more"),
        ("yolov5", "lr0: -1", "lr0 - got -1, expected 0 or more"),
        ("yolov5", "anchor_t: 0", "anchor_t - got 0, expected 1 or more"),
        ("yolov5", "momentum: 2.0", "momentum - got 2, expected 0 to 0.9999"),
        ("yolov5", "weight_decay: -1", "weight_decay - got -1, expected 0 or more"),
        ("yolov5", "scale: 1.0", "scale - got 1, expected 0 to 0.99"),
        ("yolo11", "mosaic: 1.5", "mosaic - got 1.5, expected 0 to 1"),
        ("yolo11", "tal_topk: 0", "tal_topk - got 0, expected 1 or more"),
        ("rtdetr", "num_denoising: -1", "num_denoising - got -1, expected 0 or more"),
        ("rtdetr", "ema_tau: 0", "ema_tau - got 0, expected 1 or more"),
    ],
)
def test_a_number_out_of_range_is_told_with_its_line(
    family: str, row: str, message: str, tmp_path: Path
):
    own = tmp_path / "mine.yaml"
    own.write_text(f"fliplr: 1\n{row}\n")
    with pytest.raises(ConfigError) as caught:
        recipe(family, str(own), {})
    assert str(caught.value) == f"{own}:2: {message}."


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_that_are_here_are_in_range(file: Path):
    for family in ("yolov5", "yolov9", "yolo11", "rtdetr", "dfine"):
        if file.stem in (family, "quick"):
            assert recipe(family, str(file), {})


def test_a_flag_that_the_family_has_no_number_for_is_said_and_not_recorded(
    capsys: pytest.CaptureFixture[str],
):
    assert "label_smoothing" not in recipe("yolo11", None, {"label_smoothing": 0.1})
    assert "--label-smoothing: without effect for yolo11" in capsys.readouterr().err
    assert recipe("yolov5", None, {"label_smoothing": 0.1})["label_smoothing"] == 0.1
    assert "without effect" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wanted", "rows", "parameters"),
    [
        (["2"], [0, 1], "model.0. model.1."),  # one number: every row below it
        (["0", "2"], [0, 2], "model.0. model.2."),  # several: those rows
        (["backbone"], [0, 1, 2], "model.0. model.1. model.2."),
        (["head"], [3, 4], "model.3. model.4."),
        (["C3"], [2], "model.2."),
        (["Conv"], [0, 1, 3], "model.0. model.1. model.3."),
        (["model.2.cv1"], [], "model.2.cv1."),
        (["model.2.*"], [2], "model.2."),
        (["C3", "3"], [2, 3], "model.2. model.3."),
    ],
)
def test_rows_are_frozen_by_index_or_name(wanted: list[str], rows: list[int], parameters: str):
    model = small()
    frozen = freeze(model, wanted)
    assert [i for i, row in enumerate(model.model) if row in frozen] == rows
    still = {name for name, p in model.named_parameters() if not p.requires_grad}
    prefixes = tuple(parameters.split())
    assert still == {name for name, _ in model.named_parameters() if name.startswith(prefixes)}
    norms = {n for n, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    kept = {n for n, m in model.named_modules() for f in frozen if m in set(f.modules())}
    assert {n for n in norms if f"{n}.".startswith(prefixes)} <= kept  # statistics stay too


def test_indices_are_those_of_the_table_where_a_backbone_takes_five():
    config = {
        **SMALL,
        "backbone": [[-1, 1, "EMO_1M", [False]], [-1, 1, "Conv", [8]]],
        "head": [[[3, 4], 1, "Detect", ["nc", "anchors"]]],
    }
    model = build_model(config, imgsz=(64, 64))
    assert freeze(model, ["5"]) == [model.model[0]]
    assert freeze(model, ["6"]) == [model.model[0], model.model[1]]
    assert freeze(model, ["5", "5"]) == [model.model[1]]
    for numbers in (
        ["4", "5"],
        ["0", "5"],
        ["1", "3", "5"],
    ):  # each of its five slots means the backbone
        assert freeze(model, numbers) == [model.model[0], model.model[1]]
    for below in ("1", "4"):
        with pytest.raises(ConfigError, match="expected a number from 5 to 7: .* EMO_1M as 4"):
            freeze(model, [below])


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            ["99"],
            "got 99, expected a number from 1 to 5: rows below it are frozen, and the table prints Conv as 0",
        ),
        (["0", "7"], "got 7, expected indices from 0 to 4"),
        (["bakbone"], "Did you mean 'backbone'?"),
        (["model.9.*"], "got 'model.9.*', expected an index, backbone, head"),
    ],
)
def test_what_cannot_be_frozen_is_refused(wanted: list[str], message: str):
    with pytest.raises(ConfigError) as caught:
        freeze(small(), wanted)
    assert message in str(caught.value)


def anchors_in_pixels(model: DetectionModel) -> np.ndarray:
    strides = torch.tensor(model.strides).view(-1, 1, 1)
    return (model.head.anchors * strides).numpy()


@pytest.mark.parametrize(
    ("backbone", "weights", "epochs", "expected"),
    [
        ("test_vit", None, 30, 1),
        ("test_vit", "has.pt", 30, 0),
        ("test_vit", None, 30_000, 0),
        ("test_resnet", None, 30, 0),
    ],
)
def test_a_plain_transformer_without_weights_is_told(
    backbone: str, weights: str | None, epochs: int, expected: int, caplog
):
    model = build_model("yolo11n", backbone=[backbone], imgsz=(64, 64))
    options = TrainOptions(cfg="yolo11n", data="d.yaml", weights=weights or "")
    settle(recipe("yolo11", None, {}), options, model, Length(25, epochs, 16))
    assert caplog.text.count(f"{backbone}: has no weights") == expected


def test_anchors_that_fit_are_kept(capsys: pytest.CaptureFixture[str]):
    model = small()
    before = anchors_in_pixels(model)
    # within 4 times of 12 x 12 are 10, 20 and 40; of 70 x 60 they are 20, 40 and 80
    check_anchors(model.head, np.array([[12.0, 12.0], [70.0, 60.0]]), 4.0, 0)
    assert np.array_equal(anchors_in_pixels(model), before)
    assert "anchors: 3.00 an object, best possible recall 1.0000" in capsys.readouterr().err


def long_boxes() -> np.ndarray:
    """Flat objects that no anchor of the config is near."""
    rng = np.random.default_rng(0)
    return np.stack((rng.uniform(150, 400, 200), rng.uniform(8, 16, 200)), 1)


def test_anchors_that_do_not_fit_are_fitted_small_ones_to_the_fine_level():
    model = small()
    check_anchors(model.head, long_boxes(), 4.0, 0)
    pixels = anchors_in_pixels(model)
    assert pixels.shape == (2, 2, 2)
    assert (pixels[..., 0] > 4 * pixels[..., 1]).all()
    areas = pixels.prod(-1).flatten()
    assert (np.diff(areas) >= 0).all()
    assert model.head.anchors.dtype == torch.float32


@pytest.mark.parametrize(("missed", "is_tried"), [(1, False), (3, True)])
def test_a_fit_is_tried_where_more_than_one_object_in_a_hundred_has_no_anchor(
    missed: int, is_tried: bool, capsys: pytest.CaptureFixture[str]
):
    """Of 200 objects between 10 and 80 pixels some are 400 long and 8 high: 0.995 and 0.985 of them have an anchor."""
    rng = np.random.default_rng(0)
    sizes = rng.uniform(10, 80, (200, 1)) * np.ones(2)
    sizes[:missed] = (400.0, 8.0)
    check_anchors(small().head, sizes, 4.0, 0)
    told = capsys.readouterr().err
    assert f"best possible recall {1 - missed / 200:.4f}" in told
    assert ("anchors: kept, a fit reaches" in told or "anchors: fitted" in told) is is_tried


def test_without_objects_or_with_too_few_the_anchors_stay(capsys: pytest.CaptureFixture[str]):
    model = small()
    before = anchors_in_pixels(model)
    check_anchors(model.head, np.zeros((0, 2)), 4.0, 0)
    check_anchors(model.head, np.array([[400.0, 5.0]]), 4.0, 0)
    assert np.array_equal(anchors_in_pixels(model), before)
    assert "anchors: kept - got 1 distinct object sizes" in capsys.readouterr().err


def test_without_a_gpu_an_automatic_batch_is_16(capsys: pytest.CaptureFixture[str]):
    assert automatic_batch_size(small(), (64, 64), torch.device("cpu")) == 16
    assert "no GPU to measure" in capsys.readouterr().err


def test_measuring_the_memory_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch):
    """With a CPU that answers as a GPU does: 1 MiB an image, 64 MiB free."""
    model, batches = small(), list[int]()
    forward = DetectionModel.forward

    def look(self: DetectionModel, images: torch.Tensor, *rest: Any) -> Any:
        batches.append(len(images))
        return forward(self, images, *rest)

    monkeypatch.setattr(DetectionModel, "forward", look)
    answers = {
        "mem_get_info": lambda _: (64 * 2**20, 0), "reset_peak_memory_stats": lambda _: None,
        "memory_allocated": lambda _: 0, "max_memory_allocated": lambda _: batches[-1] * 2**20,
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: torch.rand(size))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    device: Any = SimpleNamespace(type="cuda")
    assert automatic_batch_size(model, (64, 64), device) == 32
    assert batches == [1, 2, 4, 8]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("fixed", "share", "expected"),
    [
        (0, 0.7, 32),
        (16, None, 16),  # 0.7
        (16, 1.0, 32),
        (0, 0.2, 8),
    ],  # (64 x share - fixed) MiB for 1 MiB an image
)
def test_an_automatic_batch_fits_into_its_share_beside_what_is_there_anyway(
    fixed: int, share: float | None, expected: int, monkeypatch: pytest.MonkeyPatch
):
    steps = [(batch, (fixed + batch) * 2**20) for batch in (1, 2, 4, 8)]
    monkeypatch.setattr(batch_size, "_memory_of_steps", lambda *_: steps)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (64 * 2**20, 0))
    device: Any = SimpleNamespace(type="cuda")
    given = () if share is None else (share,)
    assert automatic_batch_size(small(), (64, 64), device, *given) == expected


def test_anchors_are_measured_on_objects_at_the_training_size(capsys: pytest.CaptureFixture[str]):
    """Of images 1280 high and wide, at 64 pixels: objects of 240 x 240 are 12 x 12, near the anchor of 10."""
    sizes = np.full((4, 2), 240.0), np.full((4, 2), 1280)
    dataset: Any = SimpleNamespace(box_sizes_wh=lambda: sizes, offsets=np.array([0, 4]))
    fit_to_objects(small(), dataset, (64, 64), {"anchor_t": 1.5}, TrainOptions())
    assert "anchors: 1.00 an object, best possible recall 1.0000" in capsys.readouterr().err


def test_anchors_that_are_to_stay_are_measured_all_the_same(tiny_cfg: Path, capsys):
    model = build_model(tiny_cfg)
    before = model.head.anchors.clone()
    check_anchors(model.head, np.array([[400.0, 5.0], [12.0, 12.0]]), 4.0, 0, refit=False)
    assert "best possible recall 0.5000" in capsys.readouterr().err
    assert bool((model.head.anchors == before).all())


@pytest.mark.parametrize("flag", ["rect", "multi_scale"])
def test_flags_that_change_sizes_are_refused_for_a_model_of_one_size(flag: str):
    row = SimpleNamespace(any_size=False, place="backbone[0]", module="levit_128s")
    model = SimpleNamespace(any_size=False, rows=(row,), imgsz=(96, 128))
    options = TrainOptions(**{flag: True})
    told = "backbone[0] levit_128s takes images of 96x128 alone. Leave the flag out."
    with pytest.raises(ConfigError) as caught:
        refuse_sizes(options, model)
    assert str(caught.value) == f"--{flag.replace('_', '-')}: {told}"
    refuse_sizes(options, SimpleNamespace(any_size=True))
    refuse_sizes(TrainOptions(), model)
