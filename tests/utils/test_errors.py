"""What a script answers to mistakes and to terminals of few characters."""

from __future__ import annotations

import io
import os
import resource
import signal
import sys
from pathlib import Path

import pytest

from utils.config import save_yaml
from utils.errors import ConfigError, StoppedError, printable, run_cli
from utils.logger import get_logger


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


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb\x07.jpg: gone", r"a\x1b[2Jb\x07.jpg: gone"),
        ("a\nerror: b\r.jpg", r"a\nerror: b\r.jpg"),
        ("a\u202egpj.exe", r"a\u202egpj.exe"),  # shown as aexe.jpg where it is not escaped
        ("\udcff.png \x85 \u2028", r"\udcff.png \x85 \u2028"),
        ("é 細 \u00a0 👩\u200d🔬 naïve", "é 細 \u00a0 👩\u200d🔬 naïve"),
        ("x" * 300, "x" * 300),
        ("x" * 4000 + ": gone", "x" * 200 + "..." + "x" * 74 + ": gone"),
        ("ab " * 4000, ("ab " * 4000)[:800] + "..." + "ab " * 100),
    ],
)
def test_names_from_outside_stand_in_one_short_line(text: str, shown: str):
    assert printable(text) == str(ConfigError(text)) == shown


def test_of_many_problems_the_first_are_told():
    told = str(ConfigError(*(f"a.yaml:{n}: wrong\n" for n in range(100)))).splitlines()
    assert told[0] == r"a.yaml:0: wrong\n" and told[-1] == "and 70 more" and len(told) == 31


def test_a_log_keeps_its_lines_and_no_terminal_codes(capsys: pytest.CaptureFixture[str]):
    get_logger().info("a table\nof \x1b[31mtwo lines")
    assert capsys.readouterr().err == "a table\nof \\x1b[31mtwo lines\n"


def test_a_write_without_room_names_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limit[1]))
    try:
        with pytest.raises(SystemExit):
            run_cli(lambda: save_yaml(tmp_path / "opt.yaml", {"name": "x" * 100}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    told = capsys.readouterr().err
    assert told.startswith(f"error: {tmp_path / 'opt.yaml'}: File too large. ")


@pytest.mark.parametrize(
    ("raised", "told", "code"),
    [
        (KeyboardInterrupt(), "interrupted\n", 130),
        (StoppedError(signal.SIGTERM), "stopped by SIGTERM\n", 143),
        (StoppedError(signal.SIGINT, "stopped; go on"), "stopped; go on\n", 130),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), None, 2),
    ],
)
def test_what_ends_a_script_from_outside_is_one_line(
    raised: BaseException, told: str | None, code: int, capsys: pytest.CaptureFixture[str]
):
    def ended() -> None:
        raise raised

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        run_cli(ended)
    signal.signal(signal.SIGTERM, before)
    found = capsys.readouterr().err
    assert caught.value.code == code
    assert found == told or (told is None and found.startswith("error: data loader: DataLoader"))
    assert found.count("\n") == 1


def test_a_fault_of_ours_keeps_its_traceback():
    def faulty() -> None:
        raise RuntimeError("ours")

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="ours"):
        run_cli(faulty)
    signal.signal(signal.SIGTERM, before)


def test_sigterm_unwinds_a_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def cleaned_up() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            (tmp_path / "closed").touch()

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        run_cli(cleaned_up)
    signal.signal(signal.SIGTERM, before)
    assert caught.value.code == 143 and (tmp_path / "closed").exists()
    assert capsys.readouterr().err == "stopped by SIGTERM\n"
