"""What a training must remember to go on as if it had never stopped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from engine.run import EpochProgress, Run
from engine.stopping import name_of
from engine.training_flags import check_saved
from models.family import criterion_state, restore_criterion
from models.weights.claimed import claimed
from utils.checkpoint import (
    capture_rng,
    finalize_checkpoint,
    load_checkpoint,
    require_finite,
    restore_rng,
    save_checkpoint,
)
from utils.distributed import World, all_gather_objects
from utils.errors import CheckpointError, ConfigError, StoppedError
from utils.logger import get_logger
from utils.optim import load_optimizer_state_by_name, optimizer_state_by_name

MOST_STEPS = 1 << 48
KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("model", "ema", "config", "hyp", "opt", "optimizer", "scaler", "rng"), dict),
    **dict.fromkeys(("epoch", "last_step"), int),
    "names": list,
}
GARBLED = (
    *(LookupError, TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError),
    AssertionError,
)
NEEDED = ("model", "ema", "config", "names", "hyp", "opt", "epoch", "last_step", "scaler", "rng")


def checkpoint_of(run: Run, finished_epoch: int) -> dict[str, Any]:
    """The run after `finished_epoch` as tensors and plain data."""
    scale = run.scaler.get_scale()  # 1 without a scaler; another device may want another
    named = run.model.named_parameters()
    pending = {name: p.grad / scale for name, p in named if p.grad is not None}
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
        "improved_epoch": run.improved_epoch,
        "torch_version": str(torch.__version__),
        "optimizer": {**optimizer_state_by_name(run.optimizer), "pending": pending},
        "scaler": run.scaler.state_dict(),
        "criterion": criterion_state(run.criterion),
        "skipped": [run.skipped, run.skipped_steps],
        "rng": capture_rng(),
    }


def save(run: Run, path: Path, finished_epoch: int) -> None:
    """Write a checkpoint that `restore` can go on from."""
    save_checkpoint(path, checkpoint_of(run, finished_epoch))


def is_to_stop(run: Run) -> bool:
    """Whether the run ends after this step; several processes agree about it at their next step."""
    return run.is_stopping or (run.stop.number is not None and not run.world.is_distributed)


def leave(run: Run) -> StoppedError:
    """Write last.pt in the middle of an epoch, in all processes together; gives the error to raise."""
    done, steps = run.progress.step, len(run.train_loader)
    state = {**run.progress._asdict(), "rng": capture_rng()}
    states = all_gather_objects((state, run.stop.number))
    number = next(number for _, number in states if number is not None)
    last = run.folder / "weights" / "last.pt"
    if run.world.is_main and not run.options.evolve:
        progress = [state for state, _ in states]
        save_checkpoint(last, {**checkpoint_of(run, run.epoch - 1), "progress": progress})
    place = f"epoch {run.epoch + 1} of {run.options.epochs} after step {done} of {steps}"
    return StoppedError(number, f"stopped by {name_of(number)} in {place}; {way_on(run)}")


def way_on(run: Run) -> str:
    """How to go on with a run that was stopped."""
    return f"go on with: python train.py --resume {run.folder / 'weights' / 'last.pt'}"


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
    done = _count_epochs(checkpoint)
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
    for key, kind in KINDS.items():
        value = checkpoint[key]
        if not isinstance(value, kind) or (kind is int and not -1 <= value <= MOST_STEPS):
            raise _damaged(path, key, f"got {str(value)[:60]!r}, expected another kind of value")
    check_saved(checkpoint["opt"], path)
    with claimed(path, checkpoint["config"], checkpoint["model"], len(checkpoint["names"])):
        return checkpoint


def _damaged(path: str | Path, place: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: its {place} is damaged - {reason}. Start a new run from it with --weights."
    )


@contextmanager
def _reading(path: str | Path, place: str) -> Iterator[None]:
    """Turn what a garbled value makes fail into one line."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except GARBLED as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise _damaged(path, place, f"{type(error).__name__}: {reason}") from error


def _count_epochs(checkpoint: Mapping[str, Any]) -> int | str:
    epoch = checkpoint.get("epoch")
    return epoch + 1 if isinstance(epoch, int) else "?"


def restore(run: Run, checkpoint: dict[str, Any]) -> None:
    """Bring a freshly prepared run to where the checkpoint was written.

    Raises:
        CheckpointError: the data has other classes by now, or the weights do not fit the model.
    """
    path = run.options.resume
    _check_names(run, checkpoint["names"])
    try:
        run.model.load_state_dict(checkpoint["model"])
        run.ema.load_state_dict(checkpoint["ema"])
    except GARBLED as error:
        raise CheckpointError(
            f"{path}: the weights do not fit the run's model - {' '.join(str(error).split())[:300]}"
        ) from error
    for module in (run.model, run.ema.model):
        require_finite(module.state_dict(), path)
    with _reading(path, "optimizer"):
        _restore_optimizer(run, checkpoint)
    with _reading(path, "criterion"):
        restore_criterion(run.criterion, checkpoint.get("criterion", {}))
    with _reading(path, "place in the training"):
        run.epoch = checkpoint["epoch"] + 1
        run.last_step = checkpoint["last_step"]
        run.best_fitness = float(checkpoint["best_fitness"])
        run.best_epoch = int(checkpoint["best_epoch"])
        run.improved_epoch = int(checkpoint.get("improved_epoch", run.best_epoch))
        run.skipped, run.skipped_steps = map(int, checkpoint.get("skipped", (0, 0)))
        run.progress = _progress(checkpoint.get("progress"), run.world)
    with _reading(path, "random state"):
        if run.progress.rng is not None:
            restore_rng(run.progress.rng)  # once more where the epoch goes on
        restore_rng(checkpoint["rng"])


def _restore_optimizer(run: Run, checkpoint: Mapping[str, Any]) -> None:
    """The optimiser's state, the loss scaler's, and gradients that wait for their step."""
    saved = checkpoint["optimizer"]
    for name, slots in saved["state"].items():
        tensors = {f"{name}.{slot}": value for slot, value in slots.items()}
        require_finite(
            {k: v for k, v in tensors.items() if isinstance(v, torch.Tensor)}, "optimizer"
        )
    missing = load_optimizer_state_by_name(run.optimizer, saved)
    if missing and run.hyp["optimizer"] == "SGD" and checkpoint["last_step"] >= 0:
        get_logger().info(f"resume: {len(missing)} parameters have no optimiser state yet")
    parameters = dict(run.model.named_parameters())
    if checkpoint["scaler"]:
        run.scaler.load_state_dict(checkpoint["scaler"])
    for name, gradient in saved["pending"].items():
        parameters[name].grad = gradient.to(parameters[name]) * run.scaler.get_scale()


def _progress(states: Sequence[Mapping[str, Any]] | None, world: World) -> EpochProgress:
    """How far this process was in the epoch that was stopped; other processes than then draw anew."""
    if not states:
        return EpochProgress()
    state = EpochProgress(**states[min(world.rank, len(states) - 1)])
    counts = (state.step, state.used, state.objects)
    if any(type(n) is not int for n in counts) or not 0 <= state.used <= state.step <= MOST_STEPS:
        raise ValueError(f"step {state.step}, {state.used} used")
    sums = {str(name): float(value) for name, value in state.sums.items()}
    state = state._replace(sums=sums)
    if len(states) != world.size:
        get_logger().info(
            f"resume: {world.size} processes, not the {len(states)} that were stopped: the rest of the epoch is "
            "another one than without the stop"
        )
    return state


def _check_names(run: Run, names: Sequence[str]) -> None:
    now = list(run.model.names)
    if now == list(names):
        return
    told = ", ".join(map(str, names))
    raise CheckpointError(
        f"{run.options.resume}: {run.options.data} has the classes {', '.join(now)}, expected those that the run was "
        f"started with: {told}. "
        "Restore them, or start a new run with --weights."
    )


def finish(folder: Path) -> None:
    """Reduce `best.pt` to what inference needs; `last.pt` keeps its training, for a run that is to go on after all.

    `last.pt` comes last: until it says that it is finished, a killed run is resumed and comes here again.
    """
    best, last = folder / "best.pt", folder / "last.pt"
    if best.exists():
        finalize_checkpoint(best)
    if last.exists():
        save_checkpoint(last, {**load_checkpoint(last), "finished": True})
