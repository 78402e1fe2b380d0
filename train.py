"""Train a detector.

python train.py --cfg yolov5n-emo.yaml --data data/shapes.yaml --imgsz 320 --epochs 30
python train.py --cfg yolo11s.yaml --data my.yaml --backbone convnext_tiny
python train.py --resume
torchrun --nproc_per_node 2 train.py --cfg yolov5s.yaml --data my.yaml --batch-size 32
"""

from __future__ import annotations

import math
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deploy.backends import load_backend
from engine.evaluation import Evaluation, Thresholds, evaluate
from engine.evolve import evolve
from engine.finite import use_batch, use_gradients
from engine.multi_scale import resize_randomly
from engine.outputs import RunRecorder, class_table, tell_other_score
from engine.run import EpochProgress, Run, prepare, single_values, whole_val_loader
from engine.state import (
    find_resumable,
    finish,
    is_to_stop,
    leave,
    load_resumable,
    restore,
    save,
    way_on,
)
from engine.training_flags import (
    CHANGEABLE,
    COMMAND_LINE_ONLY,
    EPOCHS,
    check_pairs,
    given_flags,
    parse_options,
)
from models.family import total_loss
from utils.checkpoint import clear_temporary, load_checkpoint, restore_rng
from utils.config import increment_path
from utils.device import autocast, describe_device, memory_used, select_device
from utils.distributed import (
    World,
    all_gather_objects,
    broadcast_object,
    process_group,
    read_world,
    share_buffers,
    unused_parameters,
)
from utils.errors import ConfigError, run_cli
from utils.logger import get_logger
from utils.metrics import CocoEvaluator, Metrics
from utils.optim import set_learning_rates
from utils.progress import Progress, train_status
from utils.seed import seed_everything
from utils.structures import Decoded, Targets, as_float


def train(
    options: Namespace, device: torch.device, world: World, checkpoint: dict[str, Any] | None
) -> Metrics | None:
    """Run a whole training; the main process returns the metrics of its best epoch."""
    log = get_logger(world.rank)
    folder = Path(broadcast_object(str(_run_folder(options, checkpoint))))
    log.info(f"device: {describe_device(device)}, torch {torch.__version__}")
    run = prepare(options, folder, device, world, hyp=checkpoint["hyp"] if checkpoint else None)
    if checkpoint:
        restore(run, checkpoint)
    if world.is_main:
        for place in (folder, folder / "weights"):
            clear_temporary(place)
    recorder = RunRecorder(run)
    recorder.start()
    with run.stop.listening():
        _train_epochs(run, recorder)
        return _conclude(run, recorder)


def _train_epochs(run: Run, recorder: RunRecorder) -> None:
    """Train, measure and save, epoch by epoch."""
    options, start = run.options, time.time()
    while run.epoch < options.epochs and not _is_out_of_patience(run):
        epoch = run.epoch
        losses = train_one_epoch(run, epoch, recorder)
        is_last = epoch + 1 == options.epochs
        evaluation, val_losses = (None, {}) if options.noval and not is_last else validate(run)
        run.epoch = epoch + 1
        if evaluation:
            _note_fitness(run, evaluation.metrics.fitness, epoch)
        recorder.epoch(epoch, losses, val_losses, evaluation, time.time() - start)
        if run.world.is_main and (not options.nosave or is_last or _is_out_of_patience(run)):
            _save(run, epoch)
    if run.epoch < options.epochs:
        get_logger().info(
            f"stopped: no better epoch since epoch {run.improved_epoch + 1} (--patience {options.patience})"
        )


def _note_fitness(run: Run, fitness: float, epoch: int) -> None:
    """Of equal epochs the latest is the best one, for it is trained longest; better it is not."""
    if fitness > run.best_fitness:
        run.improved_epoch = epoch
    if fitness >= run.best_fitness:
        run.best_fitness, run.best_epoch = fitness, epoch


def _is_out_of_patience(run: Run) -> bool:
    """Whether so many epochs were measured without a better one that the training ends early."""
    waited = run.epoch - 1 - run.improved_epoch
    return not run.options.noval and 0 < run.options.patience <= waited


def train_one_epoch(run: Run, epoch: int, recorder: RunRecorder) -> dict[str, float]:
    """One pass over the training data, or the rest of one that was stopped.

    Returns:
        The mean of each loss term over the batches that were used; nan where none was.

    Raises:
        StoppedError: a signal asked for it; last.pt is written.
    """
    _begin_epoch(run, epoch)
    steps, first = len(run.train_loader), run.progress.step
    bar = Progress(
        run.train_loader,
        steps,
        f"epoch {epoch + 1}/{run.options.epochs}",
        done=first,
        enabled=run.world.is_main,
    )
    for step, batch in enumerate(bar, start=first):
        iteration = epoch * steps + step
        set_learning_rates(
            run.optimizer, run.schedule(epoch), iteration, run.warmup, run.hyp["momentum"]
        )
        images, targets = as_float(batch.images, run.device), batch.targets.to(run.device)
        if run.options.multi_scale:
            images, targets = resize_randomly(images, targets, run, iteration)
        recorder.batch(epoch, step, images, targets, batch.paths)
        with autocast(run.device, run.autocast), single_values(run.model, len(images)):
            raw = run.wrapped(images, targets)
        losses = run.criterion(raw, targets)
        gathered = run.warmup.accumulate(iteration, run.accumulate)
        total = total_loss(run.criterion, losses, len(images) * run.world.size, gathered)
        is_used = use_batch(run, total, losses, epoch, step)
        if is_used:
            run.scaler.scale(total).backward()
            if iteration == 0:
                _check_gradients(run)
            if iteration - run.last_step >= gathered:
                optimizer_step(run)
                run.last_step = iteration
        run.progress = run.progress.after(losses, is_used, len(targets.labels))
        means = {
            name: value / max(run.progress.used, 1) for name, value in run.progress.sums.items()
        }
        size = (images.shape[2], images.shape[3])
        bar.status(train_status(means, len(targets.labels), size, memory_used(run.device)))
        if is_to_stop(run):
            raise leave(run)
    if not sum(all_gather_objects(run.progress.objects)):
        get_logger().warning(
            f"epoch {epoch + 1}: none of its {steps} batches has an object, it learned from background alone. The "
            "accounts of the splits at the start say what became of them."
        )
    return _mean_of_ranks(run.progress.sums, run.progress.used)


def _begin_epoch(run: Run, epoch: int) -> None:
    """Seed what the epoch draws, or take up what it had drawn when the run was stopped within it."""
    for criterion in (run.criterion, run.val_criterion):
        criterion.begin_epoch(epoch, run.options.epochs)
    if run.progress.rng is None:
        run.progress = EpochProgress()
        torch.manual_seed(run.options.seed + 1_000_003 * (epoch + 1) + run.world.rank)
    else:
        restore_rng(run.progress.rng)
        run.progress = run.progress._replace(rng=None)
    run.wrapped.train()
    for module in run.frozen:
        module.eval()
    run.train_loader.set_epoch(epoch, run.progress.step)


def _mean_of_ranks(sums: Mapping[str, float], count: int) -> dict[str, float]:
    """Sums over `count` batches here, and those of all other processes, as means; nan of no batch at all."""
    gathered = all_gather_objects((dict(sums), count))
    total = sum(number for _, number in gathered)
    names = dict.fromkeys(name for part, _ in gathered for name in part)
    return {
        name: sum(part.get(name, 0.0) for part, _ in gathered) / total if total else math.nan
        for name in names
    }


def optimizer_step(run: Run) -> None:
    """Clip, step, forget the gradients, let the average follow; not where a gradient is not finite."""
    run.scaler.unscale_(run.optimizer)
    is_used = use_gradients(run)
    if is_used:
        run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    if is_used:
        run.ema.update(run.model)


def validate(run: Run) -> tuple[Evaluation, dict[str, float]]:
    """Measure the averaged model on the validation split, with its losses."""
    model, sums, batches = run.ema.model, {}, 0

    def predict(images: Tensor, targets: Targets) -> Decoded:
        nonlocal batches
        with autocast(run.device, run.autocast):
            raw = model(images)
        for name, value in run.val_criterion(raw, targets).items():
            sums[name] = sums.get(name, 0.0) + value.item()
        batches += 1
        return model.decode(raw)

    def gather(evaluator: CocoEvaluator) -> None:
        if any(all_gather_objects(run.stop.number)):
            raise leave(run)
        evaluator.merge(all_gather_objects(evaluator.state()))

    share_buffers(model)
    bar = Progress(run.val_loader, len(run.val_loader), "val", enabled=run.world.is_main)
    evaluation = evaluate(
        predict,
        model.head.postprocess,
        run.stop.until(bar),
        run.evaluator,
        device=run.device,
        thresholds=Thresholds(),
        gather=gather,
    )
    return evaluation, _mean_of_ranks(sums, batches)


def _check_gradients(run: Run) -> None:
    unused = unused_parameters(run.model)
    if unused:
        get_logger().warning(f"{len(unused)} parameters get no gradient: {', '.join(unused[:5])}")


def _save(run: Run, epoch: int) -> None:
    """Write the checkpoints of an epoch; last.pt last, so that a resumed run lacks none of them."""
    weights = run.folder / "weights"
    is_only_one = run.options.nosave or not (weights / "best.pt").exists()
    if run.best_epoch == epoch or is_only_one:
        save(run, weights / "best.pt", epoch)
    period = 0 if run.options.nosave else run.options.save_period
    if period > 0 and (epoch + 1) % period == 0:
        save(run, weights / f"epoch{epoch}.pt", epoch)
    save(run, weights / "last.pt", epoch)


def _conclude(run: Run, recorder: RunRecorder) -> Metrics | None:
    """On the main process: measure the best checkpoint once more, draw the pictures, finish the checkpoints.

    They are finished last: until then a killed run can be resumed, and comes here again.
    """
    if not run.world.is_main:
        return None
    if run.ema.updates == 0:
        _warn_of_no_step(run)
    best = run.folder / "weights" / "best.pt"
    best_epoch = load_checkpoint(best)["epoch"]
    backend = load_backend(best, run.device, allow_code=run.options.allow_code)
    evaluation = evaluate(
        lambda images, targets: backend(images),
        backend.postprocess_kind,
        run.stop.until(whole_val_loader(run)),
        run.evaluator,
        device=run.device,
        gather=lambda _: run.stop.check(way_on(run)),
        on_batch=recorder.val_batch,
    )
    recorder.finish(evaluation)
    tell_other_score(run.val_set, run.evaluator)
    finish(run.folder / "weights")
    print(class_table(evaluation.metrics))
    print(
        f"best epoch {best_epoch + 1}: mAP50 {evaluation.metrics.map50:.4f}, "
        f"mAP50-95 {evaluation.metrics.map50_95:.4f}; results in {run.folder}"
    )
    return evaluation.metrics


def _warn_of_no_step(run: Run) -> None:
    get_logger().warning(
        f"the weights were never changed: {run.epoch * len(run.train_loader)} batches, but an optimiser step needs "
        f"{run.accumulate} with a finite loss (nbs {run.hyp['nbs']} / --batch-size {run.options.batch_size}). "
        "Lower nbs in the recipe, or raise --epochs."
    )


def _run_folder(options: Namespace, checkpoint: dict[str, Any] | None) -> Path:
    if checkpoint:
        return Path(options.resume).parent.parent  # find_resumable saw to it
    return increment_path(options.project, options.name, options.exist_ok)


def _resume(options: Namespace, given: Set[str]) -> tuple[Namespace, dict[str, Any]]:
    """The flags of the interrupted run, with those of `given` that may be changed, and what it had become.

    Args:
        options: flags of the command line.
        given: names of those that stand on it.

    Raises:
        ConfigError, CheckpointError: nothing to resume, or `--epochs` lowered.
    """
    path = find_resumable(options.resume, options.project)
    checkpoint = load_resumable(path, options.epochs)
    own, now = checkpoint["opt"], vars(options)
    kept = {
        name: value
        for name, value in own.items()
        if name in now and name not in COMMAND_LINE_ONLY and name not in given & CHANGEABLE
    }
    merged = Namespace(**{**now, **kept, "resume": str(path)})
    if options.epochs is not None and options.epochs < merged.epochs:
        raise ConfigError(
            f"--epochs: got {options.epochs}, but the run was started for {merged.epochs}; it may only be raised."
        )
    merged.epochs = options.epochs or merged.epochs
    merged.config = checkpoint["config"]
    others = (given & kept.keys()) - {"epochs", "project"}  # a project is where to look for the run
    _tell_resumed(path, checkpoint["epoch"] + 1, merged, {name: now[name] for name in others})
    return merged, checkpoint


def _tell_resumed(path: Path, done: int, merged: Namespace, given: Mapping[str, Any]) -> None:
    """Say what is resumed after `done` epochs, and which of the given flags the run's own values overrule."""
    log = get_logger()
    is_trained = done >= merged.epochs
    left = "the last measurement" if is_trained else f"epoch {done + 1} of {merged.epochs}"
    log.info(f"resume: {path}, {left}")
    overruled = [
        f"--{name.replace('_', '-')} {value} ({getattr(merged, name)})"
        for name, value in sorted(given.items())
        if value != getattr(merged, name)
    ]
    if overruled:
        log.warning(f"resume: the run's own values hold, not {', '.join(overruled)}")


def _train_anew(options: Namespace, device: torch.device, world: World) -> Metrics | None:
    seed_everything(options.seed)
    return train(options, device, world, None)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train from the command line."""
    options, checkpoint = parse_options(arguments), None
    if options.resume:
        options, checkpoint = _resume(options, given_flags(arguments))
    else:
        check_pairs(options)
    options.epochs = options.epochs or EPOCHS
    world = read_world()
    if options.download and world.is_distributed:
        raise ConfigError(
            "--download: got several processes, expected one. Fetch the data first: python val.py --download --data ..."
        )
    device = select_device(options.device, world.local_rank if world.is_distributed else None)
    seed_everything(options.seed)
    with process_group(world, device):
        if options.evolve:
            if world.is_distributed or options.resume:
                raise ConfigError("--evolve: one process and no --resume. Use --resume_evolve.")
            best = evolve(options, lambda flags: _train_anew(flags, device, world))
            print(f"best recipe: {best}; train with --hyp {best}")
            return
        train(options, device, world, checkpoint)


if __name__ == "__main__":
    run_cli(main)
