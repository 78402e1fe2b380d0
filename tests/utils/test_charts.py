"""Charts: where things stand, round numbers, names that do not hide each other."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from utils.charts import Axis, Point, Series, axis_of, line_chart, scatter_chart


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        (Axis("", 0, 1), [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (Axis("", 0.47, 0.63), [0.5, 0.55, 0.6]),
        (Axis("", 3, 240, is_log=True), [5, 10, 20, 50, 100, 200]),
        (Axis("", -1, 1), [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round_numbers(axis: Axis, expected: list[float]):
    assert axis.ticks() == pytest.approx(expected)


@pytest.mark.parametrize("values", [[], [0.0], [0.5, 0.5], [float("nan"), 3.0]])
@pytest.mark.parametrize("is_log", [False, True])
def test_an_axis_has_a_length_whatever_there_is(values: list[float], is_log: bool):
    axis = axis_of(values, "", is_log=is_log)
    assert axis.low < axis.high and axis.ticks() is not None
    assert axis.share(axis.low) == 0 and axis.share(axis.high) == pytest.approx(1)


def test_names_do_not_lie_on_each_other():
    points = [Point(f"name {n}", 10 + n / 50, 0.5 + n / 500, 0.5, 0.6, False) for n in range(6)]
    x, y = axis_of([1, 20], "ms"), axis_of([0, 1], "mAP")
    root = ElementTree.fromstring(scatter_chart(points, x, y, "t"))
    places = [
        (round(float(text.attrib["x"])), round(float(text.attrib["y"])))
        for text in root.iter("text")
        if (text.text or "").startswith("name")
    ]
    assert len(set(places)) == len(points)


def test_what_is_drawn_is_xml_with_names_escaped():
    chart = scatter_chart([Point("<a> & b", 1, 1, 0.5, 1.5, True)], Axis("x", 0, 2), Axis("<y>", 0, 2), "&")  # fmt: skip
    assert ElementTree.fromstring(chart).attrib["aria-label"] == "&"
    lines = line_chart([Series("<l>", [(0, 0), (1, 1)])], Axis("x", 0, 1), Axis("y", 0, 1), "t")
    assert ElementTree.fromstring(f"<div>{lines}</div>") is not None
    assert re.search(r'd="M70\.0,406\.0L780\.0,16\.0"', lines)
