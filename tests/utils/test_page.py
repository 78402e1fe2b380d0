"""Parts of a page: what is escaped, how numbers sort, what a page may ask for."""

from __future__ import annotations

import re

import numpy as np
import pytest
from markupsafe import Markup

from utils.page import (
    Column,
    badge,
    code,
    facts,
    figure,
    fold,
    page,
    paragraph,
    picture,
    section,
    table,
)

HOSTILE = """<script>alert("x")</script> & 'y' $title"""


@pytest.mark.parametrize(
    "made",
    [
        page(HOSTILE, []), section(HOSTILE), fold(HOSTILE), paragraph(HOSTILE), badge(HOSTILE), code(HOSTILE),
        facts({HOSTILE: HOSTILE}), figure(Markup(), HOSTILE), picture(np.zeros((2, 2, 3), np.uint8), HOSTILE),
        table([Column(HOSTILE), Column("n", ".2f")], [[HOSTILE, HOSTILE]], HOSTILE),
    ],
)  # fmt: skip
def test_words_from_outside_are_words_everywhere(made: str):
    assert "alert(&#34;x&#34;)" in made
    assert "<script>alert" not in made and "'y'" not in made
    assert "$title" in made  # put into the template, not read as a part of it


def test_parts_stay_as_they_are_inside_parts():
    inner = badge("front")
    assert inner in section("a", table([Column("x")], [[inner]], "c"))
    assert inner in page("a", [figure(inner, "c")])


def test_numbers_sort_by_value_and_missing_ones_have_none():
    made = table([Column("name"), Column("ms", ".1f")], [["a", 12.345], ["b", None], ["c", "failed"]], "times")  # fmt: skip
    cells = re.findall(r'<td class="number" data-value="(.*?)">(.*?)</td>', made)
    assert cells == [("12.345", "12.3"), ("", "–"), ("", "failed")]
    assert made.count('scope="row"') == 3 and made.count('scope="col"') == 2


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="zip"):
        table([Column("a"), Column("b")], [["x"]], "c")


def test_a_page_asks_for_nothing_outside_itself():
    made = page("Study", [figure(picture(np.zeros((4, 4, 3), np.uint8), "black"), "c")])
    sources = re.findall(r"""(?:src|href)\s*=\s*["'](.*?)["']|url\((.*?)\)|@import""", made)
    assert all((source or other).startswith("data:") for source, other in sources)
    assert "default-src 'none'" in made and 'lang="en"' in made and "viewport" in made
