"""Flags of training two by two: what each promises holds beside every other one, or one line refuses the pair.

In every run the objects are squares of two colours, and no augmentation changes shape or colour: boxes that are no
squares, or whose middle has another class's colour, mean that somewhere picture and boxes went apart.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

import train
from engine.flags import spelling
from engine.options import TrainOptions
from engine.recorder import RunRecorder
from engine.run import Run
from utils.checkpoint import load_checkpoint
from utils.errors import UserError
from utils.structures import Targets

COLOURS = ((220, 30, 30), (30, 30, 220))  # of the classes, RGB
SIZES = ((48, 96), (96, 48), (72, 72))
SIDE = 12  # of an object, in pixels
EPOCHS = 2
RECIPE = "mosaic: 1.0\nscale: 0.0\ntranslate: 0.0\nhsv_h: 0.0\nhsv_s: 0.0\nhsv_v: 0.0\nmixup: 0.0\nwarmup_epochs: 0\nnbs: 4\n"


class Step(NamedTuple):
    """What the network got in one step."""

    epoch: int
    images: Tensor
    targets: Targets
    paths: tuple[str, ...]


class Trained(NamedTuple):
    """A finished run and what it left."""

    run: Run
    steps: list[Step]
    folder: Path

    @property
    def rows(self) -> list[dict[str, str]]:
        with (self.folder / "results.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    @property
    def shapes(self) -> set[tuple[int, int]]:
        return {(step.images.shape[2], step.images.shape[3]) for step in self.steps}


def draw(folder: Path, split: str, count: int) -> None:
    """Pictures with a square in each half of their longer side, every fourth of the second class; the last is empty."""
    for kind in ("images", "labels"):
        (folder / kind / split).mkdir(parents=True)
    for number in range(count):
        rng, (height, width) = np.random.default_rng(number), SIZES[number % 3]
        picture, rows = np.full((height, width, 3), 90, np.uint8), ""
        for half in range(0 if number == count - 1 else 2):
            x = (
                int(rng.integers(0, width // 2 - SIDE)) + half * width // 2
                if width >= height
                else 12
            )
            y = (
                int(rng.integers(0, height // 2 - SIDE)) + half * height // 2
                if width < height
                else 12
            )
            label = int(half and number % 4 == 0)
            picture[y : y + SIDE, x : x + SIDE] = COLOURS[label][::-1]
            rows += f"{label} {(x + SIDE / 2) / width} {(y + SIDE / 2) / height} {SIDE / width} {SIDE / height}\n"
        cv2.imwrite(str(folder / "images" / split / f"{number:02}.png"), picture)
        (folder / "labels" / split / f"{number:02}.txt").write_text(rows)


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("squares")
    draw(folder, "train", 10)
    draw(folder, "val", 4)
    (folder / "hyp.yaml").write_text(RECIPE)
    (folder / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [red, blue]\n")
    return folder / "data.yaml"


def has_mosaic(step: Step, trained: Trained) -> bool:
    """Whether some image of the step has other objects than its file."""
    dataset = trained.run.train_set
    places = [list(dataset.paths).index(path) for path in step.paths]
    own = [int(np.diff(dataset.offsets)[place]) for place in places]
    counts = torch.bincount(step.targets.image_index, minlength=len(places)).tolist()
    return own != counts


def check_rect(trained: Trained) -> None:
    assert trained.run.train_set.batch_shapes is not None
    assert not any(has_mosaic(step, trained) for step in trained.steps)
    if not trained.run.options.multi_scale:
        assert trained.shapes == {tuple(s) for s in trained.run.train_set.batch_shapes.tolist()}


def check_plain_shapes(trained: Trained) -> None:
    assert trained.shapes == {trained.run.imgsz}


def check_multi_scale(trained: Trained) -> None:
    assert len(trained.shapes) > 1
    assert all(side % 32 == 0 and side <= 1.5 * 128 for shape in trained.shapes for side in shape)


def check_single_cls(trained: Trained) -> None:
    assert trained.run.model.names == ("object",)
    assert all(not step.targets.labels.any() for step in trained.steps)


def check_image_weights(trained: Trained) -> None:
    is_one_class = trained.run.options.single_cls
    assert (trained.run.train_loader.sampler.image_weights is None) is is_one_class


def check_close_mosaic(trained: Trained) -> None:
    last = [step for step in trained.steps if step.epoch == EPOCHS - 1]
    assert last and not any(has_mosaic(step, trained) for step in last)


def check_cache(trained: Trained) -> None:
    assert trained.run.train_set.cache is not None and trained.run.val_set.cache is not None


def check_imgsz(trained: Trained) -> None:
    assert trained.run.imgsz == (64, 128)


def check_freeze(trained: Trained) -> None:
    rows = trained.run.model.model[:5]
    assert not any(p.requires_grad for row in rows for p in row.parameters())


def check_anchors(trained: Trained) -> None:
    assert trained.run.model.head.anchors[0, 0].tolist() == [10 / 8, 10 / 8]


def check_nosave(trained: Trained) -> None:
    names = {path.name for path in (trained.folder / "weights").iterdir()}
    assert names == {"best.pt", "last.pt"}


def check_noval(trained: Trained) -> None:
    measured = [bool(row["metrics/mAP_0.5"]) for row in trained.rows]
    assert measured == [False] * (EPOCHS - 1) + [True]


def check_save_period(trained: Trained) -> None:
    names = {path.name for path in (trained.folder / "weights").iterdir()}
    assert {"epoch0.pt", "epoch1.pt"} <= names


def hyp_is(key: str, value: object) -> Callable[[Trained], None]:
    def check(trained: Trained) -> None:
        assert trained.run.hyp[key] == value

    return check


def option_is(key: str, value: object) -> Callable[[Trained], None]:
    def check(trained: Trained) -> None:
        assert load_checkpoint(trained.folder / "weights/last.pt")["opt"][key] == value

    return check


# Each flag, and what must be true of a run that has it. `--sync-bn`, `--download`, `--device` and `--evolve` need more
# than one process, a network, another device, and many runs; they have tests of their own.
FLAGS: dict[str, tuple[list[str], Callable[[Trained], None]]] = {
    "rect": (["--rect"], check_rect),
    "multi-scale": (["--multi-scale"], check_multi_scale),
    "single-cls": (["--single-cls"], check_single_cls),
    "image-weights": (["--image-weights"], check_image_weights),
    "close-mosaic": (["--close-mosaic", "1"], check_close_mosaic),
    "cache ram": (["--cache", "ram"], check_cache),
    "cache disk": (["--cache", "disk"], check_cache),
    "imgsz": (["--imgsz", "64", "128"], check_imgsz),
    "batch-size": (["--batch-size", "3"], option_is("batch_size", 3)),
    "batch-size auto": (["--batch-size", "-1"], option_is("batch_size", 16)),
    "workers": (["--workers", "1"], option_is("workers", 1)),
    "freeze": (["--freeze", "backbone"], check_freeze),
    "noautoanchor": (["--noautoanchor"], check_anchors),
    "optimizer": (["--optimizer", "AdamW"], hyp_is("optimizer", "AdamW")),
    "cos-lr": (["--cos-lr"], hyp_is("schedule", "cosine")),
    "flat-cos-lr": (["--flat-cos-lr"], hyp_is("schedule", "flat_cosine")),
    "fixed-lr": (["--fixed-lr"], hyp_is("schedule", "fixed")),
    "box-loss": (["--box-loss", "diou"], hyp_is("box_loss", "diou")),
    "cls-loss": (["--cls-loss", "focal"], hyp_is("cls_loss", "focal")),
    "label-smoothing": (["--label-smoothing", "0.1"], hyp_is("label_smoothing", 0.1)),
    "patience": (["--patience", "2"], option_is("patience", 2)),
    "amp off": (["--amp", "off"], option_is("amp", "off")),
    "amp bf16": (["--amp", "bf16"], option_is("amp", "bf16")),
    "seed": (["--seed", "5"], option_is("seed", 5)),
    "nosave": (["--nosave"], check_nosave),
    "noval": (["--noval"], check_noval),
    "save-period": (["--save-period", "1"], check_save_period),
}

# Pairs that exclude each other, and what the line says that refuses them.
REFUSED = {
    ("rect", "image-weights"): "--image-weights: cannot be used with --rect",
    ("cos-lr", "flat-cos-lr"): "--cos-lr, --flat-cos-lr: got 2 schedules",
    ("cos-lr", "fixed-lr"): "--cos-lr, --fixed-lr: got 2 schedules",
    ("flat-cos-lr", "fixed-lr"): "--flat-cos-lr, --fixed-lr: got 2 schedules",
}
# Pairs of which the second flag changes nothing beside the first, and what the line says that tells it.
WITHOUT_EFFECT = {
    ("rect", "close-mosaic"): "--close-mosaic: without effect with --rect",
    ("nosave", "save-period"): "--save-period: without effect with --nosave",
    ("patience", "noval"): "--patience: without effect with --noval",
    ("single-cls", "image-weights"): "--image-weights: without effect",
}
# Two values of one flag, of which the command line takes the last.
SAME_FLAG = {"cache ram": "cache", "cache disk": "cache", "amp off": "amp", "amp bf16": "amp"}
SAME_FLAG |= {"batch-size": "batch", "batch-size auto": "batch"}
PAIRS = [
    pair
    for pair in itertools.combinations(FLAGS, 2)
    if SAME_FLAG.get(pair[0], pair[0]) != SAME_FLAG.get(pair[1], pair[1])
]
# What meets in the loader, in a batch, or where an epoch ends: run each time. The others are slow together.
QUICK = [
    *[("rect", "multi-scale"), ("multi-scale", "imgsz"), ("image-weights", "close-mosaic")],
    *[("rect", "cache disk"), ("single-cls", "image-weights"), ("nosave", "save-period")],
]
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "flags.md"


def run_with(words: list[str], cfg: Path, data: Path, folder: Path, monkeypatch) -> Trained:
    steps: list[Step] = []
    runs: list[Run] = []

    def look(
        self: RunRecorder, epoch: int, step: int, images: Tensor, targets: Targets, paths
    ) -> None:
        steps.append(Step(epoch, images.clone(), targets, tuple(paths)))
        runs.append(self.run)

    monkeypatch.setattr(RunRecorder, "batch", look)
    given = [
        "--cfg",
        cfg,
        "--data",
        data,
        "--hyp",
        data.parent / "hyp.yaml",
        "--imgsz",
        96,
        "--batch-size",
        2,
    ]
    given += [
        "--workers",
        0,
        "--device",
        "cpu",
        "--noplots",
        "--epochs",
        EPOCHS,
        "--project",
        folder,
    ]
    train.main([*map(str, given), *words])
    return Trained(runs[0], steps, folder / "exp")


def check_pictures_and_boxes(trained: Trained) -> None:
    """Objects are squares of the colour of their class, but for those that the edges in a mosaic cut."""
    is_square, is_right = [], []
    for images, targets in ((step.images, step.targets) for step in trained.steps):
        for image, label, (x1, y1, x2, y2) in zip(*targets):
            is_square.append(0.85 < (x2 - x1) / (y2 - y1) < 1.18)
            red, _, blue = images[image, :, int((y1 + y2) / 2), int((x1 + x2) / 2)].tolist()
            is_coloured = max(red, blue) > 0.5 and min(red, blue) < 0.35
            is_class = trained.run.options.single_cls or int(label) == int(blue > red)
            is_right.append(is_coloured and is_class)
    assert np.mean(is_square) > (
        0.45 if any(has_mosaic(s, trained) for s in trained.steps) else 0.95
    )
    assert np.mean(is_right) > 0.9


def check_pair(
    pair: tuple[str, str], cfg: Path, data: Path, folder: Path, monkeypatch, capsys
) -> None:
    words = [word for name in pair for word in FLAGS[name][0]]
    if pair in REFUSED:
        with pytest.raises(UserError) as caught:
            run_with(words, cfg, data, folder, monkeypatch)
        assert REFUSED[pair] in str(caught.value) and "\n" not in str(caught.value)
        return
    trained = run_with(words, cfg, data, folder, monkeypatch)
    check_pictures_and_boxes(trained)
    told = WITHOUT_EFFECT.get(pair) or WITHOUT_EFFECT.get(pair[::-1])
    messages = capsys.readouterr().err
    if told:
        assert told in messages
    for name in pair:
        if not (told and told.startswith(f"--{name}:")):
            FLAGS[name][1](trained)
    if not {"rect", "multi-scale"} & set(pair):
        check_plain_shapes(trained)


@pytest.mark.parametrize("pair", QUICK, ids=" + ".join)
def test_flags_that_meet_compose(pair, tiny_cfg, squares, tmp_path, monkeypatch, capsys):
    check_pair(pair, tiny_cfg, squares, tmp_path, monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair not in QUICK], ids=" + ".join)
def test_every_other_pair_composes(pair, tiny_cfg, squares, tmp_path, monkeypatch, capsys):
    check_pair(pair, tiny_cfg, squares, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("pair", [*REFUSED, *WITHOUT_EFFECT], ids=" + ".join)
def test_the_table_names_pairs_that_are_run(pair):
    assert pair in PAIRS or pair[::-1] in PAIRS


def as_table() -> list[str]:
    """The exceptions as docs/flags.md has them."""
    rows = [f"| `--{a}` | `--{b}` | refused: {told} |" for (a, b), told in REFUSED.items()]
    rows += [f"| `--{a}` | `--{b}` | told: {told} |" for (a, b), told in WITHOUT_EFFECT.items()]
    return ["| flag | with | what happens |", "|---|---|---|", *rows]


def test_the_document_shows_the_table_and_every_flag():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("|")] == as_table()
    idle = [spelling(f.name) for f in fields(TrainOptions) if not f.metadata["has_effect"]]
    missing = [flag for flag in (*FLAGS, *idle) if f"`--{flag.removeprefix('--')}`" not in text]
    assert not missing
