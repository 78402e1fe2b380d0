"""Every listing of docs/your-own.md, as a reader would run it: files where the page puts them, commands as they stand."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from pasted_classes import block, settled

import train
from models import modules, yolo

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "your-own.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w+) ?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MAINS = {"models/yolo.py": yolo.main, "train.py": train.main}
DROPPED = "models/modules/"


class Listing(NamedTuple):
    language: str
    file: str
    text: str


LISTINGS = [Listing(*match.groups()) for match in FENCE.finditer(PAGE)]
COMMANDS = [
    line for listing in LISTINGS if listing.language == "sh" for line in listing.text.splitlines()
]


@pytest.fixture
def reader(tmp_path: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the page's files; those for `models/modules/` are found as if they were in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(f"path: {small_data.parent}\n{small_data.read_text()}")
    for listing in LISTINGS:
        if listing.file:
            path = tmp_path / listing.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(listing.text)
    monkeypatch.setattr(modules, "_FILES", dict(modules._FILES))
    monkeypatch.setattr(modules, "__path__", [*modules.__path__, str(tmp_path / DROPPED)])
    before = set(sys.modules)
    modules._import_files()
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith((*modules.USER_CODE,)):
            del sys.modules[name]


def run(command: str) -> None:
    program, script, *words = shlex.split(command)
    assert program == "python"
    if script == "train.py":  # a process for each worker, and pictures, would take most of the time
        words += ["--workers", "0", "--noplots"]
    if script in MAINS:
        MAINS[script](words)
    else:
        runpy.run_path(script, run_name="__main__")


def test_every_listing_runs(reader: Path, capsys: pytest.CaptureFixture[str]):
    said = {}
    for command in COMMANDS:
        run(command)
        out, err = capsys.readouterr()
        said[command] = out + err
    assert len(said) == len(COMMANDS) == 8
    assert "GatedAttention(c1=64, reduction=8)" in said[COMMANDS[0]]
    assert "TopDown(in_channels=[" in said[COMMANDS[1]]
    weighted = next(text for command, text in said.items() if "--backbone-weights" in command)
    assert re.search(r"transferred (\d+) of \1 tensors", weighted)
    assert sum(path.name == "best.pt" for path in reader.rglob("*.pt")) == 3
    own_loss = next(
        path for path in reader.rglob("hyp.yaml") if "corner_distance" in path.read_text()
    )
    assert own_loss.is_file()


TABLE = re.findall(r"^\| `\((.*?)\)` \| (.*?) \| `(\(.*\))`", PAGE, re.MULTILINE)


def test_the_table_of_readings_is_what_the_parser_says():
    checked = 0
    for parameters, rows, expected in TABLE:
        words = [p.split("=")[0] for p in parameters.split(", ")]
        build = block(parameters, words[0], words[1] if "out" in words[1] or words[1:2] == ["c2"] else words[0],
                      keeps=words[0] != "e_lambda") if len(words) > 1 else block(parameters, keeps=False)  # fmt: skip
        repeats = 2 if "repeats 4" in rows else 1
        for row in re.findall(r"`([\[{].*?[\]}])`", rows):
            args, kwargs = _row(row)
            assert settled(build, args, 64, repeats=repeats, **kwargs).text == f"Block{expected}"
            checked += 1
    assert len(TABLE) == 6 and checked >= 12


def _row(text: str) -> tuple[list, dict]:
    value = yaml.safe_load(text)
    value = value if isinstance(value, list) else [value]
    kwargs = value.pop() if value and isinstance(value[-1], dict) else {}
    return value, kwargs
