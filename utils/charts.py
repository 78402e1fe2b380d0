"""Charts as inline SVG for `utils.page`: lines over x, and named points of which some are the best.

They follow the page's colours, light and dark, and have their numbers in titles that a pointer or a screen reader finds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from markupsafe import Markup

WIDTH, HEIGHT = 800, 460
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 16, 54  # margins around the plotted area
COLOURS = 8
LETTER, LINE = 8.5, 20  # room of a letter and of a line of text, also in the larger type of a phone


class Axis(NamedTuple):
    """An axis.

    Attributes:
        label: what it shows, with the unit.
        low: its smallest value.
        high: its largest value.
        is_log: whether equal steps are equal factors.
    """

    label: str
    low: float
    high: float
    is_log: bool = False

    def share(self, value: float) -> float:
        """Where a value stands, 0 at the low end, 1 at the high one."""
        low, high, value = map(math.log, (self.low, self.high, value)) if self.is_log else (self.low, self.high, value)  # fmt: skip
        return (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round numbers inside it, about five."""
        if self.is_log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            ticks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
            return [tick for tick in ticks if self.low <= tick <= self.high]
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * digit for digit in (1, 2, 5, 10) if power * digit >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def axis_of(values: Iterable[float], label: str, *, is_log: bool = False) -> Axis:
    """An axis with room around the values."""
    known = [value for value in values if math.isfinite(value) and (value > 0 or not is_log)] or [1.0]  # fmt: skip
    low, high = min(known), max(known)
    if is_log:
        return Axis(label, low / 1.25, high * 1.6, True)
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(label, low if low == 0 else low - room, high + room)


class Series(NamedTuple):
    """A line: its name and its points (x, y)."""

    name: str
    points: Sequence[tuple[float, float]]


def line_chart(series: Sequence[Series], x: Axis, y: Axis, title: str) -> Markup:
    """Lines over x, with a list of their names below."""
    across, up = _scales(x, y)
    lines = [
        Markup('<path class="line" style="{}" d="M{}"><title>{}</title></path>').format(
            _style(number), "L".join(f"{across(a):.1f},{up(b):.1f}" for a, b in line.points), line.name
        )
        for number, line in enumerate(series)
        if line.points
    ]  # fmt: skip
    key = Markup('<li><svg viewBox="0 0 16 8" aria-hidden="true"><path d="M0,4H16" style="{}"/></svg> {}</li>')  # fmt: skip
    keys = [key.format(_style(number), line.name) for number, line in enumerate(series)]
    chart = _svg(title, [_frame(x, y, across, up), *lines])
    return chart + Markup('<ul class="keys">{}</ul>').format(Markup("").join(keys))


class Point(NamedTuple):
    """A named point.

    Attributes:
        name: stands beside it.
        x, y: where it is.
        low, high: ends of the bar through it, along y.
        is_best: whether no other is better in both.
        is_whole: False draws it hollow.
    """

    name: str
    x: float
    y: float
    low: float
    high: float
    is_best: bool
    is_whole: bool = True


def scatter_chart(points: Sequence[Point], x: Axis, y: Axis, title: str) -> Markup:
    """Named points with bars; a dashed line joins the best."""
    across, up = _scales(x, y)
    best = sorted((across(p.x), up(p.y)) for p in points if p.is_best)
    steps = "".join(f"H{left:.1f}V{top:.1f}" for left, top in best[1:])
    parts = [_frame(x, y, across, up)]
    if best:
        parts.append(Markup('<path class="front" d="M{:.1f},{:.1f}{}"/>').format(*best[0], steps))
    taken = [(across(p.x) - 7, up(p.y) - 7, across(p.x) + 7, up(p.y) + 7) for p in points]
    for point in points:
        parts += [_mark(point, across(point.x), up(point.y), up), _label(point, across, up, taken)]
    return _svg(title, parts)


def _mark(point: Point, left: float, top: float, up: Callable[[float], float]) -> Markup:
    colour = "var(--c0)" if point.is_best else "var(--c7)"
    told = f"{point.name}: {point.x:.3g}, {point.y:.3f} ({point.low:.3f} to {point.high:.3f})"
    bar = Markup('<path d="M{0:.1f},{1:.1f}V{2:.1f}" stroke="{3}" stroke-opacity=".5"/>').format(
        left, up(point.low), up(point.high), colour
    )
    return bar + Markup(
        '<circle cx="{:.1f}" cy="{:.1f}" r="{}" fill="{}" stroke="{}" stroke-width="2"><title>{}</title></circle>'
    ).format(left, top, 6, colour if point.is_whole else "var(--paper)", colour, told)


def _label(
    point: Point,
    across: Callable[[float], float],
    up: Callable[[float], float],
    taken: list[tuple[float, float, float, float]],
) -> Markup:
    """The name where it hides least of what is there; its place is added to `taken`."""
    left, top, wide = across(point.x), up(point.y), LETTER * len(point.name)
    places = [
        (left + side, top + rise)
        for rise in (0, -LINE, LINE, -2 * LINE, 2 * LINE)
        for side in (11, -11 - wide, -wide / 2)
        if rise or side != -wide / 2
    ]
    boxes = [(a, b - LINE / 2, a + wide, b + LINE / 2) for a, b in places]
    box = min(boxes, key=lambda box: _outside(box) + sum(_shared(box, other) for other in taken))
    taken.append(box)
    anchor = ("start", box[0]) if box[0] > left else ("end", box[2]) if box[2] < left else ("middle", left)  # fmt: skip
    return Markup('<text class="halo" x="{:.1f}" y="{:.1f}" dy=".35em" text-anchor="{}"{}>{}</text>').format(
        anchor[1], (box[1] + box[3]) / 2, anchor[0], Markup(' font-weight="600"') if point.is_best else "", point.name
    )  # fmt: skip


def _shared(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Area that two boxes share."""
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(wide, 0) * max(high, 0)


def _outside(box: tuple[float, ...]) -> float:
    """Area of a box outside the plotted part."""
    inside = _shared(box, (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM))
    return 10 * ((box[2] - box[0]) * (box[3] - box[1]) - inside)


def _style(number: int) -> str:
    dashes = ("", ";stroke-dasharray:7 3", ";stroke-dasharray:2 3")[number // COLOURS % 3]
    return f"stroke:var(--c{number % COLOURS});stroke-width:2.2{dashes}"


def _scales(x: Axis, y: Axis) -> tuple[Callable[[float], float], Callable[[float], float]]:
    return (
        lambda value: LEFT + x.share(value) * (WIDTH - LEFT - RIGHT),
        lambda value: HEIGHT - BOTTOM - y.share(value) * (HEIGHT - TOP - BOTTOM),
    )


def _frame(
    x: Axis, y: Axis, across: Callable[[float], float], up: Callable[[float], float]
) -> Markup:
    """Grid lines, their numbers and the names of the axes."""
    down, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    line = Markup('<path class="grid" d="{}"/>')
    number = Markup(
        '<text class="tick" x="{:.1f}" y="{:.1f}" dy=".35em" text-anchor="{}">{}</text>'
    )
    parts = []
    for tick in x.ticks():
        parts.append(line.format(f"M{across(tick):.1f},{TOP}V{down}"))
        parts.append(number.format(across(tick), down + 14, "middle", f"{tick:.4g}"))
    for tick in y.ticks():
        parts.append(line.format(f"M{LEFT},{up(tick):.1f}H{right}"))
        parts.append(number.format(LEFT - 7, up(tick), "end", f"{tick:.4g}"))
    middle = TOP + (HEIGHT - TOP - BOTTOM) / 2
    parts += [
        Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, x.label),
        Markup('<text x="16" y="{0}" text-anchor="middle" transform="rotate(-90 16 {0})">{1}</text>').format(middle, y.label),
    ]  # fmt: skip
    return Markup("\n").join(parts)


def _svg(title: str, parts: Sequence[Markup]) -> Markup:
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">\n{}\n</svg>'
    ).format(WIDTH, HEIGHT, title, Markup("\n").join(parts))
