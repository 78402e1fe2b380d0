"""How long it takes until a script answers: what is imported at the start, and what is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from shell import TINY_MODEL

from models.yolo import build_model
from utils.checkpoint import save_checkpoint
from utils.config import parse_yaml

ROOT = Path(__file__).resolve().parents[1]
HEAVY = [
    *("timm", "onnx", "onnxruntime", "openvino", "matplotlib", "pandas", "scipy"),
    *("faster_coco_eval", "torchvision"),
]
COMPILER = ["torch._dynamo", "torch._inductor", "sympy"]  # PyTorch's, over a second to import
TRIES = 3  # the machine may be busy with something else


def run_code(code: str, *words: str) -> str:
    """What a fresh Python prints, started in the project's folder."""
    command = [sys.executable, "-c", code, *words]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return result.stdout.strip()


def least_seconds(limit: float, code: str, *words: str) -> float:
    """The least processor time that `code` prints; the first try below `limit` is the last."""
    times: list[float] = []
    while len(times) < TRIES and (not times or times[-1] >= limit):
        times.append(float(run_code(code, *words)))
    return min(times)


def test_importing_the_models_takes_little_beyond_torch():
    code = (
        "import torch, time; start = time.process_time(); import models.yolo; "
        "print(time.process_time() - start)"
    )
    assert least_seconds(1.5, code) < 1.5


def test_help_takes_little_beyond_torch():
    pytest.importorskip("resource")
    code = (
        "import resource, subprocess, sys\n"
        "command = [sys.executable, *sys.argv[1:]]\n"
        "subprocess.run(command, check=True, stdout=subprocess.DEVNULL)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(used.ru_utime + used.ru_stime)"
    )
    torch = least_seconds(0, code, "-c", "import torch")
    assert least_seconds(1.6 * torch, code, "train.py", "--help") < 1.6 * torch


def test_importing_every_script_leaves_heavy_libraries_alone():
    code = (
        "import sys, train, val, detect, export, compare, models.yolo, models.losses, data.loader\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    assert run_code(code) == "[]"


def test_a_detection_imports_neither_heavy_libraries_nor_the_compiler(
    shared_data: Path, tmp_path: Path
):
    model = build_model({**parse_yaml(TINY_MODEL, "tiny").data, "nc": 2}, imgsz=(64, 64))
    content = {"model": model.state_dict(), "config": model.config, "names": ["square", "disc"]}
    save_checkpoint(tmp_path / "two.pt", {**content, "imgsz": [64, 64]})
    words = ["--weights", tmp_path / "two.pt", "--source", shared_data.parent / "images/val"]
    words += [
        "--conf-thres",
        0.01,
        "--project",
        tmp_path / "found",
        "--save-txt",
        "--device",
        "cpu",
    ]
    code = (
        "import sys, detect; detect.main(sys.argv[1:]); "
        f"print([name for name in {HEAVY + COMPILER} if name in sys.modules])"
    )
    assert run_code(code, *map(str, words)).splitlines()[-1] == "[]"
    assert len(list(tmp_path.glob("found/exp/labels/*.txt"))) == 4  # boxes were found, and drawn
