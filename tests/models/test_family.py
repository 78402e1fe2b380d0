"""What a head is, which criterion trains it, and that a family is its files and one entry."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from toy_family import ToyHead, ToyLoss

import export
import train
import val
from deploy.backends import load_backend
from models import family
from models.family import FAMILIES, RECIPES, Family, build_criterion, family_of
from models.head import Head
from models.heads.anchor import AnchorDetect
from models.heads.ddetect import DDetect, DualDDetect
from models.heads.dfine import DFINEDecoder
from models.heads.dfl import DFLDetect
from models.heads.rtdetr import RTDETRDecoder
from models.postprocess import KINDS
from utils.config import load_yaml
from utils.errors import ConfigError

TOY_RECIPE = {"box": 1.0, "lr0": 0.01, "optimizer": "SGD", "nbs": 4}
TOY_MODEL = """
nc: 2
backbone: [[-1, 1, Conv, [8, 3, 2]], [-1, 1, Conv, [16, 3, 2]], [-1, 1, Conv, [16, 3, 2]]]
head: [[-1, 1, ToyHead, [nc]]]
"""


def heads() -> list[Head]:
    return [
        AnchorDetect(2, [[8.0, 8.0], [16.0, 16.0]], [4, 4]),
        DFLDetect(2, channels=[8, 8]),
        DDetect(2, [8, 8]),
        DualDDetect(2, [8, 8, 8, 8]),
        RTDETRDecoder(2, [8, 8], 8, num_queries=2, num_heads=2, num_layers=1),
        DFINEDecoder(2, [8, 8], 8, num_queries=2, num_heads=2, num_layers=2),
    ]


@pytest.mark.parametrize("head", heads(), ids=lambda head: type(head).__name__)
def test_a_head_says_what_the_contract_asks_for(head: Head):
    strides = (8, 16) * (len(head.strides or (8, 16)) // 2)
    head.initialize((8, 16, 8, 16) if isinstance(head, DualDDetect) else strides)
    assert (head.num_classes, head.strides) == (2, (8, 16))
    assert head.layout in ("anchors", "channels", "queries") and head.postprocess in KINDS
    maps = [torch.rand(2, *shape) for shape in ((8, 12, 16), (8, 6, 8))]
    maps = [m[:, :4] for m in maps] if isinstance(head, AnchorDetect) else maps
    maps = maps * 2 if isinstance(head, DualDDetect) else maps
    raw = head.eval()(maps)
    decoded = head.decode(raw)
    cells = 12 * 16 + 6 * 8
    assert decoded.boxes.shape == (2, head.num_queries or cells, 4)
    assert decoded.scores.shape == (2, head.num_queries or cells, 2)
    main = head.main_head().eval()
    assert type(family_of(head).criterion).__name__ and isinstance(main, Head)
    found = main.decode(main(maps[head.main_inputs]))
    assert torch.equal(found.boxes, decoded.boxes) and torch.equal(found.scores, decoded.scores)
    laid: Tensor = head.export_layout(raw)
    assert laid.shape[0] == 2 and laid.dtype == torch.float32


@pytest.mark.parametrize(
    ("head", "told"),
    [
        (RTDETRDecoder(2, [8], 8, num_queries=2, num_heads=2, num_layers=1),
         "objects beyond the head's 2 queries an image, not learned: 3 of 6"),
        (DFINEDecoder(2, [8], 8, num_queries=2, num_heads=2, num_layers=1),
         "objects beyond the head's 2 queries an image, not learned: 3 of 6"),
        (DFLDetect(2, channels=[8]), "learned only where a point of its grid lies in them: 2 of 6"),
        (DDetect(2, [8]), "learned only where a point of its grid lies in them: 2 of 6"),
        (AnchorDetect(2, [[8.0, 8.0]], [4]), ""),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_objects_that_a_head_cannot_learn_are_counted(head: Head, told: str, capsys):
    """Images of 5 and 1 objects; two objects are thinner than the finest stride of 8."""
    head.initialize((8,))
    sizes = np.array([[9.0, 9], [7.9, 30], [30, 7], [8, 8], [50, 50], [20, 20]])
    head.tell_limits(sizes, np.array([5, 1]))
    said = capsys.readouterr().err
    assert told in said if told else not said
    head.tell_limits(np.zeros((0, 2)), np.array([0]))
    assert not capsys.readouterr().err


def test_anchors_are_set_once_however_often_the_strides_are_told():
    head = AnchorDetect(2, [[8.0, 16.0]], [4])
    for _ in range(2):
        head.initialize((8,))
        assert head.anchors.tolist() == [[[1.0, 2.0]]]


def test_every_family_has_a_recipe_of_its_own():
    for entry in FAMILIES:
        assert (
            entry.recipe_file == RECIPES / f"{entry.head.family}.yaml"
            and entry.recipe_file.is_file()
        )


def test_a_recipe_that_lacks_a_number_is_told_with_its_file():
    with pytest.raises(ConfigError) as caught:
        build_criterion(DFLDetect(2, channels=[8]), {"box": 7.5, "cls": 0.5}, (64, 64))
    assert str(caught.value).startswith("recipe: lacks 'dfl' - expected the keys of ")
    assert str(caught.value).endswith("yolo11.yaml.")


def test_a_head_without_an_entry_is_told(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError) as caught:
        build_criterion(ToyHead(2, [8]), {}, (64, 64))
    assert str(caught.value).startswith(
        "ToyHead: is a head that no criterion trains, expected one of AnchorDetect, "
    )


def test_a_subclass_of_a_head_is_trained_as_it():
    class Mine(DFLDetect):
        pass

    assert family_of(Mine(2, channels=[8])).head is DFLDetect


def test_a_family_takes_its_files_and_one_line(
    tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    recipe, cfg = tmp_path / "toy.yaml", tmp_path / "toy_model.yaml"
    lines = {**load_yaml(RECIPES / "yolo11.yaml"), **TOY_RECIPE}
    recipe.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    cfg.write_text(TOY_MODEL)
    entry = Family(ToyHead, ToyLoss, recipe=recipe)
    monkeypatch.setattr(family, "FAMILIES", [*FAMILIES, entry])  # this is the line

    words = ["--data", shared_data, "--imgsz", 96, "--workers", 0, "--project", tmp_path]
    train.main(
        [
            str(w)
            for w in [
                "--cfg",
                cfg,
                *words,
                "--epochs",
                2,
                "--batch-size",
                4,
                "--name",
                "run",
                "--noplots",
            ]
        ]
    )
    weights = tmp_path / "run" / "weights" / "best.pt"
    printed = capsys.readouterr()
    assert "the toy family's own" in printed.err and "best epoch" in printed.out

    model = load_backend(weights, fuse=False).model
    options = export.ExportOptions(imgsz=(96, 96), device=torch.device("cpu"))
    (artifact,) = export.export(model, ["torchscript"], options, weights)
    assert load_backend(artifact.path).family == "toy"
    val.main(
        [
            str(w)
            for w in [
                "--weights",
                artifact.path,
                *words,
                "--batch-size",
                1,
                "--name",
                "val",
                "--noplots",
            ]
        ]
    )
    assert "all" in capsys.readouterr().out
