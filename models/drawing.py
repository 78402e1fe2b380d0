"""A model as a drawing (SVG): `python models/yolo.py --cfg yolo11n --draw yolo11n.svg`.

Rows stand below each other in the order in which they run, in a column for each stride, so that a backbone walks to the
right and a neck back. Nothing else stands at the height of a row, and lines between rows that are not neighbours go down
in lanes between the columns: no line crosses a box. What several rows read is one line that branches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup

from models.parser.wiring import IMAGE, Row

WIDE, HIGH, PITCH = 168, 40, 62
LANE, GUTTER = 9, 16
MARGIN, HEAD = 24, 74
LONGEST = 17  # letters of a module's name
FILLS = {"backbone": "#e3eefa", "head": "#fdeedd", "last": "#e2f4e6"}
COLOURS = ("#0b5cad", "#b4480a", "#187a3c", "#7e22ce", "#a3195b", "#0f766e")
"""Of lines, by column."""
STYLE = (
    "text{font:13px system-ui,'DejaVu Sans',sans-serif;fill:#1f2328;text-anchor:middle}"
    ".name{font-weight:600}.soft{fill:#59636e;font-size:12px}.title{font-size:17px;text-anchor:start}"
    ".box{stroke:#59636e}.line{fill:none;stroke-width:1.8}"
)


class Port(NamedTuple):
    """Where a slot leaves its row: number of the row, and the column."""

    row: int
    column: int


class Box(NamedTuple):
    """Columns that a row takes, from the first to the last."""

    first: int
    last: int


@dataclass(frozen=True)
class Plan:
    """Where everything stands.

    Attributes:
        strides: of each column.
        boxes: of each row; the image is row 0.
        ports: of each slot.
        lanes: which lane beside its column each slot has that is read further down.
        lefts: left edge of each column.
    """

    strides: tuple[int, ...]
    boxes: tuple[Box, ...]
    ports: Mapping[int, Port]
    lanes: Mapping[int, int]
    lefts: tuple[float, ...]

    def middle(self, column: int) -> float:
        """Middle of a column."""
        return self.lefts[column] + WIDE / 2

    def lane(self, slot: int) -> float:
        """Where the line of a slot goes down."""
        column = self.ports[slot].column
        return self.lefts[column] + WIDE + GUTTER + LANE * self.lanes[slot]

    def edges(self, row: int) -> tuple[float, float]:
        """Left and right edge of a row's box."""
        box = self.boxes[row]
        return self.lefts[box.first], self.lefts[box.last] + WIDE


def top_of(row: int) -> float:
    """Upper edge of a row's box; the image is row 0."""
    return HEAD + row * PITCH


def draw(rows: Sequence[Row], title: str) -> str:
    """The SVG document.

    Args:
        rows: of a built model.
        title: stands above.
    """
    plan = _plan(rows)
    beside = GUTTER + LANE * max(plan.lanes.values(), default=0)
    width, height = plan.lefts[-1] + WIDE + beside + MARGIN, top_of(len(rows)) + HIGH + MARGIN
    parts = [_frame(plan, title, height)]
    parts += [
        _line(plan, number, row, k)
        for number, row in enumerate(rows, 1)
        for k in range(len(row.inputs))
    ]
    parts.append(_box(plan, 0, [("image", "RGB")], FILLS["backbone"], "the image"))
    for number, row in enumerate(rows, 1):
        fill = FILLS["last" if number == len(rows) else row.section]
        parts.append(
            _box(plan, number, _texts(plan, row), fill, f"{row.place}: {row.module} {row.args}")
        )
    document = Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0:.0f} {1:.0f}" width="{0:.0f}" height="{1:.0f}">\n'
        '<style>{2}</style><rect width="100%" height="100%" fill="#fff"/>\n{3}\n</svg>\n'
    )
    return document.format(width, height, Markup(STYLE), Markup("\n").join(parts))


def _plan(rows: Sequence[Row]) -> Plan:
    strides = tuple(sorted({stride for row in rows for stride in row.strides if stride}))
    column_of = {stride: column for column, stride in enumerate(strides)}
    ports, boxes = {IMAGE: Port(0, 0)}, [Box(0, 0)]
    for number, row in enumerate(rows, 1):
        own = [column_of[stride] for stride in row.strides if stride]
        own = own or [ports[slot].column for slot in row.inputs]
        boxes.append(Box(min(own), max(own)))
        slots = [row.index] if row.map_slots is None else row.map_slots
        places = own if len(own) == len(slots) else [own[-1]] * len(slots)
        ports.update({s: Port(number, c) for s, c in zip(slots, places) if s is not None})
    lanes = _lanes(rows, ports)
    lefts, left = [], float(MARGIN)
    for column in range(len(strides)):
        lefts.append(left)
        used = [lane + 1 for slot, lane in lanes.items() if ports[slot].column == column]
        left += WIDE + 2 * GUTTER + LANE * max(used, default=0)
    return Plan(strides, tuple(boxes), ports, lanes, tuple(lefts))


def _lanes(rows: Sequence[Row], ports: Mapping[int, Port]) -> dict[int, int]:
    """A lane for each slot that is read by others than the next row: the first that is free so far down."""
    ends: dict[int, int] = {}
    for number, row in enumerate(rows, 1):
        for slot in row.inputs:
            if number > ports[slot].row + 1:
                ends[slot] = number
    lanes: dict[int, int] = {}
    free: dict[tuple[int, int], int] = {}
    for slot in sorted(ends, key=lambda slot: ports[slot].row):
        start, column = ports[slot]
        lane = 0
        while free.get((column, lane), -1) >= start:
            lane += 1
        lanes[slot], free[column, lane] = lane, ends[slot]
    return lanes


def _line(plan: Plan, number: int, row: Row, k: int) -> Markup:
    """From the slot that a row reads as its k-th input to its box."""
    slot = row.inputs[k]
    port = plan.ports[slot]
    start, (left, right) = top_of(port.row) + HIGH, plan.edges(number)
    step = min(8.0, (HIGH - 10) / len(row.inputs))
    end = top_of(number) + HIGH / 2 + (k - (len(row.inputs) - 1) / 2) * step
    if number == port.row + 1:
        x, path = plan.middle(port.column), f"M{plan.middle(port.column):.1f},{start:.1f}"
    else:
        x = plan.lane(slot)
        path = f"M{plan.edges(port.row)[1]:.1f},{start - HIGH / 2:.1f}H{x:.1f}"
        if plan.boxes[port.row].last > port.column:  # the box covers the lane
            path = f"M{x:.1f},{start:.1f}"
    if left < x < right:
        path += f"V{top_of(number):.1f}"
    else:
        path += f"V{end:.1f}H{right if x > right else left:.1f}"
    colour = COLOURS[port.column % len(COLOURS)]
    line = '<path class="line" d="{}" stroke="{}" marker-end="url(#a{})"/>'
    return Markup(line).format(path, colour, port.column % len(COLOURS))


def _texts(plan: Plan, row: Row) -> list[tuple[str, str]]:
    """What stands in a row's box: a name and a size for each column that it takes."""
    times = f" x {row.repeats}" if row.repeats > 1 else ""
    module = row.module if len(row.module) <= LONGEST else f"{row.module[: LONGEST - 1]}…"
    shapes = [" x ".join(map(str, shape)) for shape in row.shape if len(shape) > 1]
    if row.map_slots is None:
        more = f" and {len(shapes) - 1} more" if len(shapes) > 1 else ""
        return [(f"{row.index}  {module}{times}", f"{shapes[0] if shapes else ''}{more}")]
    slots = ["-" if slot is None else str(slot) for slot in row.map_slots]
    return [(f"{slot}  {module}{times}", shape) for slot, shape in zip(slots, shapes)]


def _box(plan: Plan, number: int, texts: Sequence[tuple[str, str]], fill: str, told: str) -> Markup:
    left, right = plan.edges(number)
    top, box = top_of(number), plan.boxes[number]
    columns = box.last - box.first + 1
    middles = [(left + right) / 2]
    if len(texts) == columns:
        middles = [plan.middle(column) for column in range(box.first, box.last + 1)]
    else:
        texts = [(texts[0][0], ", ".join(size for _, size in texts))]
    inside = [
        Markup('<text class="name" x="{0:.1f}" y="{1:.1f}">{3}</text><text class="soft" x="{0:.1f}" y="{2:.1f}">{4}</text>').format(
            middle, top + 17, top + 33, *text
        )
        for middle, text in zip(middles, texts)
    ]  # fmt: skip
    return Markup(
        '<g><title>{}</title><rect class="box" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{}" rx="6" fill="{}"/>{}</g>'
    ).format(told, left, top, right - left, HIGH, fill, Markup("").join(inside))


def _frame(plan: Plan, title: str, height: float) -> Markup:
    """The title, a band and a name for each column, and the heads of arrows."""
    head = (
        '<marker id="a{0}" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0,0L8,4L0,8z" fill="{1}"/></marker>'
    )
    band = (
        '<rect x="{:.1f}" y="42" width="{}" height="{:.1f}" fill="#f6f8fa"/>'
        '<text class="soft" x="{:.1f}" y="60">stride {}</text>'
    )
    heads = [Markup(head).format(*pair) for pair in enumerate(COLOURS)]
    parts = [Markup("<defs>{}</defs>").format(Markup("").join(heads))]
    parts.append(Markup('<text class="title" x="{}" y="28">{}</text>').format(MARGIN, title))
    for column, stride in enumerate(plan.strides):
        x = plan.lefts[column]
        parts.append(
            Markup(band).format(x - 6, WIDE + 12, height - 50, plan.middle(column), stride)
        )
    return Markup("\n").join(parts)
