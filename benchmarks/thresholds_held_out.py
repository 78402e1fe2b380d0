"""Do thresholds by class and a temperature, chosen on val, serve on test? Any file that val.py measures.

    python benchmarks/thresholds_held_out.py --weights best.pt best.onnx --data bccd.yaml --imgsz 320

Prints the mean F1 of the classes on test at the best single threshold of val and at the best of each class, and the
calibration error of the scores on test before and after the temperature that was fitted on val. Beside it the
thresholds that the file itself keeps, as `val.py --report` and export.py left them.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deploy.backends import Backend, load_backend
from engine.assessment import Assessment, assess
from engine.evaluation import Validation
from engine.flags import read_flags
from engine.options import ValOptions
from utils.calibration import LEAST_SCORE, at_temperature, calibration_error
from utils.errors import run_cli
from utils.tide import RIGHT
from val import validation_of


def assessed(options: ValOptions, backend: Backend, name: str, split: str) -> Assessment:
    """A model on one split."""
    imgsz = options.size_for(backend, name)
    validation: Validation = validation_of(
        replace(options, task=split), backend, name, imgsz, options.batch_size
    )
    metrics, _ = validation.run(torch.device("cpu"))
    return assess(validation.evaluator, metrics)


def main() -> None:
    """Compare on every given model."""
    options = read_flags(ValOptions)
    for name in options.weights:
        backend = load_backend(name)
        val, test = (assessed(options, backend, name, split) for split in ("val", "test"))
        curves, names = test.metrics.curves, test.evaluator.names
        rows = np.arange(len(curves.names))
        chosen = val.thresholds[[names.index(own) for own in curves.names]]
        single = np.searchsorted(curves.confidence_axis, val.metrics.confidence)
        own = np.searchsorted(curves.confidence_axis, chosen)
        print(f"{name}: keeps {[round(v, 3) for v in backend.info.class_conf or ()]}")
        print(f"  F1 on test: {curves.f1[:, single].mean():.4f} at {val.metrics.confidence:.3f} for all, "
              f"{curves.f1[rows, own].mean():.4f} at {chosen.round(3).tolist()}")  # fmt: skip
        found = test.errors.detections
        kept = found.counts & (found.scores >= LEAST_SCORE)
        scores, right = found.scores[kept], found.kind[kept] == RIGHT
        scaled = at_temperature(scores, val.calibration.temperature)
        print(f"  D-ECE on test: {calibration_error(scores, right):.4f}, {calibration_error(scaled, right):.4f} at the "
              f"temperature {val.calibration.temperature:.3f} of val")  # fmt: skip


if __name__ == "__main__":
    run_cli(main)
