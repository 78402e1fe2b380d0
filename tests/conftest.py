"""What tests share: the project on the path, a tiny data set, a tiny model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
for _folder in (ROOT, ROOT / "tests"):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))

from shell import TINY_MODEL, draw_data, start_script

from utils.logger import get_logger

get_logger()  # pytest listens to those loggers of their own handlers that are there when a test begins


@pytest.fixture
def small_data(tmp_path: Path) -> Path:
    """YAML of a data set of 8 training and 4 validation images, 96 x 96, two classes."""
    return draw_data(tmp_path / "small")


@pytest.fixture(scope="session")
def shared_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, drawn once; for tests that only read it."""
    return draw_data(tmp_path_factory.mktemp("shared"))


@pytest.fixture
def tiny_cfg(tmp_path: Path) -> Path:
    """YAML of a very small detector."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_MODEL)
    return path


@pytest.fixture
def run_script(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run one of the project's scripts from another folder and wait for its end."""

    def run(*words: object, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        process = start_script(*words, cwd=tmp_path)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run
