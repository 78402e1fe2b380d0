"""A confusion matrix as inline SVG, in the colours of `utils.page`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from utils.charts import LINE, RIGHT, WIDTH

LARGEST_CELL = 110.0
LETTER = 11.5  # room of a letter in the larger type of a phone
MOST_NUMBERED = 12
CELL = Markup(
    '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill="var(--c0)" '
    'fill-opacity="{:.2f}"><title>{}</title></rect>'
)
FRAME = Markup(
    '<rect class="grid" fill="none" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>'
)
TEXT = Markup('<text x="{:.1f}" y="{:.1f}" dy=".35em" text-anchor="{}"{}>{}</text>')
TURN = Markup(' transform="rotate(-60 {:.1f} {:.1f})"')


def heat_map(
    counts: NDArray[np.int64],
    names: Sequence[str],
    down: str,
    across: str,
    title: str,
) -> Markup:
    """Counts as cells, the darker the larger their share of their column; up to twelve columns have numbers.

    Args:
        counts: (n, n).
        names: of rows and columns, n of them.
        down: what rows are.
        across: what columns are.
        title: for those who do not see it.
    """
    longest = LETTER * max(map(len, names))
    left, top = 20 + longest, 2 * LINE
    side = min(LARGEST_CELL, (WIDTH - left - RIGHT) / len(names))
    size, is_turned = side * len(names), side < longest
    shares = counts / np.maximum(counts.sum(0, keepdims=True), 1)
    parts = [FRAME.format(left, top, size, size)]
    for row, column in np.argwhere(counts).tolist():
        x, y, count = left + column * side, top + row * side, int(counts[row, column])
        told = f"{down} {names[row]}, {across} {names[column]}: {count}"
        parts.append(CELL.format(x, y, side, side, 0.08 + 0.6 * shares[row, column], told))
        if len(names) <= MOST_NUMBERED:
            parts.append(TEXT.format(x + side / 2, y + side / 2, "middle", "", count))
    foot = top + size + LINE * 0.7
    for number, name in enumerate(names if side > LINE / 2 else ()):
        middle = (number + 0.5) * side
        parts.append(TEXT.format(left - 7, top + middle, "end", "", name))
        turn = TURN.format(left + middle, foot) if is_turned else Markup("")
        parts.append(TEXT.format(left + middle, foot, "end" if is_turned else "middle", turn, name))
    height = foot + (longest if is_turned else LINE) + LINE
    parts.append(TEXT.format(left + size / 2, height - LINE / 2, "middle", "", across))
    parts.append(TEXT.format(left - 7, top - LINE / 2, "end", "", down))
    chart = '<svg class="chart" viewBox="0 0 {} {:.0f}" role="img" aria-label="{}">\n{}\n</svg>'
    return Markup(chart).format(WIDTH, height, title, Markup("\n").join(parts))
