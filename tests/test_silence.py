"""Nothing is sent: every connection that a command tries is an audited event."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WATCHED = """
import runpy, sys

def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "urllib.Request", "socket.sendto"):
        print("SENT", event, args, file=sys.stderr, flush=True)

sys.addaudithook(watch)
sys.path.insert(0, {root!r})
script = sys.argv.pop(1)
sys.argv[0] = script
try:
    runpy.run_path(script, run_name="__main__")
finally:
    import threading
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(5)
"""


def watched(tmp_path: Path, script: str, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", WATCHED.format(root=str(ROOT)), str(ROOT / script), *flags],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_the_watch_sees_a_request(tmp_path: Path):
    (tmp_path / "asks.py").write_text(
        "import socket\ntry:\n    socket.create_connection(('127.0.0.1', 9), 0.1)\nexcept OSError:\n    pass\n"
    )
    assert "SENT socket.connect" in watched(tmp_path, str(tmp_path / "asks.py")).stderr


def test_an_export_to_openvino_and_its_use_send_nothing(tmp_path: Path):
    pytest.importorskip("openvino")
    for script, flags in (
        ("export.py", ["--cfg", "yolov5n", "--imgsz", "64", "--include", "openvino"]),
        ("detect.py", ["--weights", "yolov5n_openvino_model", "--source", "grey.png"]),
    ):
        if script == "detect.py":
            import cv2
            import numpy as np

            cv2.imwrite(str(tmp_path / "grey.png"), np.full((64, 64, 3), 114, np.uint8))
        done = watched(tmp_path, script, *flags)
        assert done.returncode == 0, done.stderr[-500:]
        assert "SENT" not in done.stderr
