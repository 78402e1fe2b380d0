"""Train a detector.

python train.py --cfg yolov5n-emo.yaml --data data/shapes.yaml --imgsz 320 --epochs 30
python train.py --cfg yolo11s.yaml --data my.yaml --backbone convnext_tiny
python train.py --resume
torchrun --nproc_per_node 2 train.py --cfg yolov5s.yaml --data my.yaml --batch-size 32
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.check import conclude as conclude_check
from engine.evaluation import collect
from engine.evolve import evolve
from engine.options import TrainOptions, check_pairs, read_training
from engine.recorder import RunRecorder, conclude
from engine.resume import resume
from engine.run import EpochProgress, Run, look_over, prepare
from engine.state import is_to_stop, leave, restart_from_best, restore, save_epoch
from engine.step import resize_randomly, use_batch, use_gradients, warn_of_unused
from models.family import total_loss
from utils.checkpoint import clear_temporary, restore_rng
from utils.config import increment_path
from utils.device import autocast, describe_device, memory_used, seed_everything, select_device
from utils.distributed import (
    World,
    all_gather_objects,
    broadcast_object,
    process_group,
    read_world,
    share_buffers,
)
from utils.errors import ConfigError, run_cli
from utils.layers import single_values
from utils.logger import get_logger
from utils.metrics import Metrics
from utils.optim import set_learning_rates
from utils.progress import Progress, train_status
from utils.structures import Decoded, Targets, as_float


def main(arguments: Sequence[str] | None = None) -> None:
    """Train from the command line."""
    options, given = read_training(arguments)
    checkpoint = None
    if options.resume:
        options, checkpoint = resume(options, given)
    else:
        check_pairs(options)
    world = read_world()
    if options.download and world.is_distributed:
        raise ConfigError(
            "--download: got several processes, expected one. Fetch the data first: python val.py --download --data ..."
        )
    if options.evolve and (world.is_distributed or options.resume):
        raise ConfigError("--evolve: one process and no --resume. Use --resume_evolve.")
    device = select_device(options.device, world.local_rank if world.is_distributed else None)
    if options.check:
        conclude_check(look_over(options, device), options.make_folder())
    with process_group(world, device):
        if options.evolve:
            best = evolve(options, lambda flags: train(flags, device, world))
            print(f"best recipe: {best}; train with --hyp {best}")
        else:
            train(options, device, world, checkpoint)


def train(
    options: TrainOptions,
    device: torch.device,
    world: World,
    checkpoint: Mapping[str, Any] | None = None,
) -> Metrics | None:
    """Run a whole training; the main process returns the metrics of its best epoch.

    Args:
        options: the flags.
        device: where the model goes.
        world: this process among all.
        checkpoint: what a run that is resumed had become.
    """
    seed_everything(options.seed)
    log = get_logger(world.rank)
    if checkpoint is None:
        folder = increment_path(options.project, options.name, options.exist_ok)
    else:
        folder = Path(str(options.resume)).parent.parent
    folder = Path(broadcast_object(str(folder)))
    log.info(f"device: {describe_device(device)}, torch {torch.__version__}")
    kept = {name: checkpoint[name] for name in ("hyp", "config")} if checkpoint else {}
    run = prepare(options, folder, device, world, **kept)
    if checkpoint:
        restore(run, checkpoint)
    if world.is_main:
        for place in (folder, folder / "weights"):
            clear_temporary(place)
    recorder = RunRecorder(run)
    recorder.start()
    with run.stop.listening():
        train_epochs(run, recorder)
        return conclude(run, recorder)


def train_epochs(run: Run, recorder: RunRecorder) -> None:
    """Train, measure and save, epoch by epoch."""
    options, place, start = run.options, run.place, time.time()
    while place.epoch < options.epochs and not run.is_out_of_patience:
        epoch = place.epoch
        is_last = epoch + 1 == options.epochs
        losses = train_one_epoch(run, epoch, recorder)
        metrics, val_losses = (None, {}) if options.noval and not is_last else validate(run)
        place.epoch = epoch + 1
        if metrics:
            place.note_fitness(metrics.fitness, epoch)
        recorder.epoch(epoch, losses, val_losses, metrics, time.time() - start)
        is_last |= run.is_out_of_patience
        if run.world.is_main and (is_last or not options.nosave):
            save_epoch(run, epoch)
    if place.epoch < options.epochs:
        get_logger().info(
            f"stopped: no better epoch since epoch {place.improved_epoch + 1} (--patience {options.patience})"
        )


def train_one_epoch(run: Run, epoch: int, recorder: RunRecorder) -> dict[str, float]:
    """One pass over the training data, or the rest of one that was stopped.

    Returns:
        The mean of each loss term over the batches that were used; nan where none was.

    Raises:
        StoppedError: a signal asked for it; last.pt is written.
    """
    begin_epoch(run, epoch)
    place, steps = run.place, len(run.train_loader)
    first, title = place.within.step, f"epoch {epoch + 1}/{run.options.epochs}"
    bar = Progress(run.train_loader, steps, title, done=first, enabled=run.world.is_main)
    for step, batch in enumerate(bar, start=first):
        iteration = epoch * steps + step
        factor = run.schedule(epoch)
        set_learning_rates(run.optimizer, factor, iteration, run.warmup, run.hyp["momentum"])
        images, targets = as_float(batch.images, run.device), batch.targets.to(run.device)
        if run.options.multi_scale:
            seed = run.options.seed * 1_000_003 + iteration
            images, targets = resize_randomly(images, targets, run.model.max_stride, seed)
        recorder.batch(epoch, step, images, targets, batch.paths)
        with autocast(run.device, run.autocast), single_values(run.model, len(images)):
            raw = run.wrapped(images, targets)
        losses = run.criterion(raw, targets)
        gathered = run.warmup.accumulate(iteration, run.accumulate)
        total = total_loss(run.criterion, losses, len(images) * run.world.size, gathered)
        is_used = use_batch(run, total, losses)
        if is_used:
            run.scaler.scale(total).backward()
            if iteration == 0:
                warn_of_unused(run.model)
            if iteration - place.last_step >= gathered:
                optimizer_step(run)
                place.last_step = iteration
        place.within = place.within.after(losses, is_used, len(targets.labels))
        size, memory = (images.shape[2], images.shape[3]), memory_used(run.device)
        bar.status(train_status(place.within.means, len(targets.labels), size, memory))
        if is_to_stop(run):
            raise leave(run)
    if not sum(all_gather_objects(place.within.objects)):
        get_logger().warning(
            f"epoch {epoch + 1}: none of its {steps} batches has an object, it learned from background alone. The "
            "accounts of the splits at the start say what became of them."
        )
    return _mean_of_ranks(place.within.sums, place.within.used)


def begin_epoch(run: Run, epoch: int) -> None:
    """Seed what the epoch draws, or take up what it had drawn when the run was stopped within it."""
    for criterion in (run.criterion, run.val_criterion):
        criterion.begin_epoch(epoch, run.options.epochs)
    place = run.place
    if place.within.rng is None:
        place.within = EpochProgress()
        if epoch == run.plan.strong.stop:
            restart_from_best(run)
        torch.manual_seed(run.options.seed + 1_000_003 * (epoch + 1) + run.world.rank)
    else:
        restore_rng(place.within.rng)
        place.within = place.within._replace(rng=None)
    run.wrapped.train()
    for module in run.frozen:
        module.eval()
    run.train_loader.set_epoch(epoch, place.within.step)


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


def validate(run: Run) -> tuple[Metrics, dict[str, float]]:
    """Measure the averaged model on the validation split, with its losses."""
    model, evaluator, batches = run.ema.model, run.evaluator, 0
    sums: dict[str, float] = {}

    def predict(images: Tensor, targets: Targets) -> Decoded:
        nonlocal batches
        with autocast(run.device, run.autocast):
            raw = model(images)
        for name, value in run.val_criterion(raw, targets).items():
            sums[name] = sums.get(name, 0.0) + value.item()
        batches += 1
        return model.decode(raw)

    share_buffers(model)
    bar = Progress(run.val_loader, len(run.val_loader), "val", enabled=run.world.is_main)
    kind, batches_on = model.head.postprocess, run.stop.until(bar)
    collect(predict, kind, batches_on, evaluator, run.device)
    if any(all_gather_objects(run.stop.number)):
        raise leave(run)
    evaluator.merge(all_gather_objects(evaluator.state()))
    return evaluator.evaluate(), _mean_of_ranks(sums, batches)


def _mean_of_ranks(sums: Mapping[str, float], count: int) -> dict[str, float]:
    """Sums over `count` batches here, and those of all other processes, as means; nan of no batch at all."""
    gathered = all_gather_objects((dict(sums), count))
    total = sum(number for _, number in gathered)
    names = dict.fromkeys(name for part, _ in gathered for name in part)
    return {
        name: sum(part.get(name, 0.0) for part, _ in gathered) / total if total else math.nan
        for name in names
    }


if __name__ == "__main__":
    run_cli(main)
