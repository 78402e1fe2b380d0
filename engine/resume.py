"""`--resume`: which run goes on, with whose flags, and whether its file holds what it needs."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from engine.flags import spelling
from engine.options import CHANGEABLE, COMMAND_LINE_ONLY, TrainOptions, check_saved
from models.weights.claimed import claimed
from utils.checkpoint import load_checkpoint
from utils.errors import CheckpointError, ConfigError
from utils.logger import get_logger

MOST_STEPS = 1 << 48
NEEDED: dict[str, type] = {
    **dict.fromkeys(("model", "ema", "config"), dict),
    "names": list,
    **dict.fromkeys(("hyp", "opt"), dict),
    **dict.fromkeys(("epoch", "last_step"), int),
    **dict.fromkeys(("scaler", "rng"), dict),
}


def resume(options: TrainOptions, given: Set[str]) -> tuple[TrainOptions, dict[str, Any]]:
    """The flags of the interrupted run, with those of `given` that may be changed, and what it had become.

    Args:
        options: flags of the command line.
        given: names of those that stand on it.

    Raises:
        ConfigError, CheckpointError: nothing to resume, or `--epochs` lowered.
    """
    path = find_resumable(options.resume, options.project)
    epochs = options.epochs if "epochs" in given else None
    checkpoint = load_resumable(path, epochs)
    own = checkpoint["opt"]
    fixed = {item.name for item in fields(options)} - COMMAND_LINE_ONLY - (given & CHANGEABLE)
    kept = {name: value for name, value in own.items() if name in fixed}
    merged = replace(options, **kept, resume=str(path))
    if epochs is not None and epochs < merged.epochs:
        raise ConfigError(
            f"--epochs: got {epochs}, but the run was started for {merged.epochs}; it may only be raised."
        )
    merged = replace(merged, epochs=epochs or merged.epochs)
    others = (given & kept.keys()) - {"epochs", "project"}  # a project is where to look for the run
    _tell_resumed(merged, checkpoint["epoch"] + 1, options, others)
    return merged, checkpoint


def _tell_resumed(merged: TrainOptions, done: int, options: TrainOptions, given: Set[str]) -> None:
    """Say what is resumed after `done` epochs, and which of the given flags the run's own values overrule."""
    log, now, own = get_logger(), vars(options), vars(merged)
    is_trained = done >= merged.epochs
    left = "the last measurement" if is_trained else f"epoch {done + 1} of {merged.epochs}"
    log.info(f"resume: {merged.resume}, {left}")
    overruled = [
        f"{spelling(name)} {now[name]} ({own[name]})"
        for name in sorted(given)
        if now[name] != own[name]
    ]
    if overruled:
        log.warning(f"resume: the run's own values hold, not {', '.join(overruled)}")


def find_resumable(resume: str | bool, project: str) -> Path:
    """The checkpoint that `--resume [path]` means: the newest `last.pt` of the project whose training is not finished
    when no path is given. The path is absolute, its run's folder stands two above it.

    Raises:
        ConfigError: there is none, or it does not stand in a folder `weights`.
    """
    if isinstance(resume, str):
        path = Path(resume)
        if path.is_dir():
            path = path / "weights" / "last.pt"
        if not path.is_file():
            raise ConfigError(
                f"--resume: {path} is not there. Give the last.pt of the run to go on with."
            )
        path = path.resolve()
        if path.parent.name != "weights":
            raise ConfigError(
                f"--resume: got {path}, expected it in the folder `weights` of its run. Put it back there, or start "
                "a new run from it with --weights."
            )
        return path
    found = sorted(Path(project).glob("**/weights/last.pt"), key=lambda p: -p.stat().st_mtime)
    if not found:
        raise ConfigError(
            f"--resume: no last.pt under {project}. Give its path: --resume runs/train/exp/weights/last.pt."
        )
    return next((path for path in found if _is_resumable(path)), found[0]).resolve()


def _is_resumable(path: Path) -> bool:
    try:
        checkpoint = load_checkpoint(path)
    except CheckpointError:
        return False
    return "optimizer" in checkpoint and not checkpoint.get("finished")


def load_resumable(path: Path, epochs: int | None = None) -> dict[str, Any]:
    """Read a checkpoint that holds a training.

    Args:
        path: a `last.pt`, or another checkpoint of a run.
        epochs: how long it is to be by now; None leaves it as it was. A finished training goes on if this is more.

    Raises:
        CheckpointError: the training is finished, or it is not such a file.
    """
    checkpoint = load_checkpoint(path)
    epoch = checkpoint.get("epoch")
    done = epoch + 1 if isinstance(epoch, int) else "?"
    goes_on = isinstance(done, int) and epochs is not None and epochs > done
    if checkpoint.get("finished", "optimizer" not in checkpoint) and not goes_on:
        raise CheckpointError(
            f"{path}: its training is finished after {done} epochs, nothing to resume. Give more --epochs than that to "
            "go on with its last.pt, or start a new one from it with --weights."
        )
    missing = [key for key in NEEDED if key not in checkpoint]
    if missing:
        raise CheckpointError(
            f"{path}: has no {', '.join(missing)}, nothing to resume. Start a new run from it with --weights."
        )
    for key, kind in {**NEEDED, "optimizer": dict}.items():
        value = checkpoint.get(key)
        is_number = isinstance(value, int) and -1 <= value <= MOST_STEPS
        if not isinstance(value, kind) or (kind is int and not is_number):
            raise damaged(path, key, f"got {str(value)[:60]!r}, expected another kind of value")
    check_saved(checkpoint["opt"], path)
    with claimed(path, checkpoint["config"], checkpoint["model"], len(checkpoint["names"])):
        return checkpoint


def damaged(path: str | Path, place: str, reason: str) -> CheckpointError:
    """The error for a part of a checkpoint that is not what a training leaves."""
    return CheckpointError(
        f"{path}: its {place} is damaged - {reason}. Start a new run from it with --weights."
    )
