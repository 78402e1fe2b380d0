"""Everything a training needs, built from its flags: `prepare` is the only place where the parts meet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data.check import Report, examine
from data.config import DataConfig
from data.dataset import DetectionDataset
from data.loader import DetectionLoader
from engine.anchors import fit_to_objects
from engine.batch_size import settle_batch_size
from engine.datasets import open_data, open_splits, settle_white
from engine.evaluation import evaluator_of
from engine.freeze import freeze
from engine.options import TrainOptions
from engine.pace import (
    Length,
    Plan,
    accumulated,
    plan_of,
    quicken_norms,
    schedule_of,
    tell_plan,
    warmup_of,
)
from engine.recipe import lr_factors, recipe_of, settle
from engine.stopping import StopRequest
from models.family import Criterion, Recipe, build_criterion
from models.weights.load import build_to_resume, build_to_train
from models.yolo import DetectionModel
from utils.config import parse_imgsz
from utils.device import autocast_dtype
from utils.distributed import World
from utils.ema import ModelEMA
from utils.errors import ConfigError
from utils.layers import memory_format_for, with_shared_norms
from utils.logger import get_logger
from utils.metrics import CocoEvaluator
from utils.optim import Schedule, Warmup, build_optimizer
from utils.thresholds import KEY as THRESHOLDS


class EpochProgress(NamedTuple):
    """How far this process is in an epoch.

    Attributes:
        step: batches that are done.
        used: those of them whose loss was finite.
        sums: of each loss term over those.
        objects: in all of them.
        rng: random state of a run that was stopped here; None where the epoch begins anew.
    """

    step: int = 0
    used: int = 0
    sums: Mapping[str, float] = MappingProxyType({})
    objects: int = 0
    rng: Mapping[str, Any] | None = None

    @property
    def means(self) -> dict[str, float]:
        """Of each loss term so far."""
        return {name: value / max(self.used, 1) for name, value in self.sums.items()}

    def after(self, losses: Mapping[str, Tensor], is_used: bool, objects: int) -> EpochProgress:
        """The progress after one more batch; its losses count if it was used."""
        sums = self.sums or dict.fromkeys(losses, 0.0)
        if is_used:
            sums = {name: sums[name] + value.item() for name, value in losses.items()}
        return self._replace(
            step=self.step + 1, used=self.used + is_used, sums=sums, objects=self.objects + objects
        )


@dataclass
class Place:
    """How far a training is.

    Attributes:
        epoch: the next one.
        last_step: iteration of the last optimiser step.
        best_fitness: of the best epoch so far.
        best_epoch: that epoch; of several alike the latest.
        improved_epoch: the first of those.
        skipped: batches left out for a loss that was not finite, in a row.
        skipped_steps: optimiser steps left out for gradients that were not finite, in a row.
        within: in the epoch that runs.
    """

    epoch: int = 0
    last_step: int = -1
    best_fitness: float = -1.0
    best_epoch: int = 0
    improved_epoch: int = 0
    skipped: int = 0
    skipped_steps: int = 0
    within: EpochProgress = EpochProgress()

    def note_fitness(self, fitness: float, epoch: int) -> None:
        """Of equal epochs the latest is the best one, for it is trained longest; better it is not."""
        if fitness > self.best_fitness:
            self.improved_epoch = epoch
        if fitness >= self.best_fitness:
            self.best_fitness, self.best_epoch = fitness, epoch


@dataclass(frozen=True)
class Run:
    """The parts of one training.

    Attributes:
        options: the flags, as they were settled.
        folder: where the run writes.
        world: this process among all.
        device: where the model stands.
        hyp: the recipe, flags applied.
        imgsz: (height, width).
        model: the network, without wrappers.
        wrapped: what `forward` is called on: the model, or DistributedDataParallel around it.
        ema: the averaged model (on the main process).
        frozen: modules that stay in eval mode.
        accumulate: batches of an optimiser step after the warm-up.
        autocast: type of mixed precision, None: off.
        val_criterion: the losses of the averaged model.
        place: how far the training is; the one part that moves.
        stop: whether a process was told to stop.
    """

    options: TrainOptions
    folder: Path
    world: World
    device: torch.device
    hyp: Recipe
    imgsz: tuple[int, int]
    model: DetectionModel
    wrapped: nn.Module
    ema: ModelEMA
    frozen: list[nn.Module]
    criterion: Criterion
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    plan: Plan
    schedule: Schedule
    warmup: Warmup
    accumulate: int
    autocast: torch.dtype | None
    train_set: DetectionDataset
    train_loader: DetectionLoader
    val_set: DetectionDataset
    val_loader: DetectionLoader
    evaluator: CocoEvaluator
    val_criterion: Criterion
    place: Place = field(default_factory=Place)
    stop: StopRequest = field(default_factory=StopRequest)

    @property
    def last(self) -> Path:
        """The checkpoint that the run goes on from."""
        return self.folder / "weights" / "last.pt"

    @property
    def is_out_of_patience(self) -> bool:
        """Whether so many epochs were measured without a better one that the training ends early."""
        waited = self.place.epoch - 1 - self.place.improved_epoch
        return not self.options.noval and 0 < self.options.patience <= waited


def look_over(options: TrainOptions, device: torch.device) -> Report:
    """The check of the data set that a training with these flags would read, at its size and finest stride."""
    model, data, imgsz, _ = _network(options, device, None, None)
    return examine(data, imgsz, min(model.strides))


def prepare(
    options: TrainOptions,
    folder: Path,
    device: torch.device,
    world: World,
    *,
    hyp: Recipe | None = None,
    config: Mapping[str, Any] | None = None,
) -> Run:
    """Build every part of a training.

    Args:
        options: flags.
        folder: where the run writes.
        device: where the model goes.
        world: this process among all.
        hyp: recipe of a run that is resumed, as it was settled then; None reads the family's and `--hyp`.
        config: the model of a run that is resumed; None reads `--cfg` and `--weights`.

    Raises:
        ConfigError, DatasetError, CheckpointError: what a user can mend, before anything is trained.
    """
    model, data, imgsz, recipe = _network(options, device, hyp, config)
    criterion = build_criterion(model.head, recipe, imgsz, allow_code=options.allow_code)
    size = settle_batch_size(options.batch_size, model, imgsz, device, world)
    options = replace(options, batch_size=size)
    model = _share_norms(model, world) if options.sync_bn else model
    frozen = freeze(model, options.freeze) if options.freeze else []
    splits = open_splits(options, data, recipe, imgsz, model.max_stride, world)
    fit_to_objects(model, splits.train_set, imgsz, recipe, options)
    length = Length(len(splits.train_loader), options.epochs, size)
    hyp = settle(recipe, options, model, length) if hyp is None else recipe
    quicken_norms(model, hyp)
    tell_plan(plan_of(hyp, options.epochs), options.epochs)
    autocast = autocast_dtype(options.amp, device)
    ema = ModelEMA(model, hyp["ema_decay"], hyp["ema_tau"])
    return Run(
        options=options,
        folder=folder,
        world=world,
        device=device,
        hyp=hyp,
        imgsz=imgsz,
        model=model,
        wrapped=_wrap(model, device, world),
        ema=ema,
        frozen=frozen,
        criterion=criterion,
        optimizer=_optimizer(model, hyp, length, criterion.times_batch),
        scaler=torch.amp.GradScaler(device.type, enabled=autocast is torch.float16),
        plan=plan_of(hyp, options.epochs),
        schedule=schedule_of(hyp, options.epochs),
        warmup=warmup_of(hyp, length),
        accumulate=accumulated(hyp, length),
        autocast=autocast,
        **splits._asdict(),
        evaluator=evaluator_of(splits.val_set),
        val_criterion=build_criterion(ema.model.head, hyp, imgsz, allow_code=options.allow_code),
    )


class Network(NamedTuple):
    """The model on its device, the data set as it sees it, its image size (height, width) and its recipe."""

    model: DetectionModel
    data: DataConfig
    imgsz: tuple[int, int]
    hyp: Recipe


def _network(
    options: TrainOptions,
    device: torch.device,
    saved: Recipe | None,
    config: Mapping[str, Any] | None,
) -> Network:
    data = open_data(options)
    names = ("object",) if options.single_cls and len(data.names) > 1 else data.names
    model = _model(options, names, config)
    refuse_sizes(options, model)
    imgsz = parse_imgsz(options.imgsz, model.max_stride)
    model.config.pop(THRESHOLDS, None)  # they were those of the weights that it starts from
    hyp = recipe_of(options, model, saved)
    model.head.take_recipe(hyp)
    _place_on(device, model)
    return Network(model, settle_white(data, model), imgsz, hyp)


def _model(
    options: TrainOptions, names: tuple[str, ...], config: Mapping[str, Any] | None
) -> DetectionModel:
    """The model of the run that is resumed, else the one that the flags mean, with its first weights."""
    imgsz, allow_code = parse_imgsz(options.imgsz, 32, tell=False), options.allow_code
    if config is not None:
        last = str(options.resume)
        return build_to_resume(last, config, names, imgsz=imgsz, allow_code=allow_code)
    return build_to_train(
        names,
        cfg=options.cfg,
        weights=options.weights,
        backbone_weights=options.backbone_weights,
        scale=options.scale,
        backbone=options.backbone,
        imgsz=imgsz,
        allow_code=allow_code,
        end2end=options.end2end,
    )


def refuse_sizes(options: TrainOptions, model: DetectionModel) -> None:
    """Refuse flags that change the size of images for a model that takes one size alone.

    Raises:
        ConfigError: such a flag is given.
    """
    wanted = {"--rect": options.rect, "--multi-scale": options.multi_scale}
    given = [flag for flag, is_on in wanted.items() if is_on]
    if given and not model.any_size:
        bound = next((f"{row.place} {row.module}" for row in model.rows if not row.any_size), "")
        raise ConfigError(
            f"{given[0]}: {bound or 'the model'} takes images of {model.imgsz[0]}x{model.imgsz[1]} "
            "alone. Leave the flag out."
        )


def _place_on(device: torch.device, model: DetectionModel) -> None:
    """Move the model, in the memory format that suits it and the device."""
    is_possible = model.computes_channels_last
    layout = memory_format_for(model, device) if is_possible else torch.contiguous_format
    model.to(device).to(memory_format=layout)


def _share_norms(model: DetectionModel, world: World) -> DetectionModel:
    if world.is_distributed:
        return with_shared_norms(model)
    get_logger().info("--sync-bn: without effect, there is one process")
    return model


def _optimizer(
    model: DetectionModel, hyp: Recipe, length: Length, times_batch: bool
) -> torch.optim.Optimizer:
    """The recipe's; a gradient that grows with the images of a step wants a decay that does."""
    images = length.batch_size * accumulated(hyp, length)
    decay = hyp["weight_decay"] * (images / hyp["nbs"] if times_batch else 1.0)
    factors = lr_factors(model, hyp)
    return build_optimizer(
        model, hyp["optimizer"], hyp["lr0"], hyp["momentum"], decay, lr_factors=factors
    )


def _wrap(model: DetectionModel, device: torch.device, world: World) -> nn.Module:
    if not world.is_distributed:
        return model
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids)
