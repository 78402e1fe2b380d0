"""Class rows move by the names of the classes when a training starts from weights of other classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import HEADS, tiny_model
from torch import Tensor

from models.weights.fitting import copy_class_rows, match_classes
from models.weights.load import build_to_train
from models.weights.transfer import transfer
from models.yolo import DetectionModel, build_model
from utils.checkpoint import save_checkpoint

OLD = ("cat", "it's", "dog")  # of the tiny models


def fresh(layout: str, names: tuple[str, ...]) -> DetectionModel:
    config = {**tiny_model(layout).config, "nc": len(names)}
    return build_model(config, names=names, imgsz=(64, 96))


@pytest.mark.parametrize(
    ("given", "wanted", "moves", "names", "same"),
    [
        (("cat", "dog"), ("cat", "dog"), ((0, 0), (1, 1)), ("cat", "dog"), True),
        (("cat", "dog"), ("dog", "cat"), ((0, 1), (1, 0)), ("dog", "cat"), False),
        (
            ("Traffic Light", "car"),
            ("car", "traffic_light", "bus"),
            ((0, 1), (1, 0)),
            ("car", "traffic_light"),
            False,
        ),
        (("a", "b"), ("c",), (), (), False),
        (
            ("person", "person"),
            ("Person",),
            ((0, 0),),
            ("Person",),
            False,
        ),  # the first of two of one name
        (None, ("a", "b"), (), (), True),
        (("class0", "class1"), ("a", "b"), (), (), True),  # names that nobody gave
    ],
)
def test_classes_are_told_by_their_names(given, wanted, moves, names, same):
    rows = match_classes(given, wanted)
    assert (rows.moves, rows.names, rows.is_same) == (moves, names, same)


def test_rows_of_an_anchor_head_move_anchor_by_anchor():
    # Two anchors, two classes in the file, three in the model: 7 and 8 rows an anchor.
    rows = match_classes(("cat", "dog"), ("cow", "dog", "cat"))
    given, target = torch.arange(14.0), torch.full((16,), -1.0)
    assert copy_class_rows(target, given, rows, 2) == 14
    assert target.tolist() == [0, 1, 2, 3, 4, -1, 6, 5, 7, 8, 9, 10, 11, -1, 13, 12]


def test_a_row_for_no_object_behind_the_classes_is_left_out():
    rows = match_classes(("cat", "dog"), ("dog",))
    target = torch.zeros(1, 2)
    assert copy_class_rows(target, torch.tensor([[1.0, 1], [2, 2], [9, 9]]), rows, 0) == 2
    assert target.tolist() == [[2, 2]]
    assert copy_class_rows(target, torch.ones(4, 2), rows, 0) == 0  # of neither list


def split(layout: str, key: str, value: Tensor) -> Tensor:
    """A class tensor as (class, everything else); box rows left out."""
    if layout == "anchors":
        return value.unflatten(0, (2, -1))[:, 5:].transpose(0, 1).flatten(1)
    return value.flatten(1) if value.ndim > 1 else value[:, None]


@pytest.mark.parametrize("layout", HEADS)
@pytest.mark.parametrize("names", [("dog", "cat", "it's"), ("bus", "Dog")])
def test_every_family_keeps_the_rows_of_classes_that_it_knows(layout: str, names: tuple[str, ...]):
    source, target = tiny_model(layout), fresh(layout, names)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    report = transfer(target, source.state_dict(), names=(OLD, names))
    known = [name.casefold() in OLD for name in names]
    shown = ", ".join(name for name, knows in zip(names, known) if knows)
    assert report.classes == f"{shown} ({sum(known)} of {len(names)})"
    assert f"class rows by name: {report.classes}" in report.summary()
    given, after = source.state_dict(), target.state_dict()
    moved = 0
    for key, value in after.items():
        is_class = (
            value.shape != given[key].shape
            or key in report.partial
            or not torch.equal(value, given[key])
        )
        if not is_class:
            continue
        new, old, was = (split(layout, key, t) for t in (value, given[key], before[key]))
        moved += 1
        for row, name in enumerate(names):
            expected = old[OLD.index(name.casefold())] if name.casefold() in OLD else was[row]
            assert torch.equal(new[row], expected), (key, name)
    assert moved == {"anchors": 6, "channels": 6, "queries": 7}[layout]
    assert not report.missing and not report.mismatched and not report.unused


def test_no_known_class_leaves_the_rows_fresh_and_says_so():
    source, target = tiny_model("channels"), fresh("channels", ("x", "y", "z"))
    before = target.state_dict()["model.5.cv3.0.2.weight"].clone()
    report = transfer(target, source.state_dict(), names=(OLD, ("x", "y", "z")))
    assert torch.equal(target.state_dict()["model.5.cv3.0.2.weight"], before)
    assert report.classes == "none known (0 of 3)" and len(report.missing) == 6
    assert torch.equal(
        target.state_dict()["model.0.conv.weight"], source.state_dict()["model.0.conv.weight"]
    )


@pytest.mark.parametrize("names", [None, ("class0", "class1", "class2")])
def test_rows_of_classes_without_names_stay_as_they_stand(names: Any):
    source, target = tiny_model("channels"), fresh("channels", ("x", "y", "z"))
    report = transfer(target, source.state_dict(), names=(names, ("x", "y", "z")))
    assert not report.classes and len(report.transferred) == len(target.state_dict())


def test_a_training_that_starts_from_weights_moves_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source = tiny_model("anchors")
    content = {"model": source.state_dict(), "config": source.config, "names": list(OLD)}
    save_checkpoint(tmp_path / "old.pt", {**content, "imgsz": [64, 96]})
    model = build_to_train(("dog", "bird"), weights=str(tmp_path / "old.pt"), imgsz=(64, 64))
    new = model.head.m[0].bias.detach().view(2, 7)
    old = source.head.m[0].bias.detach().view(2, 8)
    assert torch.equal(new[:, 5], old[:, 7]) and not torch.equal(new[:, 6], old[:, 6])
    assert "class rows by name: dog (1 of 2)" in capsys.readouterr().err
