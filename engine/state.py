"""What a training must remember to go on as if it had never stopped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, __version__

from engine.resume import MOST_STEPS, damaged
from engine.run import EpochProgress, Place, Run
from engine.stopping import name_of
from models.family import criterion_state, restore_criterion
from utils.checkpoint import (
    capture_rng,
    finalize_checkpoint,
    load_checkpoint,
    require_finite,
    restore_rng,
    save_checkpoint,
)
from utils.distributed import World, all_gather_objects, broadcast_object
from utils.errors import CheckpointError, StoppedError
from utils.logger import get_logger
from utils.optim import load_optimizer_state_by_name, optimizer_state_by_name

NO_BEST = (
    "goes on as it is, since --noval or --nosave leaves no best weights; flips alone from here on"
)
GARBLED = (
    *(LookupError, TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError),
    AssertionError,
)


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
        "opt": dict(vars(run.options)),
        "epoch": finished_epoch,
        "epochs": run.options.epochs,
        "last_step": run.place.last_step,
        "best_fitness": run.place.best_fitness,
        "best_epoch": run.place.best_epoch,
        "improved_epoch": run.place.improved_epoch,
        "torch_version": str(__version__),
        "optimizer": {**optimizer_state_by_name(run.optimizer), "pending": pending},
        "scaler": run.scaler.state_dict(),
        "criterion": criterion_state(run.criterion),
        "skipped": [run.place.skipped, run.place.skipped_steps],
        "rng": capture_rng(),
    }


def save(run: Run, path: Path, finished_epoch: int) -> None:
    """Write a checkpoint that `restore` can go on from."""
    save_checkpoint(path, checkpoint_of(run, finished_epoch))


def save_epoch(run: Run, epoch: int) -> None:
    """Write the checkpoints of an epoch; last.pt last, so that a resumed run lacks none of them."""
    best, options = run.last.with_name("best.pt"), run.options
    if run.place.best_epoch == epoch or options.nosave or not best.exists():
        save(run, best, epoch)
    period = 0 if options.nosave else options.save_period
    if period > 0 and (epoch + 1) % period == 0:
        save(run, run.last.with_name(f"epoch{epoch}.pt"), epoch)
    save(run, run.last, epoch)


def restart_from_best(run: Run) -> None:
    """Go on from the best weights so far, the model and its average (D-FINE, arXiv 2410.13842).

    In all processes together. A run that measures or saves nothing on its way has no best weights and goes on as it is.
    """
    best = Path(broadcast_object(str(run.last.with_name("best.pt"))))  # it is written by then
    if run.options.nosave or run.place.best_fitness < 0:
        get_logger().info(f"epoch {run.place.epoch + 1}: {NO_BEST}")
        return
    checkpoint = load_checkpoint(best)
    average = {
        "model": checkpoint["model"],
        "updates": run.ema.updates,
    }  # of a run that was finished
    run.model.load_state_dict(checkpoint["model"])
    run.ema.load_state_dict(checkpoint.get("ema") or average)
    get_logger().info(
        f"epoch {run.place.epoch + 1}: goes on from {best}, epoch {run.place.best_epoch + 1}; flips alone from here on"
    )


def is_to_stop(run: Run) -> bool:
    """Whether the run ends after this step; several processes agree about it at their next step."""
    return run.stop.is_agreed or (run.stop.number is not None and not run.world.is_distributed)


def leave(run: Run) -> StoppedError:
    """Write last.pt in the middle of an epoch, in all processes together; gives the error to raise."""
    place, steps = run.place, len(run.train_loader)
    state = {**place.within._asdict(), "rng": capture_rng()}
    states = all_gather_objects((state, run.stop.number))
    number = next(number for _, number in states if number is not None)
    if run.world.is_main and not run.options.evolve:
        progress = [state for state, _ in states]
        save_checkpoint(run.last, {**checkpoint_of(run, place.epoch - 1), "progress": progress})
    told = (
        f"epoch {place.epoch + 1} of {run.options.epochs} after step {place.within.step} of {steps}"
    )
    return StoppedError(number, f"stopped by {name_of(number)} in {told}; {way_on(run)}")


def way_on(run: Run) -> str:
    """How to go on with a run that was stopped."""
    return f"go on with: python train.py --resume {run.last}"


@contextmanager
def _reading(path: str | Path, place: str) -> Iterator[None]:
    """Turn what a garbled value makes fail into one line."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except GARBLED as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise damaged(path, place, f"{type(error).__name__}: {reason}") from error


def restore(run: Run, checkpoint: Mapping[str, Any]) -> None:
    """Bring a freshly prepared run to where the checkpoint was written.

    Raises:
        CheckpointError: the data has other classes by now, or the weights do not fit the model.
    """
    path = str(run.options.resume)
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
        _restore_place(run.place, checkpoint, run.world)
    with _reading(path, "random state"):
        if run.place.within.rng is not None:
            restore_rng(run.place.within.rng)  # once more where the epoch goes on
        restore_rng(checkpoint["rng"])


def _restore_place(place: Place, checkpoint: Mapping[str, Any], world: World) -> None:
    place.epoch = checkpoint["epoch"] + 1
    place.last_step = checkpoint["last_step"]
    place.best_fitness = float(checkpoint["best_fitness"])
    place.best_epoch = int(checkpoint["best_epoch"])
    place.improved_epoch = int(checkpoint.get("improved_epoch", place.best_epoch))
    place.skipped, place.skipped_steps = map(int, checkpoint.get("skipped", (0, 0)))
    place.within = _progress(checkpoint.get("progress"), world)


def _restore_optimizer(run: Run, checkpoint: Mapping[str, Any]) -> None:
    """The optimiser's state, the loss scaler's, and gradients that wait for their step."""
    saved = checkpoint["optimizer"]
    for name, slots in saved["state"].items():
        tensors = {f"{name}.{slot}": value for slot, value in slots.items()}
        require_finite({k: v for k, v in tensors.items() if isinstance(v, Tensor)}, "optimizer")
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
