"""What a training must remember to go on as if it had never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from engine.run import Run
from utils.checkpoint import (
    capture_rng,
    finalize_checkpoint,
    load_checkpoint,
    restore_rng,
    save_checkpoint,
)
from utils.errors import CheckpointError, ConfigError
from utils.logger import get_logger
from utils.optim import load_optimizer_state_by_name, optimizer_state_by_name


def checkpoint_of(run: Run, finished_epoch: int) -> dict[str, Any]:
    """The run after `finished_epoch` as tensors and plain data."""
    pending = {n: p.grad for n, p in run.model.named_parameters() if p.grad is not None}
    return {
        "model": run.model.state_dict(),
        "ema": run.ema.state_dict(),
        "config": run.model.config,
        "names": list(run.model.names),
        "imgsz": list(run.imgsz),
        "strides": list(run.model.strides),
        "hyp": dict(run.hyp),
        "opt": {key: value for key, value in vars(run.options).items() if key != "config"},
        "epoch": finished_epoch,
        "epochs": run.options.epochs,
        "last_step": run.last_step,
        "best_fitness": run.best_fitness,
        "best_epoch": run.best_epoch,
        "torch_version": str(torch.__version__),
        "optimizer": {**optimizer_state_by_name(run.optimizer), "pending": pending},
        "scaler": run.scaler.state_dict(),
        "rng": capture_rng(),
    }


def save(run: Run, path: Path, finished_epoch: int) -> None:
    """Write a checkpoint that `restore` can go on from."""
    save_checkpoint(path, checkpoint_of(run, finished_epoch))


def find_resumable(resume: str | bool, project: str) -> Path:
    """The checkpoint that `--resume [path]` means: the newest `last.pt` of the project when no path is given.

    Raises:
        ConfigError: there is none.
    """
    if isinstance(resume, str):
        path = Path(resume)
        if path.is_dir():
            path = path / "weights" / "last.pt"
        if not path.is_file():
            raise ConfigError(
                f"--resume: {path} is not there. Give the last.pt of the run to go on with."
            )
        return path
    found = sorted(Path(project).glob("**/last.pt"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise ConfigError(
            f"--resume: no last.pt under {project}. Give its path: --resume runs/train/exp/weights/last.pt."
        )
    return found[-1]


def load_resumable(path: Path) -> dict[str, Any]:
    """Read a checkpoint that holds a training.

    Raises:
        CheckpointError: the training is finished, or it is not such a file.
    """
    checkpoint = load_checkpoint(path)
    if "optimizer" not in checkpoint:
        raise CheckpointError(
            f"{path}: its training is finished after {checkpoint.get('epochs', '?')} epochs, nothing to resume. "
            "Start a new one from it with --weights."
        )
    return checkpoint


def restore(run: Run, checkpoint: dict[str, Any]) -> None:
    """Bring a freshly prepared run to where the checkpoint was written."""
    run.model.load_state_dict(checkpoint["model"])
    run.ema.load_state_dict(checkpoint["ema"])
    missing = load_optimizer_state_by_name(run.optimizer, checkpoint["optimizer"])
    if missing and run.hyp["optimizer"] == "SGD" and checkpoint["last_step"] >= 0:
        get_logger().info(f"resume: {len(missing)} parameters have no optimiser state yet")
    parameters = dict(run.model.named_parameters())
    for name, gradient in checkpoint["optimizer"]["pending"].items():
        parameters[name].grad = gradient.to(parameters[name])
    run.scaler.load_state_dict(checkpoint["scaler"])
    run.epoch = checkpoint["epoch"] + 1
    run.last_step = checkpoint["last_step"]
    run.best_fitness, run.best_epoch = checkpoint["best_fitness"], checkpoint["best_epoch"]
    restore_rng(checkpoint["rng"])


def finish(folder: Path) -> None:
    """Reduce `best.pt` and `last.pt` to what inference needs."""
    for name in ("last.pt", "best.pt"):
        if (folder / name).exists():
            finalize_checkpoint(folder / name)
