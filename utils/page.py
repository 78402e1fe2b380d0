"""Parts of a self-contained HTML page: shell, tables, figures. It asks for nothing outside the file.

Texts are escaped wherever they are not `Markup`, so names of files and classes may hold anything. Colours, light and
dark, stand in `page.html`; `--c0` to `--c7` are those of series. A page is parts under headings:

    html = page("Title", [section("Results", table(columns, rows, "What it shows"), figure(svg, "A caption"))])
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import NamedTuple

import numpy as np
from markupsafe import Markup, escape

from utils.visualize import Image

TEMPLATE = Path(__file__).with_name("page.html")
MISSING, LONG = "–", 40  # a text with more characters runs over several lines
Cell = str | float | None
"""Of a table: words, `Markup`, a number, or nothing."""


class Column(NamedTuple):
    """A column of a table: its name, and for numbers how `format` shows them, such as `.3f`."""

    name: str
    layout: str | None = None


def page(title: str, parts: Iterable[Markup]) -> str:
    """The whole document."""
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), body=Markup("\n").join(parts))


def section(heading: str, *parts: Markup) -> Markup:
    """Parts under a heading."""
    inside = Markup("\n").join(parts)
    return Markup("<section>\n<h2>{}</h2>\n{}\n</section>").format(heading, inside)


def fold(summary: str, *parts: Markup, is_open: bool = False) -> Markup:
    """Parts that open and close with a click."""
    inside, state = Markup("\n").join(parts), Markup(" open" * is_open)
    html = Markup("<details{}><summary>{}</summary>\n{}\n</details>")
    return html.format(state, summary, inside)


def paragraph(text: str, kind: str = "") -> Markup:
    """A paragraph; `kind` is `lead` for what matters most, `soft` for what stands beside it."""
    return Markup('<p class="{}">{}</p>').format(kind, text)


def badge(word: str) -> Markup:
    """A word that stands out, inside a cell or a text."""
    return Markup('<span class="badge">{}</span>').format(word)


def code(text: str) -> Markup:
    """Commands or files as they are typed."""
    return Markup("<pre><code>{}</code></pre>").format(text)


def facts(pairs: Mapping[str, object]) -> Markup:
    """Names and what they are, a line each."""
    items = (Markup("<dt>{}</dt><dd>{}</dd>").format(*pair) for pair in pairs.items())
    return Markup("<dl>{}</dl>").format(Markup("").join(items))


def table(columns: Sequence[Column], rows: Iterable[Sequence[Cell]], caption: str) -> Markup:
    """A table that sorts by a click on a column's name; each row's first cell is its head.

    Args:
        columns: numbers where they have a layout; these are ordered by value, missing ones last.
        rows: a cell for each column.
        caption: what the table shows.
    """
    heads = (
        Markup('<th scope="col"{}>{}</th>').format(_kind(column), column.name) for column in columns
    )
    lines = (
        Markup("<tr>{}</tr>").format(
            Markup("").join(
                _cell(value, column, is_head=number == 0)
                for number, (value, column) in enumerate(zip(row, columns, strict=True))
            )
        )
        for row in rows
    )
    return Markup(
        '<p class="soft">{0}</p>\n<div class="scroll" tabindex="0" role="region" aria-label="{0}">'
        '<table class="sortable" aria-label="{0}">\n<thead><tr>{1}</tr></thead>\n<tbody>\n{2}\n</tbody></table></div>'
    ).format(caption, Markup("").join(heads), Markup("\n").join(lines))


def _kind(column: Column) -> Markup:
    return Markup("") if column.layout is None else Markup(' class="number"')


def _cell(value: Cell, column: Column, is_head: bool) -> Markup:
    if is_head:
        return Markup('<th scope="row">{}</th>').format(value)
    if column.layout is None:
        kind = Markup(' class="long"' * (len(str(value)) > LONG))
        return Markup("<td{}>{}</td>").format(kind, MISSING if value is None else value)
    if isinstance(value, str):
        return Markup('<td class="number" data-value="">{}</td>').format(value)
    shown = MISSING if value is None else format(value, column.layout)
    exact = "" if value is None else repr(float(value))
    return Markup('<td class="number" data-value="{}">{}</td>').format(exact, shown)


def figure(content: Markup, caption: str) -> Markup:
    """An inline SVG, a picture or several, and what they show."""
    return Markup("<figure>{}<figcaption>{}</figcaption></figure>").format(content, caption)


def gallery(figures: Iterable[Markup]) -> Markup:
    """Figures beside each other, as many as the screen has room for."""
    return Markup('<div class="gallery">{}</div>').format(Markup("\n").join(figures))


def picture(image: Image, alt: str, quality: int = 80) -> Markup:
    """An image inside the page, as JPEG.

    Args:
        image: RGB, (H, W, 3), uint8.
        alt: what it shows, in words.
        quality: of JPEG, 1 to 95.
    """
    from PIL import Image as Pillow

    stream = io.BytesIO()
    Pillow.fromarray(np.ascontiguousarray(image)).save(stream, "jpeg", quality=quality)
    data = base64.b64encode(stream.getvalue()).decode()
    height, width = image.shape[:2]
    return Markup('<img src="data:image/jpeg;base64,{}" width="{}" height="{}" alt="{}">').format(
        data, width, height, alt
    )
