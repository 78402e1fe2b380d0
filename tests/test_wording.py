"""What comments, messages and documents say, and what they do not."""

from __future__ import annotations

import functools
import io
import re
import tokenize
from pathlib import Path

import pytest
from shell import own_files

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("*.py", "*.md", "*.yaml", "*.sh", "*.toml", "*.txt", "Makefile")
# Where files of other projects are read, and where this is explained.
NAMES_ANOTHER_PROJECT = {
    "models",
    "hubconf.py",
    "README.md",
    "docs",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
}


@functools.cache
def prose(path: Path) -> str:
    """Comments and strings of a Python file, other files as they stand."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.suffix != ".py":
        return text
    kinds = (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return "\n".join(token.string for token in tokens if token.type in kinds)


@functools.cache
def text_files() -> list[Path]:
    """Our files of text, this one left out."""
    found = {p for p in own_files() if any(p.match(kind) for kind in KINDS)}
    return sorted(found - {Path("tests/test_wording.py")})


@pytest.mark.parametrize(
    ("what", "pattern"),
    [
        ("a machine's own paths", r"(?<![\w./])/(?:work|home|root|Users)/"),
        ("how it was made", r"(?<!\")\b[Ss]essions?\b|(?<!pytorch )\b[Ii]ssue #?\d"),
        ("work left for later", r"\b(?:TODO|FIXME|XXX)\b"),
    ],
)
def test_the_project_speaks_of_itself_alone(what: str, pattern: str):
    found = {str(p): m.group() for p in text_files() if (m := re.search(pattern, prose(p)))}
    assert not found, what


def test_other_projects_are_named_only_where_their_files_are_read():
    allowed = {*NAMES_ANOTHER_PROJECT, "tests"}
    found = [p for p in text_files() if re.search(r"(?i)ultralytics", prose(p))]
    assert not [str(p) for p in found if p.parts[0] not in allowed]
