"""Pictures: what is drawn where, and that every chart is written, also from nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch

from utils.curves import Curves
from utils.plots import (
    StudyPoint,
    plot_confusion_matrix,
    plot_correlogram,
    plot_curves,
    plot_labels,
    plot_results,
    plot_study,
    read_results,
)
from utils.structures import Detections, Targets
from utils.visualize import class_colour, draw_boxes, plot_batch, save_image

pytest.importorskip("PIL")


def size_of(path: Path) -> tuple[int, int]:
    from PIL import Image

    with Image.open(path) as image:
        return image.height, image.width


def read(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_the_edge_has_the_colour_of_its_class_and_the_inside_is_untouched() -> None:
    image = np.full((100, 100, 3), 128, np.uint8)
    drawn = draw_boxes(
        image, [[20, 30, 80, 90]], [1], ["a", "b"], line_thickness=2, hide_labels=True
    )
    colour = list(class_colour(1))
    for y, x in ((30, 50), (90, 50), (60, 20), (60, 80), (31, 50), (60, 21)):
        assert drawn[y, x].tolist() == colour
    assert drawn[60, 50].tolist() == [128] * 3
    assert drawn[29, 50].tolist() == [128] * 3
    assert (image == 128).all()


def test_a_label_stands_above_its_box_or_inside_where_there_is_no_room() -> None:
    image = np.zeros((200, 200, 3), np.uint8)
    plain = draw_boxes(image, [[50, 100, 150, 180]], [0], ["cat"], hide_labels=True)
    changed = np.argwhere((draw_boxes(image, [[50, 100, 150, 180]], [0], ["cat"]) != plain).any(2))
    assert changed[:, 0].min() >= 80
    assert changed[:, 0].max() < 100
    plain = draw_boxes(image, [[50, 0, 150, 180]], [0], ["cat"], hide_labels=True)
    changed = np.argwhere((draw_boxes(image, [[50, 0, 150, 180]], [0], ["cat"]) != plain).any(2))
    assert changed[:, 0].max() < 30


@pytest.mark.parametrize("size", [(32, 48), (64, 64), (1200, 1600)])
def test_any_size_any_name_any_box_can_be_drawn(size: tuple[int, int]) -> None:
    image = np.zeros((*size, 3), np.uint8)
    boxes = [[-50, -50, 5000, 5000], [10, 10, 5, 5], [40, 20, 48, 31], [9e9, 0, 9e9, 1]]
    drawn = draw_boxes(
        image, boxes, [0, 1, 2, 99], ["кошка", "白血球", "é" * 99], [0.1, 0.9, 0.5, 1]
    )
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8
    assert drawn.any()


def test_the_best_score_is_drawn_last() -> None:
    image = np.zeros((50, 50, 3), np.uint8)
    box = [[5, 5, 45, 45]] * 2
    for scores, winner in (([0.9, 0.1], 0), ([0.1, 0.9], 1)):
        drawn = draw_boxes(image, box, [0, 1], ["a", "b"], scores, hide_labels=True)
        assert drawn[25, 5].tolist() == list(class_colour(winner))


def test_eighty_classes_have_eighty_colours() -> None:
    assert len({class_colour(i) for i in range(80)}) == 80


def test_a_batch_becomes_a_grid_with_targets_or_detections(tmp_path: Path) -> None:
    images = torch.zeros(5, 3, 60, 80, dtype=torch.uint8)
    box = torch.tensor([[10.0, 10, 70, 50]])
    targets = Targets(torch.tensor([4]), torch.tensor([0]), box)
    path = plot_batch(
        images, targets, ["a"], tmp_path / "b.png", titles=["x/very_long_name.jpg"] * 5
    )
    grid = read(path)
    assert grid.shape == (2 * 360, 3 * 480, 3)
    assert (grid[420, 540:900] == class_colour(0)).all(1).any(), "the fifth image has the box"
    assert not (grid[60:300, :400] == class_colour(0)).all(2).any(), "the first has none"
    sure = Detections(box, torch.tensor([0.9]), torch.tensor([0]))
    unsure = Detections(box, torch.tensor([0.1]), torch.tensor([0]))
    grid = read(plot_batch(images[:2], [sure, unsure], ["a"], tmp_path / "c.png"))
    assert (grid[:, :480] == class_colour(0)).all(2).any()
    assert not (grid[:, 480:] == class_colour(0)).all(2).any()


def test_a_name_outside_ascii_is_a_good_file_name(tmp_path: Path) -> None:
    path = save_image(tmp_path / "größe" / "картина.jpg", np.zeros((8, 8, 3), np.uint8))
    assert size_of(path) == (8, 8)


def test_every_chart_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    names = ["cat", "白", "dog"]
    boxes = rng.uniform(0.1, 0.5, (30, 4))
    curves = Curves(
        tuple(names),
        np.linspace(0, 1, 101),
        rng.random((3, 101)),
        np.linspace(0, 1, 1000),
        *rng.random((3, 3, 1000)),
    )
    paths = [
        plot_labels(rng.integers(0, 3, 30), boxes, names, tmp_path / "labels.jpg"),
        plot_correlogram(boxes, tmp_path / "labels_correlogram.jpg"),
        plot_confusion_matrix(rng.integers(0, 9, (4, 4)), names, tmp_path / "confusion_matrix.png"),
        plot_study(
            {"n": [StudyPoint(320, 0.3, 2.0), StudyPoint(640, 0.4, 6.0)]}, tmp_path / "s.png"
        ),
        *plot_curves(curves, tmp_path, map50=0.5),
    ]
    expected = ["PR_curve.png", "P_curve.png", "R_curve.png", "F1_curve.png"]
    assert [p.name for p in paths[4:]] == expected
    for path in paths:
        assert len(np.unique(read(path)[::7, ::7, 1])) > 10, f"{path.name} is not blank"


def test_charts_of_nothing_are_written_too(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    nothing = np.zeros((0, 1000))
    axis = np.linspace(0, 1, 1000)
    curves = Curves((), np.linspace(0, 1, 101), np.zeros((0, 101)), axis, nothing, nothing, nothing)
    plot_curves(curves, tmp_path)
    plot_labels(np.zeros(0, np.int64), np.zeros((0, 4)), ["a"], tmp_path / "labels.jpg")
    plot_confusion_matrix(np.zeros((2, 2)), ["a"], tmp_path / "cm.png")
    plot_study({}, tmp_path / "study.png")
    assert len(list(tmp_path.iterdir())) == 7


def test_results_are_read_with_padded_cells_and_gaps(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "results.csv"
    path.write_text("epoch, train/box_loss, metrics/recall\n 0,   0.5,  \n 1,   0.25, 0.75\n")
    columns = read_results(path)
    assert columns["train/box_loss"].tolist() == [0.5, 0.25]
    assert np.isnan(columns["metrics/recall"][0])
    assert size_of(plot_results(path))[0] > 100
    assert (tmp_path / "results.png").exists()
    path.write_text("epoch,train/box_loss\n")
    plot_results(path, tmp_path / "empty.png")
    assert (tmp_path / "empty.png").exists()
