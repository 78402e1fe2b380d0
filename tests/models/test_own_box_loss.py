"""A user's own box loss: a file and a function in it, and every mistake in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from loss_cases import FAMILIES, TARGETS, case, criterion_of

from models.losses.box import BoxLoss, Frame
from models.losses.own import settle_own
from utils.errors import ConfigError
from utils.structures import Targets

OWN = """
import torch

def soft(predicted, target):
    return 1 - torch.exp(-(predicted - target).abs().sum(-1) / 100)

def mean(predicted, target):
    return (predicted - target).abs().mean()

def column(predicted, target):
    return (predicted - target).abs().sum(-1, keepdim=True)

def detached(predicted, target):
    return (predicted - target).abs().sum(-1).detach()

def number(predicted, target):
    return 0.5

def broken(predicted, target):
    return predicted + missing

number_of_boxes = 3
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "my_losses.py"
    path.write_text(OWN)
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_a_function_of_ones_own_trains_every_family(family: str, own: Path):
    head, raw, leaves = case(family)
    criterion = criterion_of(family, head, box_loss=f"{own}:soft")
    for targets in (Targets.empty(), TARGETS):
        total = sum(criterion(raw, targets).values())
        gradients = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
        assert torch.isfinite(total) and all(g is None or g.isfinite().all() for g in gradients)


def test_it_sees_pixels_in_rows_and_its_value_is_the_loss(own: Path):
    loss = BoxLoss(f"{own}:soft", {}, allow_code=True)
    frame = Frame((100, 200), unit=torch.tensor([200.0, 100.0, 200.0, 100.0]))
    boxes, wanted = torch.rand(3, 5, 1, 4), torch.rand(1, 7, 4)
    distance = ((boxes - wanted).abs() * frame.unit).sum(-1)
    expected = torch.exp(-distance / 100)
    torch.testing.assert_close(loss.similarity(boxes, wanted, frame), expected)
    torch.testing.assert_close(loss(boxes, wanted, frame), 1 - expected)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("mean", "gave () for 2 pairs of boxes, expected a tensor (2,). Return one loss per pair"),
        ("column", "gave (2, 1) for 2 pairs of boxes"),
        ("number", "gave a float for 2 pairs of boxes"),
        ("detached", "gave a loss without gradient"),
        ("broken", "failed on boxes (2, 4) - NameError: name 'missing' is not defined (my_losses.py line 20)"),
        ("softer", "expected a function that my_losses.py defines. Did you mean 'soft'?"),
        ("number_of_boxes", "expected a function that my_losses.py defines"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_it_is_one_line_before_anything_is_trained(
    function: str, told: str, own: Path
):
    head, _, _ = case("yolo11")
    with pytest.raises(ConfigError) as caught:
        criterion_of("yolo11", head, box_loss=f"{own}:{function}")
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_it_runs_only_with_leave(own: Path, tmp_path: Path):
    mark = tmp_path / "ran"
    own.write_text(f"open({str(mark)!r}, 'w')\n{OWN}")
    with pytest.raises(ConfigError, match=r"my_losses.py:soft would run code.*--allow-code"):
        BoxLoss(f"{own}:soft", {})
    assert not mark.exists()
    BoxLoss(f"{own}:soft", {}, allow_code=True)
    assert mark.exists()


def test_a_file_that_cannot_be_imported_is_one_line(own: Path):
    own.write_text("1 +\n")
    with pytest.raises(ConfigError, match="my_losses.py:soft cannot be imported - SyntaxError"):
        BoxLoss(f"{own}:soft", {}, allow_code=True)


def test_the_file_is_found_beside_the_recipe_in_the_working_folder_or_where_it_was_moved_to(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = f"{own.resolve()}:soft"
    assert settle_own("my_losses.py:soft", [tmp_path, Path()]) == whole
    assert settle_own(whole, [Path()]) == whole
    assert settle_own("ciou", [tmp_path]) == "ciou"
    with pytest.raises(ConfigError, match=r"expected the file beside the recipe or in the working"):
        settle_own("my_losses.py:soft", [tmp_path / "elsewhere"])
    monkeypatch.chdir(tmp_path)
    assert settle_own("my_losses.py:soft", [Path()]) == whole
    assert settle_own("gone/my_losses.py:soft", [tmp_path / "elsewhere"]) == whole
