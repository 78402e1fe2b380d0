"""One epoch and one validation, alone or as one of several processes: started by a test, by torchrun.

    PYTHONPATH=. python tests/two_ranks.py CFG DATA HYP FOLDER

It leaves FOLDER/rank<number of processes>_<rank>.pt. BatchNorm keeps its statistics, so that a
batch can be shared out without a difference.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import train
from engine.options import read_training
from engine.recorder import RunRecorder
from engine.run import prepare
from utils.distributed import process_group, read_world


def main(cfg: str, data: str, hyp: str, folder: str) -> None:
    """Train, validate, save what came of it."""
    given = ["--cfg", cfg, "--data", data, "--hyp", hyp, "--imgsz", "64", "--batch-size", "4"]
    options = read_training(
        [*given, "--workers", "0", "--device", "cpu", "--noplots", "--epochs", "2"]
    )[0]
    world, device = read_world(), torch.device("cpu")
    torch.manual_seed(0)
    with process_group(world, device):
        run = prepare(options, Path(folder), device, world)
        norms = [m for m in run.model.modules() if isinstance(m, nn.BatchNorm2d)]
        run = replace(run, frozen=norms)
        train.train_one_epoch(run, 0, RunRecorder(run))
        state = {key: value.clone() for key, value in run.model.state_dict().items()}
        for module in run.ema.model.modules():  # statistics that differ from rank to rank
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.add_(0.1 * world.rank)
        metrics, _ = train.validate(run)
        found = run.evaluator.predictions()
        result = {
            "model": state,
            "updates": run.ema.updates,
            "images": metrics.images,
            "predictions": len(found),
            "scores": sum(row["score"] for row in found),
            "places": sum(sum(row["bbox"]) for row in found),
        }
        torch.save(result, Path(folder) / f"rank{world.size}_{world.rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
