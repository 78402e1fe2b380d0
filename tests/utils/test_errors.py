"""What a script answers to mistakes and to terminals of few characters."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from utils.errors import run_cli


def test_what_the_system_refuses_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "README.md").write_text("a file")
    with pytest.raises(SystemExit) as caught:
        run_cli(lambda: (tmp_path / "README.md" / "exp").mkdir(parents=True))
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {tmp_path / 'README.md' / 'exp'}: Not a directory.")
    assert told.count("\n") == 1


def test_a_closed_pipe_is_no_mistake_of_the_user():
    def closed() -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run_cli(closed)


def test_a_terminal_that_lacks_characters_gets_escapes(monkeypatch: pytest.MonkeyPatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", narrow)
    run_cli(lambda: print("\N{CJK UNIFIED IDEOGRAPH-7EC6} \N{LATIN SMALL LETTER A WITH DIAERESIS}"))
    narrow.flush()
    assert narrow.buffer.getvalue() == b"\\u7ec6 \xe4\n"  # type: ignore[attr-defined]
