"""How long the models of a study take for one image, in turn: `python -m study.latency FOLDER`.

All of them are in one process, so that a machine that is busy for a while is busy for all of them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deploy.backends import load_backend
from study.plan import LATENCY, MEASURED, load_study
from utils.device import select_device, synchronize
from utils.errors import run_cli
from utils.files import write_whole

BURST = 5  # images a model gets in its turn
WARM_UP = 2  # before them, that do not count: threads of the model before wait awake for a moment, caches are full of it


class Timed(NamedTuple):
    """A model to time: what it is called with, and on images of which size."""

    run: Callable[[Tensor], object]
    imgsz: tuple[int, int]


class Latency(NamedTuple):
    """Milliseconds for one image: the median, and the quartiles around it."""

    median: float
    low: float
    high: float


@torch.inference_mode()
def latencies(models: Sequence[Timed], device: torch.device, runs: int) -> list[Latency]:
    """Of each model for one image, network and decoding, `runs` times; they take turns of some images each."""
    images = [torch.rand(1, 3, *model.imgsz, device=device) for model in models]
    times: list[list[float]] = [[] for _ in models]
    for turn in range(0, runs, BURST):
        for model, image, taken in zip(models, images, times, strict=True):
            for number in range(WARM_UP + min(BURST, runs - turn)):
                synchronize(device)
                start = time.perf_counter()
                model.run(image)
                synchronize(device)
                if number >= WARM_UP:
                    taken.append(1000 * (time.perf_counter() - start))
    return [Latency(*np.quantile(taken, (0.5, 0.25, 0.75)).tolist()) for taken in times]


def artifacts(folder: Path) -> Mapping[tuple[str, str], Path]:
    """The files that were measured, by folder of their entry and runtime."""
    found = {}
    for path in sorted(folder.glob(f"entries/*/{MEASURED}")):
        measured = json.loads(path.read_text(encoding="utf-8"))
        for runtime, result in measured["runtimes"].items():
            if "file" in result:
                found[path.parent.name, runtime] = Path(result["file"])
    return found


def main() -> None:
    """Time all that was measured, and write it down."""
    study = load_study(Path(sys.argv[1]))
    options, device = study.options, select_device(study.options.device)
    files, models = artifacts(study.folder), []
    for path in files.values():
        backend = load_backend(path, device, allow_code=options.allow_code)
        models.append(Timed(backend, backend.imgsz))
    found = latencies(models, device, options.runs)
    table: dict[str, dict[str, Latency]] = {}
    for (name, runtime), latency in zip(files, found, strict=True):
        table.setdefault(name, {})[runtime] = latency
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    write_whole(study.folder / LATENCY, json.dumps({"load": load, "entries": table}).encode())


if __name__ == "__main__":
    run_cli(main)
